package raftnet

import (
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
)

func TestStateAsSnapshot(t *testing.T) {
	logs := raft.NewInmemStore()
	for i := uint64(1); i <= 20; i++ {
		if err := logs.StoreLog(&raft.Log{Index: i, Term: 1 + i/10, Type: raft.LogCommand}); err != nil {
			t.Fatal(err)
		}
	}
	three := raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a:1"}, {ID: "b", Address: "b:1"}, {ID: "c", Address: "c:1"}}}
	one := raft.Configuration{Servers: three.Servers[:1]}
	encoded := raft.EncodeConfiguration(three)
	stored := &raft.SnapshotMeta{Version: 1, Index: 8, Term: 1, Configuration: one, ConfigurationIndex: 1}
	state := func(c raft.Configuration, index uint64) *raft.SnapshotMeta {
		return &raft.SnapshotMeta{Version: 1, ID: "state", Index: 15, Term: 2, Configuration: c, ConfigurationIndex: index}
	}
	for _, row := range []struct {
		name   string
		newest *raft.SnapshotMeta
		at     kv.Position
		want   *raft.SnapshotMeta
	}{
		{"all of the log was seen", nil, kv.Position{Index: 15, Term: 2, Changed: 12, Members: encoded}, state(three, 12)},
		{"none since the snapshot", stored, kv.Position{Index: 15, Term: 2, From: 8}, state(one, 1)},
		{"none, and all was seen", stored, kv.Position{Index: 15, Term: 2, From: 5}, state(one, 1)},
		{"one since the snapshot", stored, kv.Position{Index: 15, Term: 2, From: 9, Changed: 12, Members: encoded}, state(three, 12)},
		{"nobody saw what lies between", stored, kv.Position{Index: 15, Term: 2, From: 9}, nil},
		{"nobody saw anything", nil, kv.Position{Index: 15, Term: 2, From: 15}, nil},
		{"a new node", nil, kv.Position{}, nil},
		{"the snapshot is as new", stored, kv.Position{Index: 8, Term: 1, From: 8}, nil},
		{"the snapshot is newer", stored, kv.Position{Index: 7, Term: 1, Changed: 1, Members: encoded}, nil},
		{"the log ends before the state", nil, kv.Position{Index: 21, Term: 3, Changed: 12, Members: encoded}, nil},
		{"the log is of another time", nil, kv.Position{Index: 15, Term: 3, Changed: 12, Members: encoded}, nil},
		{"a configuration that is none", nil, kv.Position{Index: 15, Term: 2, Changed: 12, Members: []byte("?")}, nil},
	} {
		if diff := cmp.Diff(row.want, stateAsSnapshot(row.newest, logs, row.at)); diff != "" {
			t.Errorf("%s: %s", row.name, diff)
		}
	}
}

// Raft is told of the state while it starts; later it wants what it can send.
func TestTheStateIsListedOnce(t *testing.T) {
	logs := raft.NewInmemStore()
	if err := logs.StoreLog(&raft.Log{Index: 1, Term: 1}); err != nil {
		t.Fatal(err)
	}
	members := raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a:1"}}})
	h, err := NewHistory(raft.NewInmemSnapshotStore(), logs, kv.Position{Index: 1, Term: 1, Changed: 1, Members: members})
	if err != nil {
		t.Fatal(err)
	}
	if !h.Held {
		t.Error("raft would restore the state from a snapshot that is none")
	}
	for want := 1; want >= 0; want-- {
		if list, err := h.List(); err != nil || len(list) != want {
			t.Errorf("%d snapshots (%v), want %d", len(list), err, want)
		}
	}
}

// stored are snapshots of which only some can be opened.
type stored struct {
	raft.SnapshotStore
	metas      []*raft.SnapshotMeta // the newest first
	unreadable map[string]bool
}

func (s stored) List() ([]*raft.SnapshotMeta, error) { return slices.Clone(s.metas), nil }

func (s stored) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	if s.unreadable[id] {
		return nil, nil, errors.New("damaged")
	}
	return nil, io.NopCloser(strings.NewReader("")), nil
}

