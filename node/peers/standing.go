package peers

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
)

// row is a blob's row with its digest and how many nodes are to hold it.
type row struct {
	digest   digest.Digest
	replicas int
	blobs.Blob
}

// standing is what is known of the copies of one blob.
type standing struct {
	row
	homes   []string
	leads   bool     // its copies are this node's to see to
	here    bool     // this node holds it
	shelved bool     // in a storage that no node's loss takes with it
	holders int      // homes that have said that they hold it, and keep it
	missing []string // homes that have said that they do not
	unsure  error    // a home that is live did not say
}

// lacks says that fewer homes are known to hold the blob than should.
func (s *standing) lacks(l layout) bool {
	return s.leads && !s.shelved && s.holders < l.wanted(s.replicas)
}

// absent says that this node should hold the blob and does not.
func (s *standing) absent(l layout) bool { return !s.here && slices.Contains(s.homes, l.self) }

// rootless says that peers could verify the blob's pieces if this node named its root.
func (s *standing) rootless(l layout, size int64) bool {
	return s.leads && s.here && !s.shelved && s.Root == nil && s.Size > size && len(l.live) > 1
}

// heldQuestion asks a node which of some blobs it holds durably.
type heldQuestion struct {
	Blobs []digest.Digest `json:"blobs"`
}

func (q heldQuestion) check() error {
	if len(q.Blobs) > blobsPerRequest {
		return fmt.Errorf("%d blobs at once, at most %d", len(q.Blobs), blobsPerRequest)
	}
	for _, d := range q.Blobs {
		if _, err := entry.ParseDigest(d.String()); err != nil {
			return fmt.Errorf("blob %q: %w", d, err)
		}
	}
	return nil
}

// heldAnswer says it of each, in the order of the question. A node that is no
// home, whatever the asker's rows say of it, keeps nothing for the site.
type heldAnswer struct {
	Home bool   `json:"home"`
	Held []bool `json:"held"`
}

// answerHeld implements heldQuestion. A node that is no home does not look: it may
// be about to let go of the very blob.
func (p *Peers) answerHeld(_ context.Context, q heldQuestion) (any, error) {
	answer := heldAnswer{Held: make([]bool, len(q.Blobs))}
	self, ok := p.find(p.Roster.Self())
	if answer.Home = ok && mayBeHome(self) && !p.Cache.On; !answer.Home {
		return answer, nil
	}
	for i, d := range q.Blobs {
		_, err := p.Store.Stat(d)
		if err != nil && !fault.Is(err, fault.NotFound) {
			return nil, err
		}
		answer.Held[i] = err == nil
	}
	return answer, nil
}

// heldWait bounds the wait for an answer that costs a node a look at its
// directories.
const heldWait = 30 * time.Second

// askHeld asks one node for up to blobsPerRequest blobs.
func (p *Peers) askHeld(ctx context.Context, id string, ds []digest.Digest) (answer heldAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, heldWait)
	defer cancel()
	err = p.whileLive(ctx, id, func(ctx context.Context) error {
		return p.call(ctx, id, "holds", heldQuestion{ds}, &answer)
	})
	if err == nil && len(answer.Held) != len(ds) {
		err = fmt.Errorf("node %s answered for %d blobs of %d", id, len(answer.Held), len(ds))
	}
	return answer, err
}

