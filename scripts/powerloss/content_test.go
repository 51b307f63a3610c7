package main

import (
	"bytes"
	"hash/maphash"
	"math/rand/v2"
	"testing"
)

// A content is what a plain slice of bytes is, its copies stay as they were, and its
// mark tells it from others and not from itself.
func TestContentIsItsBytes(t *testing.T) {
	dice, seed := rand.New(rand.NewPCG(1, 2)), maphash.MakeSeed()
	mark := func(c *content) uint64 {
		var h maphash.Hash
		h.SetSeed(seed)
		c.mark(&h, seed)
		return h.Sum64()
	}
	var c content
	var plain []byte
	type copied struct {
		content
		bytes []byte
	}
	var copies []copied
	marks := map[uint64][]byte{}
	for range 3000 {
		switch size := dice.Int64N(5 * pageSize); dice.IntN(4) {
		case 0:
			c.resize(size)
			plain = append(plain, make([]byte, max(0, int(size)-len(plain)))...)[:size]
		case 1:
			copies = append(copies, copied{c.copied(), bytes.Clone(plain)})
		default:
			data := garbage(dice.Int64N(2*pageSize), dice)
			if dice.IntN(4) == 0 {
				clear(data)
			}
			c.put(size, data)
			plain = append(plain, make([]byte, max(0, int(size)+len(data)-len(plain)))...)
			copy(plain[size:], data)
		}
		if !bytes.Equal(c.bytes(), plain) {
			t.Fatal("a content is not what was written")
		}
		m := mark(&c)
		if was, known := marks[m]; known && !bytes.Equal(was, plain) {
			t.Fatal("two contents have one mark")
		}
		marks[m] = bytes.Clone(plain)
		var fresh content
		fresh.put(0, plain)
		if mark(&fresh) != m {
			t.Fatal("the same bytes, written in another way, have another mark")
		}
	}
	for _, was := range copies {
		if !bytes.Equal(was.content.bytes(), was.bytes) {
			t.Fatal("a copy changed with what it was taken of")
		}
	}
}
