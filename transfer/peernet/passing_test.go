package peernet

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/transfer"
)

// capped lets a rate out, and as much as ahead before its time.
type capped struct {
	mu    sync.Mutex
	rate  float64 // bytes a second; 0: nothing
	began time.Time
	out   float64
}

func (c *capped) Take(_ transfer.Flow, n int) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rate == 0 {
		return 50 * time.Millisecond
	}
	if ahead := time.Duration(c.out/c.rate*float64(time.Second)) - time.Since(c.began); ahead > 0 {
		return ahead
	}
	c.out += float64(n)
	return 0
}

// between passes on what is written to near until far is read, and back, for the nodes named.
func between(ctx context.Context, n *Net, from, to string) (near, far *marked, ended chan error) {
	out, in := net.Pipe()
	next, end := net.Pipe()
	here := &Conn{Conn: in, peer: from, service: ServicePassing, closed: func() {}}
	there := &Conn{Conn: next, peer: to, service: ServicePassing, closed: func() {}}
	ended = make(chan error, 1)
	go func() { ended <- n.passBoth(ctx, here, there) }()
	_, near = mark(&Conn{Conn: out, service: ServicePassing, closed: func() {}})
	_, far = mark(&Conn{Conn: end, service: ServicePassing, closed: func() {}})
	return near, far, ended
}

// What is passed on under a cap of the node between, in either direction, goes within a
// tenth of it, however many connections share it.
func TestWhatIsPassedOnUnderACap(t *testing.T) {
	for name, p := range map[string]func(*capped) Passing{
		"out": func(c *capped) Passing { return Passing{Out: c} },
		"in":  func(c *capped) Passing { return Passing{In: c} },
	} {
		for _, rate := range []float64{100 << 10, 1 << 20, 50 << 20} {
			for _, conns := range []int{1, 5} {
				t.Run(name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						n := &Net{relayed: prometheus.NewCounter(prometheus.CounterOpts{})}
						n.Bound(p(&capped{rate: rate, began: time.Now()}))
						ctx, cancel := context.WithCancel(t.Context())
						defer cancel()
						var mu sync.Mutex
						got := 0
						var all sync.WaitGroup
						for range conns {
							near, far, _ := between(ctx, n, "left", "right")
							all.Go(func() {
								for err := error(nil); err == nil; {
									_, err = near.Write(make([]byte, 64<<10))
								}
							})
							all.Go(func() {
								buf := make([]byte, 32<<10)
								for {
									k, err := far.Read(buf)
									mu.Lock()
									got += k
									mu.Unlock()
									if err != nil {
										return
									}
								}
							})
							defer near.Close()
							defer far.Close()
						}
						const during = 20 * time.Second
						<-time.After(during)
						mu.Lock()
						if part := float64(got) / (rate * during.Seconds()); part < 0.9 || part > 1.1 {
							t.Errorf("%d connections took %.2f of the cap", conns, part)
						}
						mu.Unlock()
						cancel()
					})
				})
			}
		}
	}
}

// Where nothing may go on for long the connection is given up: its ends may find another
// way.
func TestWhatIsHeldForLongIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Net{relayed: prometheus.NewCounter(prometheus.CounterOpts{})}
		c := &capped{rate: 1 << 20, began: time.Now()}
		n.Bound(Passing{Out: c})
		near, far, ended := between(t.Context(), n, "left", "right")
		defer near.Close()
		defer far.Close()
		go func() { _, _ = near.Write([]byte("hello")) }()
		if _, err := io.ReadFull(far, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Hour) // silence is no reason
		c.mu.Lock()
		c.rate = 0
		c.mu.Unlock()
		began := time.Now()
		go func() { _, _ = near.Write([]byte("hello")) }()
		if err := <-ended; !errors.Is(err, errHeld) || time.Since(began) != heldMost {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// An end that takes nothing ends the connection, and nothing else.
func TestAnEndThatIsStuck(t *testing.T) {
	for service, within := range map[byte]time.Duration{ServicePassing: takenWithin, ServiceRelay: restTakenWithin} {
		synctest.Test(t, func(t *testing.T) {
			n := &Net{relayed: prometheus.NewCounter(prometheus.CounterOpts{})}
			out, in := net.Pipe()
			next, end := net.Pipe()
			here := &Conn{Conn: in, service: service, closed: func() {}}
			there := &Conn{Conn: next, service: service, closed: func() {}}
			ended := make(chan error, 1)
			began := time.Now()
			go func() { ended <- n.passBoth(t.Context(), here, there) }()
			wrote := make(chan error, 1)
			go func() {
				raw, _ := mark(&Conn{Conn: out, service: service, closed: func() {}})
				var err error
				for err == nil {
					_, err = raw.Write(make([]byte, maxPart))
				}
				wrote <- err
			}()
			if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != within {
				t.Errorf("service %d: %v after %v", service, err, time.Since(began))
			}
			<-wrote
			end.Close()
		})
	}
}

// The end of either side, or of the port, ends both sides at once, whatever they wait for. What
// a side wrote before its end still has its time to arrive.
func TestTheEndOfOneEndsBoth(t *testing.T) {
	for name, end := range map[string]func(near, far *marked, stop func()){
		"near": func(near, _ *marked, _ func()) { near.Close() },
		"far":  func(_, far *marked, _ func()) { far.Close() },
		"port": func(_, _ *marked, stop func()) { stop() },
	} {
		for doing, late := range map[string]time.Duration{"idle": 0, "held back": heldMost, "stuck": takenWithin} {
			if name != "far" {
				late = 0
			}
			t.Run(name+" "+doing, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n := &Net{relayed: prometheus.NewCounter(prometheus.CounterOpts{})}
					if doing == "held back" {
						n.Bound(Passing{Out: &capped{began: time.Now()}})
					}
					ctx, stop := context.WithCancel(t.Context())
					defer stop()
					near, far, ended := between(ctx, n, "left", "right")
					defer near.Close()
					defer far.Close()
					if doing != "idle" {
						go func() { _, _ = far.Write(make([]byte, 3*maxPart)) }()
					}
					synctest.Wait()
					began := time.Now()
					end(near, far, stop)
					if <-ended; time.Since(began) != late {
						t.Errorf("it took %v", time.Since(began))
					}
					for _, c := range []*marked{near, far} {
						if _, err := c.Read(make([]byte, 1)); err == nil {
							t.Error("a side goes on")
						}
					}
				})
			})
		}
	}
}

// onlyTo holds back all that goes to one node.
type onlyTo string

func (o onlyTo) Take(f transfer.Flow, _ int) time.Duration {
	if f.Peer == string(o) {
		return time.Second
	}
	return 0
}

// What is held back in one direction waits alone.
func TestOneDirectionIsHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Net{relayed: prometheus.NewCounter(prometheus.CounterOpts{})}
		n.Bound(Passing{Out: onlyTo("right"), Patience: time.Hour})
		near, far, ended := between(t.Context(), n, "left", "right")
		go func() { _, _ = near.Write(make([]byte, 3*maxPart)) }()
		synctest.Wait()
		began := time.Now()
		go func() { _, _ = far.Write(make([]byte, 20*maxPart)) }()
		if _, err := io.ReadFull(near, make([]byte, 20*maxPart)); err != nil || time.Since(began) != 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		far.Close()
		<-ended
		near.Close()
	})
}
