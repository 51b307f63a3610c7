package offline

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
)

// target is what an import changes: it implements airgap.Catalog.
type target struct{ *Offline }

// Scope implements airgap.Catalog.
func (t target) Scope(ctx context.Context, log entry.LogID) (scope airgap.Scope, ok bool, err error) {
	_, err = t.DB.Confirmed(ctx, func(v *table.View) error {
		p, known, err := t.Projects.ByScope(v, log)
		if err != nil || !known {
			return err
		}
		size, err := t.Journal.Size(v, log)
		scope, ok = airgap.Scope{Log: log, Project: p.Name, Applied: size}, true
		return err
	})
	return scope, ok, err
}

// Holder implements airgap.Catalog.
func (t target) Holder(ctx context.Context, name string) (log entry.LogID, ok bool, err error) {
	_, err = t.DB.Confirmed(ctx, func(v *table.View) error {
		p, known, err := t.Projects.Get(v, name)
		log, ok = p.Log, known
		return err
	})
	return log, ok, err
}

// Root implements airgap.Catalog.
func (t target) Root(_ context.Context, log entry.LogID, size uint64) (root tlog.Hash, err error) {
	err = t.DB.View(func(v *table.View) error {
		root, err = t.Journal.RootAt(v, log, size)
		return err
	})
	return root, err
}

// Apply implements airgap.Catalog.
func (t target) Apply(ctx context.Context, scope airgap.Scope, records []airgap.Record) error {
	if err := t.ensureMirror(ctx, scope); err != nil {
		return err
	}
	entries := make([]catalog.SeqEntry, len(records))
	for i, r := range records {
		entries[i] = catalog.SeqEntry{Seq: r.Seq, Value: r.Value, ManifestBytes: r.Manifest}
	}
	return t.Catalog.ApplyEntries(ctx, scope.Project, scope.Log, entries)
}

func (t target) ensureMirror(ctx context.Context, scope airgap.Scope) error {
	_, err := t.DB.Update(ctx, func(tx *table.Tx) error {
		known, err := t.Journal.Known(tx, scope.Log)
		if err != nil || known {
			return err
		}
		if err := t.Journal.Follow(tx, scope.Log); err != nil {
			return err
		}
		return t.Projects.CreateMirror(tx, scope.Project, scope.Log, access.From(ctx).Name)
	})
	return err
}

// StateRoot implements airgap.Catalog.
func (t target) StateRoot(ctx context.Context, log entry.LogID) (root [32]byte, err error) {
	err = t.DB.View(func(v *table.View) error {
		p, ok, err := t.Projects.ByScope(v, log)
		if err != nil || !ok {
			return errors.Join(err, fault.New(fault.NotFound, "log %s is not followed here", log))
		}
		root, err = entry.StateRoot(t.Catalog.Materialise(v, p.Name))
		return err
	})
	return root, err
}

// Finish implements airgap.Catalog.
func (t target) Finish(ctx context.Context, f airgap.Finish) error {
	if err := t.Journal.KeepCheckpoint(ctx, f.Checkpoint); err != nil {
		return err
	}
	_, err := t.DB.Update(ctx, func(tx *table.Tx) error {
		return t.Trusts.Saw(tx, f.Log.Site, f.Serial, f.KeyChain)
	})
	return err
}

// storage is where an import puts blobs: it implements airgap.Blobs.
type storage struct{ *Offline }

// Has implements airgap.Blobs: whether a node of the site holds the blob, or a
// row the manifest.
func (s storage) Has(ctx context.Context, d digest.Digest) (bool, error) {
	_, err := export(s).Size(ctx, d)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Open implements airgap.Blobs.
func (s storage) Open(ctx context.Context, d digest.Digest) (io.ReadCloser, error) {
	return export(s).Open(ctx, d)
}

// Free implements airgap.Blobs.
func (s storage) Free(context.Context) (int64, error) {
	free, _, err := s.Store.Free()
	return max(0, free-s.MinFree()), err
}

// Stage implements airgap.Blobs.
func (s storage) Stage(_ context.Context, name string) (airgap.Staging, error) {
	area, err := s.Store.Staging(name)
	return &staging{Offline: s.Offline, area: area}, err
}

// staging gives a staging area of the store the words of airgap.
type staging struct {
	*Offline
	area *blobs.Staging

	mu    sync.Mutex
	moved []digest.Digest // out of the area, by a commit that was cut short
}

// Has implements airgap.Staging. Files that an earlier commit moved among the
// blobs, but for which it made no rows any more, count as staged.
func (s *staging) Has(_ context.Context, d digest.Digest) (bool, error) {
	if ok, err := s.area.Has(d); ok || err != nil {
		return ok, err
	}
	if _, err := s.Store.Stat(d); err != nil {
		if fault.Is(err, fault.NotFound) {
			err = nil
		}
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moved = append(s.moved, d)
	return true, nil
}

// Put implements airgap.Staging.
func (s *staging) Put(ctx context.Context, b airgap.Blob, r io.Reader) error {
	return s.area.Put(ctx, b.Digest, b.Size, r)
}

// Open implements airgap.Staging.
func (s *staging) Open(_ context.Context, d digest.Digest) (io.ReadCloser, error) {
	file, _, err := s.area.Open(d)
	if fault.Is(err, fault.NotFound) { // see Has
		file, _, err = s.Store.OpenBlob(d)
	}
	return file, err
}

// rowsPerTxn bounds the blob rows that one Txn makes.
const rowsPerTxn = 256

// Commit implements airgap.Staging: the blobs are held on as many nodes as a push
// would wait for, and then their rows say so.
func (s *staging) Commit(ctx context.Context) error {
	staged, err := s.area.List()
	if err != nil {
		return err
	}
	s.mu.Lock()
	staged = append(staged, s.moved...)
	s.mu.Unlock()
	for _, d := range staged { // no collection between the file and its row
		defer s.Store.Pin(d)()
	}
	if err := s.area.Commit(ctx); err != nil {
		return err
	}
	copies, err := s.Copies.Ensure(ctx, staged)
	if err != nil {
		return err
	}
	for part := range slices.Chunk(staged, rowsPerTxn) {
		if _, err := s.DB.Update(ctx, func(tx *table.Tx) error { return s.alive(tx, part, copies) }); err != nil {
			return err
		}
	}
	return nil
}

// alive makes the rows of blobs that this node holds.
func (s *staging) alive(tx *table.Tx, ds []digest.Digest, copies int) error {
	for _, d := range ds {
		info, err := s.Store.Stat(d)
		if err != nil {
			return err
		}
		if err := s.Records.Live(tx, d, info.Size); err != nil {
			return err
		}
		if err := s.Records.SetCopies(tx, d, copies); err != nil {
			return err
		}
	}
	return nil
}

// Discard implements airgap.Staging.
func (s *staging) Discard(context.Context) error { return s.area.Discard() }
