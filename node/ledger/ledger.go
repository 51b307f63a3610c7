// Package ledger keeps, beside the blobs of a node, what a rebuild needs when the
// node's metadata is gone: which repositories, artifacts and tags there are, and
// the manifests that are kept as rows and so are no blobs.
//
// Invariants:
//   - It follows the journals of the projects, which every node has, so each
//     node's ledger covers the whole site. It is written after the fact, a few
//     seconds behind, for all that came meanwhile, in pages with a breath between
//     them: no push waits for it. A node that has just joined takes a minute or two
//     for a million artifacts.
//   - What its position names is durable; what follows in the file is no part of it.
//   - It is bounded by what the site holds, not by what happened: when the file has
//     outgrown that, a new one takes its place that begins with what there is.
//   - Nothing is ever decided by it while the metadata is there.
package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
)

// Dir is the ledger's directory in a data directory.
const Dir = "ledger"

const (
	// settle is how long changes gather before they are written.
	settle = 5 * time.Second
	// stretch is how much is written before it is counted, in bytes.
	stretch = 4 << 20
	// page is how many entries are read at once, and breath how long others have the
	// processor to themselves then: what came in a burst is not to stop the rest of it.
	page   = 256
	breath = 10 * time.Millisecond
	// held is from which size on, in bytes, no more are read: manifests are with them.
	held = 1 << 20
	// roomy: a file below this size is not rewritten, in bytes.
	roomy = 64 << 20
	// farewell bounds the last look at the journals when the node stops.
	farewell = 2 * time.Second
)

// record is one line of the ledger: a change of a project, and the bytes of the
// manifest that it brought, if they are kept as a row.
type record struct {
	Project  string `cbor:"p"`
	Value    []byte `cbor:"v"` // an entry of the journal, as it was written
	Manifest []byte `cbor:"m,omitempty"`
}

// position says what of the file counts, and how far the journals are in it.
type position struct {
	Format int               `json:"format"`
	File   string            `json:"file"`
	Size   int64             `json:"size"`   // bytes of File that count
	Begun  int64             `json:"begun"`  // of them, what the file began with
	Logs   map[string]uint64 `json:"logs"`   // by name: entries that are in it
	Number int               `json:"number"` // of the file
}

const (
	positionName   = "position.json"
	positionFormat = 2
)

var errDamaged = errors.New("it is damaged")

// Config of a Ledger. All fields are needed.
type Config struct {
	Data     string // directory of the node
	DB       *table.DB
	Journal  *journal.Journal
	Projects *project.Projects
	Catalog  *catalog.Catalog
	Log      *slog.Logger
}

// Ledger is the room. Run owns its file.
type Ledger struct {
	Config
	dir   string
	roomy int64
	held  int
	hurry bool // at the end of the node, when there is no time for a breath
	at    position
	file  *os.File
}

// New makes the room.
func New(c Config) *Ledger {
	return &Ledger{Config: c, dir: filepath.Join(c.Data, Dir), roomy: roomy, held: held}
}

