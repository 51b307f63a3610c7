package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

func (s *site) commitRoot(t *testing.T, n *node, d digest.Digest) {
	t.Helper()
	if err := n.commitRoot(t.Context(), d); err != nil {
		t.Fatal(err)
	}
}

func pulled(t *testing.T, n *node, d digest.Digest, want []byte) {
	t.Helper()
	r, err := n.Open(t.Context(), d, int64(len(want)))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

// ways counts what came, by engine.
type ways struct {
	mu    sync.Mutex
	bytes map[transfer.Way]int
}

func (w *ways) Sent(transfer.Flow, int) {}

func (w *ways) Received(f transfer.Flow, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bytes[f.Way] += n
}

// A node that has just started has heard of nobody. It asks them all the same before it
// says that nobody holds a blob; after a moment it does not.
func TestAFetchBeforeAnybodyWasHeardOf(t *testing.T) {
	s := newSite(t, 2)
	holder, starts := s.nodes[0], s.nodes[1]
	hears := func(since time.Time) {
		s.mu.Lock()
		defer s.mu.Unlock()
		starts.deaf = since
	}
	hears(time.Now().Add(-unheard)) // nor does its repair find anybody
	s.run()
	content := bytes.Repeat([]byte("early"), 1000)
	d := s.put(content, holder)
	if _, err := starts.Open(t.Context(), d, int64(len(content))); !fault.Is(err, fault.Unavailable) {
		t.Errorf("of a blob on a node that is down: %v", err)
	}
	hears(time.Now())
	pulled(t, starts, d, content)
}

// The setting decides how blobs move, by what they are moved for and the projects that
// they are in; a node serves both ways whatever its own says, and a prefetch may say
// otherwise.
func TestTheSettingChoosesTheEngine(t *testing.T) {
	s := newSite(t, 2)
	came := &ways{bytes: map[transfer.Way]int{}}
	var settings [2]atomic.Pointer[Engines]
	from, to := s.nodes[0], s.nodes[1]
	to.Meter = came
	if err := to.makeEngines(); err != nil {
		t.Fatal(err)
	}
	for i, n := range s.nodes {
		n.Policy.Engines = func() Engines { return *settings[i].Load() }
	}
	set := func(texts ...string) {
		t.Helper()
		for i := range settings {
			e, err := parseEngines(texts[min(i, len(texts)-1)])
			if err != nil {
				t.Fatal(err)
			}
			settings[i].Store(&e)
		}
	}
	set("stream")
	s.carry() // repair would fetch the same
	var count int
	// move has the node fetch a blob that is in a project, or in none for "".
	move := func(what, project string, by transfer.Way, fetch func(d digest.Digest, content []byte) error) {
		t.Helper()
		count++
		content := bytes.Repeat([]byte{byte(count)}, 3*transfer.PieceSize+count)
		d := s.put(content, from)
		if project != "" {
			s.update(func(tx *table.Tx) error { return s.records.Link(tx, project, "app", d) })
		}
		if err := fetch(d, content); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		came.mu.Lock()
		defer came.mu.Unlock()
		if got := came.bytes[by]; got != len(content) || len(came.bytes) != 1 {
			t.Errorf("%s: %v bytes came, and not %d by %s", what, came.bytes, len(content), by)
		}
		clear(came.bytes)
	}
	pull := func(d digest.Digest, content []byte) error {
		pulled(t, to, d, content)
		return nil
	}
	push := func(d digest.Digest, _ []byte) error {
		n, err := from.Ensure(t.Context(), []digest.Digest{d})
		if err == nil && n != 2 {
			err = fmt.Errorf("%d copies", n)
		}
		return err
	}
	repair := func(d digest.Digest, content []byte) error {
		return to.obtain(t.Context(), heldBlob{Digest: d, Size: int64(len(content))}, transfer.Repair)
	}
	prefetch := func(way transfer.Way) func(digest.Digest, []byte) error {
		return func(d digest.Digest, content []byte) error {
			return to.Prefetch(t.Context(), d, int64(len(content)), way)
		}
	}

	move("pull", "", transfer.ByStream, pull)
	move("push", "", transfer.ByStream, push)
	move("prefetch that names BitTorrent", "", transfer.ByBitTorrent, prefetch(transfer.ByBitTorrent))

	set("bittorrent")
	move("pull", "", transfer.ByBitTorrent, pull)
	move("push", "", transfer.ByBitTorrent, push)
	move("repair", "", transfer.ByBitTorrent, repair)
	move("prefetch", "", transfer.ByBitTorrent, prefetch(transfer.ByDefault))
	move("prefetch that names stream", "", transfer.ByStream, prefetch(transfer.ByStream))

	set("bittorrent", "stream") // who asks for a copy knows the projects for certain
	move("push", "", transfer.ByBitTorrent, push)

	set("project=models,class=repair: stream | project=models: bittorrent | class=prefetch: bittorrent | auto")
	move("pull of another project", "apps", transfer.ByStream, pull)
	move("pull of the project", "models", transfer.ByBitTorrent, pull)
	move("push to the project", "models", transfer.ByBitTorrent, push)
	move("repair of the project", "models", transfer.ByStream, repair)
	move("prefetch of another project", "apps", transfer.ByBitTorrent, prefetch(transfer.ByDefault))
	move("repair of another project", "apps", transfer.ByStream, repair)
}

// one lets a single piece pass.
type one struct{ gone atomic.Bool }

func (o *one) Take(transfer.Flow, int) time.Duration {
	if o.gone.CompareAndSwap(false, true) {
		return 0
	}
	return time.Second
}

// What a reader is about to begin with comes first, wherever in the blob that is.
func TestOpenAtFetchesThatFirst(t *testing.T) {
	s := newSite(t, 2)
	from, to := s.nodes[0], s.nodes[1]
	from.Limiter = &one{}
	if err := from.makeEngines(); err != nil {
		t.Fatal(err)
	}
	s.run()
	content := bytes.Repeat([]byte("tide "), 2*transfer.PieceSize)
	d := s.put(content, from)
	s.commitRoot(t, from, d)
	r, err := to.OpenAt(t.Context(), d, int64(len(content)), 7*transfer.PieceSize+3)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	a, ok := to.engine.Arriving(d)
	if !ok || !a.Holds(7) || a.Held().Count() != 1 {
		t.Errorf("the only piece that went is another one: %v", a.Held())
	}
}

// A peer of a version without BitTorrent is asked in the other way.
func TestBitTorrentFallsBack(t *testing.T) {
	s := newSite(t, 2)
	from, to := s.nodes[0], s.nodes[1]
	to.Policy.Engines = func() Engines { return Engines{{engine: EngineBitTorrent}} }
	from.lacksSwarm = true
	s.run()
	content := bytes.Repeat([]byte("tide "), transfer.PieceSize)
	d := s.put(content, from)
	s.commitRoot(t, from, d)
	pulled(t, to, d, content)
	if n, _ := from.swarm.Torrents(); n != 0 {
		t.Error("it went by BitTorrent after all")
	}
}

// Blobs go by the carrier that the setting says at the moment; where a node may not
// choose, or the setting leaves it open, as the network likes.
func TestTheSettingChoosesTheTransport(t *testing.T) {
	s := newSite(t, 2)
	from, to := s.nodes[0], s.nodes[1]
	var transport atomic.Value
	var over []peernet.Carrier
	var mu sync.Mutex
	fails := errors.New("no way")
	transport.Store(peernet.Auto)
	to.Policy.Transport = func() peernet.Transport { return transport.Load().(peernet.Transport) }
	to.Over = func(ctx context.Context, addr string, service byte, by peernet.Carrier) (net.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		over = append(over, by)
		if by == peernet.TCP {
			return nil, fails
		}
		return to.Dial(ctx, addr, service)
	}
	s.run()
	dial := func(service byte) error {
		c, err := to.dialBlobs(t.Context(), from.row.Addr, service)
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := dial(peernet.ServiceBlob); err != nil || len(over) > 0 {
		t.Errorf("auto: %v, over %v", err, over)
	}
	transport.Store(peernet.OnlyQUIC)
	if err := errors.Join(dial(peernet.ServiceBlob), dial(peernet.ServiceSwarm)); err != nil || !slices.Equal(over, []peernet.Carrier{peernet.QUIC, peernet.QUIC}) {
		t.Errorf("quic: %v, over %v", err, over)
	}
	transport.Store(peernet.OnlyTCP)
	if err := dial(peernet.ServiceBlob); !errors.Is(err, fails) || !strings.Contains(err.Error(), "peers.transport") {
		t.Errorf("tcp that fails: %v", err)
	}
	to.Over = nil
	if err := dial(peernet.ServiceBlob); err != nil || len(over) != 3 {
		t.Errorf("a node that keeps to its own: %v, over %v", err, over)
	}
}

func TestParseTransport(t *testing.T) {
	for text, ok := range map[string]bool{"auto": true, "tcp": true, "quic": true, "": false, "TCP": false, "udp": false} {
		if got, err := parseTransport(text); (err == nil) != ok || ok && string(got) != text {
			t.Errorf("%q is %q, %v", text, got, err)
		}
	}
}

func TestParseEngines(t *testing.T) {
	pull, repair := transfer.Pull, transfer.Repair
	for text, want := range map[string]Engines{
		"auto":                          {{engine: EngineAuto}},
		"stream":                        {{engine: EngineStream}},
		" bittorrent ":                  {{engine: EngineBitTorrent}},
		"project = models : bittorrent": {{project: "models", engine: EngineBitTorrent}},
		"class=repair,project=a: bittorrent|class=pull:stream": {{"a", &repair, EngineBitTorrent}, {"", &pull, EngineStream}},
		"project=a: auto | bittorrent":                         {{project: "a", engine: EngineAuto}, {engine: EngineBitTorrent}},
	} {
		if got, err := parseEngines(text); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q is %v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "Stream", "ftp", "stream | bittorrent", "stream |", "project=: stream", "project: stream", ": stream", "project=a: ", "project=a:b: stream",
		"class=push: stream", "class=: stream", "class=pull,class=pull: stream", "project=a,project=b: stream", "size=1: stream",
		strings.Repeat("project=a: stream | ", maxEngineRules) + "stream",
	} {
		if got, err := parseEngines(text); err == nil {
			t.Errorf("%q is taken as %v", text, got)
		}
	}
}
