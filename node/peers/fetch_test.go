package peers

import (
	"bytes"
	"io"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
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

func TestParseEngine(t *testing.T) {
	for text, ok := range map[string]bool{"auto": true, "stream": true, "bittorrent": true, "": false, "Stream": false, "ftp": false} {
		if e, err := parseEngine(text); (err == nil) != ok || ok && string(e) != text {
			t.Errorf("%q is %q, %v", text, e, err)
		}
	}
}
