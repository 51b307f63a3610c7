package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/backup"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/peers"
)

var quiet = slog.New(slog.DiscardHandler)

// backup asks the node for one.
func (r *running) backup(asked backup.Request) []byte {
	r.t.Helper()
	body, err := json.Marshal(asked)
	if err != nil {
		r.t.Fatal(err)
	}
	return r.do("POST", "/api/atoll/v1/backup", body, "Content-Type", "application/json").want(200).Body
}

// logOf is the journal of a project, and what its entries amount to compared
// with the tables.
func (r *running) logOf(project string) (id entry.LogID, size uint64) {
	r.t.Helper()
	var fromLog entry.State
	var want [32]byte
	err := r.db.View(func(v *table.View) error {
		p, _, err := r.rooms.projects.Get(v, project)
		if err != nil {
			return err
		}
		id = p.Log
		for e, err := range r.rooms.journal.Entries(v, id, 0, 0) {
			if err != nil {
				return err
			}
			decoded, err := entry.Decode(e.Value)
			if err != nil {
				return err
			}
			if err := fromLog.Apply(decoded); err != nil {
				return err
			}
			size++
		}
		state, err := entry.StateRoot(r.rooms.catalog.Materialise(v, project))
		want = state
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	root, err := fromLog.Root()
	if err != nil || root != want {
		r.t.Errorf("the journal of %s amounts to %x, the tables to %x", project, root, want)
	}
	return id, size
}

var errKilled = errors.New("killed by the test")

// A backup of a working site makes a site, also when the work is killed at any
// step and run again. What was pushed later is not there, and the new life of the
// site never writes into the journals of the old one.
func TestBackupAndRestore(t *testing.T) {
	one := start(t, config(t))
	var images []pushed
	for i := range 5 {
		images = append(images, one.push("library/app", fmt.Sprint("v", i), content(uint64(i+1), 100<<10)))
	}
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	file := one.backup(backup.Request{Recipients: []string{identity.Recipient().String()}, Blobs: true})
	late := one.push("library/app", "late", content(99, 1000))
	oldLog, _ := one.logOf("library")
	old, key := one.member.Identity(), one.member.ClusterKeys()
	if bytes.Contains(file, key) || bytes.Contains(one.backup(backup.Request{Blobs: true}), key) {
		t.Fatal("the cluster key is in a backup as it is")
	}
	// Beside the site that works, which it would put out of service.
	drill := backup.Restoring{Data: filepath.Join(t.TempDir(), "drill"), File: bytes.NewReader(file), Identities: []age.Identity{identity}, Log: quiet}
	if _, err := Restore(t.Context(), drill, Keys{}); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "--replace") {
		t.Errorf("a restore within reach of the site ends with %v", err)
	}
	drill.Replace, drill.File = true, bytes.NewReader(file)
	if _, err := Restore(t.Context(), drill, Keys{}); err != nil {
		t.Errorf("a restore that may replace the site ends with %v", err)
	}
	if err := one.stop(); err != nil {
		t.Fatal(err)
	}
	for kill := 0; ; kill++ {
		c := config(t)
		c.Init = false
		n, where := 0, ""
		restore := func(step func(string) error) (backup.Restored, error) {
			return Restore(t.Context(), backup.Restoring{
				Data: c.Data, File: bytes.NewReader(file), Identities: []age.Identity{identity}, Log: quiet, Step: step,
			}, Keys{})
		}
		_, err := restore(func(name string) error {
			if n++; n > kill {
				where = name
				return errKilled
			}
			return nil
		})
		done := err == nil
		if !done {
			if !errors.Is(err, errKilled) {
				t.Fatal(err)
			}
			// The plan's last step is to forget the plan: from there it is whole.
			if half, err := tryStart(t, c); err == nil {
				half.stop()
				t.Fatalf("killed at %s: half a site starts", where)
			}
			if _, err := restore(nil); err != nil {
				t.Fatalf("killed at %s, then: %v", where, err)
			}
		}
		if kill%4 != 0 && !done {
			continue // starting a node takes a while; every step was finished by Restore
		}
		two := start(t, c)
		for i, image := range images {
			two.pull(image, fmt.Sprint("v", i))
		}
		two.do("GET", "/v2/library/app/manifests/late", nil).want(404)
		log, size := two.logOf("library")
		if log == oldLog || log.Scope != oldLog.Scope || log.Site != oldLog.Site || size < 11 {
			t.Errorf("killed at %s: the project's journal is %s with %d entries, before it was %s", where, log, size, oldLog)
		}
		two.push("library/app", "late", late.blobs[1])
		if _, after := two.logOf("library"); after != size+2 {
			t.Errorf("killed at %s: a push made %d entries of %d", where, after, size)
		}
		if id := two.member.Identity(); id.SiteID != old.SiteID || id.NodeID == old.NodeID || !bytes.Equal(id.CA, old.CA) {
			t.Errorf("killed at %s: the restored node is %s of site %s", where, id.NodeID, id.SiteID)
		}
		if err := two.stop(); err != nil {
			t.Error(err)
		}
		if done {
			if kill < 12 {
				t.Errorf("only %d steps", kill)
			}
			return
		}
	}
}

// The blobs that the node lacks come from the others, and what none holds whole is
// named; the backup is good all the same.
func TestBackupOfWhatOthersHold(t *testing.T) {
	nodes := three(t)
	layer := content(7, 300<<10)
	p := nodes[0].push("library/app", "v1", layer)
	await(t, "every node holds all", func() string {
		for _, n := range nodes {
			if !n.holds(layer) || !n.holds(p.blobs[0]) {
				return n.config.Name + " does not"
			}
		}
		return ""
	})
	if err := nodes[1].rooms.store.Remove(digest.FromBytes(layer)); err != nil {
		t.Fatal(err)
	}
	whole, err := backup.Verify(bytes.NewReader(nodes[1].backup(backup.Request{Blobs: true})), nil)
	if err != nil || whole.Summary.Blobs != 2 || whole.Missing != 0 || !whole.Opened {
		t.Errorf("a backup on a node without the layer: %+v, %v", whole, err)
	}
	for _, n := range nodes {
		name := n.file(p.blobs[0])
		if err := os.WriteFile(name, bytes.Repeat([]byte("x"), len(p.blobs[0])), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rotten, err := backup.Verify(bytes.NewReader(nodes[2].backup(backup.Request{Blobs: true})), nil)
	if err != nil || rotten.Summary.Blobs != 1 || rotten.Missing != 1 || rotten.Examples[0] != digest.FromBytes(p.blobs[0]).String() {
		t.Errorf("a backup with a rotten blob: %+v, %v", rotten, err)
	}
}

// Every way in which a backup can be damaged is found.
func TestDamagedBackups(t *testing.T) {
	one := start(t, config(t))
	one.push("library/app", "v1", content(1, 2000))
	file := one.backup(backup.Request{Blobs: true})
	if _, err := backup.Verify(bytes.NewReader(file), nil); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(file); i += 1 + len(file)/300 {
		bad := bytes.Clone(file)
		bad[i] ^= 1
		if _, err := backup.Verify(bytes.NewReader(bad), nil); err == nil {
			t.Errorf("a flipped bit at %d of %d is not found", i, len(file))
		}
		if _, err := backup.Verify(bytes.NewReader(file[:i]), nil); !fault.Is(err, fault.Invalid) {
			t.Errorf("cut at %d of %d: %v", i, len(file), err)
		}
	}
	if _, err := backup.Verify(bytes.NewReader(append(bytes.Clone(file), 0)), nil); err == nil {
		t.Error("something after the end is not found")
	}
}

// The story of an operator: two of three machines are lost, the third is made the
// site, the two turn up again.
func TestRecoverAndWelcomeBack(t *testing.T) {
	nodes := three(t)
	layer := content(3, 400<<10)
	p := nodes[0].push("library/app", "v1", layer)
	await(t, "every node holds all of it", func() string {
		for _, n := range nodes {
			if !n.holds(layer) || !n.holds(p.blobs[0]) {
				return n.config.Name + " does not"
			}
		}
		return ""
	})
	for _, n := range nodes { // a recovery knows what its node's log has: it may be the slowest
		n.pull(p, "v1")
	}
	third := nodes[2]
	if _, err := Recover(t.Context(), Offline{Data: third.Data, Log: quiet}, nil); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "another node runs") {
		t.Errorf("recovering a node that runs: %v", err)
	}
	nodes[1].stop()
	third.stop()
	if _, err := Recover(t.Context(), Offline{Data: third.Data, Log: quiet}, nil); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), nodes[0].PeerAddr) {
		t.Errorf("recovering while a voter answers: %v", err)
	}
	nodes[0].stop()
	out, err := Recover(t.Context(), Offline{Data: third.Data, Log: quiet}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !exists(filepath.Join(third.Data, out.Kept, "meta.db")) {
		t.Error("the old state was not kept")
	}
	third = third.again()
	third.pull(p, "v1")
	third.logOf("library")
	after := third.push("library/app", "v2", content(4, 1000))
	var status peers.Status
	third.do("GET", "/api/atoll/v1/cluster", nil).want(200).decode(&status)
	if status.UnderReplicated != 0 || len(status.Nodes) != 1 || !strings.HasPrefix(status.Epoch, "1 (") {
		t.Errorf("the recovered site: %+v", status)
	}

	old := nodes[0].again()
	await(t, "the old node is fenced", func() string {
		old.do("GET", "/api/atoll/v1/cluster", nil).want(200).decode(&status)
		if status.Fenced == "" || len(status.Advice) != 1 || !strings.Contains(status.Advice[0], "atoll node wipe --yes") {
			return fmt.Sprintf("%+v", status)
		}
		return ""
	})
	old.pull(p, "v1") // it serves what it has
	refused := old.do("PUT", "/v2/library/app/manifests/v3", p.manifest, "Content-Type", "application/vnd.oci.image.manifest.v1+json").want(503)
	if !strings.Contains(string(refused.Body), "recovered without this node") {
		t.Errorf("a push to the fenced node: %s", refused.Body)
	}
	// It may have been told by a call of its own that did not wait for the answer.
	await(t, "the recovered node speaks of it", func() string {
		third.do("GET", "/api/atoll/v1/cluster", nil).want(200).decode(&status)
		if !strings.Contains(strings.Join(status.Advice, "\n"), "came back with data from before the recovery") {
			return fmt.Sprintf("%q", status.Advice)
		}
		return ""
	})

	old.stop()
	var saved bytes.Buffer
	if count, err := Salvage(t.Context(), Offline{Data: old.Data, Log: quiet}, &saved); err != nil || !count.Exact {
		t.Errorf("salvage: %+v, %v", count, err)
	}
	if _, err := Wipe(old.Data); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"identity.json", "cluster.key", "meta.db", "raft", epoch.FencedFile} {
		if exists(filepath.Join(old.Data, name)) {
			t.Errorf("wiping left %s", name)
		}
	}
	token, err := third.member.CreateToken(t.Context(), time.Hour, 1)
	if err != nil {
		t.Fatal(err)
	}
	back := old.again(func(c *Config) { c.Join, c.Token = []string{third.PeerAddr}, token })
	back.pull(after, "v2")
	if !back.holds(layer) {
		t.Error("wiping took the blobs")
	}
	allLive(t, []*running{third, back})
}
