package blobs

import (
	"context"
	"iter"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

// linksPerTxn bounds the link rows that one transaction deletes.
const linksPerTxn = 1000

// Condemn begins the end of a blob that nothing refers to: its row becomes
// condemned under the condition that there is still no reference. A blob that is
// referred to is fault.Precondition; one that is condemned already stays as it
// is, time included. A push that races with it wins or revives the blob.
func (r *Records) Condemn(ctx context.Context, d digest.Digest) error {
	_, err := r.db.Update(ctx, func(tx *table.Tx) error {
		b, ok, err := r.Get(tx, d)
		switch {
		case err != nil:
			return err
		case !ok || b.State == Gone:
			return unknown(d)
		case b.State == Condemned:
			return nil
		}
		if err := r.unreferred(tx, d); err != nil {
			return err
		}
		return r.set(tx, d, b, Condemned)
	})
	return err
}

// Gone ends a blob that was condemned before the given time and that nothing
// refers to, and takes its links away; from then on nodes may unlink their
// copies (Store.RemoveIf with Unlinkable). A blob that has been revived or is
// referred to is fault.Precondition.
func (r *Records) Gone(ctx context.Context, d digest.Digest, before time.Time) error {
	for {
		repositories, revision, err := r.linkedFrom(d)
		if err != nil {
			return err
		}
		more := len(repositories) > linksPerTxn
		if more {
			repositories = repositories[:linksPerTxn]
		}
		already := false
		_, err = r.db.Update(ctx, func(tx *table.Tx) error {
			b, meta, ok, err := r.blobs.Get(tx, d.String())
			switch {
			case err != nil:
				return err
			case !ok:
				return unknown(d)
			case b.State == Gone:
				already = true
			case b.State != Condemned || b.At > before.Unix():
				return fault.New(fault.Precondition, "blob %s is %s since %s, not condemned before %s", d, b.State,
					time.Unix(b.At, 0).UTC().Format(time.RFC3339), before.UTC().Format(time.RFC3339))
			case meta.Revision != revision:
				// The links were read from an older life of the row.
				return fault.New(fault.Conflict, "blob %s changed while it was collected; try again later", d)
			default:
				if err := r.unreferred(tx, d); err != nil {
					return err
				}
				if err := r.set(tx, d, b, Gone); err != nil {
					return err
				}
			}
			for _, key := range repositories {
				if err := r.links.Delete(tx, key...); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil || !more && !already || len(repositories) == 0 {
			return err
		}
	}
}

// linkedFrom finds the link rows of a blob, and the revision of the blob's row
// in the same state. The links come from a local index, yet none is missed: a
// new link needs a live row, so all links of a condemned row are older than it.
func (r *Records) linkedFrom(d digest.Digest) (keys [][]string, revision uint64, err error) {
	err = r.db.View(func(v *table.View) error {
		_, meta, _, err := r.blobs.Get(v, d.String())
		if err != nil {
			return err
		}
		revision = meta.Revision
		for row, err := range r.links.Lookup(v, "digest", table.Range{Prefix: []string{d.String()}, Limit: linksPerTxn + 1}) {
			if err != nil {
				return err
			}
			keys = append(keys, row.Key)
		}
		return nil
	})
	return keys, revision, err
}

func (r *Records) unreferred(tx *table.Tx, d digest.Digest) error {
	referred, err := r.Referred(tx, d)
	if err == nil && referred {
		return fault.New(fault.Precondition, "blob %s is referred to", d)
	}
	return err
}

// Unlinkable is nil when a node may unlink its copy of the blob: the row is gone
// in a state that a read index has confirmed. It is the question for
// Store.RemoveIf, which asks it under the blob's lock.
func (r *Records) Unlinkable(ctx context.Context, d digest.Digest) error {
	var b Blob
	var ok bool
	fresh, err := r.db.Confirmed(ctx, func(v *table.View) (err error) {
		b, ok, err = r.Get(v, d)
		return err
	})
	switch {
	case err != nil:
		return err
	case fresh.Stale:
		return fault.New(fault.Unavailable, "blob %s stays: no leader confirms that it is gone", d)
	case !ok || b.State != Gone:
		return fault.New(fault.Precondition, "blob %s stays: it is not gone", d)
	}
	return nil
}

// MarkLost records that no node which is up holds the blob. One that is marked,
// gone or unknown stays as it is.
func (r *Records) MarkLost(ctx context.Context, d digest.Digest) error {
	_, err := r.db.Update(ctx, func(tx *table.Tx) error {
		b, ok, err := r.Get(tx, d)
		if err != nil || !ok || b.State == Gone || b.Lost != 0 {
			return err
		}
		b.Lost, b.Copies = time.Now().Unix(), 0
		return r.blobs.Put(tx, b, d.String())
	})
	return err
}

// Found takes the mark of MarkLost away again; the caller's node holds the blob.
func (r *Records) Found(ctx context.Context, d digest.Digest) error {
	_, err := r.db.Update(ctx, func(tx *table.Tx) error {
		b, ok, err := r.Get(tx, d)
		if err != nil || !ok || b.Lost == 0 {
			return err
		}
		b.Lost, b.Copies = 0, max(b.Copies, 1)
		return r.blobs.Put(tx, b, d.String())
	})
	return err
}

// LostBlobs lists blobs that are marked lost, in the order of their digests.
func (r *Records) LostBlobs(v *table.View) iter.Seq2[table.Row[Blob], error] {
	return r.blobs.Lookup(v, "lost", table.Range{Prefix: []string{"lost"}})
}

// CountLost counts what LostBlobs lists.
func (r *Records) CountLost(v *table.View) (int, error) {
	n := 0
	for _, err := range r.LostBlobs(v) {
		if err != nil {
			return 0, err
		}
		n++
	}
	return n, nil
}
