package reserve_test

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/reserve"
)

// inside runs this test in a process that may mount on dir what nobody else
// sees. It takes no rights: the process is root in a user namespace of its own.
func inside(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), smallDisk+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// smallDisk is the variable by which this binary runs on a file system of its
// own, in a directory of that name.
const smallDisk = "ATOLL_TEST_SMALL_DISK"

// onSmallDisk runs the test once more in a process that sees a small disk, and
// gives its directory there; "" outside.
func onSmallDisk(t *testing.T, size string) string {
	t.Helper()
	if dir := os.Getenv(smallDisk); dir != "" {
		if err := syscall.Mount("none", dir, "tmpfs", 0, "size="+size); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	inside(t, t.TempDir())
	return ""
}

type statfs struct{ dir string }

func (s statfs) Space() (free, total int64, err error) {
	var st syscall.Statfs_t
	err = syscall.Statfs(s.dir, &st)
	return int64(st.Bavail) * int64(st.Bsize), int64(st.Blocks) * int64(st.Bsize), err
}

// eat takes all that is free, and gives the way to give it back.
func eat(t *testing.T, dir string) (giveBack func()) {
	t.Helper()
	name := filepath.Join(dir, "eaten")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	for block := make([]byte, 4096); ; {
		if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := errors.Join(f.Close(), os.Remove(name)); err != nil {
			t.Error(err)
		}
	}
}

// The stores as they are, on a disk that fills: the ballast lets them go on, then
// the log says that there is no room and the state waits; nothing is lost, torn
// or applied twice, and all goes on when there is space again.
func TestRealDiskFills(t *testing.T) {
	dir := onSmallDisk(t, "24m")
	if dir == "" {
		return
	}
	r, err := reserve.Open(reserve.Path(dir), statfs{dir}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	store, err := kv.OpenLog(filepath.Join(dir, "log.db"))
	if err != nil {
		t.Fatal(err)
	}
	bolt, err := kv.OpenBolt(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	machine, err := kv.NewMachine(r.Engine(bolt), kv.Hooks{})
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := r.Fill(); !ok || err != nil {
		t.Fatalf("fill: %v, %v", ok, err)
	}
	logs := r.Logs(store)
	random := rand.NewChaCha8([32]byte{1}) // nothing that could be compressed
	entry := func(index uint64) *raft.Log { return bulky(t, random, index) }
	var acknowledged uint64
	write := func() error {
		e := entry(acknowledged + 1)
		if err := logs.StoreLogs([]*raft.Log{e}); err != nil {
			return err
		}
		acknowledged++
		if _, ok := machine.ApplyBatch([]*raft.Log{e})[0].(kv.Result); !ok {
			t.Fatalf("entry %d was not applied", e.Index)
		}
		return nil
	}
	for range 20 {
		if err := write(); err != nil {
			t.Fatal(err)
		}
	}
	giveBack := eat(t, dir)
	before := acknowledged
	for r.Held() != 0 { // the files have some free pages of their own
		if acknowledged > before+10_000 {
			t.Fatal("the disk does not fill")
		}
		if err := write(); err != nil {
			t.Fatalf("on a full disk with a ballast: %v, %d held", err, r.Held())
		}
	}
	t.Logf("%d entries were taken on a full disk until the ballast was given up", acknowledged-before)
	// Take what is left, now for good.
	giveMore := eatMore(t, dir)
	for err == nil && acknowledged < before+10_000 {
		e := entry(acknowledged + 1)
		if err = logs.StoreLogs([]*raft.Log{e}); err == nil {
			acknowledged++
			applied := make(chan any, 1)
			go func() { applied <- machine.ApplyBatch([]*raft.Log{e})[0] }()
			awaitApply(t, r, applied, func() { giveMore(); giveMore = eatMore(t, dir) })
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the log on a full disk: %v", err)
	}
	select {
	case err := <-r.Broken():
		t.Fatalf("a full disk ended the node: %v", err)
	default:
	}
	// A start on the full disk: nothing is left to give up, and the files open.
	if err := errors.Join(store.Close(), bolt.Close()); err != nil {
		t.Fatal(err)
	}
	verify(t, dir, acknowledged)
	if store, err = kv.OpenLog(filepath.Join(dir, "log.db")); err != nil {
		t.Fatalf("the log does not open on a full disk: %v", err)
	}
	if bolt, err = kv.OpenBolt(filepath.Join(dir, "state.db")); err != nil {
		t.Fatalf("the state does not open on a full disk: %v", err)
	}
	if machine, err = kv.NewMachine(r.Engine(bolt), kv.Hooks{}); err != nil {
		t.Fatal(err)
	}
	logs = r.Logs(store)
	giveMore()
	giveBack()
	if err := write(); err != nil {
		t.Fatalf("with space again: %v", err)
	}
	if ok, err := r.Fill(); !ok || err != nil {
		t.Errorf("the ballast does not come back: %v, %v", ok, err)
	}
	if machine.Applied() != acknowledged || machine.Err() != nil {
		t.Errorf("applied are %d of %d: %v", machine.Applied(), acknowledged, machine.Err())
	}
	if err := errors.Join(store.Close(), bolt.Close()); err != nil {
		t.Fatal(err)
	}
	verify(t, dir, acknowledged)
}

// bulky is an entry of 8 KiB.
func bulky(t *testing.T, random *rand.ChaCha8, index uint64) *raft.Log {
	t.Helper()
	value := make([]byte, 8<<10)
	_, _ = random.Read(value) // never fails
	txn := kv.Txn{ID: kv.NewID(), Base: index - 1, Ops: []kv.Op{{Kind: kv.Put, Key: fmt.Appendf(nil, "key%08d", index), Value: value}}}
	data, err := txn.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return &raft.Log{Index: index, Term: 1, Type: raft.LogCommand, Data: data}
}

// A state whose disk is full when what it has in memory is to be written: that
// waits, what was applied is read and goes on being applied, and a node that stops
// meanwhile loses nothing, since the log has it.
func TestTheStateIsBehindOnAFullDisk(t *testing.T) {
	dir := onSmallDisk(t, "24m")
	if dir == "" {
		return
	}
	r, err := reserve.Open(reserve.Path(dir), statfs{dir}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		t.Fatal(err)
	}
	start := func(stand func(kv.Engine) kv.Engine) (*kv.Log, kv.Engine, *kv.Machine) {
		store, err := kv.OpenLog(filepath.Join(dir, "log.db"))
		if err != nil {
			t.Fatal(err)
		}
		bolt, err := kv.OpenBolt(filepath.Join(dir, "state.db"))
		if err != nil {
			t.Fatal(err)
		}
		engine := kv.WriteBehind(stand(bolt))
		machine, err := kv.NewMachine(engine, kv.Hooks{})
		if err != nil {
			t.Fatal(err)
		}
		return store, engine, machine
	}
	store, engine, machine := start(r.Engine)
	const first, last = 20, 420
	random := rand.NewChaCha8([32]byte{2})
	var logs []*raft.Log
	for i := range uint64(last) {
		logs = append(logs, bulky(t, random, i+1))
	}
	machine.ApplyBatch(logs[:first])
	store.Stage(last)
	if err := errors.Join(engine.Sync(), store.StoreLogs(logs)); err != nil {
		t.Fatal(err)
	}
	giveBack := eat(t, dir)
	for i, answer := range machine.ApplyBatch(logs[first:]) {
		if _, ok := answer.(kv.Result); !ok {
			t.Fatalf("entry %d on a full disk: %v", first+i+1, answer)
		}
	}
	limit, tick := time.NewTimer(30*time.Second), time.NewTicker(20*time.Millisecond)
	defer limit.Stop()
	defer tick.Stop()
	for what := []string{}; len(what) == 0; what, _ = r.Waiting() {
		select {
		case <-tick.C:
		case <-limit.C:
			t.Fatal("the state does not wait for room")
		}
	}
	if err := engine.Read(func(c kv.Content) error {
		if _, ok := kv.ReadRow(c, fmt.Appendf(nil, "key%08d", last)); !ok || kv.Applied(c) != last {
			t.Errorf("while the state waits for room it reads as of %d", kv.Applied(c))
		}
		return nil
	}); err != nil || machine.Err() != nil {
		t.Fatal(err, machine.Err())
	}
	r.Stop()
	if err := engine.Close(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("closed while it waits: %v", err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	store, engine, machine = start(func(e kv.Engine) kv.Engine { return e })
	if at := machine.Applied(); at < first || at >= last {
		t.Errorf("the state on the disk is at %d", at)
	}
	giveBack()
	if err := machine.CatchUp(store); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(engine.Close(), store.Close()); err != nil {
		t.Fatal(err)
	}
	verify(t, dir, last)
}

// awaitApply waits for an entry to be applied; when the state waits for room, it
// makes some, once it has seen that.
func awaitApply(t *testing.T, r *reserve.Reserve, applied chan any, makeRoom func()) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for made := false; ; {
		select {
		case answer := <-applied:
			if _, ok := answer.(kv.Result); !ok {
				t.Fatalf("an entry was answered with %v", answer)
			}
			return
		case <-tick.C:
			if what, _ := r.Waiting(); len(what) > 0 && !made {
				made = true
				t.Logf("waiting for room: %v", what)
				makeRoom()
			}
		}
	}
}

// eatMore takes what is free now into a file of its own.
func eatMore(t *testing.T, dir string) func() {
	t.Helper()
	sub, err := os.MkdirTemp(dir, "more")
	if err != nil {
		t.Fatal(err)
	}
	back := eat(t, sub)
	return func() {
		back()
		_ = os.Remove(sub) // empty; nobody else looks
	}
}

// verify reads all that was acknowledged from the files as a new start does.
func verify(t *testing.T, dir string, acknowledged uint64) {
	t.Helper()
	store, err := kv.OpenLog(filepath.Join(dir, "log.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	bolt, err := kv.OpenBolt(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer bolt.Close()
	for i := uint64(1); i <= acknowledged; i++ {
		var l raft.Log
		if err := store.GetLog(i, &l); err != nil || l.Index != i {
			t.Fatalf("entry %d: %v", i, err)
		}
	}
	rows := 0
	if err := bolt.Read(func(c kv.Content) error {
		if kv.Applied(c) != acknowledged {
			t.Errorf("the state is at %d of %d", kv.Applied(c), acknowledged)
		}
		for range c.Ascend(kv.Space(0), nil, nil) {
			rows++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if uint64(rows) != acknowledged {
		t.Errorf("%d rows for %d entries", rows, acknowledged)
	}
}

// A database that finds no room for its first pages, or for some of them only, is none:
// the next start that finds room makes it.
func TestANewFileFindsNoRoom(t *testing.T) {
	dir := onSmallDisk(t, "1m")
	if dir == "" {
		return
	}
	opens := map[string]func(string) (io.Closer, error){
		"log.db":   func(path string) (io.Closer, error) { return kv.OpenLog(path) },
		"state.db": func(path string) (io.Closer, error) { return kv.OpenBolt(path) },
	}
	for name, open := range opens {
		path, room := filepath.Join(dir, name), filepath.Join(dir, "room")
		for pages, found := 0, false; !found; pages++ {
			if err := os.WriteFile(room, make([]byte, pages*os.Getpagesize()), 0o600); err != nil {
				t.Fatal(err)
			}
			giveBack := eat(t, dir)
			if err := os.Remove(room); err != nil {
				t.Fatal(err)
			}
			db, err := open(path)
			if found = err == nil; found {
				if err := db.Close(); err != nil {
					t.Fatal(err)
				}
				if t.Logf("%s takes %d pages", name, pages); pages < 4 {
					t.Errorf("%s was made in %d pages", name, pages)
				}
			} else if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("%s in %d pages: %v", name, pages, err)
			}
			giveBack()
			if db, err = open(path); err != nil {
				t.Fatalf("%s, which found %d pages, with space again: %v", name, pages, err)
			}
			if err := errors.Join(db.Close(), os.Remove(path)); err != nil {
				t.Fatal(err)
			}
			if left, err := filepath.Glob(path + ".first"); err != nil || len(left) > 0 {
				t.Errorf("%q is left, %v", left, err)
			}
		}
	}
}
