package peernet_test

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// What connections cost that are parked and say nothing: each of some nodes parks at all
// others. With ATOLL_IDLE_SECONDS there are 50 of them, and it watches the processor for so
// long, before they come and after. It is about the whole process, and so not parallel.
func TestIdleParkedConnections(t *testing.T) { overBoth(t, testIdleParkedConnections) }

func testIdleParkedConnections(t *testing.T) {
	nodes := 10
	idle, _ := strconv.Atoi(os.Getenv("ATOLL_IDLE_SECONDS"))
	if idle > 0 {
		nodes = 50
	}
	s, members := transfertest.NewSite(t, "site-a"), &roll{}
	var all []peernet.Peer
	var ports []*port
	for i := range nodes {
		id := fmt.Sprint("node-", i)
		cfg := config(t, s, id)
		cfg.Peers, cfg.MaxPerAddress, cfg.MaxStrangers = members.list, 1000, 1000
		p := open(t, cfg)
		peernet.Few(p.Net, nodes)
		ports, all = append(ports, p), append(all, peernet.Peer{ID: id, Addr: p.addr})
	}
	before, busyBefore := settledMemory(), burnt(idle)
	members.set(all...)
	parked := 0
	limit := time.Now().Add(2 * time.Minute)
	for tick := time.NewTicker(100 * time.Millisecond); parked < nodes*(nodes-1); <-tick.C {
		parked = 0
		for _, p := range ports {
			parked += peernet.ParkedHere(p.Net)
		}
		if time.Now().After(limit) {
			t.Fatalf("%d are parked", parked)
		}
	}
	if idle > 0 {
		<-time.After(trials) // until all have found out that nobody is behind a wall
	}
	each := (settledMemory() - before) / int64(parked)
	t.Logf("%d bytes a parked connection of %d, both of its ends", each, parked)
	if idle > 0 {
		t.Logf("%v of the processor a second before, %v after", busyBefore, burnt(idle))
	}
	most := int64(128 << 10)
	if carried(t)() == peernet.OnlyQUIC {
		most = 320 << 10
	}
	if each > most {
		t.Errorf("a parked connection holds %d bytes, %d are the most that it should", each, most)
	}
}

// trials is how long a node takes to try whether who parks at it can be dialled, and more.
const trials = 5 * time.Second

// settledMemory is what is in use once nothing is there that could go.
func settledMemory() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// burnt is the processor time a second, over so many seconds.
func burnt(seconds int) time.Duration {
	if seconds == 0 {
		return 0
	}
	begun := processor()
	<-time.After(time.Duration(seconds) * time.Second)
	return (processor() - begun) / time.Duration(seconds)
}

func processor() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
