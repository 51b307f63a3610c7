package kv

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/raft"
)

func TestPackedLog(t *testing.T) {
	store := raft.NewInmemStore()
	packed, err := NewPacked(store)
	if err != nil {
		t.Fatal(err)
	}
	defer packed.Close()
	digest := strings.Repeat("0123456789abcdef", 4)
	repeats := []byte(strings.Repeat("artifact/library/app/sha256:"+digest, 20))
	at := time.Unix(1, 2).UTC()
	logs := []*raft.Log{
		{Index: 1, Term: 1, Type: raft.LogNoop, AppendedAt: at},
		{Index: 2, Term: 1, Type: raft.LogCommand, Data: []byte("short"), AppendedAt: at},
		{Index: 3, Term: 1, Type: raft.LogCommand, Data: repeats, AppendedAt: at},
		{Index: 4, Term: 1, Type: raft.LogConfiguration, Data: repeats, AppendedAt: at},
		{Index: 5, Term: 2, Type: raft.LogCommand, Data: bytes.Repeat([]byte{0}, MaxTxnBytes), AppendedAt: at},
		{Index: 6, Term: 2, Type: raft.LogCommand, Data: repeats, Extensions: []byte("of another"), AppendedAt: at},
	}
	sent := bytes.Clone(repeats)
	if err := packed.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(logs[2].Data, sent) || logs[2].Extensions != nil {
		t.Error("the caller's entry was changed")
	}
	var raw raft.Log
	if err := store.GetLog(3, &raw); err != nil || len(raw.Data) > len(repeats)/5 {
		t.Errorf("an entry that repeats itself takes %d of %d bytes (%v)", len(raw.Data), len(repeats), err)
	}
	for _, want := range logs {
		var got raft.Log
		if err := packed.GetLog(want.Index, &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(*want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("entry %d: %s", want.Index, diff)
		}
	}

	// What was written before there was a compression is read as it is.
	if err := store.StoreLog(&raft.Log{Index: 7, Type: raft.LogCommand, Data: repeats}); err != nil {
		t.Fatal(err)
	}
	var old raft.Log
	if err := packed.GetLog(7, &old); err != nil || !bytes.Equal(old.Data, repeats) {
		t.Errorf("an entry that is not compressed: %v", err)
	}
	if err := store.StoreLog(&raft.Log{Index: 8, Type: raft.LogCommand, Data: raw.Data[:len(raw.Data)-3], Extensions: []byte(packMark)}); err != nil {
		t.Fatal(err)
	}
	if err := packed.GetLog(8, &old); err == nil {
		t.Error("a damaged entry was read")
	}
}
