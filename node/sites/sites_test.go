package sites

import (
	"crypto/ed25519"
	"crypto/rand"
	"strings"
	"testing"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
)

type openSealer struct{}

func (openSealer) Seal(_ string, plain []byte) ([]byte, error)    { return plain, nil }
func (openSealer) Unseal(_ string, sealed []byte) ([]byte, error) { return sealed, nil }

func newSites(t *testing.T) *Sites {
	db := tabletest.Open(t)
	j := journal.New(db, openSealer{})
	s := New(db, j)
	tabletest.Start(t, db)
	if _, err := j.EnsureSite(t.Context(), "home", "Home"); err != nil {
		t.Fatal(err)
	}
	return s
}

func foreign(t *testing.T, id string) airgap.Site {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := entry.KeyOf(private)
	if err != nil {
		t.Fatal(err)
	}
	return airgap.Site{ID: id, Incarnation: table.NewID(), Name: "Away", RootKey: key, Fingerprint: key.Fingerprint()}
}

func TestTrustIsByKeyAndProject(t *testing.T) {
	s, away := newSites(t), foreign(t, "away")
	if _, err := s.Trust(t.Context(), airgap.Trust{Site: away}); err != nil {
		t.Fatal(err)
	}
	all, err := s.All(t.Context())
	if err != nil || len(all) != 1 || all[0].Accepts("app") {
		t.Fatalf("a site trusted without --accept: %+v, %v; it must write nothing", all, err)
	}
	if _, err := s.Trust(t.Context(), airgap.Trust{Site: away, Accept: []string{"app"}}); err != nil {
		t.Fatal(err)
	}
	if all, _ = s.All(t.Context()); len(all) != 1 || !all[0].Accepts("app") || all[0].Accepts("other") {
		t.Fatalf("after accepting app: %+v", all)
	}

	impostor := foreign(t, "away")
	_, err = s.Trust(t.Context(), airgap.Trust{Site: impostor, Accept: []string{"*"}})
	if !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "distrust") {
		t.Fatalf("another key for a trusted site: %v; want a conflict that says what to do", err)
	}
	if err := s.Distrust(t.Context(), "away"); err != nil {
		t.Fatal(err)
	}
	if err := s.Distrust(t.Context(), "away"); !fault.Is(err, fault.NotFound) {
		t.Fatalf("distrusting twice: %v", err)
	}
	if _, err := s.Trust(t.Context(), airgap.Trust{Site: impostor}); err != nil {
		t.Fatalf("after distrust the new key is taken: %v", err)
	}
}

func TestTrustRefusesNonsense(t *testing.T) {
	s, away := newSites(t), foreign(t, "away")
	self, err := s.Self()
	if err != nil {
		t.Fatal(err)
	}
	wrong := away
	wrong.Fingerprint = "SHA256:nonsense"
	for name, trust := range map[string]airgap.Trust{
		"itself":                {Site: self},
		"fingerprint of no key": {Site: wrong},
		"no document":           {},
		"broken pattern":        {Site: away, Accept: []string{"["}},
	} {
		if _, err := s.Trust(t.Context(), trust); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v; want Invalid", name, err)
		}
	}
}

func TestSawNeverGoesBack(t *testing.T) {
	s, away := newSites(t), foreign(t, "away")
	if _, err := s.Trust(t.Context(), airgap.Trust{Site: away, Accept: []string{"*"}}); err != nil {
		t.Fatal(err)
	}
	for _, serial := range []uint64{3, 2} {
		if _, err := s.db.Update(t.Context(), func(tx *table.Tx) error { return s.Saw(tx, "away", serial, nil) }); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := s.All(t.Context()); err != nil || all[0].Serial != 3 {
		t.Fatalf("serial %+v, %v; want 3", all, err)
	}
}
