// Package faultfs is a file system in memory that fails where a test tells it
// to: it counts every step, and any single one can fail, write short, fill the
// disk or be the last before the machine stops. It knows what has been synced,
// so that a test can take away what a power cut would.
//
// The model of durability, after journalling file systems at their worst:
//   - Bytes are durable once their file was synced. A power cut loses others
//     whole or torn in blocks of 512 bytes, zeros included. After a failed sync the
//     unsynced bytes of that time are lost for good, although later syncs succeed.
//   - Names (create, rename, remove, mkdir) become durable in order. SyncDir makes
//     durable everything up to the last change in that directory; syncing a file
//     says nothing of its name. A power cut keeps any prefix of the others.
//   - A stopped process loses nothing of either.
package faultfs

import (
	"errors"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/atoll-registry/atoll/node/blobs"
)

// ErrCrashed answers every step from the crash on, until Restart.
var ErrCrashed = errors.New("faultfs: the machine has stopped")

// Fault is what happens at one step.
type Fault struct {
	// Err is returned instead of doing the step.
	Err error
	// Short lets a write do this many bytes before it fails with Err, or before
	// it returns the short count without an error when Err is nil.
	Short int
	// Crash stops the machine before the step; a write tears after Short bytes.
	Crash bool
}

// Loss is what a restart takes away.
type Loss uint8

const (
	// Killed: the process stopped, the kernel went on.
	Killed Loss = iota
	// PowerCut takes everything that was not synced.
	PowerCut
	// Torn takes a random part of what was not synced.
	Torn
)

// FS implements blobs.FS. The zero value is not usable: see New.
type FS struct {
	mu       sync.Mutex
	names    map[string]*node // as running programs see them
	order    []string         // names in order; nil when they have changed
	durable  map[string]*node // as a power cut leaves them
	journal  []change         // between the two, in order
	faults   map[int]Fault
	steps    int
	crashed  bool
	life     int // handles of an earlier one are dead
	capacity int64
}

type node struct {
	dir    bool
	data   []byte
	synced []byte
	// lost says that a sync failed: the bytes that differ from synced stay lost.
	lost bool
	at   time.Time
	bad  error // what reading it gives
}

type change struct {
	from, to string // from "" creates, to "" removes
	node     *node
}

// New gives an empty file system.
func New() *FS {
	root := &node{dir: true}
	return &FS{names: map[string]*node{".": root}, durable: map[string]*node{".": root}, faults: map[int]Fault{}}
}

// Clone copies the files, what is durable of them, and the capacity; the steps
// of the copy count from 0.
func (f *FS) Clone() *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	copies := map[*node]*node{}
	twin := func(n *node) *node {
		if n != nil && copies[n] == nil {
			copies[n] = &node{n.dir, slices.Clone(n.data), slices.Clone(n.synced), n.lost, n.at, n.bad}
		}
		return copies[n]
	}
	c := New()
	for name, n := range f.names {
		c.names[name] = twin(n)
	}
	for name, n := range f.durable {
		c.durable[name] = twin(n)
	}
	for _, ch := range f.journal {
		c.journal = append(c.journal, change{ch.from, ch.to, twin(ch.node)})
	}
	c.capacity = f.capacity
	return c
}

// Steps gives how many steps were made so far; the next has this number.
func (f *FS) Steps() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.steps
}

// Inject makes the step with the number fail.
func (f *FS) Inject(step int, fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults[step] = fault
}

// SetCapacity bounds the bytes of all files, as a disk does; 0 is unbounded.
func (f *FS) SetCapacity(bytes int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.capacity = bytes
}

// Flip inverts one bit of a stored file, as a rotten disk does.
func (f *FS) Flip(name string, bit int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.names[path.Clean(name)]
	for _, bytes := range [][]byte{n.data, n.synced} {
		if bit/8 < int64(len(bytes)) {
			bytes[bit/8] ^= 1 << (bit % 8)
		}
	}
}

