package spread

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/scripts/lab"
	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/swarm/swarmtest"
)

// crew is the nodes of one run, each a process in a network namespace of its own.
type crew struct {
	ground
	way   string
	blob  transfer.Blob
	info  []byte
	plan  []post
	nodes []*member
}

// post is what a node is to be.
type post struct {
	zone     string // its switch; nodes on others are far away when the crew has several
	up, down int64  // bytes a second; 0: as fast as it goes
	holds    bool
	reads    bool // a client reads there from the beginning
}

// member is one of the crew as it is seen from outside.
type member struct {
	post
	id     string
	host   *lab.Host
	cmd    *exec.Cmd
	orders io.WriteCloser
	began  time.Time // when it was told to fetch

	mu      sync.Mutex
	last    report
	took    time.Duration // from then until the blob was there
	changed chan struct{} // closed and made anew with each report
	ended   chan struct{}
}

// newCrew is of nodes that spread a blob; they run only when started.
func newCrew(t *testing.T, way string, size int64, plan []post) *crew {
	t.Helper()
	c := &crew{ground: newGround(t, 0), way: way, plan: plan}
	content := contentOf(size)
	table, err := transfer.HashPieces(bytes.NewReader(content), size)
	if err != nil {
		t.Fatal(err)
	}
	c.blob = transfer.Blob{Digest: digest.FromBytes(content), Size: size, Root: table.Root()}
	if way == byDefaults {
		info, err := swarmtest.MetaInfo(content, transfer.PieceSize)
		if err != nil {
			t.Fatal(err)
		}
		c.info = info.InfoBytes
	}
	for i, p := range plan {
		m := &member{post: p, id: fmt.Sprintf("node-%d", i), changed: make(chan struct{}), ended: make(chan struct{})}
		if m.host, err = c.Host(t.Context(), fmt.Sprintf("n%d", i), p.zone, fmt.Sprintf("10.77.0.%d/24", i+1)); err != nil {
			t.Fatal(err)
		}
		if p.up > 0 {
			err = m.host.ShapeOut(t.Context(), p.up)
		}
		if err == nil && p.down > 0 {
			err = m.host.Shape(t.Context(), p.down)
		}
		if err != nil {
			t.Fatal(err)
		}
		c.nodes = append(c.nodes, m)
	}
	return c
}

// task is what a node is told.
func (c *crew) task(t *testing.T, m *member) task {
	t.Helper()
	cert := c.site.Node(t, m.id)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	out := task{Way: c.way, ID: m.id, Site: c.site.ID, Chain: cert.Certificate, Key: key, Blob: c.blob, Info: c.info, Holds: m.holds, Reads: m.reads}
	if c.way == byDefaults {
		out.Dir = t.TempDir()
	}
	for _, o := range c.nodes {
		if o == m || c.way == byStar && !o.holds {
			continue
		}
		to := mate{Peer: transfer.Peer{ID: o.id, Addr: o.host.IP + ":" + peerPort}}
		if o.zone != m.zone {
			to.Distance, out.Zones = stream.Farthest, true
		}
		out.Mates = append(out.Mates, to)
	}
	return out
}

// start runs all nodes and waits until they are ready.
func (c *crew) start(t *testing.T) {
	t.Helper()
	for _, m := range c.nodes {
		raw, err := json.Marshal(c.task(t, m))
		if err != nil {
			t.Fatal(err)
		}
		m.cmd = m.host.Command(context.WithoutCancel(t.Context()), os.Args[0])
		m.cmd.Env = append(os.Environ(), taskEnv+"="+string(raw))
		m.cmd.Stderr = os.Stderr
		out, err := m.cmd.StdoutPipe()
		if err == nil {
			m.orders, err = m.cmd.StdinPipe()
		}
		if err == nil {
			err = m.cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		ready := make(chan struct{})
		go m.listen(out, ready)
		t.Cleanup(m.kill)
		select {
		case <-ready:
		case <-m.ended:
			t.Fatalf("%s ended before it was ready", m.id)
		}
	}
}

// listen takes a node's reports.
func (m *member) listen(out io.Reader, ready chan struct{}) {
	defer close(m.ended)
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var r report
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			continue
		}
		m.mu.Lock()
		if (r.Done || r.Err != "") && !m.last.Done {
			m.took = time.Since(m.began)
		}
		m.last = r
		close(m.changed)
		m.changed = make(chan struct{})
		m.mu.Unlock()
		if ready != nil {
			close(ready)
			ready = nil
		}
	}
	_ = m.cmd.Wait() // it was killed, or has said why on standard error
}

// kill ends the node as kill -9 does.
func (m *member) kill() {
	_ = m.cmd.Process.Kill() // one that has ended is what is wanted
	<-m.ended
}

