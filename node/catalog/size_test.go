package catalog_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

// recorder keeps the entries that a node's log would hold.
type recorder struct {
	*tabletest.Backend
	logs []*raft.Log
}

func (r *recorder) Propose(ctx context.Context, txn []byte) (kv.Result, error) {
	result, err := r.Backend.Propose(ctx, txn)
	if err == nil {
		r.logs = append(r.logs, &raft.Log{Index: result.Rev, Term: 3, Type: raft.LogCommand, Data: bytes.Clone(txn)})
	}
	return result, err
}

// TestDiskPerTag: one more tag of a manifest that is there takes less than 1,000
// bytes of a node's disk: of the state, of the log while no snapshot has let it be
// cut, and of the two snapshots that are kept. It plays what the registry writes
// for 6,400 tags into the files that a node has.
func TestDiskPerTag(t *testing.T) {
	const tags, clients, batch, goal = 6_400, 32, 16, 1000
	s := newSite(t, "5e0c1f7a4b2d4c6e8f90a1b2c3d4e5f6")
	played := &recorder{Backend: s.backend}
	s.db.Attach(played)
	body := s.image("bench/large", "one")
	s.mustPush("bench/large", "first", body)
	begin := tabletest.Snapshot(t, s.db)
	played.logs = nil
	order := rand.New(rand.NewPCG(1, 2))
	for from := 0; from < tags; from += clients {
		for _, i := range order.Perm(clients) { // they are not served in turn
			s.mustPush("bench/large", fmt.Sprintf("tag-%07d", from+i), body)
		}
	}

	dir := t.TempDir()
	engine, err := kv.OpenBolt(filepath.Join(dir, "meta.db"))
	must(t, err)
	machine, err := kv.NewMachine(engine, kv.Hooks{})
	must(t, err)
	must(t, machine.Restore(begin))
	log, err := kv.OpenLog(filepath.Join(dir, "log.db"))
	must(t, err)
	for at := 0; at < len(played.logs); at += batch {
		logs := played.logs[at:min(at+batch, len(played.logs))]
		must(t, log.StoreLogs(logs))
		for i, answer := range machine.ApplyBatch(logs) {
			if r, ok := answer.(kv.Result); !ok || r.Code != kv.OK {
				t.Fatalf("entry %d: %v", logs[i].Index, answer)
			}
		}
	}
	snapshot, err := io.ReadAll(tabletest.Snapshot(t, s.db))
	must(t, err)
	must(t, log.Close())
	must(t, engine.Close())
	size := func(name string) (n int) {
		db, err := bbolt.Open(filepath.Join(dir, name), 0o600, &bbolt.Options{ReadOnly: true})
		must(t, err)
		// The file itself grows in steps of 16 MiB, the rest of which is a hole.
		must(t, db.View(func(tx *bbolt.Tx) error { n = int(tx.Size()); return nil }))
		must(t, db.Close())
		return n
	}
	state, logged, snapshots := size("meta.db")/tags, size("log.db")/tags, 2*len(snapshot)/tags
	t.Logf("a tag takes %d bytes: %d of state, %d of log, %d of snapshots", state+logged+snapshots, state, logged, snapshots)
	if state+logged+snapshots > goal {
		t.Errorf("a tag takes %d bytes of disk, want at most %d", state+logged+snapshots, goal)
	}
}
