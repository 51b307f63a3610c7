package node

import (
	"context"
	"errors"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

func heapOf() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// A flood of joiners with tokens that nobody made is refused, by either carrier, with a
// reason for each and a count of all; it holds little, and one with a good token gets in.
func TestFloodOfJoiners(t *testing.T) {
	n := start(t, config(t))
	text, err := n.member.CreateToken(t.Context(), 3600e9, 1)
	if err != nil {
		t.Fatal(err)
	}
	token, err := pki.ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	token.Secret[0]++
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	ask := map[string]any{"token": token.String(), "node": strings.Repeat("a", 32), "name": "flood", "addr": "10.0.0.9:5001", "csr": csr, "feature": 1}
	const crowd, atOnce = 200, 16
	for _, by := range []peernet.Transport{peernet.OnlyTCP, peernet.OnlyQUIC} {
		joiner, err := peernet.New(peernet.Config{Transport: func() peernet.Transport { return by }})
		if err != nil {
			t.Fatal(err)
		}
		before := heapOf()
		var mu sync.Mutex
		codes := map[string]int{}
		var asking sync.WaitGroup
		for range atOnce {
			asking.Go(func() {
				for range crowd / atOnce {
					var answer map[string]any
					err := joining.Post(t.Context(), func(ctx context.Context) (net.Conn, error) {
						return joiner.DialJoin(ctx, n.PeerAddr, token.Pin)
					}, "/v1/join", ask, &answer)
					var no *joining.Refusal
					mu.Lock()
					if errors.As(err, &no) {
						codes[no.Code]++
					} else if err == nil {
						codes["let in"]++
					} else {
						codes["crowded"]++ // the port has too many of one address
					}
					mu.Unlock()
				}
			})
		}
		asking.Wait()
		held := heapOf() - before
		t.Logf("over %s: %v, and %d KiB held by both ends", by, codes, held>>10)
		if codes["let in"] > 0 || codes[joining.CodeUnknown] == 0 {
			t.Errorf("over %s: %v", by, codes)
		}
		if held > 32<<20 {
			t.Errorf("over %s the flood holds %d bytes", by, held)
		}
		metrics := string(n.do("GET", "/metrics", nil).want(200).Body)
		if !strings.Contains(metrics, `atoll_cluster_join_refused_total{code="token_unknown"}`) {
			t.Error("the flood is not counted")
		}
	}
	allLive(t, []*running{n, join(t, n, "two")})
}
