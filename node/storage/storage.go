// Package storage decides where this node's committed blobs are: on its disk or
// in an object store, and on the way from one to the other.
//
// Invariants:
//   - What the node last wrote to is written down in its data directory before
//     the first blob goes there, so that no start forgets where blobs are.
//   - A move loses nothing at any moment: a blob leaves its old place only once
//     the new one holds it in full, and both are read until all have moved.
//   - The secrets of an object store are in that file (readable by the node's
//     user) and in no log, answer or error.
package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path/filepath"
	"sync"

	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/cloud"
	"github.com/atoll-registry/atoll/node/fault"
)

// Local is the kind of storage that is the node's own disk.
const Local = "local"

// FileName is the file in the data directory that says where blobs are.
const FileName = "storage.json"

// Choice names a storage. The parameters are those of distribution's storage
// drivers; Local has none.
type Choice struct {
	Kind       string         `json:"kind"`
	Parameters map[string]any `json:"parameters,omitempty"`
}

// Check tells before a node is made whether the choice could be one: fault.Invalid
// says what is wrong with it.
func (c Choice) Check() error {
	switch {
	case c.Kind == "" && len(c.Parameters) > 0:
		return fault.New(fault.Invalid, "--storage-config says how, and not where: add --storage s3, gcs or azure")
	case c.Kind == Local && len(c.Parameters) > 0:
		return fault.New(fault.Invalid, "--storage local has no --storage-config")
	case c.Kind == "" || c.Kind == Local:
		return nil
	}
	return cloud.Supported(c.Kind, c.Parameters)
}

// state is what the file says.
type state struct {
	Home Choice `json:"home"`
	// Former is where blobs may still be, while they are being moved.
	Former *Choice `json:"former,omitempty"`
	Delete bool    `json:"delete,omitempty"` // move, not copy
}

// Opener opens an object store and does not talk to it yet.
type Opener func(ctx context.Context, kind string, parameters map[string]any) (Checked, error)

// Checked is a backend that can say whether it works.
type Checked interface {
	blobs.Backend
	Check() error
}

// Config of Storage. All fields but Open are needed.
type Config struct {
	Data  string        // the node's data directory
	Keys  *keyring.Ring // seals its file, which may hold passwords; nil: it is plain
	Store *blobs.Store
	// Members is the number of the site's nodes.
	Members func() (int, error)
	Log     *slog.Logger
	Open    Opener // nil: package cloud's
}

// Storage is the room.
type Storage struct {
	Config
	start chan struct{} // a move is to begin

	mu    sync.Mutex
	state state
	move  Status
}

// New finds out where blobs are and tells the store. asked is what the operator
// chose, with no kind if nothing; it may not silently leave blobs behind in
// another place: fault.Invalid says how to move them.
func New(ctx context.Context, c Config, asked Choice) (*Storage, error) {
	if c.Open == nil {
		c.Open = func(ctx context.Context, kind string, parameters map[string]any) (Checked, error) {
			return cloud.Open(ctx, kind, parameters)
		}
	}
	s := &Storage{Config: c, start: make(chan struct{}, 1)}
	known, err := s.read()
	if err != nil {
		return nil, err
	}
	asked, err = s.reconcile(asked, known)
	if err != nil {
		return nil, err
	}
	if s.state.Former != nil {
		former, err := s.open(ctx, *s.state.Former, true)
		if err != nil {
			return nil, fmt.Errorf("opening the storage that blobs are being moved from: %w", err)
		}
		c.Store.Rehome(former)
		s.move = Status{State: Running, From: s.state.Former.describe(), To: asked.describe(), Delete: s.state.Delete}
		s.start <- struct{}{}
	}
	home, err := s.open(ctx, asked, known)
	if err != nil {
		return nil, err
	}
	s.state.Home = asked
	if known || asked.Kind != Local {
		if err := s.save(s.state); err != nil {
			return nil, err
		}
	}
	c.Store.Rehome(home)
	return s, nil
}

// reconcile holds what was asked for against what the file says.
func (s *Storage) reconcile(asked Choice, known bool) (Choice, error) {
	home := s.state.Home
	switch {
	case !known && asked.Kind == "":
		return Choice{Kind: Local}, nil
	case !known, same(asked, home):
		return asked, nil // with new credentials, perhaps
	case asked.Kind == "":
		return home, nil
	case s.state.Former != nil && same(asked, *s.state.Former):
		s.Log.Warn("blobs are moved to another storage; change --storage and --storage-config to it", "storage", home.describe())
		return home, nil
	case home.Kind == Local:
		return asked, nil // the directory is always read
	}
	return asked, fault.New(fault.Invalid, "this node's blobs are in %s, not in %s: start it without --storage and move them with atoll blobs migrate --to %s", home.describe(), asked.describe(), asked.Kind)
}

// open opens a place; nil is the node's directory. One that worked before may be
// away at the moment.
func (s *Storage) open(ctx context.Context, c Choice, before bool) (blobs.Backend, error) {
	if c.Kind == Local {
		return nil, nil
	}
	b, err := s.Open(ctx, c.Kind, c.Parameters)
	if err != nil {
		return nil, err
	}
	err = b.Check()
	if err == nil || !before {
		return b, err
	}
	s.Log.Error("the storage does not answer as it should; blobs in it cannot be pulled or pushed until it does", "storage", c.describe(), "err", err)
	return b, nil
}

// same reports whether both name one place; credentials may differ.
func same(a, b Choice) bool {
	return a.Kind == b.Kind && maps.Equal(a.place(), b.place())
}

// place is what tells one place from another.
func (c Choice) place() map[string]string {
	out := map[string]string{}
	for _, name := range []string{"bucket", "rootdirectory", "regionendpoint", "container", "accountname", "serviceurl"} {
		if v := c.Parameters[name]; v != nil {
			out[name] = fmt.Sprint(v)
		}
	}
	return out
}

// describe names a place without its secrets.
func (c Choice) describe() string {
	text := c.Kind
	for _, name := range []string{"regionendpoint", "serviceurl", "accountname", "bucket", "container", "rootdirectory"} {
		if v, ok := c.place()[name]; ok {
			text += " " + name + "=" + v
		}
	}
	return text
}

func (s *Storage) read() (known bool, err error) {
	text, err := s.Keys.Read(filepath.Join(s.Data, FileName))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &s.state)
	}
	if err != nil {
		return false, fmt.Errorf("reading where blobs are from %s: %w", filepath.Join(s.Data, FileName), err)
	}
	return true, nil
}

// save writes down where blobs are, durably, before anything goes there.
func (s *Storage) save(st state) error {
	if err := s.Keys.WriteJSON(filepath.Join(s.Data, FileName), st); err != nil {
		return fmt.Errorf("writing down where blobs are: %w", err)
	}
	return nil
}