// Run keeps the ledger until ctx ends. A disk that fails does not end it: the
// ledger is tried again with the next change.
func (l *Ledger) Run(ctx context.Context) error {
	tables := []<-chan uint64{l.DB.Watch(ctx, "project"), l.DB.Watch(ctx, "artifact"), l.DB.Watch(ctx, "tag")}
	defer l.close()
	failing := false
	for ctx.Err() == nil {
		err := l.Catch(ctx)
		if err != nil && ctx.Err() == nil && !failing {
			l.Log.Warn("the ledger for a rebuild cannot be written; it is tried again", "error", err)
		}
		failing = err != nil
		select {
		case <-tables[0]:
		case <-tables[1]:
		case <-tables[2]:
		case <-ctx.Done():
		}
		pause(ctx, settle)
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
	defer cancel()
	l.hurry = true
	if err := l.Catch(last); err != nil {
		l.Log.Info("the ledger for a rebuild is some seconds behind", "error", err)
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func (l *Ledger) close() {
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}

// Catch brings the ledger up to the state of this node. It is for Run, and for
// who has no Run.
func (l *Ledger) Catch(ctx context.Context) error {
	err := l.catch(ctx)
	if err != nil {
		l.close() // begins again at what is durable
	}
	return err
}

func (l *Ledger) catch(ctx context.Context) error {
	if err := l.open(); err != nil {
		return err
	}
	if l.at.Size > max(l.roomy, 3*l.at.Begun) {
		if err := l.compact(ctx); err != nil {
			return err
		}
	}
	var logs []entry.LogID
	err := l.DB.View(func(v *table.View) error {
		for id, err := range l.Journal.Logs(v, entry.LogID{}) {
			if err != nil {
				return err
			}
			logs = append(logs, id)
		}
		return nil
	})
	if err != nil {
		return err
	}
	next := l.at.clone()
	w := newWriter(l.file)
	for _, id := range logs {
		if err := l.follow(ctx, id, &next, w); err != nil {
			return err
		}
	}
	return l.advance(&next, w)
}

// advance counts what was written so far: a node that is far behind, as one that
// has just joined, does not begin again when it is stopped on the way.
func (l *Ledger) advance(next *position, w *writer) error {
	if err := w.flush(); err != nil || w.size == 0 {
		return err
	}
	next.Size += w.size
	w.size = 0
	return l.keep(next.clone())
}

// keep makes what was written durable, and then counted.
func (l *Ledger) keep(next position) error {
	if err := l.file.Sync(); err != nil {
		return err
	}
	if err := atomicfile.WriteJSON(filepath.Join(l.dir, positionName), next); err != nil {
		return err
	}
	l.at = next
	return nil
}

func (p position) clone() position {
	logs := make(map[string]uint64, len(p.Logs))
	for name, n := range p.Logs {
		logs[name] = n
	}
	p.Logs = logs
	return p
}

// follow writes the entries of a log that are not in the ledger yet.
func (l *Ledger) follow(ctx context.Context, id entry.LogID, next *position, w *writer) error {
	for ctx.Err() == nil {
		var records []record
		err := l.DB.View(func(v *table.View) (err error) {
			records, err = l.page(v, id, next.Logs[id.String()])
			return err
		})
		if err != nil || len(records) == 0 {
			return err
		}
		for _, r := range records {
			if err := w.write(r); err != nil {
				return err
			}
		}
		next.Logs[id.String()] += uint64(len(records))
		if w.size >= stretch {
			if err := l.advance(next, w); err != nil {
				return err
			}
		}
		if !l.hurry {
			pause(ctx, breath)
		}
	}
	return ctx.Err()
}

// page gives some of a log's entries from a number on, as many as are held at once.
func (l *Ledger) page(v *table.View, id entry.LogID, from uint64) (records []record, err error) {
	p, ok, err := l.Projects.ByScope(v, id)
	if err != nil || !ok {
		return nil, err // a log that no project has: of an earlier life, or deleted
	}
	held := 0
	for e, err := range l.Journal.Entries(v, id, from, page) {
		if err != nil {
			return nil, err
		}
		r, err := l.record(v, p.Name, e.Value)
		if err != nil {
			return nil, err
		}
		records, held = append(records, r), held+len(r.Value)+len(r.Manifest)
		if held >= l.held {
			break
		}
	}
	return records, nil
}

func (l *Ledger) record(v *table.View, project string, value []byte) (record, error) {
	r := record{Project: project, Value: append([]byte(nil), value...)}
	// Checked it was when it came into the journal, and will be by a rebuild.
	var e struct {
		Kind   string        `cbor:"kind"`
		Digest digest.Digest `cbor:"digest"`
	}
	err := cbor.Unmarshal(value, &e)
	if err != nil || e.Kind != entry.ArtifactPut {
		return r, err
	}
	r.Manifest, err = l.Catalog.Small(v, e.Digest)
	return r, err
}

// compact begins a new file with what the projects amount to.
func (l *Ledger) compact(ctx context.Context) error {
	next := position{Format: positionFormat, Number: l.at.Number + 1, Logs: map[string]uint64{}}
	next.File = fmt.Sprintf("entries-%d", next.Number)
	file, err := os.OpenFile(filepath.Join(l.dir, next.File), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	w := newWriter(file)
	err = l.restate(ctx, &next, w)
	if err == nil {
		err = w.flush()
	}
	if err != nil {
		file.Close()
		return err
	}
	old := l.at.File
	l.close()
	l.file, next.Size, next.Begun = file, w.size, w.size
	if err := l.keep(next); err != nil {
		return err
	}
	return os.Remove(filepath.Join(l.dir, old))
}

// restate writes what there is. What changes meanwhile is in the journals behind
// the lengths that it takes first, and is written once more.
func (l *Ledger) restate(ctx context.Context, next *position, w *writer) error {
	var projects []project.Project
	states := map[string]entry.Entry{}
	err := l.DB.View(func(v *table.View) (err error) {
		if projects, err = l.Projects.All(v); err != nil {
			return err
		}
		for _, p := range projects {
			if next.Logs[p.Log.String()], err = l.Journal.Size(v, p.Log); err != nil {
				return err
			}
			if state, ok, err := l.Projects.State(v, p.Name); err != nil {
				return err
			} else if ok {
				states[p.Name] = state
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, p := range projects {
		tell := func(part []entry.Entry) error {
			for _, e := range part {
				if err := l.tell(p.Name, e, w); err != nil {
					return err
				}
			}
			return ctx.Err()
		}
		if state, ok := states[p.Name]; ok {
			if err := tell([]entry.Entry{state}); err != nil {
				return err
			}
		}
		if err := l.Catalog.Restate(p.Name, tell); err != nil {
			return err
		}
	}
	return nil
}

func (l *Ledger) tell(project string, e entry.Entry, w *writer) error {
	value, err := e.Encode()
	if err != nil {
		return err
	}
	var r record
	err = l.DB.View(func(v *table.View) (err error) {
		r, err = l.record(v, project, value)
		return err
	})
	if err != nil {
		return err
	}
	return w.write(r)
}

// open opens the file at what counts of it.
func (l *Ledger) open() error {
	if l.file != nil {
		return nil
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return err
	}
	at, err := readPosition(l.dir)
	if errors.Is(err, errDamaged) {
		l.Log.Warn("the ledger for a rebuild is damaged and written anew", "error", err)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errDamaged) {
		at = position{Format: positionFormat, File: "entries-0", Logs: map[string]uint64{}}
	} else if err != nil {
		return err
	}
	file, err := os.OpenFile(filepath.Join(l.dir, at.File), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err == nil && info.Size() < at.Size {
		// Somebody cut it: it begins anew, from the journals.
		l.Log.Warn("the ledger for a rebuild is damaged and written anew", "file", at.File)
		at.Size, at.Begun, at.Logs = 0, 0, map[string]uint64{}
		err = atomicfile.WriteJSON(filepath.Join(l.dir, positionName), at)
	}
	if err == nil {
		err = file.Truncate(at.Size)
	}
	if err == nil {
		_, err = file.Seek(at.Size, io.SeekStart)
	}
	if err != nil {
		file.Close()
		return err
	}
	l.file, l.at = file, at
	return nil
}

func readPosition(dir string) (p position, err error) {
	b, err := os.ReadFile(filepath.Join(dir, positionName))
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return p, fmt.Errorf("%s: %w: %w", positionName, errDamaged, err)
	}
	if p.Format != positionFormat || p.File != filepath.Base(p.File) || p.Size < 0 {
		return p, fmt.Errorf("%s has format %d, this version of Atoll reads %d", positionName, p.Format, positionFormat)
	}
	if p.Logs == nil {
		p.Logs = map[string]uint64{}
	}
	return p, nil
}
