package reserve_test

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/reserve"
)

// noRoom is what a write to a full disk gives.
var noRoom = &fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}

// roomy is a disk with as much space as the test says.
type roomy struct{ free, total int64 }

func (r *roomy) Space() (free, total int64, err error) { return r.free, r.total, nil }

func open(t *testing.T, disk reserve.Disk) *reserve.Reserve {
	t.Helper()
	r, err := reserve.Open(reserve.Path(t.TempDir()), disk, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	return r
}

func TestBallast(t *testing.T) {
	disk := &roomy{free: 1 << 30, total: 100 << 20}
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	r, err := reserve.Open(reserve.Path(dir), disk, log)
	if err != nil {
		t.Fatal(err)
	}
	fill := func(want bool) {
		t.Helper()
		if ok, err := r.Fill(); ok != want || err != nil {
			t.Errorf("fill: %v, %v", ok, err)
		}
	}
	size := func() int64 {
		info, err := os.Stat(reserve.Path(dir))
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	if r.Release() {
		t.Error("gave up a ballast that was never made")
	}
	fill(true)
	if r.Held() != 1<<20 || size() != 1<<20 {
		t.Errorf("one part in a hundred of 100 MiB is %d, on the disk %d", r.Held(), size())
	}
	if !r.Release() || r.Held() != 0 || size() != 0 {
		t.Errorf("released, it holds %d, on the disk %d", r.Held(), size())
	}
	disk.free = 3 << 20 // not plenty
	fill(false)
	disk.free = 5 << 20
	fill(true)
	if r, err = reserve.Open(reserve.Path(dir), disk, log); err != nil || r.Held() != 1<<20 {
		t.Errorf("a new start finds %d, %v", r.Held(), err)
	}
	disk.free = 100 << 10
	if r, err = reserve.Open(reserve.Path(dir), disk, log); err != nil || r.Held() != 0 {
		t.Errorf("a start on a full disk keeps %d in the way of its own writes, %v", r.Held(), err)
	}
	disk.free, disk.total = 1<<40, 1<<40
	fill(true)
	if r.Held() != reserve.Most {
		t.Errorf("of a large disk it takes %d", r.Held())
	}
}

// memory is what raft keeps, with a disk that fails as told.
type memory struct {
	*raft.InmemStore
	mu     sync.Mutex
	fail   error
	sneaky bool // the change can be seen although it failed
	tries  int
}

func (m *memory) set(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

func (m *memory) change(do func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tries++
	if m.fail == nil || m.sneaky {
		if err := do(); err != nil {
			return err
		}
	}
	return m.fail
}

func (m *memory) StoreLogs(logs []*raft.Log) error {
	return m.change(func() error { return m.InmemStore.StoreLogs(logs) })
}

func (m *memory) Set(key, value []byte) error {
	return m.change(func() error { return m.InmemStore.Set(key, value) })
}

func (m *memory) SetUint64(key []byte, value uint64) error {
	return m.change(func() error { return m.InmemStore.Set(key, []byte(fmt.Sprint(value))) })
}

// Raft's term waits for room, and raft goes on where it was.
func TestTermWaitsForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, &roomy{free: 1 << 30, total: 1 << 30})
		if _, err := r.Fill(); err != nil {
			t.Fatal(err)
		}
		m := &memory{InmemStore: raft.NewInmemStore()}
		stable := r.Stable(m)
		m.set(noRoom)
		done := make(chan error, 1)
		go func() { done <- stable.SetUint64([]byte("CurrentTerm"), 7) }()
		<-time.After(time.Minute)
		if r.Held() != 0 {
			t.Error("the ballast was not given up")
		}
		what, since := r.Waiting()
		if len(what) != 1 || !strings.Contains(what[0], "CurrentTerm") || time.Since(since) < 50*time.Second {
			t.Errorf("waiting are %v since %v", what, since)
		}
		if ok, _ := r.Fill(); ok {
			t.Error("the ballast takes the room that somebody waits for")
		}
		m.set(nil)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if what, _ := r.Waiting(); len(what) != 0 {
			t.Errorf("still waiting: %v", what)
		}
		if v, err := m.Get([]byte("CurrentTerm")); err != nil || string(v) != "7" {
			t.Errorf("the term is %s, %v", v, err)
		}
	})
}

// A term that cannot be written does not end the process: the node is told to
// stop, and until it has, nothing is promised in that term.
func TestBrokenDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, &roomy{free: 1 << 30, total: 1 << 30})
		m := &memory{InmemStore: raft.NewInmemStore(), fail: &fs.PathError{Op: "write", Path: "x", Err: syscall.EIO}}
		stable, logs := r.Stable(m), r.Logs(m)
		done := make(chan error, 1)
		go func() { done <- stable.SetUint64([]byte("CurrentTerm"), 7) }()
		err := <-r.Broken()
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "start the node again") {
			t.Errorf("broken: %v", err)
		}
		synctest.Wait()
		select {
		case err := <-done:
			t.Errorf("the term was taken as written before the node stops: %v", err)
		default:
		}
		r.Stop()
		if err := <-done; err != nil {
			t.Errorf("raft would end the process: %v", err)
		}
		m.set(nil) // even if the disk works again
		if err := stable.SetUint64([]byte("LastVoteTerm"), 7); err == nil {
			t.Error("a vote in a term that is on no disk")
		}
		if err := logs.StoreLogs([]*raft.Log{{Index: 1, Term: 7}}); err == nil {
			t.Error("an entry in a term that is on no disk")
		}
	})
}

