package gossip_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"

	"github.com/atoll-registry/atoll/cluster/gossip"
)

// said is a message as memberlist encodes it.
func said(t *testing.T, kind byte, v map[string]any) []byte {
	t.Helper()
	b := bytes.NewBuffer([]byte{kind})
	if err := codec.NewEncoder(b, &codec.MsgpackHandle{}).Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// line opens a connection for packets as a member that is taken over.
func (s *site) line(as, to *node) net.Conn {
	s.t.Helper()
	c, err := as.host.Dial(s.t.Context(), to.Addr, gossip.Service)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	if _, err := c.Write([]byte{1}); err != nil {
		s.t.Fatal(err)
	}
	return c
}

func frame(packet []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(packet))), packet...)
}

// TestLies of a member that was taken over: what it may not say has no effect, and
// what it may say of others lasts no longer than it goes on.
func TestLies(t *testing.T) {
	meanwhile(t, 4, func(t *testing.T, s *site) {
		victim, liar := s.nodes[0], s.nodes[3]
		truth := func() bool {
			return s.see(s.nodes[1], gossip.Up, liar) && s.see(s.nodes[2], gossip.Up, liar) && s.see(victim, gossip.Up, liar)
		}
		c := s.line(liar, victim)
		for _, packet := range [][]byte{
			// Another's question, so that the answer goes there.
			said(t, 0, map[string]any{"SeqNo": 1, "Node": victim.ID, "SourceNode": s.nodes[1].ID}),
			said(t, 1, map[string]any{"SeqNo": 1, "Node": s.nodes[2].ID, "SourceNode": s.nodes[1].ID, "Nack": true}),
			// Answers to questions that it was not asked.
			said(t, 2, map[string]any{"SeqNo": 100000}),
			said(t, 11, map[string]any{"SeqNo": 100000}),
			// Somebody who is no member.
			said(t, 4, map[string]any{"Node": "nobody", "Incarnation": 9, "Addr": []byte{127, 0, 0, 1}, "Port": 1, "Vsn": []uint8{1, 5, 5, 0, 0, 0}}),
			said(t, 3, map[string]any{"Node": "nobody", "From": liar.ID}),
		} {
			if _, err := c.Write(frame(packet)); err != nil {
				t.Fatal(err)
			}
		}
		s.await("all of it is refused", 5*time.Second, func() bool { return victim.sum(t, "atoll_gossip_dropped_total") >= 6 })
		if got := victim.State("nobody"); got != gossip.Down {
			t.Errorf("nobody is %s", got)
		}
		// A member at an address of the liar's, and of a protocol that nobody speaks.
		for _, change := range []map[string]any{
			{"Addr": []byte{6, 6, 6, 6}}, {"Vsn": []uint8{200, 255, 255, 0, 0, 0}}, {"Meta": make([]byte, 600)},
		} {
			m := map[string]any{"Node": s.nodes[1].ID, "Incarnation": 50, "Addr": []byte{127, 0, 0, 1}, "Port": 1, "Vsn": []uint8{1, 5, 5, 0, 0, 0}}
			for k, v := range change {
				m[k] = v
			}
			if _, err := c.Write(frame(said(t, 4, m))); err != nil {
				t.Fatal(err)
			}
		}
		s.stays("nothing changed", 30*time.Second, truth)
		// That another is dead, again and again, is denied by who lives.
		for range 20 {
			if _, err := c.Write(frame(said(t, 5, map[string]any{"Node": s.nodes[1].ID, "Incarnation": 1, "From": liar.ID}))); err != nil {
				t.Fatal(err)
			}
			pass(time.Second)
		}
		s.await("who lives counts as up", 10*time.Second, truth)
	})
}

// TestMalformed ends the connection it came on, and no other.
func TestMalformed(t *testing.T) {
	meanwhile(t, 3, func(t *testing.T, s *site) {
		for _, packet := range [][]byte{{}, {9, 1, 2}, bytes.Repeat([]byte{7}, 1000), make([]byte, 2000)} {
			c := s.line(s.nodes[2], s.nodes[0])
			if _, err := c.Write(frame(packet)); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := c.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
				t.Errorf("%x: the connection is kept: %v", packet[:min(4, len(packet))], err)
			}
		}
		s.stays("all is well", 10*time.Second, s.allUp)
	})
}

// TestFlood of a member costs the site little: packets, connections, exchanges.
func TestFlood(t *testing.T) {
	meanwhile(t, 3, func(t *testing.T, s *site) {
		victim, flooder := s.nodes[0], s.nodes[2]
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		goroutines := runtime.NumGoroutine()
		c := s.line(flooder, victim)
		suspect := frame(said(t, 3, map[string]any{"Node": s.nodes[1].ID, "Incarnation": 0, "From": flooder.ID}))
		for range 20000 {
			if _, err := c.Write(suspect); err != nil {
				t.Fatal(err)
			}
		}
		var conns []net.Conn
		for range 50 {
			d, err := flooder.host.Dial(t.Context(), victim.Addr, gossip.Service)
			if err != nil {
				break
			}
			conns = append(conns, d)
			_, _ = d.Write([]byte{2, 0xff, 0xff, 0xff, 0xff})
		}
		synctest.Wait()
		runtime.GC()
		runtime.ReadMemStats(&after)
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
			t.Errorf("the flood holds %d bytes", grown)
		}
		if more := runtime.NumGoroutine() - goroutines; more > 30 {
			t.Errorf("the flood holds %d goroutines", more)
		}
		if dropped := victim.sum(t, "atoll_gossip_dropped_total"); dropped < 10000 {
			t.Errorf("%v dropped", dropped)
		}
		for _, d := range conns {
			d.Close()
		}
		s.stays("the others see each other", time.Minute, func() bool {
			return victim.State(s.nodes[1].ID) == gossip.Up && s.nodes[1].State(victim.ID) == gossip.Up
		})
	})
}

// TestClose leaves no goroutine behind, whatever is under way: the bubble would not
// end.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		s.nodes[0].stop() // before it has seen anybody
		s.await("the others see each other", 10*time.Second, func() bool { return s.nodes[1].State(s.nodes[2].ID) == gossip.Up })
		s.network.Cut(s.members[1].Addr, s.members[2].Addr)
		pass(1200 * time.Millisecond) // in the middle of a probe
		begun := time.Now()
		s.nodes[1].stop()
		if took := time.Since(begun); took > 4*time.Second {
			t.Errorf("stopping took %v", took)
		}
	})
}