// Spoil makes every read of a stored file fail, as sectors that went bad do; nil
// makes it readable again.
func (f *FS) Spoil(name string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.names[path.Clean(name)].bad = err
}

// Stop stops the machine now, for a test in which something else than the disk
// does.
func (f *FS) Stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.crashed = true
}

// Crashed reports whether the machine has stopped.
func (f *FS) Crashed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.crashed
}

// Restart starts the machine again, with what the loss leaves; seed chooses
// what Torn takes. Injected faults that were not met are forgotten.
func (f *FS) Restart(loss Loss, seed uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.life++
	f.crashed = false
	f.faults = map[int]Fault{}
	if loss == Killed {
		return
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	kept := 0
	if loss == Torn {
		kept = rng.IntN(len(f.journal) + 1)
	}
	f.settle(kept)
	f.journal = nil
	f.names, f.order = maps.Clone(f.durable), nil
	seen := map[*node]bool{}
	for _, name := range slices.Sorted(maps.Keys(f.names)) {
		n := f.names[name]
		if n.dir || seen[n] {
			continue
		}
		seen[n] = true
		if loss == Torn {
			n.data = tear(rng, n)
		} else {
			n.data = slices.Clone(n.synced)
		}
		n.synced, n.lost = slices.Clone(n.data), false
	}
}

// tear mixes what was synced, what was written since, and zeros.
func tear(rng *rand.Rand, n *node) []byte {
	least, most := min(len(n.synced), len(n.data)), max(len(n.synced), len(n.data))
	size := []int{least, most, least + rng.IntN(most-least+1)}[rng.IntN(3)]
	out := make([]byte, size)
	const block = 512
	for at := 0; at < size; at += block {
		end := min(at+block, size)
		from := n.data
		if n.lost || rng.IntN(2) == 0 {
			from = n.synced
		}
		if at < len(from) {
			copy(out[at:end], from[at:])
		}
	}
	return out
}

// settle makes the first n changes of names durable.
func (f *FS) settle(n int) {
	for _, c := range f.journal[:n] {
		if c.from != "" {
			delete(f.durable, c.from)
		}
		if c.to != "" {
			f.durable[c.to] = c.node
		}
	}
	f.journal = slices.Clone(f.journal[n:])
}

// step counts one step; the caller holds f.mu.
func (f *FS) step(life int) (Fault, error) {
	if f.crashed || life != f.life {
		return Fault{}, ErrCrashed
	}
	fault := f.faults[f.steps]
	f.steps++
	if fault.Crash {
		f.crashed = true
		return fault, ErrCrashed
	}
	return fault, fault.Err
}

func (f *FS) begin() error {
	_, err := f.step(f.life)
	return err
}

func missing(op, name string) error {
	return &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
}

func (f *FS) change(from, to string, n *node) {
	f.journal = append(f.journal, change{from, to, n})
	if from != "" {
		delete(f.names, from)
		f.order = nil
	}
	if to != "" {
		f.names[to] = n
		f.order = nil
	}
}

// OpenFile implements blobs.FS.
func (f *FS) OpenFile(name string, flag int) (blobs.Handle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(); err != nil {
		return nil, err
	}
	name = path.Clean(name)
	n := f.names[name]
	switch {
	case n == nil && flag&os.O_CREATE == 0:
		return nil, missing("open", name)
	case n == nil:
		if parent := f.names[path.Dir(name)]; parent == nil || !parent.dir {
			return nil, missing("open", name)
		}
		n = &node{at: time.Now()}
		f.change("", name, n)
	case n.dir:
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EISDIR}
	case flag&os.O_EXCL != 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrExist}
	case flag&os.O_TRUNC != 0:
		n.data = nil
	}
	return &handle{f: f, node: n, name: name, life: f.life}, nil
}

