package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const password = "Soak-Password-1"

// node is the process under load.
type node struct {
	cmd   *exec.Cmd
	data  string
	url   string
	log   string
	ended chan struct{}
	ops   *http.Client // for samples
}

// startNode founds a site in dir and waits until it serves.
func startNode(ctx context.Context, binary, dir string) (*node, error) {
	n := &node{
		data: filepath.Join(dir, "data"), log: filepath.Join(dir, "log"), ended: make(chan struct{}),
		ops: &http.Client{Timeout: 10 * time.Second},
	}
	log, err := os.Create(n.log)
	if err != nil {
		return nil, err
	}
	n.cmd = exec.CommandContext(ctx, binary, "serve", "--init", "--data", n.data, "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", "--name", "soak")
	n.cmd.Env = append(os.Environ(), "ATOLL_ADMIN_PASSWORD="+password)
	n.cmd.Stderr = log
	n.cmd.Cancel = func() error { return n.cmd.Process.Signal(syscall.SIGTERM) }
	n.cmd.WaitDelay = 10 * time.Second
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	if err := n.cmd.Start(); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	lines := bufio.NewScanner(out)
	for n.url == "" && lines.Scan() {
		if _, rest, ok := strings.Cut(lines.Text(), "http://"); ok {
			n.url = "http://" + strings.FieldsFunc(rest, func(r rune) bool { return r == ' ' || r == '(' || r == ',' })[0]
		}
	}
	go func() {
		defer close(n.ended)
		_, _ = io.Copy(io.Discard, out)
		_ = n.cmd.Wait() // whoever waits on ended reads the log
		log.Close()
	}()
	if n.url == "" {
		<-n.ended
		return nil, fmt.Errorf("the node did not start:\n%s", n.tail())
	}
	return n, nil
}

func (n *node) stop() {
	_ = n.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	<-n.ended
}

// tail is the end of the node's log.
func (n *node) tail() string {
	b, err := os.ReadFile(n.log)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-4000):])
}

// sample is what the node uses at one moment.
type sample struct {
	memory     float64 // anonymous, resident, in bytes; the mapped file of the rows is the kernel's to drop
	files      float64 // open descriptors
	goroutines float64
	heap       float64 // live and not yet collected, in bytes
	unfinished float64 // files of upload sessions
	applied    float64 // transactions so far
	stored     float64 // size of the files of state and log, in bytes
}

func (n *node) sample() (s sample, err error) {
	proc := fmt.Sprintf("/proc/%d/", n.cmd.Process.Pid)
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		return s, err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			if err != nil {
				return s, err
			}
			s.memory = kib * 1024
		}
	}
	files, err := os.ReadDir(proc + "fd")
	if err != nil {
		return s, err
	}
	s.files = float64(len(files))
	uploads, err := os.ReadDir(filepath.Join(n.data, "content", "uploads"))
	if err != nil {
		return s, err
	}
	s.unfinished = float64(len(uploads))
	for _, name := range []string{"meta.db", "raft/log.db"} {
		info, err := os.Stat(filepath.Join(n.data, filepath.FromSlash(name)))
		if err != nil {
			return s, err
		}
		s.stored += float64(info.Size())
	}
	resp, err := n.ops.Get(n.url + "/metrics")
	if err != nil {
		return s, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return s, err
	}
	for name, into := range map[string]*float64{"go_goroutines ": &s.goroutines, "go_memstats_heap_alloc_bytes ": &s.heap, "atoll_cluster_applied_revision ": &s.applied} {
		_, rest, ok := bytes.Cut(b, []byte("\n"+name))
		if !ok {
			return s, fmt.Errorf("the node's metrics lack %s", name)
		}
		line, _, _ := bytes.Cut(rest, []byte("\n"))
		if *into, err = strconv.ParseFloat(string(line), 64); err != nil {
			return s, err
		}
	}
	return s, nil
}

// settled closes the clients' connections and samples the node when it has had time
// to become quiet and to give memory back: the lowest of a minute.
func (n *node) settled(ctx context.Context, l *load) (lowest sample, err error) {
	l.rest()
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for i := range 30 {
		select {
		case <-ctx.Done():
			return lowest, ctx.Err()
		case <-tick.C:
		}
		s, err := n.sample()
		if err != nil {
			return lowest, err
		}
		if i > 0 {
			s.memory = min(lowest.memory, s.memory)
			s.files = min(lowest.files, s.files)
			s.goroutines = min(lowest.goroutines, s.goroutines)
		}
		lowest = s
	}
	return lowest, nil
}
