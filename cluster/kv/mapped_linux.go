package kv

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// memoryFile is where the kernel says how much memory this process has. It stays
// open: to open it anew costs more than to read it.
type memoryFile struct {
	file    *os.File
	program func() []mapping
}

func openMemoryFile() *memoryFile {
	m := &memoryFile{program: sync.OnceValue(programMappings)}
	m.file, _ = os.Open("/proc/self/statm") // nil where there is none
	return m
}

// read gives the bytes that are in memory, and those of them that are of mapped
// files.
func (m *memoryFile) read() (resident, files int64, ok bool) {
	if m.file == nil {
		return 0, 0, false
	}
	var buf [128]byte
	n, _ := m.file.ReadAt(buf[:], 0) // it is shorter, so there is always an error
	_, rest, _ := bytes.Cut(buf[:n], []byte(" "))
	second, rest, _ := bytes.Cut(rest, []byte(" "))
	third, _, ok := bytes.Cut(rest, []byte(" "))
	page := int64(os.Getpagesize())
	return decimal(second) * page, decimal(third) * page, ok
}

func (m *memoryFile) close() {
	if m.file != nil {
		m.file.Close()
	}
}

func decimal(digits []byte) (n int64) {
	for _, d := range digits {
		n = 10*n + int64(d-'0')
	}
	return n
}

// unmapPages takes the pages of a mapped file from the process. They stay in the
// kernel's cache, and the next access finds them there.
func unmapPages(at uintptr, size int64) {
	// Advice that is not taken changes nothing.
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, at, uintptr(size), unix.MADV_DONTNEED)
}

type mapping struct{ from, to uintptr }

// unmapProgram takes the pages of the program from the process. Half of the code is used by
// a start alone; the rest is mapped again in a millisecond.
func (m *memoryFile) unmapProgram() {
	for _, p := range m.program() {
		unmapPages(p.from, int64(p.to-p.from))
	}
}

func programMappings() []mapping {
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return nil
	}
	defer f.Close()
	return readOnly(f, path)
}

// readOnly reads smaps (proc(5)) and gives where a file is mapped that nobody may write to
// there and nobody did: what was, by a linker or a debugger, is in no file.
func readOnly(smaps io.Reader, path string) (out []mapping) {
	var m mapping
	inside := false
	for lines := bufio.NewScanner(smaps); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		switch {
		case len(fields) < 2:
		case fields[0] == "Anonymous:":
			if inside && fields[1] == "0" {
				out = append(out, m)
			}
			inside = false
		case !strings.HasSuffix(fields[0], ":"): // the first line of a mapping
			_, err := fmt.Sscanf(fields[0], "%x-%x", &m.from, &m.to)
			inside = err == nil && strings.HasSuffix(lines.Text(), " "+path) && slices.Contains([]string{"r-xp", "r--p"}, fields[1])
		}
	}
	return out
}
