package blobs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

// State of a blob's life. A blob that was never pushed has no row.
type State string

const (
	// Live blobs may be referred to.
	Live State = "live"
	// Condemned blobs had no references; whoever wants one revives it.
	Condemned State = "condemned"
	// Gone blobs may be unlinked by every node; only a push brings one back.
	Gone State = "gone"
)

// BlobTable and LinkTable are the names of the tables of blobs and of links, for
// those who watch them. The last part of a key is the blob's digest in both.
const (
	BlobTable = "blob"
	LinkTable = "link"
)

// Blob is the row of a blob.
type Blob struct {
	Size int64 `cbor:"size"`
	// Root is the root of the piece tree, 32 bytes; nil until somebody who has
	// verified the digest has computed it. It never changes.
	Root  []byte `cbor:"root,omitempty"`
	State State  `cbor:"state"`
	// Copies is on how many nodes the blob was last known to be durable.
	Copies int `cbor:"copies"`
	// At is when State was last set, in Unix seconds of the node that set it.
	At int64 `cbor:"at"`
	// Lost is since when no node that was up has been known to hold the blob, in
	// Unix seconds; 0 while one is. The row stays as it is otherwise: a push of the
	// blob, or a node that comes back with it, mends everything that needs it.
	Lost int64 `cbor:"lost,omitempty"`
}

// Link is the row that lets a repository see a blob.
type Link struct {
	At int64 `cbor:"at"` // Unix seconds
}

// Place is a repository, named relative to its project.
type Place struct{ Project, Repository string }

// Ref is the row that keeps a blob: an artifact of a repository needs it.
type Ref struct{}

// What must never happen, and means a broken disk, a broken peer or a bug.
var (
	// ErrRootDiffers: two computations of one blob's piece tree disagree.
	ErrRootDiffers = errors.New("the blob's piece root differs from the one on record")
	// ErrSizeDiffers: one digest with two sizes.
	ErrSizeDiffers = errors.New("the blob's size differs from the one on record")
)

// Copies makes a push durable before it is acknowledged.
type Copies interface {
	// Ensure brings every blob to as many members as the site's policy wants and
	// that are live, and gives on how many members all of ds are durable, this
	// one included if it holds them. Fewer than wanted is no error; fault.Unavailable
	// means that no member holds one of them. A blob in a Backend, which no member's
	// loss takes with it, counts as durable on as many as are wanted. It is safe for
	// concurrent use and to be repeated.
	Ensure(ctx context.Context, ds []digest.Digest) (copies int, err error)
}

// Records are the rows of blobs: their life, the repositories that may see them
// and the artifacts that need them. Every method that takes a *table.Tx makes
// what it read a condition of that transaction.
type Records struct {
	db    *table.DB
	blobs *table.Table[Blob]
	links *table.Table[Link]
	refs  *table.Table[Ref]
}

// NewRecords defines the tables blob, link and ref in db.
func NewRecords(db *table.DB) *Records {
	return &Records{
		db: db,
		blobs: table.Define(db, BlobTable, table.Index[Blob]{Name: "copies", Version: 1, Keys: func(_ []string, b Blob) [][]string {
			if b.State != Live {
				return nil
			}
			return [][]string{{copiesKey(b.Copies)}}
		}}, table.Index[Blob]{Name: "lost", Version: 1, Keys: func(_ []string, b Blob) [][]string {
			if b.Lost == 0 || b.State == Gone {
				return nil
			}
			return [][]string{{"lost"}}
		}}),
		links: table.Define(db, LinkTable, table.Index[Link]{Name: "digest", Version: 1, Keys: func(key []string, _ Link) [][]string {
			if len(key) != 3 {
				return nil
			}
			return [][]string{{key[2]}}
		}}),
		refs: table.Define[Ref](db, "ref"),
	}
}

func copiesKey(n int) string { return fmt.Sprintf("%04d", n) }

func unknown(d digest.Digest) error {
	return fault.New(fault.NotFound, "blob %s is not known here", d).WithCode("BLOB_UNKNOWN")
}

// Get reads a blob's row, whatever its state.
func (r *Records) Get(from table.Reader, d digest.Digest) (b Blob, ok bool, err error) {
	b, _, ok, err = r.blobs.Get(from, d.String())
	return b, ok, err
}

