package peers

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

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

// The setting decides how a blob is fetched; a node serves both ways whatever its own
// says, and a fetch may say otherwise.
func TestTheSettingChoosesTheEngine(t *testing.T) {
	s := newSite(t, 2)
	var engine atomic.Value
	engine.Store(EngineStream)
	from, to := s.nodes[0], s.nodes[1]
	to.Policy.Engine = func() Engine { return engine.Load().(Engine) }
	s.run()
	torrents := func() int {
		n, _ := from.swarm.Torrents()
		return n
	}
	var count int
	pull := func(options ...transfer.Option) {
		count++
		content := bytes.Repeat([]byte{byte(count)}, 3*transfer.PieceSize+count)
		d := s.put(content, from)
		s.commitRoot(t, from, d)
		if len(options) == 0 {
			pulled(t, to, d, content)
			return
		}
		root, err := to.root(d)
		if err != nil {
			t.Fatal(err)
		}
		f, err := to.engine.Fetch(t.Context(), transfer.Blob{Digest: d, Size: int64(len(content)), Root: root}, options...)
		if err == nil {
			err = f.Wait(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	pull()
	if torrents() != 0 {
		t.Error("there is a torrent, and the setting says stream")
	}
	pull(transfer.Via(transfer.ByBitTorrent))
	if torrents() != 1 {
		t.Error("the fetch that asked for BitTorrent went another way")
	}
	engine.Store(EngineBitTorrent)
	pull()
	if torrents() != 2 {
		t.Error("there is no torrent, and the setting says bittorrent")
	}
	pull(transfer.Via(transfer.ByStream))
	if torrents() != 2 {
		t.Error("the fetch that asked for stream went another way")
	}
	engine.Store(EngineStream)
	content := bytes.Repeat([]byte("before"), transfer.PieceSize)
	d := s.put(content, from)
	s.commitRoot(t, from, d)
	if err := to.Prefetch(t.Context(), d, int64(len(content)), transfer.ByBitTorrent); err != nil {
		t.Fatal(err)
	}
	if torrents() != 3 {
		t.Error("the prefetch that asked for BitTorrent went another way")
	}
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
	to.Policy.Engine = func() Engine { return EngineBitTorrent }
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

func TestParseEngine(t *testing.T) {
	for text, ok := range map[string]bool{"auto": true, "stream": true, "bittorrent": true, "": false, "Stream": false, "ftp": false} {
		if e, err := parseEngine(text); (err == nil) != ok || ok && string(e) != text {
			t.Errorf("%q is %q, %v", text, e, err)
		}
	}
}
