package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

const (
	repository = "library/power"
	password   = "Power-Password-1"
	// patience is how long a node may take to start and to answer on a machine that
	// does much else.
	patience = 2 * time.Minute
)

// seat is what a node is of a site: its name, the address of its peer port, and
// how it comes into the site when its directory belongs to none.
type seat struct {
	name, peers string
	how         []string
}

// lone founds a site of its own.
func lone() seat { return seat{"power", "127.0.0.1:0", []string{"--init"}} }

// elsewhere is the same node started again, at a loopback address of its own: others that
// are started again meanwhile are the same node, too, and where the state says that it
// is reached one of them might be found, as a second machine with its disk.
func elsewhere() seat {
	s := lone()
	s.peers = fmt.Sprintf("127.%d.%d.%d:0", 1+rand.IntN(250), rand.IntN(256), 1+rand.IntN(254))
	return s
}

// Snapshots are taken and the log is cut so soon that a recording has both.
const (
	snapshotBytes = 16 << 10
	trailingLogs  = 16
)

// node is a process on a directory.
type node struct {
	data string
	cmd  *exec.Cmd
	url  string
	log  *logBuffer
	done chan struct{}
	http *http.Client
}

// start starts a node on a directory and waits until it serves. command is the
// binary, with what runs it before.
func start(ctx context.Context, s seat, data string, command ...string) (*node, error) {
	n := &node{data: data, log: &logBuffer{}, done: make(chan struct{}), http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}}}
	args := append(command[1:len(command):len(command)], "serve", "--data", data, "--name", s.name, "--listen", "127.0.0.1:0", "--peer-listen", s.peers,
		"--snapshot-bytes", fmt.Sprint(snapshotBytes), "--trailing-logs", fmt.Sprint(trailingLogs))
	args = append(args, s.how...)
	n.cmd = exec.CommandContext(ctx, command[0], args...)
	n.cmd.Env = append(os.Environ(), "ATOLL_ADMIN_PASSWORD="+password)
	n.cmd.Stderr = n.log
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	served := make(chan string, 1)
	go func() {
		defer close(n.done)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if _, rest, ok := strings.Cut(lines.Text(), "serves at "); ok {
				url, _, _ := strings.Cut(rest, " ")
				served <- url
			}
		}
		_ = n.cmd.Wait() // whoever waits for done reads the log
	}()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case n.url = <-served:
		return n, nil
	case <-n.done:
		return nil, fmt.Errorf("the node ended before it served:\n%s", n.end())
	case <-late.C:
	}
	n.kill()
	return nil, fmt.Errorf("the node does not serve after %v:\n%s", patience, n.log)
}

// end says what a node has printed, and how it ended if it has.
func (n *node) end() string {
	select {
	case <-n.done:
		return fmt.Sprintf("%s(%s)", n.log, n.cmd.ProcessState)
	default:
		return n.log.String()
	}
}

// kill ends the process as kill -9 does and waits until it is gone.
func (n *node) kill() {
	_ = n.cmd.Process.Kill() // it may have ended
	<-n.done
	n.http.CloseIdleConnections()
}

// answer is what came back, read to its end.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// question is a request to the repository; id names it in the answer and so in
// the trace.
type question struct {
	method, path string
	body         []byte
	mediaType    string
	id           string
}

func (n *node) do(ctx context.Context, q question) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	url := q.path
	if strings.HasPrefix(url, "/") {
		url = n.url + url
	}
	r, err := http.NewRequestWithContext(ctx, q.method, url, bytes.NewReader(q.body))
	if err != nil {
		return answer{}, err
	}
	r.SetBasicAuth("admin", password)
	if q.mediaType != "" {
		r.Header.Set("Content-Type", q.mediaType)
	}
	if q.id != "" {
		r.Header.Set("X-Request-Id", q.id)
	}
	resp, err := n.http.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, b}, err
}

// read gets something as soon as the node can say that it is not stale: the
// log's last entries are known to be committed only when a leader is there.
func (n *node) read(ctx context.Context, path string) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		a, err := n.do(ctx, question{method: http.MethodGet, path: "/v2/" + repository + path})
		if err != nil || a.status != http.StatusServiceUnavailable && a.header.Get("Atoll-Stale") == "" {
			return a, err
		}
		select {
		case <-tick.C:
		case <-n.done:
			return a, errors.New("the node ended")
		case <-ctx.Done():
			return a, fmt.Errorf("%s: %d, and %w", path, a.status, ctx.Err())
		}
	}
}

// logBuffer keeps what a node prints.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
