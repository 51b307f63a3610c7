package lab

import (
	"context"
	"encoding/binary"
	"net"
	"os"
	"slices"
	"testing"
	"time"
)

// pair is two hosts with a line between their switches and a socket on each.
func pair(t *testing.T, p Path) (a, b net.PacketConn, line *Line) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("a lab takes root, or a user namespace of one's own: unshare -rn")
	}
	l := New()
	t.Cleanup(func() {
		// The test's own context has ended by now.
		if err := l.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	var ends []net.PacketConn
	for _, side := range []struct{ name, ip string }{{"near", "10.77.0.1"}, {"far", "10.77.0.2"}} {
		h, err := l.Host(t.Context(), side.name, side.name, side.ip+"/24")
		if err != nil {
			t.Fatal(err)
		}
		conn, err := h.ListenPacket(side.ip + ":7000")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		ends = append(ends, conn)
	}
	line, err := l.Line(t.Context(), "near", "far", p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := line.Close(); err != nil {
			t.Error(err)
		}
	})
	return ends[0], ends[1], line
}

func echo(c net.PacketConn) {
	buf := make([]byte, 2000)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(buf[:n], from)
	}
}

// roundTrip sends one small packet and waits for it to come back.
func roundTrip(t *testing.T, a, b net.PacketConn) time.Duration {
	t.Helper()
	buf := make([]byte, 8)
	for range 20 { // the first may be lost while addresses are looked up
		start := time.Now()
		if _, err := a.WriteTo(buf, b.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		_ = a.SetReadDeadline(time.Now().Add(2 * time.Second))
		if _, _, err := a.ReadFrom(buf); err == nil {
			return time.Since(start)
		}
	}
	t.Fatal("nothing comes back over the line")
	return 0
}

func TestLineDelays(t *testing.T) {
	const delay = 40 * time.Millisecond
	a, b, _ := pair(t, Path{Delay: delay})
	go echo(b)
	roundTrip(t, a, b)
	var took []time.Duration
	for range 20 {
		took = append(took, roundTrip(t, a, b))
	}
	least := slices.Min(took)
	if least < 2*delay || least > 2*delay+20*time.Millisecond {
		t.Errorf("the shortest round trip takes %v, want %v and little more", least, 2*delay)
	}
}

func TestLineLoses(t *testing.T) {
	a, b, line := pair(t, Path{Loss: 0.05, Seed: 7, Queue: 8 << 20})
	go echo(b)
	roundTrip(t, a, b)
	const packets = 4000
	sent, lost := line.Sent.Load(), line.Lost.Load()
	before := sent + lost
	pace := time.NewTicker(2 * time.Millisecond)
	defer pace.Stop()
	for i := range packets {
		if _, err := a.WriteTo(binary.BigEndian.AppendUint32(nil, uint32(i)), b.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		if i%100 == 99 { // so that no socket overflows
			<-pace.C
		}
	}
	deadline := time.Now().Add(10 * time.Second)
	for line.Sent.Load()+line.Lost.Load() < before+packets && time.Now().Before(deadline) {
		<-pace.C
	}
	passed, vanished := line.Sent.Load()-sent, line.Lost.Load()-lost
	if share := float64(vanished) / float64(passed+vanished); share < 0.03 || share > 0.07 {
		t.Errorf("%d of %d packets were lost, %.3f, want about 0.05", vanished, passed+vanished, share)
	}
}

func TestLineKeepsItsRate(t *testing.T) {
	const rate = 256 << 10
	a, b, line := pair(t, Path{Rate: rate, Queue: 32 << 10})
	go echo(b)
	roundTrip(t, a, b)
	pace := time.NewTicker(20 * time.Millisecond)
	defer pace.Stop()
	start, bytes := time.Now(), line.Bytes[0].Load()
	for time.Since(start) < time.Second {
		for range 40 { // 56 KB at once do not fit into the queue
			if _, err := a.WriteTo(make([]byte, 1400), b.LocalAddr()); err != nil {
				t.Fatal(err)
			}
		}
		<-pace.C
	}
	took := time.Since(start).Seconds()
	carried := float64(line.Bytes[0].Load() - bytes)
	// The queue may be filled beyond what was carried in that time.
	if most := rate*took + 48<<10; carried > most || carried < 0.5*rate*took {
		t.Errorf("%.0f bytes were carried in %.2f s, want at most %.0f and at least half of the rate", carried, took, most)
	}
	if line.Lost.Load() == 0 {
		t.Error("nothing was dropped though more came than the line carries")
	}
}