// Whatever is not certainly a write that did nothing is not tried again.
func TestDoubtEndsTheNode(t *testing.T) {
	for name, m := range map[string]*memory{
		"a failed sync":                  {fail: syscall.ENOSPC},
		"a broken disk":                  {fail: &fs.PathError{Op: "write", Path: "x", Err: syscall.EIO}},
		"a refusal that can be seen":     {fail: noRoom, sneaky: true},
		"a sync that says no room (Nfs)": {fail: &fs.PathError{Op: "sync", Path: "x", Err: syscall.EDQUOT}},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, &roomy{free: 1 << 30, total: 1 << 30})
			if _, err := r.Fill(); err != nil {
				t.Fatal(err)
			}
			m.InmemStore = raft.NewInmemStore()
			if err := r.Logs(m).StoreLogs([]*raft.Log{{Index: 1, Term: 1}}); err == nil {
				t.Error("taken for written")
			}
			if m.tries != 1 {
				t.Errorf("tried %d times", m.tries)
			}
			select {
			case <-r.Broken():
			default:
				t.Error("the node goes on")
			}
			if r.Held() == 0 {
				t.Error("the ballast was given up for nothing")
			}
		})
	}
}

// An entry does not wait: raft is told, and the node is not.
func TestLogDoesNotWait(t *testing.T) {
	r := open(t, &roomy{free: 1 << 30, total: 1 << 30})
	m := &memory{InmemStore: raft.NewInmemStore(), fail: noRoom}
	if err := r.Logs(m).StoreLogs([]*raft.Log{{Index: 1, Term: 1}}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("without a ballast: %v", err)
	}
	if _, err := r.Fill(); err != nil {
		t.Fatal(err)
	}
	if err := r.Logs(m).StoreLogs([]*raft.Log{{Index: 1, Term: 1}}); !errors.Is(err, syscall.ENOSPC) || r.Held() != 0 {
		t.Errorf("with a ballast that is not enough: %v, %d held", err, r.Held())
	}
	select {
	case err := <-r.Broken():
		t.Error(err)
	default:
	}
	m.set(nil)
	if err := r.Logs(m).StoreLogs([]*raft.Log{{Index: 1, Term: 1}}); err != nil {
		t.Error(err)
	}
}

// What takes the place of a cut end waits: raft would not know of the cut.
func TestLogWaitsAfterACut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, &roomy{free: 1 << 30, total: 1 << 30})
		m := &memory{InmemStore: raft.NewInmemStore()}
		logs := r.Logs(m)
		if err := logs.StoreLogs([]*raft.Log{{Index: 1, Term: 1}, {Index: 2, Term: 1}, {Index: 3, Term: 1}}); err != nil {
			t.Fatal(err)
		}
		if err := logs.DeleteRange(2, 3); err != nil {
			t.Fatal(err)
		}
		m.set(noRoom)
		done := make(chan error, 1)
		go func() { done <- logs.StoreLogs([]*raft.Log{{Index: 2, Term: 2}}) }()
		<-time.After(time.Minute)
		select {
		case err := <-done:
			t.Fatalf("the entry did not wait: %v", err)
		default:
		}
		m.set(nil)
		if err := <-done; err != nil {
			t.Error(err)
		}
		// A cut at the beginning, as behind a snapshot, is no such cut.
		if err := logs.DeleteRange(1, 1); err != nil {
			t.Fatal(err)
		}
		m.set(noRoom)
		if err := logs.StoreLogs([]*raft.Log{{Index: 3, Term: 2}}); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("behind a cut of the beginning: %v", err)
		}
	})
}

// crowded is an engine whose disk is full for a while.
type crowded struct {
	kv.Engine
	memory
}

func (c *crowded) Update(fn func(kv.Writer) error) error {
	return c.change(func() error { return c.Engine.Update(fn) })
}

// What is committed waits for room and is then applied, once.
func TestStateWaitsForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, &roomy{free: 1 << 30, total: 1 << 30})
		disk := &crowded{Engine: kv.NewMemory()}
		machine, err := kv.NewMachine(r.Engine(disk), kv.Hooks{})
		if err != nil {
			t.Fatal(err)
		}
		txn := kv.Txn{ID: kv.NewID(), Ops: []kv.Op{{Kind: kv.Append, Key: []byte("log"), Value: []byte("once")}}}
		data, err := txn.Encode()
		if err != nil {
			t.Fatal(err)
		}
		disk.set(noRoom)
		applied := make(chan any, 1)
		go func() {
			applied <- machine.ApplyBatch([]*raft.Log{{Index: 1, Term: 1, Type: raft.LogCommand, Data: data}})[0]
		}()
		<-time.After(time.Minute)
		if what, _ := r.Waiting(); strings.Join(what, ",") != "the state" {
			t.Errorf("waiting are %v", what)
		}
		select {
		case <-machine.Halted():
			t.Error("the state machine halted on a full disk")
		default:
		}
		disk.set(nil)
		if answer, ok := (<-applied).(kv.Result); !ok || answer.Rev != 1 {
			t.Errorf("answered %+v", answer)
		}
		if err := disk.Read(func(c kv.Content) error {
			n := 0
			for range c.Ascend(kv.Space(2), nil, nil) {
				n++
			}
			if n != 1 {
				t.Errorf("appended %d times", n)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}

		// A node that stops while it waits applies nothing and says so.
		disk.set(noRoom)
		txn.ID, txn.Base = kv.NewID(), 1
		if data, err = txn.Encode(); err != nil {
			t.Fatal(err)
		}
		go func() {
			applied <- machine.ApplyBatch([]*raft.Log{{Index: 2, Term: 1, Type: raft.LogCommand, Data: data}})[0]
		}()
		synctest.Wait()
		r.Stop()
		if err, ok := (<-applied).(error); !ok || !errors.Is(err, syscall.ENOSPC) || machine.Applied() != 1 {
			t.Errorf("stopped while it waits: %v, applied %d", err, machine.Applied())
		}
	})
}
