package watch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
)

const (
	// probeFile is written again and again in the data directory.
	probeFile = "watch"
	// probeEvery is the pause between two probes: a small write and a flush.
	probeEvery = 5 * time.Second
	// scarce is how much has to be free for a node to count on its next writes.
	scarce = 1 << 20
	// fillEvery is how often the ballast is looked at.
	fillEvery = 10 * time.Second
)

// watchdog is what one goroutine tells of the disk and the other counts.
type watchdog struct {
	wake chan struct{} // a probe ended that may have been taken for hung

	mu sync.Mutex
	// looks counts how often somebody looked while the present probe was under
	// way, a second apart. Looks and not the clock, so that a machine that slept
	// or stood still does not find its disk hung when it wakes.
	looks   int
	probing bool
	took    time.Duration // by the last probe
	seen    disk
}

// disk is what the last probe saw.
type disk struct {
	err         error // of the write
	known       bool  // the space is
	free, total int64
	whole       bool // the ballast is
}

// probe writes and flushes a small file every few seconds, and looks at the
// space. Everything that waits for the disk is done here.
func (w *Watch) probe(ctx context.Context) {
	var filled time.Time
	for ctx.Err() == nil {
		began := time.Now()
		w.disk.begin()
		d := disk{err: w.touch(), whole: w.Ballast.Held() > 0}
		free, total, err := w.Disk.Space()
		if err == nil {
			d.known, d.free, d.total = true, free, total
		} else {
			w.Log.Debug("asking for the free space", "error", err)
		}
		if began.Sub(filled) >= fillEvery || !d.whole {
			filled = began
			if d.whole, err = w.Ballast.Fill(); err != nil {
				w.Log.Warn("no space could be set aside for the metadata", "error", err)
			}
		}
		w.disk.end(d, time.Since(began))
		pause := time.NewTimer(probeEvery)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
		}
	}
}

// touch overwrites one block, as small as a disk can write, and flushes it.
func (w *Watch) touch() error {
	f, err := w.Disk.OpenFile(probeFile, os.O_CREATE|os.O_WRONLY)
	if err != nil {
		return err
	}
	block := make([]byte, 512)
	copy(block, w.Clock().UTC().Format(time.RFC3339Nano)+"\n")
	_, err = f.WriteAt(block, 0)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (d *watchdog) begin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.probing, d.looks = true, 0
}

func (d *watchdog) end(seen disk, took time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.probing, d.looks, d.seen, d.took = false, 0, seen, took
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// look counts one second, and gives for how many the probe has been under way.
func (d *watchdog) look() (seconds int, seen disk) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.probing {
		d.looks++
	}
	return d.looks, d.seen
}

func (d *watchdog) saw() disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.seen
}

// last is how long the last probe took, or the present one has.
func (d *watchdog) last() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return max(d.took, time.Duration(d.looks)*look)
}

// judgeDisk says whether the disk answers, and how full it is.
func (w *Watch) judgeDisk() []Condition {
	seconds, d := w.disk.look()
	if seconds > w.patience.Value() {
		return []Condition{{
			Code: "disk-hung", Severity: Critical, local: true, fitness: member.Unfit, parts: []string{partDatabase, partRegistry, partJobs},
			Text:   fmt.Sprintf("the disk of this node has not finished a small write for more than %d seconds", w.patience.Value()),
			Remedy: "look at the disk, its controller or the network storage behind it (dmesg); the node goes on by itself as soon as it answers",
		}}
	}
	noRoom := errors.Is(d.err, syscall.ENOSPC) || errors.Is(d.err, syscall.EDQUOT)
	if d.err != nil && !noRoom {
		return []Condition{{
			Code: "disk-error", Severity: Critical, local: true, fitness: member.Unfit, parts: []string{partDatabase, partRegistry, partJobs},
			Text:   "the disk of this node refuses writes" + reason(d.err),
			Remedy: "look at the disk (dmesg, smartctl) and whether it is mounted read-only; if it is dying, replace it",
		}}
	}
	if !d.known && !noRoom {
		return nil // the first probe is under way
	}
	out := w.judgeSpace(d, noRoom)
	if !d.whole {
		out = append(out, Condition{
			Code: "ballast-gone", Severity: Warning, local: true,
			Text:   "this node has no space set aside for its metadata in case the disk fills up",
			Remedy: "free space: it is set aside again by itself",
		})
	}
	return out
}

func (w *Watch) judgeSpace(d disk, noRoom bool) []Condition {
	low, free := w.LowWater(), d.free
	waiting, since := w.Ballast.Waiting()
	switch {
	case len(waiting) > 0 || noRoom || free < scarce && w.Ballast.Held() == 0:
		text := fmt.Sprintf("the disk of this node is full (%d MiB free)", free>>20)
		if len(waiting) > 0 {
			text += fmt.Sprintf(" and %s cannot be written since %s", strings.Join(waiting, ", "), since.UTC().Format(time.TimeOnly))
		}
		return []Condition{{
			Code: "disk-full", Severity: Critical, local: true, fitness: member.Unfit, parts: []string{partDatabase, partRegistry, partJobs},
			Text: text, Remedy: fmt.Sprintf("free space on it: with %d MiB or more it takes pushes again, by itself", low>>20),
		}}
	case free < low:
		return []Condition{{
			Code: "disk-low", Severity: Critical, local: true, fitness: member.Reluctant, parts: []string{partRegistry},
			Text:   fmt.Sprintf("the disk of this node has %d MiB free and keeps %d MiB in reserve, so it takes no pushes", free>>20, low>>20),
			Remedy: "free space or enlarge the disk; the setting storage.min-free is the reserve. Pushes are taken again by themselves",
		}}
	case free < low+low/2:
		return []Condition{{
			Code: "disk-filling", Severity: Warning, local: true,
			Text:   fmt.Sprintf("the disk of this node has %d MiB free; below %d MiB it takes no pushes", free>>20, low>>20),
			Remedy: "free space or enlarge the disk in time",
		}}
	}
	return nil
}

// reason names the kind of a disk's failure: paths and the rest are in the log.
func reason(err error) string {
	var kind syscall.Errno
	if errors.As(err, &kind) {
		return " (" + kind.Error() + ")"
	}
	return ""
}
