package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// program is a server to be started, as often as need be.
type program struct {
	path string
	args []string
	env  []string
	url  string // answers once the server runs
	dir  string // where it keeps its data
}

// process is a server whose cost is measured from outside.
type process struct {
	cmd   *exec.Cmd
	began time.Time
	said  *bytes.Buffer
	ended chan struct{}
}

// begin starts a program without waiting until it serves.
func (p *program) begin(ctx context.Context) (*process, error) {
	said := &bytes.Buffer{}
	cmd := exec.CommandContext(ctx, p.path, p.args...)
	cmd.Env = append(os.Environ(), p.env...)
	cmd.Stderr = said
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	run := &process{cmd: cmd, began: began, said: said, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended is in what it said
		close(run.ended)
	}()
	return run, nil
}

// start starts a program and waits until it answers.
func (p *program) start(ctx context.Context, client *http.Client) (*process, error) {
	run, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	err = run.await(ctx, func() error {
		resp, err := client.Get(p.url)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
	return run, err
}

// await tries until it works; it gives up when the process ends or after a minute.
func (p *process) await(ctx context.Context, try func() error) error {
	return p.awaitFor(ctx, time.Minute, try)
}

func (p *process) awaitFor(ctx context.Context, patience time.Duration, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	again := time.NewTicker(2 * time.Millisecond)
	defer again.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-again.C:
		case <-p.ended:
			return fmt.Errorf("%s ended: %s", p.cmd.Path, p.said)
		case <-ctx.Done():
			p.stop()
			return fmt.Errorf("%s does not answer (%w): %s", p.cmd.Path, err, p.said)
		}
	}
}

func (p *process) stop() {
	_ = p.cmd.Process.Signal(os.Interrupt) // one that has ended is stopped
	<-p.ended
}

// kill ends the process as a power cut would, but for the kernel's cache.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// cpu is the processor time that the process has used so far, in seconds, by its
// own clock (clock_getcpuclockid(3)), which is finer than /proc's hundredths.
func (p *process) cpu() (float64, error) { return cpuOf(p.cmd.Process.Pid) }

func cpuOf(pid int) (float64, error) {
	const schedulerClock = 2
	clock := int32(^pid<<3 | schedulerClock)
	var used unix.Timespec
	if err := unix.ClockGettime(clock, &used); err != nil {
		return 0, fmt.Errorf("processor time of process %d: %w", pid, err)
	}
	return float64(used.Nano()) / 1e9, nil
}

// cost runs work and gives the processor seconds that the server spent on it.
func (p *process) cost(work func() error) (float64, error) {
	before, err := p.cpu()
	if err != nil {
		return 0, err
	}
	if err := work(); err != nil {
		return 0, err
	}
	after, err := p.cpu()
	return after - before, err
}

// memory reads a field of /proc/PID/status, in MB.
func (p *process) memory(field string) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib * 1024 / 1e6, err
		}
	}
	return 0, fmt.Errorf("no %s in the status of process %d", field, p.cmd.Process.Pid)
}

// watch reads a field of /proc/PID/status again and again; the peak in MB is given
// when it is asked for, and the watch ends.
func (p *process) watch(field string) (peak func() float64) {
	end, ended := make(chan struct{}), make(chan float64, 1)
	go func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		highest := 0.0
		for {
			select {
			case <-tick.C:
				if now, err := p.memory(field); err == nil { // none once it has ended
					highest = max(highest, now)
				}
			case <-end:
				ended <- highest
				return
			}
		}
	}()
	return sync.OnceValue(func() float64 { close(end); return <-ended })
}

// forgetPeak makes the kernel count the peak of memory anew.
func (p *process) forgetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.cmd.Process.Pid), []byte("5"), 0)
}

// occupied is how many bytes of the disk a directory takes.
func occupied(dir string) (total float64, err error) {
	err = filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) { // removed meanwhile
				return nil
			}
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return nil // removed meanwhile
		}
		if s, ok := info.Sys().(*syscall.Stat_t); ok {
			total += float64(s.Blocks) * 512
		}
		return nil
	})
	return total, err
}

// freeAddr gives a loopback address that nobody uses at the moment.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// pause waits.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
