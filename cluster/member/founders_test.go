package member_test

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/clustertest"
	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
)

// How a site lets in those who hold its founding token, and for how long.
func TestFounders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ahead atomic.Int64 // of all clocks
		c := clustertest.New(t, clustertest.Options{Clock: func(*clustertest.Node) func() time.Time {
			return func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
		}})
		first := c.Found()
		token, err := pki.NewSiteToken()
		if err != nil {
			t.Fatal(err)
		}
		pairing, err := pki.NewPairing(token)
		if err != nil {
			t.Fatal(err)
		}
		as := func(machine, name string) member.Founders {
			return member.Founders{Token: pairing.ID(), Places: 3, Machine: machine, Name: name}
		}
		grant := func(via *clustertest.Node, f member.Founders) (string, error) {
			return via.GrantFounder(t.Context(), f, func(pin []byte) (pki.Token, error) {
				return pairing.Grant(via.Identity().SiteID, f.Machine, pin)
			})
		}
		refused := func(what string, err error, code string) {
			t.Helper()
			var no *joining.Refusal
			if !errors.As(err, &no) || no.Code != code {
				t.Errorf("%s: %v, want %s", what, err, code)
			}
		}
		_, err = grant(first, as("m2", "node2"))
		refused("before the site knows the token", err, joining.CodeLater)
		for range 2 { // a second start changes nothing
			if err := first.OpenToFounders(t.Context(), as("m1", "node1")); err != nil {
				t.Fatal(err)
			}
		}
		_, err = grant(first, as("m2", "node1"))
		refused("a name that a node has", err, joining.CodeName)

		second := c.NewNode()
		text, err := grant(first, as("m2", second.Name))
		if err != nil {
			t.Fatal(err)
		}
		if again, err := grant(first, as("m2", second.Name)); err != nil || again != text {
			t.Errorf("a second grant is another: %v", err)
		}
		if err := second.JoinWith(text, first.Addr); err != nil {
			t.Fatal(err)
		}
		// Its node is not up yet; a machine of the same name does not take its place.
		_, err = grant(first, as("m3", second.Name))
		refused("the name of a machine that has just joined", err, joining.CodeName)
		if err := c.NewNode().JoinWith(text, first.Addr); !errors.Is(err, member.ErrTokenUsed) {
			t.Errorf("a grant was used twice: %v", err)
		}
		second.Start()
		third := c.NewNode()
		c.Await("a grant of the second, any member gives them", func() bool {
			text, err = grant(second, as("m3", third.Name))
			return err == nil
		})
		if err := third.JoinWith(text, second.Addr); err != nil {
			t.Fatal(err)
		}
		third.Start()
		c.AwaitVoters(3)
		_, err = grant(first, as("m4", "another"))
		refused("a fourth of three", err, joining.CodeUsed)
		if _, err := grant(first, as("m3", third.Name)); err != nil {
			t.Errorf("who has its place already: %v", err)
		}

		// It ends by time, and with a node that was stolen; no start opens it again.
		other := as("m1", "node1")
		other.Token = "another"
		if err := first.OpenToFounders(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		if err := first.Betray(t.Context(), third.Self()); err != nil {
			t.Fatal(err)
		}
		for i, f := range []member.Founders{as("m3", third.Name), other} {
			if err := first.OpenToFounders(t.Context(), f); err != nil {
				t.Fatal(err)
			}
			f.Machine, f.Name = fmt.Sprint("late", i), fmt.Sprint("late", i)
			_, err = grant(first, f)
			refused("after a node was stolen", err, joining.CodeExpired)
		}
		timed := as("m1", "node1")
		timed.Token = "timed"
		if err := first.OpenToFounders(t.Context(), timed); err != nil {
			t.Fatal(err)
		}
		ahead.Store(int64(member.FoundersLife))
		timed.Machine, timed.Name = "late", "late"
		_, err = grant(first, timed)
		refused("after its life", err, joining.CodeExpired)
	})
}

// A machine whose disk was cleared comes back with the same command line: by its name
// and its address it is the one that had the place, and joins in its node's stead.
func TestFounderWithAClearedDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		first := c.Found()
		token, err := pki.NewSiteToken()
		if err != nil {
			t.Fatal(err)
		}
		pairing, err := pki.NewPairing(token)
		if err != nil {
			t.Fatal(err)
		}
		as := func(machine string, n *clustertest.Node) member.Founders {
			return member.Founders{Token: pairing.ID(), Places: 3, Machine: machine, Name: n.Name, Addr: n.Addr}
		}
		grant := func(f member.Founders) (text, code string) {
			text, err := first.GrantFounder(t.Context(), f, func(pin []byte) (pki.Token, error) {
				return pairing.Grant(first.Identity().SiteID, f.Machine, pin)
			})
			var no *joining.Refusal
			if err != nil && !errors.As(err, &no) {
				t.Fatal(err)
			} else if err != nil {
				code = no.Code
			}
			return text, code
		}
		join := func(n *clustertest.Node, text string) {
			t.Helper()
			if err := n.JoinWith(text, first.Addr); err != nil {
				t.Fatal(err)
			}
			n.Start()
		}
		if err := first.OpenToFounders(t.Context(), as("m1", first)); err != nil {
			t.Fatal(err)
		}
		second, third := c.NewNode(), c.NewNode()
		// It is cleared before it has used its grant, so the site knows it as a machine only.
		if _, code := grant(as("lost", second)); code != "" {
			t.Fatal(code)
		}
		for machine, n := range map[string]*clustertest.Node{"m2": second, "m3": third} {
			text, code := grant(as(machine, n))
			if code != "" {
				t.Fatalf("%s: %s", machine, code)
			}
			join(n, text)
		}
		c.AwaitVoters(3)

		was := second.Self()
		second.Kill()
		if err := os.RemoveAll(second.Dir); err != nil {
			t.Fatal(err)
		}
		back := as("m2-again", second)
		if _, code := grant(back); code != joining.CodeLater {
			t.Errorf("while its node counts as up: %q", code)
		}
		elsewhere := back
		elsewhere.Addr, elsewhere.Machine = "10.0.0.99:5001", "m4"
		if _, code := grant(elsewhere); code != joining.CodeName {
			t.Errorf("another machine that is called the same: %q", code)
		}
		var text string
		c.Await("it gets its place back", func() bool {
			var code string
			text, code = grant(back)
			return code == ""
		})
		if _, code := grant(elsewhere); code != joining.CodeName {
			t.Errorf("another machine that is called the same, when the node is down: %q", code)
		}
		join(second, text)
		c.AwaitVoters(3)
		if second.Self() == was {
			t.Error("it has the identity that was on the cleared disk")
		}
		c.Await("the node that it was is gone", func() bool {
			s, err := first.Status(t.Context())
			return err == nil && len(s.Members) == 3
		})
		if _, code := grant(member.Founders{Token: pairing.ID(), Places: 3, Machine: "m5", Name: "another", Addr: "10.0.0.98:5001"}); code != joining.CodeUsed {
			t.Errorf("a fourth of three: %q", code)
		}
	})
}
