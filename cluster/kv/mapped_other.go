//go:build !linux

package kv

// Only Linux says cheaply how much is mapped.

func mappedNow() (int64, bool) { return 0, false }

func unmapPages(uintptr, int64) {}