// survey finds out where the copies of up to blobsPerRequest blobs are, as far as
// that is this node's business; the others it leaves out. all makes every blob
// that it holds its business.
func (p *Peers) survey(ctx context.Context, l layout, rows []row, all bool) ([]*standing, error) {
	p.metrics.repairRows.Add(float64(len(rows)))
	var out []*standing
	asked := map[string][]*standing{}
	for _, r := range rows {
		s := &standing{row: r, homes: l.homesOf(r.digest, r.replicas)}
		s.leads = all || l.lead(r.digest, s.homes) == l.self
		if !s.leads && r.Lost == 0 && !slices.Contains(s.homes, l.self) {
			continue
		}
		_, err := p.Store.Stat(r.digest)
		switch {
		case err == nil:
			s.here = true
		case !fault.Is(err, fault.NotFound):
			return nil, err
		}
		s.shelved = s.here && p.Store.Shelved(r.digest)
		out = append(out, s)
		for _, id := range s.homes {
			switch {
			case id == l.self && s.here:
				s.holders++
			case id != l.self && l.isLive(id) && s.leads && !s.shelved:
				asked[id] = append(asked[id], s)
			}
		}
	}
	var mu sync.Mutex
	var wait sync.WaitGroup
	for id, about := range asked {
		wait.Go(func() {
			ds := make([]digest.Digest, len(about))
			for i, s := range about {
				ds[i] = s.digest
			}
			answer, err := p.askHeld(ctx, id, ds)
			mu.Lock()
			defer mu.Unlock()
			for i, s := range about {
				switch {
				case errors.Is(err, errNotUnderstood): // it sees to its own copies
				case err != nil:
					s.unsure = err
				case !answer.Home:
				case answer.Held[i]:
					s.holders++
				default:
					s.missing = append(s.missing, id)
				}
			}
		})
	}
	wait.Wait()
	return out, ctx.Err()
}

// page reads rows in the order of their digests.
func (p *Peers) page(after digest.Digest) (page []row, err error) {
	err = p.DB.View(func(v *table.View) error {
		for r, err := range p.Records.Scan(v, after, repairPage) {
			if err != nil {
				return err
			}
			d := digest.Digest(r.Key[0])
			n, err := p.replicas(v, d)
			if err != nil {
				return err
			}
			page = append(page, row{d, n, r.Value})
		}
		return nil
	})
	return page, err
}

// rowsOf reads the rows of some blobs that are in a state which keeps them.
func (p *Peers) rowsOf(ds []digest.Digest, keeps func(blobs.State) bool) (rows []row, err error) {
	err = p.DB.View(func(v *table.View) error {
		for _, d := range ds {
			b, ok, err := p.Records.Get(v, d)
			if err != nil {
				return err
			}
			if !ok || !keeps(b.State) {
				continue
			}
			n, err := p.replicas(v, d)
			if err != nil {
				return err
			}
			rows = append(rows, row{d, n, b})
		}
		return nil
	})
	return rows, err
}

// isLiveState: a condemned blob is on its way out, and whoever wants it revives it.
func isLiveState(s blobs.State) bool { return s == blobs.Live }

// notGone is what a node that goes away must not be the last to hold: a condemned
// blob may be revived.
func notGone(s blobs.State) bool { return s != blobs.Gone }

// mark stands for a digest in sets that may have a million members: 64 bits of it.
func mark(d digest.Digest) uint64 {
	var b [8]byte
	if n, err := hex.Decode(b[:], []byte(d.Encoded()[:16])); err != nil || n != len(b) {
		return 0 // no row has such a digest
	}
	return binary.BigEndian.Uint64(b[:])
}

// ledger is what this node knows of the blobs that it sees to. It is safe for
// concurrent use.
type ledger struct {
	mu       sync.Mutex
	lacking  map[uint64]struct{}
	counted  layout // for which lacking is right
	complete bool
	leaving  int  // blobs that homes do not keep yet, while this node is drained
	handing  bool // leaving has been counted
}

// begin forgets what was known, for a count of all blobs.
func (l *ledger) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lacking, l.complete = map[uint64]struct{}{}, false
}

// end says that all blobs have been counted for a layout.
func (l *ledger) end(of layout) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counted, l.complete = of, true
}

// set notes what is known of one blob.
func (l *ledger) set(d digest.Digest, lacks bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case !lacks:
		delete(l.lacking, mark(d))
	case l.lacking == nil:
		l.lacking = map[uint64]struct{}{mark(d): {}}
	default:
		l.lacking[mark(d)] = struct{}{}
	}
}

func (l *ledger) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.lacking)
}

// isComplete says that the count is right for a layout.
func (l *ledger) isComplete(of layout) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.complete && l.counted.equal(of)
}

// leave notes how many blobs are still to be handed over; known says whether that
// has been counted.
func (l *ledger) leave(n int, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leaving, l.handing = n, known
}

// left is what leave noted; -1 when it is not known.
func (l *ledger) left() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.handing {
		return -1
	}
	return l.leaving
}
