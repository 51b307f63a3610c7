package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// site is several nodes in one process: one table for all of them, a store for
// each, pipes between them.
type site struct {
	t       testing.TB
	db      *table.DB
	records *blobs.Records

	durability, replicas, minutes number

	mu    sync.Mutex
	nodes []*node
}

// number is a setting.
type number struct{ atomic.Int64 }

func (n *number) value() int { return int(n.Load()) }

// node is one of them; it is the Roster and the Network of its Peers.
type node struct {
	*Peers
	site       *site
	id, dir    string
	logs       bytes.Buffer         // under site.mu
	down       bool                 // under site.mu
	row        member.Member        // under site.mu
	sees       func(*member.Member) // changes what this node sees of a row; nil: nothing
	gone       time.Time            // since when down is what it is
	deaf       time.Time            // under site.mu: since when it hears of nobody; zero: it does
	suspects   string               // whom it cannot reach itself
	lacksSwarm bool                 // it does not know the BitTorrent service
	listeners  map[byte]*pipes
	cancel     context.CancelFunc
	done       chan error
}

func newSite(t testing.TB, n int) *site {
	t.Helper()
	s := &site{t: t, db: tabletest.Open(t)}
	s.durability.Store(durability)
	s.replicas.Store(replicas)
	s.records = blobs.NewRecords(s.db)
	tabletest.Start(t, s.db)
	for i := range n {
		s.add(fmt.Sprintf("node%d", i+1))
	}
	return s
}

