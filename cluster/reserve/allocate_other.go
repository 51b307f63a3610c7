//go:build !linux

package reserve

import "os"

func allocate(f *os.File, want int64) error { return write(f, want) }
