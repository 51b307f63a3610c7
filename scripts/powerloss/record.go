package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
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
		n, err := start(ctx, rec.root, "strace", "-f", "-xx", "-s", strconv.Itoa(16<<20), "-e", "signal=none", "-e", "trace="+traced, "-o", trace, p.Binary)
		if err != nil {
			return nil, err
		}
		pid, err := firstThread(trace)
		if err != nil {
			n.kill()
			return nil, err
		}
		var clients sync.WaitGroup
		parts := make([]*client, p.Clients)
		for i := range parts {
			parts[i] = &client{node: n, name: fmt.Sprintf("r%dc%d", run, i), dice: rand.New(rand.NewPCG(dice.Uint64(), 0))}
			clients.Go(func() { parts[i].work(ctx, p.Pushes) })
		}
		clients.Wait()
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		<-n.done                               // strace ends with it
		for _, c := range parts {
			if c.err != nil {
				return nil, fmt.Errorf("%w\n%s", c.err, n.log)
			}
			rec.deeds = append(rec.deeds, c.deeds...)
		}
	}
	boot, err := os.ReadFile(filepath.Join(rec.root, bootFile))
	rec.boot = string(boot)
	return rec, err
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
		if err == nil && string(b) != string(want) {
			err = fmt.Errorf("%s has other bytes in the replay", key)
		}
		return err
	})
	if err == nil && seen != len(i) {
		err = errors.New("the replay has files that are not in the directory")
	}
	return err
}
