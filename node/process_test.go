//go:build unix

package node

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"testing"

	"github.com/atoll-registry/atoll/node/peers"
)

// childConfig is the variable by which this binary becomes a node of its own: a
// node that is to die without a word, or to freeze, needs its own process.
const childConfig = "ATOLL_TEST_NODE"

func TestMain(m *testing.M) {
	if c := os.Getenv(childConfig); c != "" {
		if err := runChild(c); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// childStart is what a child is told.
type childStart struct {
	Data, Name, Token string
	// Disk is the size of a file system of the node's own, such as 96m, that its
	// data lies on and nobody else sees; "" for the one of the test.
	Disk string
	Join []string
}

func runChild(text string) error {
	var s childStart
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return err
	}
	if s.Disk != "" {
		if err := mountDisk(s.Data, s.Disk); err != nil {
			return err
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	c := Config{
		Data: s.Data, Listen: "127.0.0.1:0", PeerListen: "127.0.0.1:0", Name: s.Name, Join: s.Join, Token: s.Token,
		Init: s.Join == nil, Version: "test", timings: fast, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Started: func(s Started) { _ = json.NewEncoder(os.Stdout).Encode(s) }, // a parent that is gone needs none
	}
	if c.Init {
		c.AdminPassword = password
	}
	n, err := New(ctx, c)
	if err != nil {
		return err
	}
	return n.Run(ctx)
}

// child is a node in a process of its own.
type child struct {
	Started
	t    *testing.T
	name string
	data string // its directory
	cmd  *exec.Cmd
	once sync.Once
}

// startChild starts a node and waits until it serves; its log is the test's when
// the test fails.
func startChild(t *testing.T, s childStart) *child {
	t.Helper()
	if s.Data == "" {
		s.Data = config(t).Data
	}
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	log := &lines{}
	c := &child{t: t, name: s.Name, data: s.Data, cmd: exec.Command(self)}
	c.cmd.Env, c.cmd.Stderr = append(os.Environ(), childConfig+"="+string(text)), log
	if s.Disk != "" {
		ownDisks(c.cmd)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.kill()
		if t.Failed() {
			t.Logf("log of %s:\n%s", s.Name, log)
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &c.Started)
	}
	if err != nil {
		t.Fatalf("node %s did not start: %v\n%s", s.Name, err, log)
	}
	return c
}

// kill ends the process at once.
func (c *child) kill() {
	c.once.Do(func() {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait() // an error says that it was killed
	})
}

// signal freezes the process, or lets it go on.
func (c *child) signal(s syscall.Signal) {
	c.t.Helper()
	if err := c.cmd.Process.Signal(s); err != nil {
		c.t.Fatal(err)
	}
}

func (c *child) running() *running {
	return &running{Started: c.Started, t: c.t, http: http.DefaultClient}
}

// site asks the node for the state of the cluster.
func (c *child) site() (s peers.Status) {
	c.t.Helper()
	c.running().do("GET", "/api/atoll/v1/cluster", nil).want(http.StatusOK).decode(&s)
	return s
}

// children starts a site of three voters, each a process.
func children(t *testing.T) []*child {
	t.Helper()
	first := startChild(t, childStart{Name: "one"})
	nodes := []*child{first}
	for _, name := range []string{"two", "three"} {
		var token struct{ Token string }
		first.running().do("POST", "/api/atoll/v1/tokens", []byte(`{"ttl_seconds":600,"uses":1}`), "Content-Type", "application/json").want(http.StatusCreated).decode(&token)
		nodes = append(nodes, startChild(t, childStart{Name: name, Join: []string{first.PeerAddr}, Token: token.Token}))
	}
	await(t, "three voters that are up", func() string {
		for _, n := range nodes {
			s := n.site()
			good := 0
			for _, m := range s.Nodes {
				if m.Voter && m.Up {
					good++
				}
			}
			if good != 3 || !s.Quorum {
				return fmt.Sprintf("%s sees %+v", n.name, s)
			}
		}
		return ""
	})
	return nodes
}

// split gives the leader and the others.
func split(t *testing.T, nodes []*child) (leader *child, others []*child) {
	t.Helper()
	s := nodes[0].site()
	for _, m := range s.Nodes {
		for _, n := range nodes {
			if n.name == m.Name && m.Leader {
				leader = n
			} else if n.name == m.Name {
				others = append(others, n)
			}
		}
	}
	if leader == nil {
		t.Fatalf("nobody leads: %+v", s)
	}
	return leader, others
}

// Tags stay registers while the leader dies without a word. Pulls go on at once:
// at the nodes that live, none fails.
func TestTagsAreLinearizableWhileTheLeaderDies(t *testing.T) {
	nodes := children(t)
	leader, others := split(t, nodes)
	c := newTagClients(t, []string{others[0].URL, others[1].URL})
	var clients sync.WaitGroup
	for id := range 5 {
		clients.Go(func() { c.work(id, 40, []string{"a", "b"}) })
	}
	// One speaks with the leader itself, and what it asks last has no answer.
	lost := &tagClients{t: t, history: c.history, urls: []string{leader.URL}, client: c.client, once: true}
	lost.pushed.Store(1 << 32)
	clients.Go(func() { lost.work(100, 1000, []string{"a", "b"}) })
	await(t, "the clients are at work", func() string {
		c.history.mu.Lock()
		defer c.history.mu.Unlock()
		if n := len(c.history.ops); n < 40 {
			return fmt.Sprint(n)
		}
		return ""
	})
	leader.kill()
	clients.Wait()
	c.history.summary(t, 100)
	if !c.history.linearizable() {
		t.Error("no order explains what the clients were answered")
	}
	if s := others[0].site(); !s.Quorum || s.Leader == "" {
		t.Errorf("the two that live have no leader: %+v", s)
	}
}

// The check has teeth: a node that answers from what it has, without asking a
// leader, says so; whoever takes its answers for the site's is found out.
func TestLocalReadsOfTagsAreNotLinearizable(t *testing.T) {
	nodes := children(t)
	leader, others := split(t, nodes)
	behind, other := others[0], others[1]
	c := newTagClients(t, []string{leader.URL})
	arrives := func(tag string) tagOutput {
		put := c.do(0, leader.URL, tagInput{kind: moveTag, tag: tag})
		await(t, "a push reaches the node", func() string {
			a := c.ask(behind.URL, "GET", "manifests/"+tag, nil)
			if a.Status != http.StatusOK || a.Header.Get("Docker-Content-Digest") != put.at.String() {
				return fmt.Sprint(a.Status, a.Header)
			}
			return ""
		})
		return put
	}
	old := arrives("a")
	arrives("b") // with it the node's log says that the first is committed
	// Not frozen: what the others send meanwhile would wait for it.
	behind.kill()
	moved := c.do(0, leader.URL, tagInput{kind: moveTag, tag: "a"})
	if moved.status != http.StatusCreated {
		t.Fatalf("with two of three up a push answers %d", moved.status)
	}
	leader.signal(syscall.SIGSTOP)
	other.signal(syscall.SIGSTOP)
	defer leader.signal(syscall.SIGCONT)
	defer other.signal(syscall.SIGCONT)
	behind = startChild(t, childStart{Name: behind.name, Data: behind.data})

	honest := c.do(1, behind.URL, tagInput{kind: readTag, tag: "a"})
	if honest.status != http.StatusOK || honest.at != old.at || c.history.stale != 1 {
		t.Fatalf("a node that is cut off answers %d with %s, and marked %d answers stale; it holds %s", honest.status, honest.at, c.history.stale, old.at)
	}
	if !c.history.linearizable() {
		t.Error("the answer marked stale was counted")
	}
	c.takeStale = true
	c.do(1, behind.URL, tagInput{kind: readTag, tag: "a"})
	if c.history.linearizable() {
		t.Error("a local read passes for linearizable")
	}
}
