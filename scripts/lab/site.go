package lab

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Password of the admin in every site of a lab.
const Password = "Lab-Password-1"

// Node is an Atoll node on a host, with TLS by its site's CA.
type Node struct {
	Host *Host
	Data string // data directory

	binary string
	extra  []string
	logs   *logBuffer
	run    *Process
}

// Registry is the node's address for clients.
func (n *Node) Registry() string { return net.JoinHostPort(n.Host.IP, "5000") }

// PeerAddr is the node's address for other nodes.
func (n *Node) PeerAddr() string { return net.JoinHostPort(n.Host.IP, "5001") }

// Log is what the node has printed so far.
func (n *Node) Log() string { return n.logs.String() }

// NewNode prepares a node; args are further flags of atoll serve.
func NewNode(h *Host, binary, data string, args ...string) *Node {
	return &Node{Host: h, Data: data, binary: binary, extra: args, logs: &logBuffer{}}
}

// Start runs the node and waits until it serves.
func (n *Node) Start(ctx context.Context, args ...string) error {
	all := append([]string{"serve", "--data", n.Data, "--listen", n.Registry(), "--name", n.Host.Name}, n.extra...)
	env := []string{"ATOLL_ADMIN_PASSWORD=" + Password}
	run, err := n.Host.Start(ctx, n.logs, env, n.binary, append(all, args...)...)
	if err != nil {
		return err
	}
	n.run = run
	return n.waitServing(ctx)
}

func (n *Node) waitServing(ctx context.Context) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := n.Atoll(ctx, "site", "show", "--format", "json"); err == nil {
			return nil
		}
		select {
		case <-n.run.Done():
			return fmt.Errorf("node %s ended before it served:\n%s", n.Host.Name, n.Log())
		case <-ctx.Done():
			return fmt.Errorf("node %s does not serve: %w\n%s", n.Host.Name, ctx.Err(), n.Log())
		case <-tick.C:
		}
	}
}

// Use makes the node's next start, and the commands after it, those of another
// binary.
func (n *Node) Use(binary string) { n.binary = binary }

// Kill ends the node as kill -9 does.
func (n *Node) Kill() { n.run.Kill() }

// Binary is the program that the node runs.
func (n *Node) Binary() string { return n.binary }

// Process is the present run of the node.
func (n *Node) Process() *Process { return n.run }

// Stop ends the node as it should be ended.
func (n *Node) Stop(ctx context.Context) error { return n.run.Stop(ctx) }

// Pid of the running node.
func (n *Node) Pid() int { return n.run.Pid() }

// Atoll runs a command against the node through its socket.
func (n *Node) Atoll(ctx context.Context, args ...string) (string, error) {
	return n.Host.Run(ctx, n.binary, append(args, "--data", n.Data)...)
}

// Bare runs a command of the binary on the node's host without naming the node.
func (n *Node) Bare(ctx context.Context, args ...string) (string, error) {
	return n.Host.Run(ctx, n.binary, args...)
}

// Found starts the first node of a site.
func (n *Node) Found(ctx context.Context) error { return n.Start(ctx, "--init") }

// Join starts a node that joins the site of another; args are further flags of this start.
func (n *Node) Join(ctx context.Context, first *Node, args ...string) error {
	token, err := first.Atoll(ctx, "token", "create")
	if err != nil {
		return err
	}
	return n.Start(ctx, append([]string{"--join", first.PeerAddr(), "--token", strings.TrimSpace(token)}, args...)...)
}

// Status is what atoll cluster status says, as far as tests need it.
type Status struct {
	Leader          string `json:"leader"`
	Quorum          bool   `json:"quorum"`
	UnderReplicated int    `json:"under_replicated"`
	Counting        bool   `json:"counting"` // UnderReplicated is not complete yet
	Lost            int    `json:"lost"`
	Level           int    `json:"level"`
	Nodes           []struct {
		ID, Name          string
		Voter, Leader, Up bool
		Lag               uint64
		Feature           int
	} `json:"nodes"`
	Advice []string `json:"advice"`
}

// Status asks the node for the state of its cluster.
func (n *Node) Status(ctx context.Context) (s Status, err error) {
	out, err := n.Atoll(ctx, "cluster", "status", "--format", "json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// WaitStatus waits until the node says of its cluster what ok wants.
func (n *Node) WaitStatus(ctx context.Context, what string, ok func(Status) bool) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	var last Status
	for {
		s, err := n.Status(ctx)
		if err == nil {
			if last = s; ok(s) {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting on %s for %s: %w (last status %+v)", n.Host.Name, what, ctx.Err(), last)
		case <-tick.C:
		}
	}
}

// Clients writes what registry clients need to use the nodes, into dir, and gives
// the environment by which they find it: the site's CA and the admin's login.
func Clients(ctx context.Context, dir string, nodes ...*Node) (env []string, err error) {
	ca := filepath.Join(dir, "ca.pem")
	var pem strings.Builder
	auths := map[string]any{}
	for _, n := range nodes {
		out, err := n.Atoll(ctx, "ca")
		if err != nil {
			return nil, err
		}
		pem.WriteString(out)
		auths[n.Registry()] = map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte("admin:" + Password))}
	}
	if err := os.WriteFile(ca, []byte(pem.String()), 0o644); err != nil {
		return nil, err
	}
	config, err := json.Marshal(map[string]any{"auths": auths})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), config, 0o600); err != nil {
		return nil, err
	}
	return []string{"SSL_CERT_FILE=" + ca, "DOCKER_CONFIG=" + dir, "REGISTRY_AUTH_FILE=" + filepath.Join(dir, "config.json")}, nil
}

// logBuffer keeps what a program prints.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
