package settings_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest/resttest"
	"github.com/atoll-registry/atoll/node/settings"
)

// rig is a few settings over a database.
type rig struct {
	*settings.Settings
	db    *table.DB
	size  *settings.Setting[int64]
	most  *settings.Setting[int]
	hosts *settings.Setting[map[string]string]
}

func begin(t *testing.T) *rig {
	r := &rig{db: tabletest.Open(t)}
	r.Settings = settings.New(r.db, slog.New(slog.DiscardHandler))
	r.size = settings.Define(r.Settings, settings.Spec[int64]{
		Name: "b.size", Default: "4MiB", Summary: "a size", Kind: settings.Bytes(1<<10, 1<<30, true),
	})
	r.most = settings.Define(r.Settings, settings.Spec[int]{Name: "a.most", Default: "3", Summary: "a count", Kind: settings.Count(1, 9)})
	r.hosts = settings.Define(r.Settings, settings.Spec[map[string]string]{
		Name: "c.hosts", Default: "", Summary: "a table", Kind: settings.Pairs(func(string, string) error { return nil }),
	})
	tabletest.Start(t, r.db)
	return r
}

func TestSetResetAndDefaults(t *testing.T) {
	r := begin(t)
	if r.size.Value() != 4<<20 || r.most.Value() != 3 || len(r.hosts.Value()) != 0 {
		t.Fatalf("defaults: %d %d %v", r.size.Value(), r.most.Value(), r.hosts.Value())
	}
	e, err := r.Set(t.Context(), "b.size", " 64KiB ", "ann")
	if err != nil || e.Value != "64KiB" || e.ChangedBy != "ann" || e.ChangedAt == nil || r.size.Value() != 64<<10 {
		t.Fatalf("set: %+v %v, in force %d", e, err, r.size.Value())
	}
	if _, err := r.Set(t.Context(), "c.hosts", "a=1, b.example:5000=2", "ann"); err != nil {
		t.Fatal(err)
	}
	if h := r.hosts.Value(); len(h) != 2 || h["a"] != "1" || h["b.example:5000"] != "2" {
		t.Errorf("table: %v", h)
	}
	all, err := r.All(t.Context())
	if err != nil || len(all) != 3 || all[0].Name != "a.most" || all[0].ChangedAt != nil || all[1].Value != "64KiB" || all[1].Default != "4MiB" {
		t.Errorf("all: %+v %v", all, err)
	}
	if err := r.Reset(t.Context(), "b.size"); err != nil || r.size.Value() != 4<<20 {
		t.Errorf("reset: %v, in force %d", err, r.size.Value())
	}
	if err := r.Reset(t.Context(), "no.such"); !fault.Is(err, fault.NotFound) {
		t.Errorf("reset of nothing: %v", err)
	}
}

func TestValuesAreChecked(t *testing.T) {
	r := begin(t)
	for name, bad := range map[string][]string{
		"a.most":  {"", "0", "10", "three", "1.5"},
		"b.size":  {"", "1", "2GiB", "-1", "4 megs", "1e3", "NaN", "Inf", "0x10"},
		"c.hosts": {"a", "=1", "a=1,a=2", "a=1,", ",a=1"},
	} {
		for _, value := range bad {
			if _, err := r.Set(t.Context(), name, value, ""); !fault.Is(err, fault.Invalid) {
				t.Errorf("%s took %q: %v", name, value, err)
			}
		}
	}
	if _, err := r.Set(t.Context(), "c.hosts", "a="+strings.Repeat("x", 20<<10), ""); !fault.Is(err, fault.Invalid) {
		t.Errorf("a huge value: %v", err)
	}
	for text, want := range map[string]int64{"0": 0, "1024": 1024, "1.5KiB": 1536, "2 MiB": 2 << 20, "7B": 7, "1TiB": 1 << 40} {
		if got, err := settings.ParseBytes(text); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", text, got, err, want)
		}
	}
	for n, want := range map[int64]string{0: "0", 1000: "1000", 1 << 10: "1KiB", 3 << 20: "3MiB", 1 << 30: "1GiB"} {
		if got := settings.FormatBytes(n); got != want {
			t.Errorf("%d is written %q, want %q", n, got, want)
		}
	}
}

// Another node's change, and a value that only a newer version takes.
func TestRunFollowsTheRows(t *testing.T) {
	r := begin(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- r.Run(ctx) }()
	for name, value := range map[string]string{"a.most": "99", "b.size": "8MiB"} {
		if err := r.Write(t.Context(), name, value); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for r.size.Value() != 8<<20 {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("the change is not in force: %d", r.size.Value())
		}
	}
	if r.most.Value() != 3 {
		t.Errorf("a value outside the limits is in force: %d", r.most.Value())
	}
	cancel()
	if err := <-ended; err != context.Canceled {
		t.Errorf("Run ended with %v", err)
	}
}

func TestOperations(t *testing.T) {
	r := begin(t)
	s := resttest.New(t)
	r.Operations(s.Kernel)
	var e settings.Entry
	s.Do("PUT", "/api/atoll/v1/settings/b.size", `{"value":"1MiB"}`).Want(200).Decode(&e)
	if e.Value != "1MiB" || e.ChangedBy != "admin" || r.size.Value() != 1<<20 {
		t.Errorf("changed: %+v", e)
	}
	s.Do("PUT", "/api/atoll/v1/settings/b.size", `{"value":"1"}`).Want(400)
	s.Do("PUT", "/api/atoll/v1/settings/nothing", `{"value":"1"}`).Want(404)
	var all []settings.Entry
	s.Do("GET", "/api/atoll/v1/settings", nil).Want(200).Decode(&all)
	if len(all) != 3 {
		t.Errorf("all: %+v", all)
	}
	s.Do("GET", "/api/atoll/v1/settings/a.most", nil).Want(200).Decode(&e)
	s.Do("DELETE", "/api/atoll/v1/settings/b.size", nil).Want(200)
	if r.size.Value() != 4<<20 {
		t.Errorf("in force after the reset: %d", r.size.Value())
	}
	s.As = access.Principal{Kind: access.User, Name: "u"}
	s.Do("GET", "/api/atoll/v1/settings", nil).Want(403)
	s.Do("PUT", "/api/atoll/v1/settings/b.size", `{"value":"1MiB"}`).Want(403)
}
