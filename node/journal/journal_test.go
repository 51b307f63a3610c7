package journal_test

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
)

// plainSealer binds the name and hides nothing.
type plainSealer struct{}

func (plainSealer) Seal(name string, plain []byte) ([]byte, error) {
	return append([]byte(name+"\x00"), plain...), nil
}

func (plainSealer) Unseal(name string, sealed []byte) ([]byte, error) {
	plain, ok := bytes.CutPrefix(sealed, []byte(name+"\x00"))
	if !ok {
		return nil, fmt.Errorf("sealed under another name than %s", name)
	}
	return plain, nil
}

func open(t *testing.T, site string) (*table.DB, *journal.Journal, journal.Site) {
	t.Helper()
	db := tabletest.Open(t)
	j := journal.New(db, plainSealer{})
	tabletest.Start(t, db)
	s, err := j.EnsureSite(t.Context(), site, "name of "+site)
	must(t, err)
	return db, j, s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func view(t *testing.T, db *table.DB, read func(*table.View) error) {
	t.Helper()
	must(t, db.View(read))
}

func tag(name string) entry.Entry {
	return entry.Entry{Kind: entry.TagDelete, At: 7, Repository: "app", Tag: name}
}

// write begins a log and appends n entries, each in a Txn of its own.
func write(t *testing.T, db *table.DB, j *journal.Journal, n int) entry.LogID {
	t.Helper()
	var scope journal.Scope
	_, err := db.Update(t.Context(), func(tx *table.Tx) (err error) {
		scope, err = j.Begin(tx, table.NewID())
		return err
	})
	must(t, err)
	for i := range n {
		_, err := db.Update(t.Context(), func(tx *table.Tx) error { return j.Append(tx, scope, tag(fmt.Sprint("t", i))) })
		must(t, err)
	}
	return scope.Log
}

func entries(t *testing.T, db *table.DB, j *journal.Journal, id entry.LogID) (all []journal.SeqEntry) {
	t.Helper()
	view(t, db, func(v *table.View) error {
		for e, err := range j.Entries(v, id, 0, 0) {
			if err != nil {
				return err
			}
			all = append(all, e)
		}
		return nil
	})
	return all
}

func TestSiteIsFoundedOnce(t *testing.T) {
	db, j, s := open(t, "site-a")
	again, err := j.EnsureSite(t.Context(), "site-a", "another name")
	must(t, err)
	if again.Incarnation != s.Incarnation || again.Root != s.Root || again.Name != "name of site-a" {
		t.Fatalf("founded twice: %+v, %+v", s, again)
	}
	if _, err := j.EnsureSite(t.Context(), "site-b", ""); err == nil {
		t.Fatal("the rows of another site were taken")
	}
	keys, err := s.Chain.Verify("site-a", s.Root)
	must(t, err)
	if len(keys.Signing()) != 1 || keys.Signing()[0] != s.Online || s.Online == s.Root {
		t.Fatalf("keys are %+v", keys)
	}
	view(t, db, func(v *table.View) error {
		return signs(j, v, s)
	})
}

// signs makes a signature with the site's key and verifies it.
func signs(j *journal.Journal, v *table.View, s journal.Site) error {
	key, err := j.Signer(context.Background(), v)
	if err != nil {
		return err
	}
	signature, err := key.Sign(nil, []byte("payload"), crypto.Hash(0))
	if err != nil {
		return err
	}
	return s.Online.Verify([]byte("payload"), signature)
}

// closed is a sealer that opens nothing while it is shut.
type closed struct {
	plainSealer
	shut bool
}

type noKey struct{}

func (noKey) Error() string     { return "no cluster key" }
func (noKey) Unavailable() bool { return true }

func (c *closed) Unseal(name string, sealed []byte) ([]byte, error) {
	if c.shut {
		return nil, noKey{}
	}
	return c.plainSealer.Unseal(name, sealed)
}

// TestSignElsewhere: a node that cannot open the site's key has another sign, and
// believes no signature that does not hold.
func TestSignElsewhere(t *testing.T) {
	db, sealer := tabletest.Open(t), &closed{}
	j := journal.New(db, sealer)
	tabletest.Start(t, db)
	s, err := j.EnsureSite(t.Context(), "site-a", "a")
	must(t, err)
	sealer.shut = true
	view(t, db, func(v *table.View) error {
		if err := signs(j, v, s); !fault.Is(err, fault.Unavailable) {
			t.Errorf("with nobody to ask: %v", err)
		}
		return nil
	})
	forge := true
	j.Delegate(func(ctx context.Context, duty string, ask, answer any) error {
		body, err := json.Marshal(ask)
		if err != nil || duty != journal.SignDuty {
			return fmt.Errorf("%s: %w", duty, err)
		}
		if forge {
			return json.Unmarshal([]byte(`{"signature":"AAAA"}`), answer)
		}
		sealer.shut = false
		done, err := j.SignFor(ctx, body)
		sealer.shut = true
		if err != nil {
			return err
		}
		if body, err = json.Marshal(done); err != nil {
			return err
		}
		return json.Unmarshal(body, answer)
	})
	view(t, db, func(v *table.View) error {
		if err := signs(j, v, s); err == nil {
			t.Error("a forged signature was taken")
		}
		forge = false
		return signs(j, v, s)
	})
}

func TestUnfoundedSiteIsUnavailable(t *testing.T) {
	db := tabletest.Open(t)
	j := journal.New(db, plainSealer{})
	tabletest.Start(t, db)
	_, err := db.Update(t.Context(), func(tx *table.Tx) error { _, err := j.Begin(tx, "x"); return err })
	if !fault.Is(err, fault.Unavailable) {
		t.Fatalf("error is %v", err)
	}
}

func TestCheckpointVerifies(t *testing.T) {
	db, j, s := open(t, "site-a")
	id := write(t, db, j, 5)
	var signed []byte
	view(t, db, func(v *table.View) (err error) { signed, err = j.Checkpoint(t.Context(), v, id); return err })
	c, err := entry.OpenCheckpoint(signed, s.Online)
	must(t, err)
	if c.Log != id || c.Size != 5 || c.At != 7 {
		t.Fatalf("checkpoint is %+v", c)
	}
	// The cached tree grows to what a fresh one is.
	_, err = db.Update(t.Context(), func(tx *table.Tx) error { return j.Append(tx, journal.Scope{Log: id}, tag("more")) })
	must(t, err)
	var grown entry.Tree
	for _, e := range entries(t, db, j, id) {
		leaf, err := entry.Leaf(id, e.Seq, e.Value)
		must(t, err)
		grown.Append(leaf)
	}
	view(t, db, func(v *table.View) error {
		tree, err := j.Tree(v, id)
		if err == nil && (tree.Size() != 6 || tree.Root() != grown.Root()) {
			t.Error("the cached tree differs from the log")
		}
		return err
	})
}

func TestConcurrentAppendsAllCount(t *testing.T) {
	db, j, _ := open(t, "site-a")
	id := write(t, db, j, 0)
	var wait sync.WaitGroup
	failures := make([]error, 32)
	for i := range failures {
		wait.Go(func() {
			_, failures[i] = db.Update(t.Context(), func(tx *table.Tx) error {
				return j.Append(tx, journal.Scope{Log: id}, tag(fmt.Sprint("t", i)))
			})
		})
	}
	wait.Wait()
	must(t, errors.Join(failures...))
	if got := entries(t, db, j, id); len(got) != len(failures) || got[31].Seq != 31 {
		t.Fatalf("%d entries", len(got))
	}
}

func TestForeignLogsTakeNeitherGapsNorForks(t *testing.T) {
	dbA, a, siteA := open(t, "site-a")
	id := write(t, dbA, a, 4)
	theirs := entries(t, dbA, a, id)
	values := make([][]byte, len(theirs))
	for i, e := range theirs {
		values[i] = e.Value
	}
	db, j, _ := open(t, "site-b")
	accept := func(seq uint64, values ...[]byte) error {
		_, err := db.Update(t.Context(), func(tx *table.Tx) error { return j.Accept(tx, id, seq, values...) })
		return err
	}
	if err := accept(0, values...); !fault.Is(err, fault.Precondition) {
		t.Fatalf("a log that nobody follows: %v", err)
	}
	_, err := db.Update(t.Context(), func(tx *table.Tx) error { return j.Follow(tx, id) })
	must(t, err)
	if err := accept(1, values[1:]...); !errors.Is(err, journal.ErrGap) {
		t.Fatalf("a gap: %v", err)
	}
	must(t, accept(0, values[:2]...))
	if err := accept(1, values[1]); !errors.Is(err, journal.ErrAccepted) {
		t.Fatalf("an entry again: %v", err)
	}
	if err := accept(2, []byte("no entry")); !fault.Is(err, fault.Invalid) {
		t.Fatalf("a malformed entry: %v", err)
	}

	var signed []byte
	view(t, dbA, func(v *table.View) (err error) { signed, err = a.Checkpoint(t.Context(), v, id); return err })
	if err := j.KeepCheckpoint(t.Context(), signed); !errors.Is(err, journal.ErrGap) {
		t.Fatalf("a checkpoint over more than is here: %v", err)
	}
	must(t, accept(2, values[2:]...))
	must(t, j.KeepCheckpoint(t.Context(), signed))
	view(t, db, func(v *table.View) error {
		kept, err := j.Checkpoint(t.Context(), v, id)
		if err != nil {
			return err
		}
		if _, err := entry.OpenCheckpoint(kept, siteA.Online); err != nil {
			t.Errorf("the relayed checkpoint: %v", err)
		}
		if err := j.Compare(v, id, theirs[3]); err != nil {
			t.Error(err)
		}
		if err := j.Compare(v, id, journal.SeqEntry{Seq: 3, Value: theirs[2].Value}); !errors.Is(err, journal.ErrFork) {
			t.Errorf("another entry at a place: %v", err)
		}
		return nil
	})
	err = db.View(func(v *table.View) error { _, err := j.Own(v, id); return err })
	if !fault.Is(err, fault.Denied) {
		t.Fatalf("writing another site's log: %v", err)
	}
	_, err = db.Update(t.Context(), func(tx *table.Tx) error { return j.Append(tx, journal.Scope{Log: id}, tag("mine")) })
	if !fault.Is(err, fault.Denied) {
		t.Fatalf("writing another site's log: %v", err)
	}
}

func TestForkedCheckpointIsAnAlarm(t *testing.T) {
	dbA, a, _ := open(t, "site-a")
	id := write(t, dbA, a, 2)
	theirs := entries(t, dbA, a, id)
	db, j, _ := open(t, "site-b")
	_, err := db.Update(t.Context(), func(tx *table.Tx) error {
		if err := j.Follow(tx, id); err != nil {
			return err
		}
		return j.Accept(tx, id, 0, theirs[1].Value, theirs[0].Value) // in the wrong order
	})
	must(t, err)
	var signed []byte
	view(t, dbA, func(v *table.View) (err error) { signed, err = a.Checkpoint(t.Context(), v, id); return err })
	if err := j.KeepCheckpoint(t.Context(), signed); !errors.Is(err, journal.ErrFork) {
		t.Fatalf("error is %v", err)
	}
}

func TestLogsAreListedInOrder(t *testing.T) {
	db, j, _ := open(t, "site-a")
	for range 3 {
		write(t, db, j, 1)
	}
	var all []entry.LogID
	view(t, db, func(v *table.View) error {
		for id, err := range j.Logs(v, entry.LogID{}) {
			if err != nil {
				return err
			}
			all = append(all, id)
		}
		return nil
	})
	if len(all) != 3 || all[0].Compare(all[1]) >= 0 || all[1].Compare(all[2]) >= 0 {
		t.Fatalf("logs are %v", all)
	}
	view(t, db, func(v *table.View) error {
		for id, err := range j.Logs(v, all[1]) {
			if id != all[2] {
				t.Errorf("after the second comes %v", id)
			}
			return err
		}
		t.Error("nothing comes after the second")
		return nil
	})
}
