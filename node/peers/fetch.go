package peers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
)

// rootPatience bounds how long a reader waits for a holder to compute the root
// of a blob that has none; after that it gets the blob fetched whole.
const rootPatience = 5 * time.Second

// Open gives a reader of a blob that this node does not hold: the blob is
// fetched from peers, and the reader delivers verified bytes while it arrives.
// Closing the reader does not end the fetch. fault.Unavailable when no live peer
// holds the blob.
func (p *Peers) Open(ctx context.Context, d digest.Digest, size int64) (io.ReadSeekCloser, error) {
	fetch, err := p.fetch(ctx, d, size)
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

// fetch starts fetching a blob whole, or joins the fetch under way.
func (p *Peers) fetch(ctx context.Context, d digest.Digest, size int64) (*transfer.Fetch, error) {
	blob := transfer.Blob{Digest: d, Size: size}
	var err error
	if blob.Root, err = p.root(d); err != nil {
		return nil, err
	}
	if blob.Root == nil && size > transfer.PieceSize {
		blob.Root = p.askForRoot(ctx, d)
	}
	fetch, err := p.engine.Fetch(ctx, blob)
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
	for _, peer := range (candidates{p}).Candidates(ctx, d) {
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
// nearest of them first, and of equally near ones those that should hold the blob.
type candidates struct{ *Peers }

// Candidates implements transfer.Peers.
func (c candidates) Candidates(_ context.Context, d digest.Digest) []transfer.Peer {
	others, here := c.others(), c.place()
	order := placement(d, ids(others))
	suspects := map[string]int{} // 1 for those that are; asked once, so that the order is one
	for _, m := range others {
		if c.Roster.Suspect(m.ID) {
			suspects[m.ID] = 1
		}
	}
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
