package airgap

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle"
	"github.com/atoll-registry/atoll/bundle/entry"
)

// How much one call of Catalog.Apply is given, unless a single record is larger.
const (
	batchRecords = 64
	batchBytes   = 512 << 10
)

// apply makes visible what was verified: blobs first, since entries lead to
// them, then the entries of each log in order.
func (i *importer) apply(ctx context.Context) error {
	if !i.options.DryRun {
		if err := i.blobs.Commit(ctx); err != nil {
			return fmt.Errorf("commit blobs: %w", err)
		}
	}
	for _, log := range i.logs {
		if err := i.applyLog(ctx, log); err != nil {
			return err
		}
	}
	if i.options.DryRun {
		return nil
	}
	if err := i.blobs.Discard(ctx); err != nil {
		return fmt.Errorf("clear staging: %w", err)
	}
	if err := i.notes.Discard(ctx); err != nil {
		return fmt.Errorf("clear staging: %w", err)
	}
	return nil
}

func (i *importer) applyLog(ctx context.Context, log *incoming) error {
	missing := uint64(0)
	if log.wanted && log.Size > log.scope.Applied {
		missing = log.Size - log.scope.Applied
	}
	if missing > 0 && i.options.DryRun {
		i.report.Entries += int(missing)
		return nil
	}
	if missing > 0 {
		if err := i.applyEntries(ctx, log); err != nil {
			return fmt.Errorf("apply entries of project %s: %w", log.report.Local, err)
		}
	}
	// Equal logs have to mean equal states; a log of which the site has more
	// than the bundle has nothing to be compared with.
	if !log.wanted && (!log.known || log.report.Outcome != OutcomeOwn || log.scope.Applied != log.Size) {
		return nil
	}
	state, err := i.target.Catalog.StateRoot(ctx, log.LogID)
	if err != nil {
		return fmt.Errorf("state of project %s: %w", log.report.Local, err)
	}
	if have := hex.EncodeToString(state[:]); have != log.State {
		return refuse(ErrDiverged, "alarm: after %d entries project %s has the state %s here and %s at site %s. Every entry was verified and applied; one of the two sites has a defect or was changed by hand. Export it from both and report this", log.Size, log.report.Local, have, log.State, i.report.Source.Site)
	}
	log.report.StateCompared = true
	if !log.wanted || i.options.DryRun {
		return nil
	}
	err = i.target.Catalog.Finish(ctx, Finish{Log: log.LogID, Checkpoint: log.signed, KeyChain: i.b.Chain(log.Site), Serial: i.b.Keys(log.Site).Serial})
	if err != nil {
		return fmt.Errorf("keep checkpoint of project %s: %w", log.report.Local, err)
	}
	return nil
}

func (i *importer) applyEntries(ctx context.Context, log *incoming) error {
	staged, err := i.notes.Open(ctx, log.entries.Digest())
	if err != nil {
		return err
	}
	defer staged.Close()
	var batch []Record
	size := 0
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		if err := i.target.Catalog.Apply(ctx, log.scope, batch); err != nil {
			return err
		}
		i.report.Entries += len(batch)
		log.scope.Applied = batch[len(batch)-1].Seq + 1
		batch, size = nil, 0
		return nil
	}
	first := log.scope.Applied
	err = bundle.ReadEntries(staged, func(seq uint64, value []byte) error {
		if seq < first {
			return nil
		}
		record := Record{Seq: seq, Value: value}
		if record.Manifest, err = i.manifest(ctx, value); err != nil {
			return err
		}
		weight := len(record.Value) + len(record.Manifest)
		if len(batch) == batchRecords || size+weight > batchBytes {
			if err := flush(); err != nil {
				return err
			}
		}
		batch, size = append(batch, record), size+weight
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}

// manifest gives the manifest of an artifact.put, if the bundle brought it.
func (i *importer) manifest(ctx context.Context, value []byte) ([]byte, error) {
	e, err := entry.Decode(value)
	if err != nil || e.Kind != entry.ArtifactPut || !i.held[e.Digest] {
		return nil, err
	}
	return i.read(ctx, e.Digest)
}

func (i *importer) read(ctx context.Context, d digest.Digest) ([]byte, error) {
	r, err := i.notes.Open(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("open staged manifest %s: %w", d, err)
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read staged manifest %s: %w", d, err)
	}
	if d.Algorithm().FromBytes(data) != d {
		return nil, fmt.Errorf("staged manifest %s changed on disk: check the disk, then run the import again", d)
	}
	return data, nil
}
