package traffic

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

// Content is a blob that a client is about to be sent.
type Content struct {
	Digest     digest.Digest
	Size       int64
	Project    string
	Repository string // relative to the project
	User       string // "" for nobody in particular
	Client     string // USER@ADDRESS
}

// Answer is a blob on its way to a client: a pull like that of a node, under the
// same caps. It is for one goroutine.
type Answer struct {
	t   *Traffic
	key flowKey
	c   Content
}

// Begin waits for a place for an answer; the caller ends it. An error is ctx's.
func (t *Traffic) Begin(ctx context.Context, c Content) (*Answer, error) {
	if err := t.answering.Take(ctx); err != nil {
		return nil, err
	}
	a := &Answer{t: t, c: c, key: flowKey{blob: c.Digest, client: c.Client}}
	t.board.open(t.now(), a.key, a.facts())
	return a, nil
}

// Place waits for a place for one more blob that nobody waits for to come to this node,
// and gives the way to give it back. An error is ctx's.
func (t *Traffic) Place(ctx context.Context) (release func(), err error) {
	if err := t.fetching.Take(ctx); err != nil {
		return nil, err
	}
	return t.fetching.Give, nil
}

func (a *Answer) facts() flowFacts {
	return flowFacts{class: transfer.Pull, size: a.c.Size, repository: a.c.Project + "/" + a.c.Repository}
}

// Take asks to send n bytes. 0: they are counted as sent and may go. Else nothing is
// counted, and the same is asked again after about so long.
func (a *Answer) Take(n int) time.Duration {
	t := a.t
	if t.capped.Load() {
		wait, by, kind := t.decide(ask{client: a.c.Client, class: transfer.Pull, project: a.c.Project, user: a.c.User, n: n})
		if wait > 0 {
			t.board.held(t.now(), a.key, a.facts(), wait, by)
			t.metrics.hold(kind, transfer.Pull, wait)
			return wait
		}
	}
	t.board.moved(t.now(), a.key, a.facts(), n)
	t.metrics.count(false, transfer.Pull, "", n)
	return 0
}

// Capped says whether any cap is in force at all, so that it pays to send in small
// steps.
func (a *Answer) Capped() bool { return a.t.capped.Load() }

// End gives the place back. It may be called once.
func (a *Answer) End() {
	a.t.board.close(a.key)
	a.t.answering.Give()
}
