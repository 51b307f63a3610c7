package peers

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

// roster of three nodes as one of them sees it.
type roster string

func (r roster) Self() string                       { return string(r) }
func (r roster) Live() []member.Member              { return nil }
func (r roster) Suspect(string) bool                { return false }
func (r roster) DownSince(string) (time.Time, bool) { return time.Time{}, false }

func (r roster) Members(table.Reader) ([]member.Member, error) {
	return []member.Member{{ID: "a", Name: "one"}, {ID: "b", Name: "two"}, {ID: "c", Name: "three"}}, nil
}

func TestEndpoints(t *testing.T) {
	db := tabletest.Open(t)
	a := NewEndpoints(db, roster("a"), "https://10.0.0.1:5000", true, slog.New(slog.DiscardHandler))
	tabletest.Start(t, db)
	as := func(id roster, url string, shared bool) *Endpoints {
		e := *a
		e.roster, e.self, e.shared = id, url, shared
		return &e
	}
	b, c := as("b", "https://10.0.0.2:5000", true), as("c", "http://127.0.0.1:5000", false)
	for _, e := range []*Endpoints{a, b, c, b} {
		if err := e.announce(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	want := func(e *Endpoints, want ...Endpoint) {
		t.Helper()
		all, err := e.All(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, all); diff != "" {
			t.Error(diff)
		}
	}
	one, two := Endpoint{Node: "a", Name: "one", URL: "https://10.0.0.1:5000"}, Endpoint{Node: "b", Name: "two", URL: "https://10.0.0.2:5000"}
	self := func(e Endpoint) Endpoint { e.Self = true; return e }
	want(a, self(one), two)
	want(b, self(two), one)
	want(c, Endpoint{Node: "c", Name: "three", URL: "http://127.0.0.1:5000", Self: true}, one, two) // others cannot reach it

	// An address that changed, and one that is only the machine's own now.
	moved := as("a", "https://10.0.0.9:5000", true)
	hidden := as("b", "http://127.0.0.1:5000", false)
	for _, e := range []*Endpoints{moved, hidden} {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		changed := e.db.Watch(ctx, "endpoint")
		go func() { ended <- e.Run(ctx) }()
		<-changed
		cancel()
		if err := <-ended; err != context.Canceled {
			t.Errorf("Run ended with %v", err)
		}
	}
	one.URL = moved.self
	want(c, Endpoint{Node: "c", Name: "three", URL: "http://127.0.0.1:5000", Self: true}, one)
}
