package peers

import (
	"context"
	"sync"
	"time"
)

// tellWait is how long Tell waits at most for a node that hangs and is still live.
const tellWait = 10 * time.Second

// reachedRequest asks a node to answer once its state has a revision.
type reachedRequest struct {
	Revision uint64 `json:"revision"`
}

func (p *Peers) reached(ctx context.Context, q reachedRequest) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, tellWait)
	defer cancel()
	return nil, p.DB.WaitApplied(ctx, q.Revision)
}

// Tell returns when each node that is live knows of a revision, so that what it
// took away is not to be seen on any of them. A node that stops being live is not
// waited for.
func (p *Peers) Tell(ctx context.Context, revision uint64) {
	ctx, cancel := context.WithTimeout(ctx, tellWait)
	defer cancel()
	var wait sync.WaitGroup
	for _, m := range p.others() {
		wait.Go(func() {
			err := p.whileLive(ctx, m.ID, func(ctx context.Context) error {
				return p.call(ctx, m.ID, "reached", reachedRequest{revision}, nil)
			})
			if err != nil {
				p.Log.Debug("a node does not say that it knows of a deletion", "node", m.ID, "revision", revision, "err", err)
			}
		})
	}
	wait.Wait()
}
