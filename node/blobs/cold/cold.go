// Package cold reads files without taking the page cache away from others: what
// a reader has brought in from the disk it gives back, and what was in memory
// before, because somebody pulls it, stays there.
package cold

import "io"

// Reader gives a view of a file for reading it once, from its beginning to its
// end. A file that is not the operating system's is read as it is.
func Reader(f io.ReaderAt) io.ReaderAt { return reader(f) }
