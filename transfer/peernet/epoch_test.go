package peernet_test

import (
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// judge is one node's view of epochs: it takes its own and writes down all.
type judge struct {
	own  string
	mu   sync.Mutex
	told []string
}

func (j *judge) meet(peer, epoch string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.told = append(j.told, peer+" "+epoch)
	if epoch != j.own {
		return errors.New("data from before the recovery")
	}
	return nil
}

func (j *judge) heard() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.told, ", ")
}

func (j *judge) in(cfg peernet.Config) peernet.Config {
	cfg.Epoch, cfg.Meet = func() string { return j.own }, j.meet
	return cfg
}

// Both ends learn the other's epoch, and either can refuse, before the service
// or Authorize is asked.
func TestEpochs(t *testing.T) { overBoth(t, testEpochs) }

func testEpochs(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	long := strings.Repeat("e", 255)
	for _, c := range []struct {
		name           string
		server, client string
		fails          bool
	}{
		{"none", "", "", false},
		{"the same", long, long, false},
		{"an old server", "", "1", true},
		{"an old client", "1", "", true},
		{"apart", "1.a", "1.b", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			here, there := &judge{own: c.server}, &judge{own: c.client}
			cfg := here.in(config(t, s, "node-a"))
			authorized := make(chan string, 1)
			cfg.Authorize = func(id string, _ byte) error { authorized <- id; return nil }
			a := open(t, cfg)
			echo(t, a.Listen(peernet.ServiceBlob))
			b, err := peernet.New(there.in(config(t, s, "node-b")))
			if err != nil {
				t.Fatal(err)
			}
			conn, err := b.Dial(within(t), a.addr, peernet.ServiceBlob)
			if errors.Is(err, peernet.ErrOtherEpoch) != c.fails || err != nil && !c.fails {
				t.Fatalf("error is %v", err)
			}
			if err == nil {
				says(t, conn, "hello")
				conn.Close()
			}
			if got := here.heard(); got != "node-b "+c.client {
				t.Errorf("the server heard %q", got)
			}
			if got := there.heard(); got != "node-a "+c.server {
				t.Errorf("the client heard %q", got)
			}
			if c.fails == (len(authorized) == 1) {
				t.Errorf("asked for authorization: %d", len(authorized))
			}
		})
	}
}

// A version that knows no epochs works with a site that was never recovered, and
// with no other.
func TestEpochsAndOlderVersions(t *testing.T) { overBoth(t, testEpochsAndOlderVersions) }

func testEpochsAndOlderVersions(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	for _, own := range []string{"", "1"} {
		newer := open(t, (&judge{own: own}).in(config(t, s, "node-a")))
		older := open(t, config(t, s, "node-b"))
		echo(t, newer.Listen(peernet.ServiceBlob))
		echo(t, older.Listen(peernet.ServiceBlob))
		_, there := older.Dial(within(t), newer.addr, peernet.ServiceBlob)
		_, back := newer.Dial(within(t), older.addr, peernet.ServiceBlob)
		if own == "" && (there != nil || back != nil) {
			t.Errorf("never recovered: %v, %v", there, back)
		}
		if own != "" && (there == nil || !errors.Is(back, peernet.ErrOtherEpoch)) {
			t.Errorf("recovered: %v, %v", there, back)
		}
	}
	cfg := config(t, s, "node-c")
	cfg.Epoch = func() string { return "" }
	if _, err := peernet.New(cfg); err == nil {
		t.Error("Epoch without Meet is taken")
	}
}
