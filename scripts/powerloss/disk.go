package main

import (
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
)

// sector is the unit in which a write tears.
const sector = 512

// loss is what a power cut takes away.
type loss string

const (
	// killed: the process stopped and the kernel went on. Nothing is lost.
	killed loss = "killed"
	// cut takes all that was not synced.
	cut loss = "cut"
	// torn keeps a random part of the bytes that were not synced, sector by
	// sector, and the names up to a random change after the last that was synced.
	torn loss = "torn"
	// reordered is torn, and keeps of the names any part: one that was given later
	// may be there without those before it.
	reordered loss = "reordered"
	// bare is what reordered leaves at worst: no byte and no name that was not synced
	// itself.
	bare loss = "bare"
)

// losses are all of them.
func losses() []loss { return []loss{killed, cut, torn, reordered, bare} }

// disk knows of a directory what a running program sees and what of it is
// durable. Its promises are those of journalling file systems at their worst, and
// the same as package faultfs makes to the content store:
//   - Bytes and sizes are durable once their file was synced after them.
//   - Names (create, rename, link, remove, mkdir) become durable in order. The
//     sync of a directory makes durable everything up to the last change in it;
//     the sync of a file says nothing of its name. A rename is whole or not at all.
type disk struct {
	root    *inode
	journal []change
	durable int  // so many changes of the journal are, when their order holds
	clock   int  // counts edits and changes
	deaf    bool // syncs are answered and not done: for a test of the judge
}

// inode is a file or a directory.
type inode struct {
	names   map[string]*inode // of a directory; nil for a file
	data    content           // as a running program reads it
	synced  content
	pending []edit
}

// edit is a change to a file's bytes: data at off, or the size when data is nil.
type edit struct {
	at   int
	off  int64
	data []byte
}

// change is one step of the names; all of it happens or none.
type change struct {
	at     int
	sets   []name
	synced bool // by a sync of a directory that it touches
}

// name is what an entry becomes; nil is gone.
type name struct {
	dir *inode
	key string
	to  *inode
}

func newDisk() *disk { return &disk{root: &inode{names: map[string]*inode{}}} }

// walk finds a path below the root; parent is nil when its directory is not there.
func (d *disk) walk(from *inode, path string) (parent *inode, key string, found *inode) {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	at := from
	for i, part := range parts {
		if part == "" || part == "." {
			return at, "", at
		}
		if at == nil || at.names == nil {
			return nil, "", nil
		}
		if i == len(parts)-1 {
			return at, part, at.names[part]
		}
		at = at.names[part]
	}
	return nil, "", nil
}

// rename, create and remove are all of this form.
func (d *disk) set(sets ...name) {
	d.clock++
	for _, s := range sets {
		if s.to == nil {
			delete(s.dir.names, s.key)
		} else {
			s.dir.names[s.key] = s.to
		}
	}
	d.journal = append(d.journal, change{at: d.clock, sets: sets})
}

// write puts bytes at off; resize sets the size.
func (d *disk) write(f *inode, off int64, data []byte) {
	d.clock++
	f.pending = append(f.pending, edit{d.clock, off, data})
	f.data.put(off, data)
}

func (d *disk) resize(f *inode, size int64) {
	d.clock++
	f.pending = append(f.pending, edit{d.clock, size, nil})
	f.data.resize(size)
}

// sync makes durable what was done to an inode up to the moment mark.
func (d *disk) sync(f *inode, mark int) {
	if d.deaf {
		return
	}
	if f.names == nil {
		n := 0
		for n < len(f.pending) && f.pending[n].at <= mark {
			f.pending[n].apply(&f.synced)
			n++
		}
		f.pending = slices.Delete(f.pending, 0, n)
		return
	}
	for i := range d.journal {
		c := &d.journal[i]
		if c.at > mark {
			break
		}
		if slices.ContainsFunc(c.sets, func(s name) bool { return s.dir == f }) {
			c.synced = true
			d.durable = max(d.durable, i+1)
		}
	}
}

func (e edit) apply(c *content) {
	if e.data == nil {
		c.resize(e.off)
	} else {
		c.put(e.off, e.data)
	}
}

// image is the tree that the next start finds: files by path, and directories
// with nil.
type image map[string]*content

// after gives what a loss leaves of the disk.
func (d *disk) after(l loss, dice *rand.Rand) image {
	names := map[*inode]map[string]*inode{}
	until, kept := len(d.journal), 0
	switch l {
	case cut:
		until = d.durable
	case torn:
		until = d.durable + dice.IntN(len(d.journal)-d.durable+1)
	case reordered:
		kept = []int{0, 50, 95}[dice.IntN(3)] // percent of the names that were not synced
	}
	for _, c := range d.journal[:until] {
		if !c.synced && (l == bare || l == reordered && dice.IntN(100) >= kept) {
			continue
		}
		for _, s := range c.sets {
			if names[s.dir] == nil {
				names[s.dir] = map[string]*inode{}
			}
			if s.to == nil {
				delete(names[s.dir], s.key)
			} else {
				names[s.dir][s.key] = s.to
			}
		}
	}
	files := image{}
	var collect func(dir *inode, path string)
	collect = func(dir *inode, path string) {
		for _, key := range slices.Sorted(maps.Keys(names[dir])) {
			at := names[dir][key]
			if at.names != nil {
				files[path+key] = nil
				collect(at, path+key+"/")
				continue
			}
			files[path+key] = at.after(l, dice)
		}
	}
	collect(d.root, "")
	return files
}

// after gives the bytes that a loss leaves of a file; never nil.
func (f *inode) after(l loss, dice *rand.Rand) *content {
	if l == killed {
		c := f.data.copied()
		return &c
	}
	c := f.synced.copied()
	if l == cut || l == bare || len(f.pending) == 0 {
		return &c
	}
	percent := []int{10, 50, 90, 100}[dice.IntN(4)]
	for _, e := range f.pending {
		if e.data == nil {
			if dice.IntN(100) < percent {
				c.resize(e.off)
			}
			continue
		}
		for at := 0; at < len(e.data); {
			off := e.off + int64(at)
			end := min(len(e.data), at+int(sector-off%sector))
			if dice.IntN(100) < percent {
				c.put(off, e.data[at:end])
			}
			at = end
		}
	}
	// The size may be durable without the bytes: what shows then is zeros, or what
	// was there before.
	if was := c.size; was < f.data.size && dice.IntN(2) == 0 {
		c.resize(f.data.size)
		if dice.IntN(2) == 0 {
			c.put(was, garbage(f.data.size-was, dice))
		}
	}
	return &c
}

// garbage is what was on the disk before.
func garbage(size int64, dice *rand.Rand) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(dice.Uint32())
	}
	return b
}
