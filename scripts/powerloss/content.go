package main

import "hash/maphash"

// pageSize is the unit in which files share their bytes, in memory.
const pageSize = 4096

// content is the bytes of a file. Pages are never changed once they are in it, so
// that images of a disk, of which there are thousands, share them; a page that was
// never written is nil and reads as zeros.
type content struct {
	size  int64
	pages []*page
	// shared: another content has the same pages slice.
	shared bool
}

// page is so many bytes of a file. Behind the end of the file they are zeros.
type page struct {
	b      [pageSize]byte
	marked bool
	sum    uint64 // of b, once marked; 0 when all of b is zeros
}

// copied gives a content that goes on apart from this one.
func (c *content) copied() content {
	c.shared = true
	return *c
}

// own makes the slice of pages this content's own.
func (c *content) own() {
	if c.shared {
		c.pages, c.shared = append([]*page(nil), c.pages...), false
	}
}

// put writes data at off, with zeros before it where the content ends earlier.
func (c *content) put(off int64, data []byte) {
	if end := off + int64(len(data)); end > c.size {
		c.resize(end)
	}
	c.own()
	for len(data) > 0 {
		at := off % pageSize
		is := &page{}
		if was := c.pages[off/pageSize]; was != nil {
			is.b = was.b
		}
		n := copy(is.b[at:], data)
		c.pages[off/pageSize] = is
		off, data = off+int64(n), data[n:]
	}
}

// resize cuts the content, or fills it up with zeros. What is cut off does not come
// back when it grows again.
func (c *content) resize(size int64) {
	c.own()
	for want := int((size + pageSize - 1) / pageSize); len(c.pages) != want; {
		if len(c.pages) > want {
			c.pages = c.pages[:want]
		} else {
			c.pages = append(c.pages, make([]*page, want-len(c.pages))...)
		}
	}
	if rest := size % pageSize; size < c.size && rest > 0 {
		if was := c.pages[size/pageSize]; was != nil {
			is := &page{b: was.b}
			clear(is.b[rest:])
			c.pages[size/pageSize] = is
		}
	}
	c.size = size
}

// part gives the bytes of page i; nil for zeros.
func (c *content) part(i int) []byte {
	if c.pages[i] == nil {
		return nil
	}
	return c.pages[i].b[:min(pageSize, c.size-int64(i)*pageSize)]
}

// bytes gives all of it.
func (c *content) bytes() []byte {
	b := make([]byte, c.size)
	for i := range c.pages {
		copy(b[i*pageSize:], c.part(i))
	}
	return b
}

// mark adds to a sum what tells this content from others. Sums of pages are taken
// once, by one goroutine.
func (c *content) mark(h *maphash.Hash, seed maphash.Seed) {
	maphash.WriteComparable(h, c.size)
	for i, p := range c.pages {
		if p == nil {
			continue
		}
		if !p.marked {
			p.marked = true
			if p.b != [pageSize]byte{} {
				p.sum = max(1, maphash.Bytes(seed, p.b[:]))
			}
		}
		if p.sum != 0 {
			maphash.WriteComparable(h, i)
			maphash.WriteComparable(h, p.sum)
		}
	}
}
