package peers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/swarm"
)

// rootPatience bounds how long a reader waits for a holder to compute the root
// of a blob that has none; after that it gets the blob fetched whole.
const rootPatience = 5 * time.Second

// Open gives a reader of a blob that this node does not hold: the blob is
// fetched from peers, and the reader delivers verified bytes while it arrives.
// Closing the reader does not end the fetch. fault.Unavailable when no live peer
// holds the blob.
func (p *Peers) Open(ctx context.Context, d digest.Digest, size int64) (io.ReadSeekCloser, error) {
	return p.OpenAt(ctx, d, size, 0)
}

// OpenAt is Open for who is about to read from a byte on: that comes first.
func (p *Peers) OpenAt(ctx context.Context, d digest.Digest, size, from int64) (io.ReadSeekCloser, error) {
	fetch, err := p.fetch(ctx, d, size, from)
	if err != nil {
		return nil, err
	}
	// Whoever promises the blob to a client must know that somebody has it.
	if err := fetch.Ready(ctx); err != nil {
		return nil, noHolder(err, d)
	}
	return fetch.Reader(ctx), nil
}

// noHolder says in a user's words that nobody who is up has a blob.
func noHolder(err error, d digest.Digest) error {
	if errors.Is(err, transfer.ErrNoHolder) {
		return fault.Wrap(err, fault.Unavailable, "no node that is up holds %s; try again when more nodes of the site are back", d)
	}
	return fmt.Errorf("fetch %s from peers: %w", d, err)
}

// fetch starts fetching a blob whole for a reader, or joins the fetch under way.
func (p *Peers) fetch(ctx context.Context, d digest.Digest, size, from int64) (*transfer.Fetch, error) {
	blob := transfer.Blob{Digest: d, Size: size}
	var err error
	if blob.Root, err = p.root(d); err != nil {
		return nil, err
	}
	if blob.Root == nil && size > transfer.PieceSize {
		blob.Root = p.askForRoot(ctx, d)
	}
	way, err := p.engineFor(d, transfer.Pull)
	if err != nil {
		return nil, err
	}
	fetch, err := p.engine.Fetch(ctx, blob, transfer.Via(way), transfer.ReadFrom(from))
	if err != nil {
		return nil, noHolder(err, d)
	}
	return fetch, nil
}

// root reads a blob's piece root from its row; nil when it has none yet.
func (p *Peers) root(d digest.Digest) (root []byte, err error) {
	err = p.DB.View(func(v *table.View) error {
		row, ok, err := p.Records.Get(v, d)
		if ok {
			root = row.Root
		}
		return err
	})
	return root, err
}

// askForRoot has a holder compute and commit the blob's root, and gives it once
// this node has applied it. nil when none does so in time: without a trusted root
// the blob is fetched whole and verified before it is served.
func (p *Peers) askForRoot(ctx context.Context, d digest.Digest) []byte {
	ctx, cancel := context.WithTimeout(ctx, rootPatience)
	defer cancel()
	for _, peer := range (candidates{p}).ordered(d, nil) { // one after the other: none that may be down
		var answer rootAnswer
		if err := p.call(ctx, peer.ID, "root", rootRequest{Digest: d}, &answer); err != nil {
			p.Log.Debug("asked for a piece root", "blob", d, "node", peer.ID, "err", err)
			continue
		}
		if err := p.DB.WaitApplied(ctx, answer.Revision); err != nil {
			return nil
		}
		root, err := p.root(d)
		if err != nil {
			return nil
		}
		return root
	}
	return nil
}

// source is what this node offers to its peers.
type source struct{ *Peers }

// content gives a blob's file the length that transfer asks for, and notes when
// the disk cannot read it.
type content struct {
	blobs.File
	size       int64
	unreadable func(error)
}

func (c content) Size() int64 { return c.size }

func (c content) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.File.ReadAt(p, off)
	if blobs.Unreadable(err) {
		c.unreadable(err)
	}
	return n, err
}

// Open implements transfer.Source.
func (s source) Open(_ context.Context, d digest.Digest) (transfer.Content, error) {
	file, size, err := s.Store.OpenBlob(d)
	if fault.Is(err, fault.NotFound) {
		return nil, transfer.ErrNotHeld
	}
	if err != nil {
		return nil, err
	}
	return content{file, size, func(cause error) {
		if s.unreadable != nil {
			s.unreadable(d, file, cause)
		}
	}}, nil
}

// Pieces implements transfer.Source.
func (s source) Pieces(ctx context.Context, d digest.Digest) (transfer.PieceTable, error) {
	return s.tables.table(ctx, d)
}

// candidates are the live peers: those that answer before those that are suspect, the
// nearest of them first, and of equally near ones those that should hold the blob. While
// there are none, those of which nothing has been heard yet.
type candidates struct{ *Peers }

// unheard is for how long a peer is asked that gives no sign of life. Who has just
// started has heard of nobody yet, and must not say that nobody holds a blob.
const unheard = 3 * time.Second

// Candidates implements transfer.Peers.
func (c candidates) Candidates(_ context.Context, d digest.Digest) []transfer.Peer {
	if len(c.others()) > 0 {
		return c.ordered(d, nil)
	}
	return c.ordered(d, c.silent())
}

