package lab

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Path is what a Line does to the packets that go each way.
type Path struct {
	Rate  int64         // bytes a second; 0 means as fast as it goes
	Delay time.Duration // one way
	Loss  float64       // share of packets that vanish, 0 to 1
	// Queue is how many bytes may wait for the line before more are dropped; 0
	// means what the line carries in 100 ms, at least 64 KiB.
	Queue int64
	// MTU of the line, bytes with the headers of IP; longer packets vanish, and nobody is
	// told. 0: as long as the links' own.
	MTU  int
	Seed uint64 // of what is lost
}

// Line joins two switches by a long path: every frame passes through this process,
// which delays and loses it. It stands in for netem, which not every kernel has.
type Line struct {
	ends [2]*os.File
	wg   sync.WaitGroup

	// Sent and Lost count frames of both directions; Lost has those of a full queue.
	Sent, Lost atomic.Int64
	// Bytes that were carried, by direction: from the first switch, from the second.
	Bytes [2]atomic.Int64
}

// frameRoom holds an Ethernet frame: the links here have an MTU of 1500.
const (
	frameRoom   = 1600
	etherHeader = 14
)

// Line joins the switches a and b, on which there must be hosts. The hosts of both
// share one subnet then. Close the line before the lab.
func (l *Lab) Line(ctx context.Context, a, b string, p Path) (*Line, error) {
	if p.Queue == 0 {
		p.Queue = max(p.Rate/10, 64<<10)
	}
	line := &Line{}
	for i, sw := range []string{a, b} {
		l.mu.Lock()
		space, ok := l.switches[sw]
		l.ports++
		name := fmt.Sprintf("line%d", l.ports)
		l.mu.Unlock()
		var err error
		if !ok {
			err = fmt.Errorf("join a line: there is no switch %q", sw)
		} else {
			line.ends[i], err = openTap(space, name)
		}
		if err == nil {
			err = runAll(ctx, "ip -n "+space+" link set "+name+" master br0", "ip -n "+space+" link set "+name+" up")
		}
		if err != nil {
			return nil, errors.Join(err, line.Close())
		}
	}
	for i := range line.ends {
		line.carry(i, p)
	}
	return line, nil
}

// openTap makes the device that gives this process the frames of a switch.
func openTap(space, name string) (*os.File, error) {
	var file *os.File
	err := inside(space, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		request, err := unix.NewIfreq(name)
		if err == nil {
			request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
		}
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		file = os.NewFile(uintptr(fd), name)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("make a line's end on a switch: %w", err)
	}
	return file, nil
}

// inside runs fn in a network namespace. The thread is not unlocked, so it ends
// with the goroutine and nobody else runs there.
func inside(space string, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		f, err := os.Open("/run/netns/" + space)
		if err != nil {
			done <- err
			return
		}
		defer f.Close()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the network %s: %w", space, err)
			return
		}
		done <- fn()
	}()
	return <-done
}

// frame is one on its way.
type frame struct {
	due  time.Time
	data []byte
}

// carry takes frames from one end to the other until the line is closed.
func (l *Line) carry(from int, p Path) {
	in, out := l.ends[from], l.ends[1-from]
	// What the line holds at once: those that wait and those that are under way.
	room := p.Queue/60 + int64(float64(p.Rate)*p.Delay.Seconds())/60 + 1024
	way := make(chan frame, room)
	var free sync.Pool
	free.New = func() any { b := make([]byte, frameRoom); return &b }
	l.wg.Go(func() {
		defer close(way)
		luck := rand.New(rand.NewPCG(p.Seed, uint64(from)))
		var busy time.Time // the line's beginning is, until then
		for {
			buf := free.Get().(*[]byte)
			n, err := in.Read(*buf)
			if err != nil {
				return // closed
			}
			now := time.Now()
			waiting := int64(0)
			if p.Rate > 0 {
				if busy.Before(now) {
					busy = now
				}
				waiting = int64(busy.Sub(now).Seconds() * float64(p.Rate))
			}
			if p.MTU > 0 && n > p.MTU+etherHeader || waiting+int64(n) > p.Queue || luck.Float64() < p.Loss {
				l.Lost.Add(1)
				free.Put(buf)
				continue
			}
			due := now.Add(p.Delay)
			if p.Rate > 0 {
				busy = busy.Add(time.Duration(float64(n) / float64(p.Rate) * float64(time.Second)))
				due = busy.Add(p.Delay)
			}
			l.Bytes[from].Add(int64(n))
			select {
			case way <- frame{due, (*buf)[:n]}:
			default: // more small frames than it was made for
				l.Lost.Add(1)
			}
		}
	})
	l.wg.Go(func() {
		for f := range way {
			time.Sleep(time.Until(f.due))
			if _, err := out.Write(f.data); err == nil {
				l.Sent.Add(1)
			}
			whole := f.data[:cap(f.data)]
			free.Put(&whole)
		}
	})
}

// Close takes the line away; what is under way is lost.
func (l *Line) Close() error {
	var errs []error
	for _, end := range l.ends {
		if end != nil {
			errs = append(errs, end.Close())
		}
	}
	l.wg.Wait()
	return errors.Join(errs...)
}
