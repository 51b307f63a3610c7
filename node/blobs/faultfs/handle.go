package faultfs

import (
	"errors"
	"io"
	"io/fs"
	"path"
	"slices"
	"syscall"
	"time"
)

// handle is an open file. Closing it is no step: it cannot fail usefully.
type handle struct {
	f      *FS
	node   *node
	name   string
	life   int
	at     int64
	closed bool
}

// begin counts a step; the caller holds h.f.mu.
func (h *handle) begin() (Fault, error) {
	if h.closed {
		return Fault{}, fs.ErrClosed
	}
	return h.f.step(h.life)
}

func (h *handle) ReadAt(b []byte, off int64) (int, error) {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	if _, err := h.begin(); err != nil {
		return 0, err
	}
	if h.node.bad != nil {
		return 0, &fs.PathError{Op: "read", Path: h.name, Err: h.node.bad}
	}
	if off >= int64(len(h.node.data)) {
		return 0, io.EOF
	}
	n := copy(b, h.node.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (h *handle) Read(b []byte) (int, error) {
	n, err := h.ReadAt(b, h.at)
	h.at += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

func (h *handle) Seek(offset int64, whence int) (int64, error) {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	switch whence {
	case io.SeekCurrent:
		offset += h.at
	case io.SeekEnd:
		offset += int64(len(h.node.data))
	}
	if offset < 0 {
		return 0, errors.New("faultfs: seek before the beginning")
	}
	h.at = offset
	return offset, nil
}

func (h *handle) WriteAt(b []byte, off int64) (int, error) {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	fault, err := h.begin()
	if errors.Is(err, fs.ErrClosed) || h.life != h.f.life || (err == ErrCrashed && !fault.Crash) {
		return 0, err
	}
	part := b
	if err != nil || fault.Short > 0 {
		part = b[:min(fault.Short, len(b))]
	}
	if grow := off + int64(len(part)) - int64(len(h.node.data)); h.f.capacity > 0 && grow > 0 {
		if room := h.f.capacity - h.f.used(); grow > room {
			part = part[:max(0, int64(len(part))-(grow-max(room, 0)))]
			err = &fs.PathError{Op: "write", Path: h.name, Err: syscall.ENOSPC}
		}
	}
	if end := off + int64(len(part)); len(part) > 0 && end > int64(len(h.node.data)) {
		h.node.data = append(h.node.data, make([]byte, end-int64(len(h.node.data)))...)
	}
	copy(h.node.data[min(off, int64(len(h.node.data))):], part)
	h.node.at = time.Now()
	return len(part), err
}

func (h *handle) Truncate(size int64) error {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	if _, err := h.begin(); err != nil {
		return err
	}
	if grow := size - int64(len(h.node.data)); h.f.capacity > 0 && grow > h.f.capacity-h.f.used() {
		return &fs.PathError{Op: "truncate", Path: h.name, Err: syscall.ENOSPC}
	}
	if size <= int64(len(h.node.data)) {
		h.node.data = slices.Clip(h.node.data[:size])
	} else {
		h.node.data = append(h.node.data, make([]byte, size-int64(len(h.node.data)))...)
	}
	return nil
}

func (h *handle) Sync() error {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	fault, err := h.begin()
	if err != nil {
		if !fault.Crash && err != ErrCrashed {
			h.node.lost = true
		}
		return err
	}
	if !h.node.lost {
		h.node.synced = slices.Clone(h.node.data)
	}
	return nil
}

func (h *handle) Stat() (fs.FileInfo, error) {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	if _, err := h.begin(); err != nil {
		return nil, err
	}
	return info{path.Base(h.name), int64(len(h.node.data)), false, h.node.at}, nil
}

func (h *handle) Close() error {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	if h.closed {
		return fs.ErrClosed
	}
	h.closed = true
	return nil
}
