package node

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/traffic"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// A node under caps: clients get what they may have, it is to be seen who gets it
// from any node, and a budget at its end is a condition.
func TestTrafficOfANode(t *testing.T) {
	one := start(t, config(t))
	two := join(t, one, "two")
	allLive(t, []*running{one, two})
	layer := bytes.Repeat([]byte("0123456789abcdef"), 48<<10) // 768 KiB
	one.push("library/app", "v1", layer)
	path := "/v2/library/app/blobs/" + digest.FromBytes(layer).String()
	one.set("traffic.node", "128KiB")
	one.set("traffic.budgets", "node: 1MiB/day")
	capped(t, 2, one)
	seen := make(chan traffic.View, 1)
	go func() {
		var v traffic.View
		for range time.Tick(50 * time.Millisecond) {
			two.do("GET", "/api/atoll/v1/transfers", nil).want(http.StatusOK).decode(&v)
			if len(v.Transfers) > 0 && v.Transfers[0].HeldBack != "" || t.Context().Err() != nil {
				seen <- v
				return
			}
		}
	}()
	began := time.Now()
	if got := one.do("GET", path, nil).want(http.StatusOK).Body; !bytes.Equal(got, layer) {
		t.Error("the blob changed")
	}
	// What is saved up goes at once.
	if took := time.Since(began); took < 4*time.Second {
		t.Errorf("768 KiB at 128 KiB/s took %v", took)
	}
	var v traffic.View
	select {
	case v = <-seen:
	case <-time.After(20 * time.Second):
		t.Fatal("the transfer was never shown as held back")
	}
	if one := v.Transfers[0]; one.From != "one" || !strings.HasPrefix(one.To, "admin@127.") || one.Repository != "library/app" || one.HeldBack != "node" || one.Class != "pull" {
		t.Errorf("the other node shows %+v", one)
	}
	one.do("GET", path, nil).want(http.StatusOK)
	one.awaitCondition("traffic-budget-spent", true)
	if advice := fmt.Sprint(one.status().Advice); !strings.Contains(advice, "traffic.budgets") {
		t.Errorf("the status advises %s", advice)
	}
	one.set("traffic.budgets", "")
	one.awaitCondition("traffic-budget-spent", false)
	one.set("traffic.node", "0")
	await(t, "no cap", func() string {
		began := time.Now()
		one.do("GET", path, nil).want(http.StatusOK)
		if took := time.Since(began); took > 2*time.Second {
			return fmt.Sprint("still held back: ", took)
		}
		return ""
	})
	if text := string(one.as(login{}, "GET", "/metrics", nil).want(http.StatusOK).Body); !strings.Contains(text, `atoll_traffic_held_back_seconds_total{cap="node",class="pull"}`) {
		t.Error("the metrics do not say what was held back")
	}
}

// set changes a setting of the site.
func (r *running) set(name, value string) {
	r.t.Helper()
	r.do("PUT", "/api/atoll/v1/settings/"+name, []byte(`{"value":"`+value+`"}`), "Content-Type", "application/json").want(http.StatusOK)
}

// What nodes send each other keeps to the cap of its link, at the sender or at the
// receiver, and is shown with its class.
func TestTrafficBetweenNodes(t *testing.T) {
	one := start(t, config(t))
	two := join(t, one, "two")
	allLive(t, []*running{one, two})
	for i, c := range []struct{ setting, value, off, heldBy string }{
		{"traffic.links", "one>two: 256KiB", "", "link one>two"},
		{"traffic.node-in", "256KiB", "0", "node-in"},
	} {
		one.set(c.setting, c.value)
		capped(t, 1, one, two)
		layer := bytes.Repeat([]byte(fmt.Sprint("a layer ", i)), 200<<10) // 1.8 MiB
		pushed := make(chan time.Duration, 1)
		go func() {
			began := time.Now()
			one.push("library/app", fmt.Sprint("v", i), layer)
			pushed <- time.Since(began)
		}()
		await(t, "the copy is shown, and what holds it back", func() string {
			var v traffic.View
			two.do("GET", "/api/atoll/v1/transfers", nil).want(http.StatusOK).decode(&v)
			for _, x := range v.Transfers {
				if x.Blob == digest.FromBytes(layer) && x.From == "one" && x.To == "two" && x.Class == "replication" && x.HeldBack == c.heldBy {
					return ""
				}
			}
			return fmt.Sprintf("%+v", v)
		})
		if took := <-pushed; took < 5*time.Second {
			t.Errorf("%s: the copy of 1.8 MiB at 256 KiB/s took %v", c.setting, took)
		}
		if !two.holds(layer) {
			t.Error("the copy is not there")
		}
		one.set(c.setting, c.off)
		capped(t, 0, one, two)
	}
}

// Blobs take the carrier that the site says, but for a node that was told itself; the
// cluster's own talk goes on whatever is set.
func TestTransportOfBlobs(t *testing.T) {
	one := start(t, config(t))
	two := join(t, one, "two", func(c *Config) { c.PeerTransport = "tcp" })
	allLive(t, []*running{one, two})
	if two.rooms.peers.Over != nil {
		t.Error("a node with --peer-transport obeys the setting")
	}
	for _, by := range []peernet.Carrier{peernet.TCP, peernet.QUIC} {
		c, err := one.rooms.peers.Over(t.Context(), one.config.Advertise, peernet.ServiceDoctor, by)
		if err != nil {
			t.Fatal(by, err)
		}
		if got := c.(*peernet.Conn).Carrier(); got != by {
			t.Errorf("by %s instead of %s", got, by)
		}
		c.Close()
	}
	one.do("PUT", "/api/atoll/v1/settings/peers.transport", []byte(`{"value":"carrier pigeon"}`), "Content-Type", "application/json").want(http.StatusBadRequest)
	one.set("peers.transport", "tcp")
	layer := bytes.Repeat([]byte("x"), 300<<10)
	one.push("library/app", "v1", layer)
	if !two.holds(layer) {
		t.Error("by TCP the copy does not come")
	}
	one.set("peers.transport", "quic") // of which the other node takes none
	one.set("peers.transport", "auto") // and this change still gets through
	layer = bytes.Repeat([]byte("y"), 300<<10)
	one.push("library/app", "v2", layer)
	if !two.holds(layer) {
		t.Error("the copy does not come any more")
	}
}

// capped waits until so many caps and budgets are in force on nodes.
func capped(t *testing.T, want int, nodes ...*running) {
	t.Helper()
	await(t, "the caps", func() string {
		for _, n := range nodes {
			if got := n.rooms.traffic.Capped(); got != want {
				return fmt.Sprintf("%s has %d", n.config.Name, got)
			}
		}
		return ""
	})
}
