package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// recording is what one node did to its directory, in several runs, and what its
// clients were told.
type recording struct {
	root   string
	traces []string // by run
	deeds  []deed
	boot   string // the run of the kernel, as the node wrote it down
}

// runs of the node in a recording: each but the last ends with kill -9, so that
// what a start repairs is recorded as well.
const runs = 2

// tries of a recording. A call that is under way when the process is killed may
// have been done or not, which the trace does not say: then all is done again.
const tries = 5

// record runs a node under strace while clients push to it.
func record(ctx context.Context, p Plan) (*recording, error) {
	for try := range tries {
		dir := filepath.Join(p.Dir, fmt.Sprint("recorded", try))
		rec, err := recordOnce(ctx, p, dir)
		if err != nil {
			return nil, err
		}
		// What the disk of the replay shows in the end is what is there: then no call
		// was missed or misread.
		d := newDisk()
		if err := rec.play(d, visitor{}); err != nil {
			return nil, err
		}
		err = same(d.after(killed, nil), rec.root)
		if err == nil {
			return rec, nil
		}
		p.Say("recording again: %v", err)
	}
	return nil, fmt.Errorf("%d recordings do not give the directory that was there", tries)
}

func recordOnce(ctx context.Context, p Plan, dir string) (*recording, error) {
	rec := &recording{root: filepath.Join(dir, "data")}
	if err := os.MkdirAll(rec.root, 0o700); err != nil {
		return nil, err
	}
	dice := rand.New(rand.NewPCG(p.Seed, 1))
	for run := range runs {
		trace := filepath.Join(dir, fmt.Sprint("trace", run))
		rec.traces = append(rec.traces, trace)
		n, pid, err := startTraced(ctx, lone(), rec.root, trace, p.Binary)
		if err != nil {
			return nil, err
		}
		var clients sync.WaitGroup
		parts := make([]*client, p.Clients)
		for i := range parts {
			parts[i] = &client{node: n, name: fmt.Sprintf("r%dc%d", run, i), dice: rand.New(rand.NewPCG(dice.Uint64(), 0))}
			clients.Go(func() { parts[i].work(ctx, p.Pushes) })
		}
		clients.Wait()
		if err := n.awaitSnapshot(ctx); err != nil {
			return nil, err
		}
		last := &client{node: n, name: fmt.Sprintf("r%dlast", run), dice: rand.New(rand.NewPCG(dice.Uint64(), 0))}
		last.work(ctx, 1) // behind the snapshot, onto the log that was cut
		parts = append(parts, last)
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		<-n.done                               // strace ends with it
		for _, c := range parts {
			if c.err != nil {
				return nil, fmt.Errorf("%w\n%s", c.err, n.log)
			}
			rec.deeds = append(rec.deeds, c.deeds...)
		}
	}
	return rec, rec.end()
}

// startTraced starts a node under strace; pid is the node's own.
func startTraced(ctx context.Context, s seat, data, trace, binary string) (n *node, pid int, err error) {
	n, err = start(ctx, s, data, "strace", "-f", "-xx", "-s", strconv.Itoa(16<<20), "-e", "signal=none", "-e", "trace="+traced, "-o", trace, binary)
	if err != nil {
		return nil, 0, err
	}
	if pid, err = firstThread(trace); err != nil {
		n.kill()
	}
	return n, pid, err
}

// end notes the run of the kernel, and says whether the recording has what only a
// busy node does: a snapshot of the state, and a log that was cut behind it.
func (r *recording) end() error {
	boot, err := os.ReadFile(filepath.Join(r.root, bootFile))
	if err != nil {
		return err
	}
	r.boot = string(boot)
	copied := filepath.Join(filepath.Dir(r.root), "log.db") // opening it may write
	if err := errors.Join(os.RemoveAll(copied), copyFile(copied, filepath.Join(r.root, "raft", "log.db"))); err != nil {
		return err
	}
	log, err := kv.OpenLog(copied)
	if err != nil {
		return err
	}
	defer log.Close()
	if first, err := log.FirstIndex(); err != nil || first <= 1 {
		return fmt.Errorf("the recording's log was never cut: it begins with entry %d, %w", first, err)
	}
	return nil
}

// firstThread is the process whose trace it is.
func firstThread(trace string) (int, error) {
	b, err := os.ReadFile(trace)
	if err != nil {
		return 0, err
	}
	id, _, _ := strings.Cut(string(b), " ")
	return strconv.Atoi(id)
}

// usable says why nothing can be recorded here; nil when it can.
func usable(ctx context.Context) error {
	if out, err := exec.CommandContext(ctx, "strace", "-f", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		return fmt.Errorf("strace does not work here (a sandbox without ptrace?): %w: %s", err, out)
	}
	return nil
}

// visitor is told of what happens in a recording. Either may be nil.
type visitor struct {
	moved    func(call string) error
	answered func(id string) error
}

// play does to d what the recording shows, in its order.
func (r *recording) play(d *disk, v visitor) error {
	for _, trace := range r.traces {
		p := newPlayer(d, r.root)
		p.moved = func(call string) error {
			if v.moved == nil {
				return nil
			}
			return v.moved(call)
		}
		p.answered = func(head string) error {
			_, id, ok := strings.Cut(head, "\r\nX-Request-Id: ")
			if !ok || v.answered == nil {
				return nil
			}
			id, _, _ = strings.Cut(id, "\r\n")
			return v.answered(id)
		}
		if err := readTrace(trace, p.play); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600)
}

// awaitSnapshot waits until the node has taken a snapshot.
func (n *node) awaitSnapshot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		all, err := filepath.Glob(filepath.Join(n.data, "raft", "snapshots", "*", "meta.json"))
		if err != nil {
			return err
		}
		if slices.ContainsFunc(all, func(name string) bool { return !strings.HasSuffix(filepath.Dir(name), ".tmp") }) {
			return nil
		}
		pause := time.NewTimer(50 * time.Millisecond)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return errors.New("the recording has no snapshot of the state: push more")
		}
	}
}

// same compares an image with a directory; sockets do not count.
func same(i image, root string) error {
	seen := 0
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == root || e.Type()&fs.ModeSocket != 0 {
			return err
		}
		key := strings.TrimPrefix(path, root+"/")
		want, ok := i[key]
		if !ok || e.IsDir() != (want == nil) {
			return fmt.Errorf("%s is in the directory and not in the replay", key)
		}
		seen++
		if e.IsDir() {
			return nil
		}
		b, err := os.ReadFile(path)
		if err == nil && !bytes.Equal(b, want.bytes()) {
			err = fmt.Errorf("%s has other bytes in the replay", key)
		}
		return err
	})
	if err == nil && seen != len(i) {
		err = errors.New("the replay has files that are not in the directory")
	}
	return err
}