func (c candidates) ordered(d digest.Digest, silent []member.Member) []transfer.Peer {
	others, here := c.others(), c.place()
	suspects := map[string]int{} // 1 for those that are; asked once, so that the order is one
	for _, m := range others {
		if c.Roster.Suspect(m.ID) {
			suspects[m.ID] = 1
		}
	}
	for _, m := range silent {
		if !slices.ContainsFunc(others, func(o member.Member) bool { return o.ID == m.ID }) { // else it was heard of meanwhile
			others = append(others, m)
		}
	}
	order := placement(d, ids(others))
	slices.SortFunc(others, func(a, b member.Member) int {
		return cmp.Or(
			suspects[a.ID]-suspects[b.ID],
			cmp.Compare(here.distance(placeOf(a)), here.distance(placeOf(b))),
			cmp.Compare(slices.Index(order, a.ID), slices.Index(order, b.ID)),
		)
	})
	out := make([]transfer.Peer, len(others))
	for i, m := range others {
		out[i] = transfer.Peer{ID: m.ID, Addr: m.Addr}
	}
	return out
}

// silent are the members that are not live and may be all the same: they went, or came to
// be known of, just now.
func (p *Peers) silent() (out []member.Member) {
	live := p.Roster.Live()
	err := p.DB.View(func(v *table.View) error {
		members, err := p.Roster.Members(v)
		for _, m := range members {
			isLive := slices.ContainsFunc(live, func(o member.Member) bool { return o.ID == m.ID })
			if since, down := p.Roster.DownSince(m.ID); !isLive && (!down || time.Since(since) < unheard) {
				out = append(out, m)
			}
		}
		return err
	})
	if err != nil {
		p.Log.Debug("reading the members", "err", err)
	}
	return out
}

// distance of a peer, for the engine.
func (p *Peers) distance(to transfer.Peer) int {
	m, _ := p.find(to.ID)
	return p.place().distance(placeOf(m))
}

// place is where this node stands.
func (p *Peers) place() place {
	m, _ := p.find(p.Roster.Self())
	return placeOf(m)
}

// sink is where blobs from peers are written.
type sink struct{ store *blobs.Store }

// partial gives a store's partial blob the words of transfer.
type partial struct{ *blobs.Partial }

// Create implements transfer.Sink.
func (s sink) Create(ctx context.Context, blob transfer.Blob) (transfer.Partial, error) {
	p, err := s.store.NewPartial(ctx, blob.Digest, blob.Size)
	if err != nil {
		return nil, err
	}
	return partial{p}, nil
}

// Commit implements transfer.Partial.
func (p partial) Commit(ctx context.Context) error {
	_, err := p.Partial.Commit(ctx)
	if code, _, _ := fault.Public(err); err != nil && code == "DIGEST_INVALID" {
		return fmt.Errorf("%w: %w", transfer.ErrDigest, err)
	}
	return err
}

// Engine is how a blob moves between nodes, as the setting peers.transfer-engine says.
type Engine string

const (
	EngineAuto       Engine = "auto"
	EngineStream     Engine = "stream"
	EngineBitTorrent Engine = "bittorrent"
)

// way is the engine in transfer's words. Left to Atoll it is the stream engine, for what
// transfer/DESIGN.md has measured.
func (e Engine) way() transfer.Way {
	if e == EngineBitTorrent {
		return transfer.ByBitTorrent
	}
	return transfer.ByStream
}

// Engines says by which engine blobs move: by that of the first rule that holds, and by
// EngineAuto when none does.
type Engines []engineRule

// engineRule holds for what is moved for a class and is in a project's sight.
type engineRule struct {
	project string          // "": whatever sees it
	class   *transfer.Class // nil: whatever it is for
	engine  Engine
}