// add makes a node, which does not run yet.
func (s *site) add(id string) *node {
	s.t.Helper()
	n := &node{site: s, id: id, row: member.Member{ID: id, Addr: id + ":5001"}, listeners: map[byte]*pipes{}}
	n.dir = s.t.TempDir()
	store, err := blobs.Open(n.dir, blobs.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	n.Peers, err = New(Config{
		DB: s.db, Roster: n, Network: n, Store: store, Records: s.records,
		Policy: Policy{Durability: s.durability.value, Replicas: s.replicas.value, Release: s.release},
		Log:    slog.New(slog.NewTextHandler(n, nil)), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		s.t.Fatal(err)
	}
	n.ServeForwarded(http.NotFoundHandler())
	s.mu.Lock()
	s.nodes = append(s.nodes, n)
	s.mu.Unlock()
	return n
}

// run runs nodes, all without an argument, until stop or the test's end.
func (s *site) run(nodes ...*node) {
	if len(nodes) == 0 {
		nodes = s.nodes
	}
	for _, n := range nodes {
		ctx, cancel := context.WithCancel(context.WithoutCancel(s.t.Context()))
		n.cancel, n.done = cancel, make(chan error, 1)
		go func() { n.done <- n.Run(ctx) }()
		s.t.Cleanup(n.stop)
	}
}

// carry has all nodes move and serve blobs until the test's end, without their repairs.
func (s *site) carry() {
	ctx, cancel := context.WithCancel(context.WithoutCancel(s.t.Context()))
	var wg sync.WaitGroup
	for _, n := range s.nodes {
		wg.Go(func() { _ = n.runEngines(ctx) })
		wg.Go(func() { _ = n.tables.run(ctx) })
		wg.Go(func() { _ = n.engine.Serve(ctx, n.Network.Listen(peernet.ServiceBlob)) })
		wg.Go(func() { _ = n.serveHTTP(ctx, peernet.ServiceAPI, n.apiServer()) })
	}
	s.t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

func (n *node) stop() {
	if n.cancel == nil {
		return
	}
	n.cancel()
	n.cancel = nil
	if err := <-n.done; err != nil {
		n.site.t.Errorf("%s ended with %v", n.id, err)
	}
}

// setRow changes what a node's row says.
func (n *node) setRow(change func(*member.Member)) {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	change(&n.row)
}

// setDown takes a node off the network, or brings it back.
func (n *node) setDown(down bool) {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	n.down, n.gone = down, time.Now()
}

// Write takes the node's log.
func (n *node) Write(p []byte) (int, error) {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	return n.logs.Write(p)
}

// logged counts the lines of the log that hold a text.
func (n *node) logged(text string) int {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	return strings.Count(n.logs.String(), text)
}

// release is after how long nodes let go of surplus copies.
func (s *site) release() time.Duration { return time.Duration(s.minutes.Load()) * time.Minute }

// Self implements Roster.
func (n *node) Self() string { return n.id }

// Live implements Roster.
func (n *node) Live() (live []member.Member) {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	for _, o := range n.site.nodes {
		if o == n || !o.down && !n.down && n.deaf.IsZero() {
			live = append(live, n.seen(o.row))
		}
	}
	return live
}

// Suspect implements Roster.
func (n *node) Suspect(id string) bool {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	return n.suspects == id
}

// DownSince implements Roster.
func (n *node) DownSince(id string) (time.Time, bool) {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	for _, o := range n.site.nodes {
		if o.id == id && o != n && o.down {
			return o.gone, true
		}
		if o.id == id && o != n && !n.deaf.IsZero() {
			return n.deaf, true
		}
	}
	return time.Time{}, false
}

// Members implements Roster.
func (n *node) Members(table.Reader) (members []member.Member, err error) {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	for _, o := range n.site.nodes {
		members = append(members, n.seen(o.row))
	}
	return members, nil
}

func (n *node) seen(m member.Member) member.Member {
	if n.sees != nil {
		n.sees(&m)
	}
	return m
}

// pipes is a listener.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// proven is a connection that proves its peer.
type proven struct {
	net.Conn
	peer string
}

func (c proven) PeerID() string { return c.peer }

func (n *node) listener(service byte) *pipes {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	if n.listeners[service] == nil {
		n.listeners[service] = &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	}
	return n.listeners[service]
}

// Listen implements Network.
func (n *node) Listen(service byte) net.Listener { return n.listener(service) }

// Dial implements Network.
func (n *node) Dial(ctx context.Context, addr string, service byte) (net.Conn, error) {
	n.site.mu.Lock()
	var to *node
	for _, o := range n.site.nodes {
		if o.id+":5001" == addr && !o.down && !n.down {
			to = o
		}
	}
	n.site.mu.Unlock()
	if to == nil {
		return nil, errors.New("no route to " + addr)
	}
	if to.lacksSwarm && service == peernet.ServiceSwarm {
		return nil, peernet.ErrNoService
	}
	near, far := net.Pipe()
	l := to.listener(service)
	select {
	case l.conns <- proven{far, n.id}:
		return proven{near, to.id}, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// put gives a blob to nodes, named by sha256, and makes its row.
func (s *site) put(b []byte, on ...*node) digest.Digest {
	s.t.Helper()
	return s.putAs(digest.SHA256, b, on...)
}

func (s *site) putAs(algorithm digest.Algorithm, b []byte, on ...*node) digest.Digest {
	s.t.Helper()
	d := algorithm.FromBytes(b)
	for _, n := range on {
		if _, err := n.Store.Put(s.t.Context(), d, bytes.NewReader(b)); err != nil {
			s.t.Fatal(err)
		}
	}
	s.update(func(tx *table.Tx) error { return s.records.Live(tx, d, int64(len(b))) })
	return d
}

func (s *site) update(fn func(*table.Tx) error) {
	s.t.Helper()
	if _, err := s.db.Update(s.t.Context(), fn); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) row(d digest.Digest) (row blobs.Blob) {
	s.t.Helper()
	if err := s.db.View(func(v *table.View) (err error) {
		row, _, err = s.records.Get(v, d)
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	return row
}

func (n *node) holds(d digest.Digest) bool {
	_, err := n.Store.Stat(d)
	return err == nil
}

// byPlacement are the nodes in the order of a blob's placement.
func (s *site) byPlacement(d digest.Digest) (order []*node) {
	var all []string
	for _, n := range s.nodes {
		all = append(all, n.id)
	}
	for _, id := range placement(d, all) {
		for _, n := range s.nodes {
			if n.id == id {
				order = append(order, n)
			}
		}
	}
	return order
}

// bytesOf gives n bytes of a kind.
func bytesOf(kind string, n int) []byte {
	return bytes.Repeat([]byte(kind+"."), n/(len(kind)+1)+1)[:n]
}

// homes are the nodes that should hold a blob when all are alike and there.
func homes(d digest.Digest, ids []string, n int) []string {
	order := placement(d, ids)
	return order[:min(n, len(order))]
}

// What the sites of the tests are set to.
const (
	durability = 2
	replicas   = 3
)

// plant puts a blob into a node's store without the syncs of a push, for sites of
// many blobs; a node that runs does not notice.
func (n *node) plant(d digest.Digest, b []byte) {
	n.site.t.Helper()
	dir := filepath.Join(n.dir, "blobs", d.Algorithm().String(), d.Encoded()[:2])
	if err := os.WriteFile(filepath.Join(dir, d.Encoded()), b, 0o600); err != nil {
		n.site.t.Fatal(err)
	}
}

// emptied gives a node a store with nothing in it.
func emptied(n *node) (*blobs.Store, error) { return blobs.Open(n.site.t.TempDir(), blobs.Options{}) }