// Live makes the row of a blob whose bytes this node holds durably, or brings it
// back from condemned or gone. A row with another size is ErrSizeDiffers.
func (r *Records) Live(tx *table.Tx, d digest.Digest, size int64) error {
	b, ok, err := r.Get(tx, d)
	switch {
	case err != nil:
		return err
	case !ok:
		return r.blobs.Put(tx, Blob{Size: size, State: Live, Copies: 1, At: time.Now().Unix()}, d.String())
	case b.Size != size:
		return fmt.Errorf("recording blob %s with %d bytes over %d: %w", d, size, b.Size, ErrSizeDiffers)
	case b.State == Gone || b.Lost != 0:
		b.Copies, b.Lost = 1, 0 // the other nodes may have unlinked theirs
	case b.State == Live:
		return nil
	}
	return r.set(tx, d, b, Live)
}

func (r *Records) set(tx *table.Tx, d digest.Digest, b Blob, state State) error {
	b.State, b.At = state, time.Now().Unix()
	return r.blobs.Put(tx, b, d.String())
}

// Guard makes the transaction depend on the blob being live and gives its row. A
// condemned blob is revived by the same transaction; one that is gone or was
// never pushed is fault.NotFound with code BLOB_UNKNOWN.
func (r *Records) Guard(tx *table.Tx, d digest.Digest) (Blob, error) {
	b, ok, err := r.Get(tx, d)
	if err != nil {
		return Blob{}, err
	}
	if !ok || b.State == Gone {
		return Blob{}, unknown(d)
	}
	if b.State != Condemned {
		return b, nil
	}
	if err := r.set(tx, d, b, Live); err != nil {
		return Blob{}, err
	}
	b.State = Live
	return b, nil
}

// Revive makes sure, before a HEAD or a GET is answered, that the blob is not
// about to go: a condemned one becomes live. It costs a transaction only then.
func (r *Records) Revive(ctx context.Context, d digest.Digest) (Blob, error) {
	var b Blob
	var ok bool
	err := r.db.View(func(v *table.View) (err error) {
		b, ok, err = r.Get(v, d)
		return err
	})
	if err != nil {
		return Blob{}, err
	}
	if ok && b.State == Live {
		return b, nil
	}
	_, err = r.db.Update(ctx, func(tx *table.Tx) (err error) {
		b, err = r.Guard(tx, d)
		return err
	})
	return b, err
}

// Add records a blob that has just been pushed into a repository: Live and Link
// in one transaction.
func (r *Records) Add(ctx context.Context, project, repository string, info Info) error {
	_, err := r.db.Update(ctx, func(tx *table.Tx) error {
		if err := r.Live(tx, info.Digest, info.Size); err != nil {
			return err
		}
		return r.Link(tx, project, repository, info.Digest)
	})
	return err
}

// Link lets a repository see a blob, which must be live (see Guard).
func (r *Records) Link(tx *table.Tx, project, repository string, d digest.Digest) error {
	if _, err := r.Guard(tx, d); err != nil {
		return err
	}
	linked, err := r.Linked(tx, project, repository, d)
	if err != nil || linked {
		return err
	}
	return r.links.Put(tx, Link{At: time.Now().Unix()}, project, repository, d.String())
}

// Linked reports whether a repository may see a blob. The blob may be condemned
// or gone: see Guard and Revive.
func (r *Records) Linked(from table.Reader, project, repository string, d digest.Digest) (bool, error) {
	_, ok, err := r.links.Meta(from, project, repository, d.String())
	return ok, err
}

// Places lists up to n repositories that link a blob. They come from a local
// index: who decides by one asks Linked of a Tx.
func (r *Records) Places(v *table.View, d digest.Digest, n int) (places []Place, err error) {
	for row, err := range r.links.Lookup(v, "digest", table.Range{Prefix: []string{d.String()}, Limit: n}) {
		if err != nil {
			return nil, err
		}
		places = append(places, Place{row.Key[0], row.Key[1]})
	}
	return places, nil
}

// LinkedIn lists up to n blobs that a place links: a project, or a project and
// a repository.
func (r *Records) LinkedIn(v *table.View, n int, place ...string) (places []Place, ds []digest.Digest, err error) {
	for row, err := range r.links.Scan(v, table.Range{Prefix: place, Limit: n}) {
		if err != nil {
			return nil, nil, err
		}
		places = append(places, Place{row.Key[0], row.Key[1]})
		ds = append(ds, digest.Digest(row.Key[2]))
	}
	return places, ds, nil
}

// Unlink takes a blob out of a repository's sight. References stay.
func (r *Records) Unlink(tx *table.Tx, project, repository string, d digest.Digest) error {
	return r.links.Delete(tx, project, repository, d.String())
}

