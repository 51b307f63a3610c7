package stream

import (
	"fmt"
	"testing"
)

// A range that a peer asks for lies in the blob and is written in one way only.
func FuzzParseRange(f *testing.F) {
	f.Add("bytes=0-0", int64(1))
	f.Add("bytes=5-9", int64(10))
	f.Add("bytes=5-10", int64(10))
	f.Add("bytes=9223372036854775807-9223372036854775807", int64(1<<62))
	f.Add("bytes=-5", int64(10))
	f.Add("bytes=00-01", int64(10))
	f.Fuzz(func(t *testing.T, s string, size int64) {
		off, n, ok := parseRange(s, size)
		if !ok {
			return
		}
		if off < 0 || n <= 0 || off > size-n {
			t.Fatalf("%q of %d bytes is %d bytes at %d", s, size, n, off)
		}
		if o, m, ok := parseRange(fmt.Sprintf("bytes=%d-%d", off, off+n-1), size); !ok || o != off || m != n {
			t.Fatalf("%q of %d bytes reads as %d at %d, then %d at %d", s, size, n, off, m, o)
		}
	})
}
