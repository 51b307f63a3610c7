package raftnet

import (
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