// AddRef keeps a blob for an artifact of a repository and guards that the blob
// is live: what it refers to can never be gone.
func (r *Records) AddRef(tx *table.Tx, d digest.Digest, project, repository string, artifact digest.Digest) error {
	if _, err := r.Guard(tx, d); err != nil {
		return err
	}
	return r.refs.Put(tx, Ref{}, d.String(), project, repository, artifact.String())
}

// DropRefs ends an artifact's hold on blobs.
func (r *Records) DropRefs(tx *table.Tx, ds []digest.Digest, project, repository string, artifact digest.Digest) error {
	for _, d := range ds {
		if err := r.refs.Delete(tx, d.String(), project, repository, artifact.String()); err != nil {
			return err
		}
	}
	return nil
}

// Referred reports whether an artifact needs the blob; place narrows the
// question to a project, or to a project and a repository.
func (r *Records) Referred(from table.Reader, d digest.Digest, place ...string) (bool, error) {
	for _, err := range r.refs.Scan(from, table.Range{Prefix: append([]string{d.String()}, place...), Limit: 1}) {
		return err == nil, err
	}
	return false, nil
}

// Referrers lists up to n artifacts of a repository that need the blob.
func (r *Records) Referrers(from table.Reader, d digest.Digest, p Place, n int) (artifacts []digest.Digest, err error) {
	for row, err := range r.refs.Scan(from, table.Range{Prefix: []string{d.String(), p.Project, p.Repository}, Limit: n}) {
		if err != nil {
			return nil, err
		}
		artifacts = append(artifacts, digest.Digest(row.Key[3]))
	}
	return artifacts, nil
}

// SetRoot records the root of a blob's piece tree, computed by somebody who has
// verified the digest. It is set once: another root for the same digest is
// ErrRootDiffers and must raise an alarm.
func (r *Records) SetRoot(ctx context.Context, d digest.Digest, root []byte) error {
	if len(root) != 32 {
		return fmt.Errorf("recording the piece root of blob %s: it has %d bytes, not 32", d, len(root))
	}
	_, err := r.db.Update(ctx, func(tx *table.Tx) error {
		b, ok, err := r.Get(tx, d)
		switch {
		case err != nil:
			return err
		case !ok || b.State == Gone:
			return unknown(d)
		case bytes.Equal(b.Root, root):
			return nil
		case b.Root != nil:
			return fmt.Errorf("recording piece root %x of blob %s over %x: %w", root, d, b.Root, ErrRootDiffers)
		}
		b.Root = root
		return r.blobs.Put(tx, b, d.String())
	})
	return err
}

// SetCopies records on how many nodes a blob is durable. It writes only what
// changed, so that pushes over a common base do not contend for its rows.
func (r *Records) SetCopies(tx *table.Tx, d digest.Digest, copies int) error {
	b, ok, err := r.Get(tx, d)
	switch {
	case err != nil:
		return err
	case !ok || b.State == Gone:
		return unknown(d)
	case b.Copies == copies:
		return nil
	}
	b.Copies = copies
	return r.blobs.Put(tx, b, d.String())
}

// Scan lists up to n blobs in the order of their digests, after the one given
// ("" begins), whatever their state.
func (r *Records) Scan(v *table.View, after digest.Digest, n int) iter.Seq2[table.Row[Blob], error] {
	return r.Changed(v, 0, after, n)
}

// Changed is a Scan of the blobs whose rows were written after a revision. It
// passes the others over at a tenth of the cost.
func (r *Records) Changed(v *table.View, since uint64, after digest.Digest, n int) iter.Seq2[table.Row[Blob], error] {
	rg := table.Range{Limit: n, Since: since}
	if after != "" {
		rg.After = []string{after.String()}
	}
	return r.blobs.Scan(v, rg)
}

// Count is the number of blobs that have a row, whatever their state.
func (r *Records) Count(v *table.View) (int, error) { return r.blobs.Count(v) }

// UnderReplicated lists the live blobs that are on fewer than wanted nodes,
// those with the fewest copies first.
func (r *Records) UnderReplicated(v *table.View, wanted int) iter.Seq2[table.Row[Blob], error] {
	return func(yield func(table.Row[Blob], error) bool) {
		for copies := range wanted {
			for row, err := range r.blobs.Lookup(v, "copies", table.Range{Prefix: []string{copiesKey(copies)}}) {
				if !yield(row, err) || err != nil {
					return
				}
			}
		}
	}
}

// CountUnderReplicated counts what UnderReplicated lists.
func (r *Records) CountUnderReplicated(v *table.View, wanted int) (int, error) {
	n := 0
	for _, err := range r.UnderReplicated(v, wanted) {
		if err != nil {
			return 0, err
		}
		n++
	}
	return n, nil
}
