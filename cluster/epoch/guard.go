package epoch

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
)

// Files in the data directory.
const (
	File       = "epoch.json"  // absent at a site that was never recovered
	FencedFile = "fenced.json" // of a node that has met a later epoch
)

type fileJSON struct {
	Epoch string `json:"epoch"`
}

// Fence says why a node is fenced.
type Fence struct {
	Epoch string `json:"epoch"` // the later one, as Wire
	Peer  string `json:"peer"`  // node id of who told
	At    int64  `json:"at"`    // Unix seconds
}

// ErrFenced is wrapped by all that a fenced node refuses.
var ErrFenced = errors.New("this node is fenced")

// refusal is what a fenced node says to whoever wants it to take part.
type refusal struct{ own, later Epoch }

func (r *refusal) Error() string {
	return fmt.Sprintf("%v: the site was recovered without it, in recovery epoch %s, and this node's data is of epoch %s. It serves what it holds and takes no writes. "+
		"To save what only it has: stop it, then atoll cluster salvage -o FILE. To bring it back: stop it, atoll node wipe --yes, then atoll serve --join ADDR --token TOKEN", ErrFenced, r.later, r.own)
}

func (r *refusal) Unwrap() error     { return ErrFenced }
func (r *refusal) Unavailable() bool { return true }

// Public is what a client of the node may read.
func (r *refusal) Public() string {
	return "the site was recovered without this node, which serves what it holds and takes no writes; use another node of the site"
}

// Load reads the epoch of a data directory.
func Load(dir string) (Epoch, error) {
	var stored fileJSON
	if err := atomicfile.ReadJSON(filepath.Join(dir, File), &stored); errors.Is(err, fs.ErrNotExist) {
		return Epoch{}, nil
	} else if err != nil {
		return Epoch{}, err
	}
	e, err := Parse(stored.Epoch)
	if err != nil {
		return Epoch{}, fmt.Errorf("%s: %w", filepath.Join(dir, File), err)
	}
	return e, nil
}

// Save makes e the epoch of a data directory, durably.
func Save(dir string, e Epoch) error {
	if e.Zero() {
		return nil
	}
	return atomicfile.WriteJSON(filepath.Join(dir, File), fileJSON{Epoch: e.Wire()})
}

// LoadFence reads why the node of a data directory is fenced; not ok when it is
// not.
func LoadFence(dir string) (f Fence, ok bool, err error) {
	err = atomicfile.ReadJSON(filepath.Join(dir, FencedFile), &f)
	if errors.Is(err, fs.ErrNotExist) {
		return Fence{}, false, nil
	}
	return f, err == nil, err
}

// Guard judges the peers that a node meets. It is safe for use by many
// goroutines.
type Guard struct {
	dir, site string
	log       *slog.Logger
	own       Epoch

	mu     sync.Mutex
	ca     []byte
	fence  *Fence
	fenced chan struct{}
	strays map[string]Stray
}

// Trust replaces the authorities of the site, in PEM, by whose word an epoch is
// believed.
func (g *Guard) Trust(ca []byte) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ca = ca
}

// Stray is a peer that was refused for its epoch.
type Stray struct {
	Node  string
	Epoch Epoch
	Apart bool // recovered apart from this node; else it has older data
	Seen  time.Time
}

// Open gives the guard of a data directory of a site with the authorities ca,
// in PEM. The directory's own epoch is believed: the authority that signed it may
// have been replaced since.
func Open(dir, site string, ca []byte, log *slog.Logger) (*Guard, error) {
	g := &Guard{dir: dir, site: site, ca: ca, log: log, fenced: make(chan struct{}), strays: map[string]Stray{}}
	var err error
	if g.own, err = Load(dir); err != nil {
		return nil, fmt.Errorf("reading the recovery epoch: %w", err)
	}
	f, ok, err := LoadFence(dir)
	if err != nil {
		return nil, fmt.Errorf("reading why this node is fenced: %w", err)
	}
	if ok {
		g.fence = &f
		close(g.fenced)
	}
	return g, nil
}

// Epoch is this node's.
func (g *Guard) Epoch() Epoch {
	if g == nil {
		return Epoch{}
	}
	return g.own
}

// Wire is what this node tells its peers.
func (g *Guard) Wire() string { return g.Epoch().Wire() }

// Fenced is closed when the node is fenced.
func (g *Guard) Fenced() <-chan struct{} {
	if g == nil {
		return nil
	}
	return g.fenced
}

// Err says why the node must take no part; nil while it may. It wraps ErrFenced.
func (g *Guard) Err() error {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.fence == nil {
		return nil // not a *refusal that is nil
	}
	later, _ := Parse(g.fence.Epoch) // Meet has read it
	return &refusal{own: g.own, later: later}
}

// Meet judges a peer by what it tells of its epoch. An error refuses the
// connection, on both sides.
func (g *Guard) Meet(peer, wire string) error {
	if g == nil || wire == g.own.Wire() {
		return nil
	}
	g.mu.Lock()
	ca := g.ca
	g.mu.Unlock()
	theirs, err := Parse(wire)
	if err == nil {
		err = theirs.Verify(g.site, ca)
	}
	if err != nil {
		return fmt.Errorf("node %s: %w", peer, err)
	}
	switch g.own.Compare(theirs) {
	case Newer:
		if err := g.close(peer, theirs); err != nil {
			return err
		}
		return g.Err()
	case Older:
		g.saw(Stray{Node: peer, Epoch: theirs, Seen: time.Now()})
		return fmt.Errorf("node %s has data from before this site was recovered: its recovery epoch is %s, the site's is %s. It is refused until it was wiped (atoll node wipe) and joined anew", peer, theirs, g.own)
	case Apart:
		g.saw(Stray{Node: peer, Epoch: theirs, Apart: true, Seen: time.Now()})
		return fmt.Errorf("node %s was recovered apart from this one: its recovery epoch is %s, this node's is %s. Decide which of the two goes on, then wipe the other (atoll node wipe) and join it anew", peer, theirs, g.own)
	}
	return nil // Same, signed another time
}

// close fences the node, on its disk first: it must not come back as a voter.
func (g *Guard) close(peer string, later Epoch) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.fence != nil {
		return nil
	}
	f := Fence{Epoch: later.Wire(), Peer: peer, At: time.Now().Unix()}
	err := atomicfile.WriteJSON(filepath.Join(g.dir, FencedFile), f)
	g.fence = &f
	close(g.fenced)
	if err != nil {
		return fmt.Errorf("noting that this node is fenced: %w", err)
	}
	return nil
}

func (g *Guard) saw(s Stray) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, known := g.strays[s.Node]; !known {
		g.log.Warn("a node is refused: its data is of another recovery epoch", "node", s.Node, "its_epoch", s.Epoch.String(), "epoch", g.own.String())
	}
	if len(g.strays) < 64 {
		g.strays[s.Node] = s
	}
}

// Strays are the peers that were refused for their epoch since this node
// started, and when last, by node id.
func (g *Guard) Strays() []Stray {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []Stray
	for _, s := range g.strays {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b Stray) int { return strings.Compare(a.Node, b.Node) })
	return all
}