// parseEngines reads "project=NAME: ENGINE | class=NAME: ENGINE | ENGINE".
func parseEngines(text string) (rules Engines, err error) {
	items := strings.Split(text, "|")
	if len(items) > maxEngineRules {
		return nil, fmt.Errorf("there are more than %d rules", maxEngineRules)
	}
	for i, item := range items {
		var r engineRule
		what, engine, conditional := strings.Cut(item, ":")
		switch {
		case conditional:
			if err := r.when(what); err != nil {
				return nil, err
			}
		case i < len(items)-1:
			return nil, fmt.Errorf("%.80q has no condition, so nothing that follows it would ever count; write it last", strings.TrimSpace(item))
		default:
			engine = what
		}
		switch r.engine = Engine(strings.TrimSpace(engine)); r.engine {
		case EngineAuto, EngineStream, EngineBitTorrent:
		default:
			return nil, fmt.Errorf("%.80q is no engine; one of %s, %s and %s is wanted", r.engine, EngineAuto, EngineStream, EngineBitTorrent)
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// maxEngineRules bounds what is looked through for each fetch.
const maxEngineRules = 64

// when reads the conditions of a rule, one of each kind at most.
func (r *engineRule) when(text string) error {
	for condition := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(condition, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		switch {
		case key == "project" && value != "" && r.project == "":
			r.project = value
		case key == "class" && r.class == nil:
			for c := range transfer.Class(transfer.Classes) {
				if c.String() == value {
					r.class = &c
				}
			}
			if r.class == nil {
				return fmt.Errorf("%.80q is no class; pull, replication, repair and prefetch are", value)
			}
		default:
			return fmt.Errorf("%.80q is no condition; write project=NAME or class=NAME, or one of each with a comma", strings.TrimSpace(condition))
		}
	}
	return nil
}

// engineFor is how a blob is to move to whoever fetches it for a class.
func (p *Peers) engineFor(d digest.Digest, class transfer.Class) (transfer.Way, error) {
	if p.Policy.Engines == nil {
		return EngineAuto.way(), nil
	}
	var places []blobs.Place
	looked := false
	for _, r := range p.Policy.Engines() {
		if r.class != nil && *r.class != class {
			continue
		}
		if r.project != "" && !looked {
			looked = true
			err := p.DB.View(func(v *table.View) (err error) {
				places, err = p.Records.Places(v, d, placesAsked)
				return err
			})
			if err != nil {
				return "", err
			}
		}
		if r.project == "" || slices.ContainsFunc(places, func(at blobs.Place) bool { return at.Project == r.project }) {
			return r.engine.way(), nil
		}
	}
	return EngineAuto.way(), nil
}

// makeEngines makes the mover of blobs and its carriers. Every node serves whichever
// way a peer has chosen; which one it chooses itself is asked for each fetch.
func (p *Peers) makeEngines() (err error) {
	hooks := transfer.Hooks{
		Moved:  func(_ string, n int64) { p.metrics.received.Add(float64(n)) },
		Served: func(_ string, n int64) { p.metrics.served.Add(float64(n)) },
		Dropped: func(_ string, _ digest.Digest, why transfer.Reason) {
			p.metrics.dropped.WithLabelValues(string(why)).Inc()
		},
	}
	var byStream, bySwarm transfer.Limits
	if p.Limits != nil {
		byStream, bySwarm = p.Limits()
	}
	p.swarm, err = swarm.New(swarm.Config{
		Node: p.Roster.Self(), Source: source{p}, Peers: candidates{p}, Distance: p.distance, Log: p.Log, Hooks: hooks,
		Limiter: p.Limiter, Incoming: p.Incoming, Meter: p.Meter, Limits: bySwarm,
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return p.dialBlobs(ctx, addr, peernet.ServiceSwarm)
		},
		Lacks:    func(err error) bool { return errors.Is(err, peernet.ErrNoService) },
		Arriving: func(d digest.Digest) (*transfer.Arrival, bool) { return p.engine.Arriving(d) },
	})
	if err != nil {
		return err
	}
	p.engine, err = stream.New(stream.Config{
		Source: source{p}, Sink: sink{p.Store}, Peers: candidates{p}, Self: p.Roster.Self(), Distance: p.distance, Log: p.Log, Hooks: hooks,
		Limiter: p.Limiter, Incoming: p.Incoming, Meter: p.Meter, Limits: byStream,
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return p.dialBlobs(ctx, addr, peernet.ServiceBlob)
		},
		Carrier: p.carrier,
	})
	return err
}

func parseTransport(text string) (peernet.Transport, error) {
	t, err := peernet.ParseTransport(text)
	if err == nil && text == "" {
		err = fmt.Errorf("one of %s, %s and %s is wanted", peernet.Auto, peernet.OnlyTCP, peernet.OnlyQUIC)
	}
	return t, err
}

// dialBlobs connects to a node for blobs, by the carrier that the site's setting says.
func (p *Peers) dialBlobs(ctx context.Context, addr string, service byte) (net.Conn, error) {
	by := peernet.Auto
	if p.Over != nil && p.Policy.Transport != nil {
		by = p.Policy.Transport()
	}
	if by == peernet.Auto {
		return p.Network.Dial(ctx, addr, service)
	}
	conn, err := p.Over(ctx, addr, service, peernet.Carrier(by))
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w (by %s alone, as the setting peers.transport says; auto takes what gets through)", err, by)
	}
	return conn, err
}

// carrier is what moves a blob in the way that its fetch asks for; nil: the mover itself.
func (p *Peers) carrier(_ transfer.Blob, way transfer.Way) transfer.Carrier {
	if way == transfer.ByBitTorrent {
		return p.swarm
	}
	return nil
}

// runEngines moves and serves blobs until ctx ends. The carriers end after the mover,
// whose fetches use them.
func (p *Peers) runEngines(ctx context.Context) error {
	carrying, stop := context.WithCancel(context.WithoutCancel(ctx))
	var carriers sync.WaitGroup
	defer carriers.Wait()
	defer stop()
	ln := p.Network.Listen(peernet.ServiceSwarm)
	defer ln.Close()
	carriers.Go(func() { _ = p.swarm.Run(carrying) }) // never fails
	carriers.Go(func() {
		if err := p.swarm.Serve(ln); !errors.Is(err, net.ErrClosed) {
			p.Log.Error("blobs are not served by BitTorrent any more", "err", err)
		}
	})
	return p.engine.Run(ctx)
}