// What raft begins with, for what is left of snapshots, log and state.
func TestHistoryOfWhatIsLeft(t *testing.T) {
	members := raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a:1"}}})
	at := func(index uint64) kv.Position {
		return kv.Position{Index: index, Term: 1, Changed: 1, Members: members}
	}
	snapshot := func(id string, index uint64) *raft.SnapshotMeta {
		return &raft.SnapshotMeta{ID: id, Index: index, Term: 1}
	}
	for _, row := range []struct {
		name        string
		snapshots   []*raft.SnapshotMeta
		damaged     string // ids
		first, last uint64 // of the log; 0: empty
		at          kv.Position
		start       string // ids that raft is told of at its start, "gap" for ErrGap
		later       string // and afterwards
		wanted      bool
		restored    bool // raft is to restore the newest
	}{
		{"all is well", []*raft.SnapshotMeta{snapshot("b", 20), snapshot("a", 10)}, "", 15, 30, at(28), "state b a", "b a", false, false},
		{"a new node", nil, "", 0, 0, kv.Position{}, "", "", false, true},
		{"before the first snapshot", nil, "", 1, 30, at(28), "state", "", false, false},
		{"brought up by a snapshot", []*raft.SnapshotMeta{snapshot("b", 20)}, "", 21, 30, at(28), "b", "b", false, false},
		{"brought up just now", []*raft.SnapshotMeta{snapshot("b", 20)}, "", 0, 0, at(20), "b", "b", false, false},
		{"died while it was brought up", []*raft.SnapshotMeta{snapshot("b", 20)}, "", 1, 9, at(8), "b", "b", false, true},
		{"and what came is damaged", []*raft.SnapshotMeta{snapshot("b", 20)}, "b", 1, 9, at(8), "state", "", true, false},
		{"and there is an older one", []*raft.SnapshotMeta{snapshot("b", 20), snapshot("a", 5)}, "b", 1, 9, at(8), "state a", "a", true, false},
		{"the state is lost", []*raft.SnapshotMeta{snapshot("b", 20), snapshot("a", 10)}, "", 15, 30, kv.Position{}, "b a", "b a", false, true},
		{"and the newest is damaged", []*raft.SnapshotMeta{snapshot("b", 20), snapshot("a", 10)}, "b", 8, 30, kv.Position{}, "a", "a", true, true},
		{"and the log was cut behind that", []*raft.SnapshotMeta{snapshot("b", 20), snapshot("a", 10)}, "b", 15, 30, kv.Position{}, "gap", "", false, false},
		{"the newest cannot be found", []*raft.SnapshotMeta{snapshot("a", 10)}, "", 15, 30, at(28), "state", "", true, false},
		{"none can be found", nil, "", 15, 30, at(28), "state", "", true, false},
		{"nor who votes", nil, "", 15, 30, kv.Position{Index: 28, Term: 1, From: 28}, "gap", "", false, false},
		{"the state came as the snapshot that is lost", nil, "", 21, 30, kv.Position{Index: 20, Term: 1, From: 20, Changed: 1, Members: members}, "state", "", true, false},
		{"and the log is of another time", nil, "", 21, 30, kv.Position{Index: 20, Term: 2, From: 20, Changed: 1, Members: members}, "gap", "", false, false},
		{"and nothing came since", nil, "", 1, 9, kv.Position{Index: 20, Term: 1, From: 20, Changed: 1, Members: members}, "state", "", false, false},
		{"the state ends before the log", nil, "", 15, 30, at(12), "gap", "", false, false},
		{"the log ends before the state", nil, "", 1, 20, at(28), "gap", "", false, false},
		{"the log ends before the state, by a version that kept no term", nil, "", 1, 20, kv.Position{Index: 28, From: 28}, "gap", "", false, false},
		{"a version that kept no term", nil, "", 1, 30, kv.Position{Index: 28, From: 28}, "", "", false, true},
	} {
		logs := raft.NewInmemStore()
		for i := row.first; i <= row.last && i > 0; i++ {
			if err := logs.StoreLog(&raft.Log{Index: i, Term: 1, Type: raft.LogCommand}); err != nil {
				t.Fatal(err)
			}
		}
		damaged := map[string]bool{}
		for _, id := range strings.Fields(row.damaged) {
			damaged[id] = true
		}
		h, err := NewHistory(stored{metas: row.snapshots, unreadable: damaged}, logs, row.at)
		if row.start == "gap" || err != nil {
			if !errors.Is(err, ErrGap) || row.start != "gap" {
				t.Errorf("%s: %v", row.name, err)
			}
			continue
		}
		for _, want := range []string{row.start, row.later} {
			list, err := h.List()
			var ids []string
			for _, s := range list {
				ids = append(ids, s.ID)
			}
			if got := strings.Join(ids, " "); got != want || err != nil {
				t.Errorf("%s: raft is told of %q (%v), want %q", row.name, got, err, want)
			}
		}
		if h.Wanted() != row.wanted || h.Held == row.restored {
			t.Errorf("%s: a snapshot is wanted: %v; the state is held: %v", row.name, h.Wanted(), h.Held)
		}
	}
}

// A snapshot that raft cannot open is missed until another is taken.
func TestAnotherSnapshotIsWanted(t *testing.T) {
	h := &History{SnapshotStore: stored{unreadable: map[string]bool{"b": true}}}
	for _, id := range []string{"a", "b"} {
		_, source, err := h.Open(id)
		if damaged := id == "b"; (err != nil) != damaged || h.Wanted() != damaged {
			t.Errorf("%s is opened: %v, and another is wanted: %v", id, err, h.Wanted())
		}
		if err == nil {
			source.Close()
		}
	}
	if h.Taken(); h.Wanted() {
		t.Error("another is wanted when one was taken")
	}
}
