package node

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/atoll-registry/atoll/node/backup"
	"github.com/atoll-registry/atoll/node/peers"
)

// The site remembers a backup when whoever asked for it has said that it arrived,
// on every node, and no older one in its place.
func TestLastBackup(t *testing.T) {
	site := three(t)
	one, two := site[0], site[1]
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	last := func(n *running) *peers.LastBackup {
		t.Helper()
		var status peers.Status
		n.do("GET", "/api/atoll/v1/cluster", nil).want(200).decode(&status)
		return status.Backup
	}
	take := func(asked backup.Request) backup.Verified {
		t.Helper()
		file := one.backup(asked)
		v, err := backup.Verify(bytes.NewReader(file), []age.Identity{identity})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	first := take(backup.Request{Recipients: []string{identity.Recipient().String()}, Blobs: true})
	if got := last(one); got != nil {
		t.Fatalf("a backup that nobody said arrived is remembered: %+v", got)
	}
	if text := string(one.do("GET", "/metrics", nil).want(200).Body); strings.Contains(text, "\natoll_backup_age_seconds") {
		t.Error("the age of no backup is a metric")
	}
	one.do("PUT", "/api/atoll/v1/backup/unknown", nil).want(404)
	two.do("PUT", "/api/atoll/v1/backup/"+first.ID, nil).want(404) // another node sent it
	one.push("library/app", "later", content(1, 1000))
	second := take(backup.Request{})
	if second.Revision <= first.Revision {
		t.Fatal("the second backup is no later one")
	}
	one.do("PUT", "/api/atoll/v1/backup/"+second.ID, nil).want(200)
	for range 2 { // late, and twice
		one.do("PUT", "/api/atoll/v1/backup/"+first.ID, nil).want(200)
	}
	for _, n := range site {
		await(t, "the last backup is known on all nodes", func() string {
			got := last(n)
			if got == nil || got.Revision != second.Revision || got.Node != second.Node || got.Blobs || len(got.Recipients) != 0 {
				return "it is not the second"
			}
			return ""
		})
	}
	text := string(two.do("GET", "/metrics", nil).want(200).Body)
	if !strings.Contains(text, "\natoll_backup_age_seconds ") {
		t.Error("its age is no metric")
	}
	third := take(backup.Request{Recipients: []string{identity.Recipient().String()}, Blobs: true})
	one.do("PUT", "/api/atoll/v1/backup/"+third.ID, nil).want(200)
	got := last(one)
	if got == nil || !got.Blobs || len(got.Recipients) != 1 || got.Recipients[0] != identity.Recipient().String() || time.Since(got.At).Abs() > time.Hour {
		t.Errorf("the last backup is %+v", got)
	}
}
