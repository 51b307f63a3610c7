package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is a server whose cost is measured from outside.
type process struct {
	cmd  *exec.Cmd
	addr string
}

// start runs a server that prints its address in the line that find reads.
func start(ctx context.Context, find func(line string) (addr string, ok bool), env []string, name string, args ...string) (*process, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if addr, ok := find(lines.Text()); ok {
			go func() {
				for lines.Scan() { // what it says later is read and dropped
				}
			}()
			return &process{cmd: cmd, addr: addr}, nil
		}
	}
	cmd.Wait()
	return nil, fmt.Errorf("%s did not start: %s", name, said.String())
}

func (p *process) stop() {
	_ = p.cmd.Process.Signal(os.Interrupt) // one that has ended is stopped
	_ = p.cmd.Wait()
}

// cpu is the processor time that the process has used so far, in seconds, by its
// own clock (clock_getcpuclockid(3)), which is finer than /proc's hundredths.
func (p *process) cpu() (float64, error) {
	const schedulerClock = 2
	clock := int32(^p.cmd.Process.Pid<<3 | schedulerClock)
	var used unix.Timespec
	if err := unix.ClockGettime(clock, &used); err != nil {
		return 0, fmt.Errorf("processor time of process %d: %w", p.cmd.Process.Pid, err)
	}
	return float64(used.Nano()) / 1e9, nil
}

// memory reads a field of /proc/PID/status, in MB.
func (p *process) memory(field string) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb / 1000, err
		}
	}
	return 0, fmt.Errorf("no %s in the status of process %d", field, p.cmd.Process.Pid)
}

// forgetPeak makes the kernel count the peak of memory anew.
func (p *process) forgetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.cmd.Process.Pid), []byte("5"), 0)
}
