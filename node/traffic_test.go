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
	v := <-seen
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