// Mkdir implements blobs.FS.
func (f *FS) Mkdir(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(); err != nil {
		return err
	}
	name = path.Clean(name)
	if f.names[name] != nil {
		return nil
	}
	if f.names[path.Dir(name)] == nil {
		return missing("mkdir", name)
	}
	f.change("", name, &node{dir: true, at: time.Now()})
	return nil
}

// Rename implements blobs.FS, for files.
func (f *FS) Rename(from, to string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(); err != nil {
		return err
	}
	from, to = path.Clean(from), path.Clean(to)
	n := f.names[from]
	if n == nil || f.names[path.Dir(to)] == nil {
		return missing("rename", from)
	}
	if n.dir {
		return &fs.PathError{Op: "rename", Path: from, Err: syscall.EISDIR}
	}
	f.change(from, to, n)
	return nil
}

// Remove implements blobs.FS.
func (f *FS) Remove(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(); err != nil {
		return err
	}
	name = path.Clean(name)
	n := f.names[name]
	if n == nil {
		return missing("remove", name)
	}
	if n.dir && len(f.below(name)) > 0 {
		return &fs.PathError{Op: "remove", Path: name, Err: syscall.ENOTEMPTY}
	}
	f.change(name, "", n)
	return nil
}

func (f *FS) below(dir string) []string {
	var names []string
	prefix := dir + "/"
	if dir == "." {
		prefix = ""
	}
	if f.order == nil {
		f.order = slices.Sorted(maps.Keys(f.names))
	}
	first, _ := slices.BinarySearch(f.order, prefix)
	for _, name := range f.order[first:] {
		base, ok := strings.CutPrefix(name, prefix)
		if !ok {
			break
		}
		if name != "." && !strings.Contains(base, "/") {
			names = append(names, base)
		}
	}
	return names
}

// ReadDir implements blobs.FS.
func (f *FS) ReadDir(name string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(); err != nil {
		return nil, err
	}
	name = path.Clean(name)
	if n := f.names[name]; n == nil || !n.dir {
		return nil, missing("readdir", name)
	}
	return f.below(name), nil
}

// Stat implements blobs.FS.
func (f *FS) Stat(name string) (fs.FileInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(); err != nil {
		return nil, err
	}
	name = path.Clean(name)
	n := f.names[name]
	if n == nil {
		return nil, missing("stat", name)
	}
	return info{path.Base(name), int64(len(n.data)), n.dir, n.at}, nil
}

// SyncDir implements blobs.FS.
func (f *FS) SyncDir(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(); err != nil {
		return err
	}
	name = path.Clean(name)
	if n := f.names[name]; n == nil || !n.dir {
		return missing("sync", name)
	}
	last := 0
	for i, c := range f.journal {
		if in(c.from, name) || in(c.to, name) {
			last = i + 1
		}
	}
	f.settle(last)
	return nil
}

func in(name, dir string) bool { return name != "" && path.Dir(name) == dir }

// Space implements blobs.FS.
func (f *FS) Space() (free, total int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(); err != nil {
		return 0, 0, err
	}
	total = f.capacity
	if total == 0 {
		total = 1 << 50
	}
	return total - f.used(), total, nil
}

func (f *FS) used() int64 {
	var n int64
	for _, node := range f.names {
		n += int64(len(node.data))
	}
	return n
}

// Dump lists the files below a directory, for tests that look for leftovers.
func (f *FS) Dump(dir string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for name, n := range f.names {
		if !n.dir && strings.HasPrefix(name, path.Clean(dir)+"/") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

type info struct {
	name string
	size int64
	dir  bool
	at   time.Time
}

func (i info) Name() string       { return i.name }
func (i info) Size() int64        { return i.size }
func (i info) ModTime() time.Time { return i.at }
func (i info) IsDir() bool        { return i.dir }
func (i info) Sys() any           { return nil }
func (i info) Mode() fs.FileMode {
	if i.dir {
		return fs.ModeDir | 0o700
	}
	return 0o600
}