// fetch tells the node to get the blob.
func (m *member) fetch(t *testing.T) {
	t.Helper()
	m.began = time.Now()
	if _, err := io.WriteString(m.orders, "fetch\n"); err != nil {
		t.Fatal(err)
	}
}

// says is the node's last report.
func (m *member) says() report {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last
}

// until waits until what the node says is right; false when it failed, ended or ran out of time.
func (m *member) until(ctx context.Context, ok func(report) bool) bool {
	for {
		m.mu.Lock()
		last, changed := m.last, m.changed
		m.mu.Unlock()
		if ok(last) {
			return true
		}
		if last.Err != "" {
			return false
		}
		select {
		case <-changed:
		case <-m.ended:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// have waits until the nodes have the blob, and gives how long the last one took.
func (c *crew) have(ctx context.Context, t *testing.T, nodes []*member) (last time.Duration) {
	t.Helper()
	for _, m := range nodes {
		if !m.until(ctx, func(r report) bool { return r.Done }) {
			r := m.says()
			t.Fatalf("%s has %d of %d bytes: %s %v", m.id, r.Held, c.blob.Size, r.Err, ctx.Err())
		}
		last = max(last, m.took)
	}
	return last
}

// settled waits until the nodes' counts stand still, for pieces that are under way still.
func settled(ctx context.Context, nodes []*member) {
	for _, m := range nodes {
		before := int64(-1)
		m.until(ctx, func(r report) bool {
			same := r.Sent == before
			before = r.Sent
			return same
		})
	}
}

// wait bounds a run: so many times as long as a link needs for the blob, and a while.
func wait(t *testing.T, size, rate int64, times float64) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second+time.Duration(times*float64(size)/float64(rate)*float64(time.Second)))
	t.Cleanup(cancel)
	return ctx
}

var ways = flag.String("engine", byStream, "some of stream, bittorrent, defaults and star, one run after the other")

// One node holds a blob and all the others want it at once: by each engine, by
// BitTorrent's library as it comes, and all from the holder.
func TestWays(t *testing.T) {
	took := map[string]float64{}
	for way := range strings.SplitSeq(*ways, ",") {
		if !slices.Contains([]string{byStream, byBitTorrent, byDefaults, byStar}, way) {
			t.Fatalf("-engine %q: stream, bittorrent, defaults and star are known", way)
		}
		t.Run(way, func(t *testing.T) { took[way] = spread(t, way, false) })
	}
	for other, goal := range map[string]float64{byDefaults: 2.2, byStar: 6} {
		if took[byStream] > 0 && took[other] > 0 {
			rowAtLeast(fmt.Sprintf("ways_%d_nodes_%s_over_stream", *nodes, other), took[other]/took[byStream], "x", goal)
		}
	}
}

// Clients read at all nodes at once, and so wait for the same pieces in the same order.
func TestReaders(t *testing.T) { spread(t, byStream, true) }

// spread gives the time until the last node has the blob, over the bound.
func spread(t *testing.T, way string, reads bool) float64 {
	size := int64(*mib) << 20
	plan := []post{{zone: "s", up: *rate, holds: true}}
	for range *nodes {
		plan = append(plan, post{zone: "s", up: *rate, reads: reads})
	}
	c := newCrew(t, way, size, plan)
	c.start(t)
	for _, m := range c.nodes[1:] {
		m.fetch(t)
	}
	ctx := wait(t, size, *rate, float64(*nodes)+4)
	took := c.have(ctx, t, c.nodes[1:])
	settled(ctx, c.nodes)

	// With equal uplinks the holder's is the bound: each byte has to leave it once.
	over := took.Seconds() / (float64(size) / float64(*rate))
	all := int64(0)
	for _, m := range c.nodes {
		all += m.says().Sent
	}
	source, sent := float64(c.nodes[0].says().Sent)/float64(size), float64(all)/float64(size)/float64(*nodes)
	t.Logf("%s: %d nodes, %d MiB, %.1f MB/s each: the last had it after %.1f s, %.3f of the bound; the holder sent %.3f F, all sent %.3f N F",
		way, *nodes, *mib, float64(*rate)/1e6, took.Seconds(), over, source, sent)
	name := fmt.Sprintf("ways_%d_nodes_%s", *nodes, way)
	if reads {
		name = fmt.Sprintf("readers_%d_nodes", *nodes)
	}
	if way != byStream && way != byBitTorrent {
		row(name, over, "x bound", 0)
		return over
	}
	goal := 1.3
	if *nodes > 8 {
		goal = 1.4
	}
	judge(t, name, over, "x bound", limits{goal, 3})
	judge(t, name+"_source_sent", source, "F", limits{1.25, 2})
	judge(t, name+"_all_sent", sent, "N F", limits{1.02, 1.1})
	return over
}
