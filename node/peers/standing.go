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
	unsure  error    // a home that is live did not say whether it does
}

// lacks says that fewer homes are known to hold the blob than should. One that is lost is
// counted as that: there is nothing to copy.
func (s *standing) lacks(l layout) bool {
	lost := s.Lost != 0 && s.holders == 0 && !s.here
	return s.leads && !s.shelved && !lost && s.holders < l.wanted(s.replicas)
}

// absent says that this node should hold the blob and does not.
func (s *standing) absent(l layout) bool { return !s.here && slices.Contains(s.homes, l.self) }

// rootless says that peers could verify the blob's pieces if this node named its root.
func (s *standing) rootless(l layout, size int64) bool {
	return s.leads && s.here && !s.shelved && s.Root == nil && s.Size > size && len(l.live) > 1
}

// survey finds out where the copies of up to blobsAsked blobs are, as far as
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
			answer, err := p.askHave(ctx, id, ds, haveQuestion{})
			if err == nil && !answer.Home {
				// It has not read its own row yet, or is about to have another one.
				err = fmt.Errorf("node %s does not take itself for a home", id)
			}
			mu.Lock()
			defer mu.Unlock()
			for i, s := range about {
				switch {
				case errors.Is(err, errNotUnderstood): // it sees to its own copies
				case err != nil:
					s.unsure = err
				case answer.Held.has(i):
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

// Figures is what one node knows of the copies that it sees to. Every blob is seen
// to by one node that is up, so the nodes' figures add up.
type Figures struct {
	Lacking  int  `json:"lacking"`  // blobs on fewer homes than they should be
	Counting bool `json:"counting"` // Lacking is not complete yet
	Leaving  int  `json:"leaving"`  // blobs that a node which is drained must hand over; -1: not known yet
	// Cache is how many bytes a cache holds.
	Cache int64 `json:"cache"`
	// Surplus and SurplusBytes are blobs that the node holds and others are to keep.
	Surplus      int   `json:"surplus"`
	SurplusBytes int64 `json:"surplus_bytes"`
}

// figures of this node.
func (p *Peers) figures() (Figures, error) {
	l, err := p.currentLayout()
	f := Figures{Lacking: p.ledger.count(), Counting: !p.ledger.isComplete(l), Cache: p.cached.bytes()}
	f.Surplus, f.SurplusBytes = p.surplus.sum()
	if p.draining() {
		f.Leaving = p.ledger.left()
	}
	return f, err
}

type figuresQuestion struct{}

// figuresWait is how long a node is waited for.
const figuresWait = 2 * time.Second

// Figures gives those of every node that is up, by its id; a node that does not
// answer is not among them.
func (p *Peers) Figures(ctx context.Context) (map[string]Figures, error) {
	own, err := p.figures()
	if err != nil {
		return nil, fmt.Errorf("reading this node's figures: %w", err)
	}
	all := map[string]Figures{p.Roster.Self(): own}
	ctx, cancel := context.WithTimeout(ctx, figuresWait)
	defer cancel()
	type answer struct {
		id      string
		figures Figures
		err     error
	}
	others := p.others()
	answers := make(chan answer, len(others))
	for _, m := range others {
		go func() {
			a := answer{id: m.ID}
			a.err = p.call(ctx, m.ID, "figures", figuresQuestion{}, &a.figures)
			answers <- a
		}()
	}
	for range others {
		if a := <-answers; a.err != nil {
			p.Log.Debug("a node did not say what its blobs lack", "node", a.id, "err", a.err)
		} else {
			all[a.id] = a.figures
		}
	}
	return all, nil
}

// addFigures adds what the nodes know of the copies of blobs.
func (p *Peers) addFigures(ctx context.Context, out *Status) error {
	figures, err := p.Figures(ctx)
	if err != nil {
		return err
	}
	for i := range out.Nodes {
		n := &out.Nodes[i]
		f, known := figures[n.ID]
		if !known {
			f = Figures{Leaving: -1, Counting: n.Up}
		}
		out.UnderReplicated += f.Lacking
		out.Surplus += f.Surplus
		out.SurplusBytes += f.SurplusBytes
		out.Counting = out.Counting || f.Counting
		n.CacheBytes = f.Cache
		if n.Draining != nil {
			n.Leaving = f.Leaving
		}
	}
	return nil
}
