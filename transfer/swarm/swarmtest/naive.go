// Package swarmtest has what measurements of the BitTorrent engine compare it with:
// the library as it comes.
package swarmtest

import (
	"bytes"
	"context"
	"fmt"
	"net"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"golang.org/x/time/rate"
)

// Naive is one client of the library with its own defaults, but for what finds peers:
// it has the connections that it is given, as the engine has.
type Naive struct {
	client *torrent.Client
	dir    string
	id     string
}

// Dialer opens connections to addresses.
type Dialer func(ctx context.Context, addr string) (net.Conn, error)

// Dial implements the library's Dialer.
func (d Dialer) Dial(ctx context.Context, addr string) (net.Conn, error) { return d(ctx, addr) }

// DialerNetwork implements the library's Dialer.
func (Dialer) DialerNetwork() string { return "tcp" }

// NewNaive starts a client that keeps its files in dir.
func NewNaive(id, dir string, dial Dialer, ln net.Listener) (*Naive, error) {
	c := torrent.NewDefaultClientConfig()
	c.DataDir, c.Seed = dir, true
	c.NoDHT, c.DisableTrackers, c.DisablePEX, c.NoDefaultPortForwarding = true, true, true, true
	c.DisableTCP, c.DisableUTP, c.DisableWebtorrent, c.DisableWebseeds = true, true, true, true
	c.DialRateLimiter = rate.NewLimiter(rate.Inf, 1) // the connections are not what is measured
	cl, err := torrent.NewClient(c)
	if err != nil {
		return nil, err
	}
	cl.AddDialer(dial)
	cl.AddListener(ln)
	return &Naive{client: cl, dir: dir, id: id}, nil
}

// MetaInfo of content in pieces of so many bytes, named blob.
func MetaInfo(content []byte, piece int64) (*metainfo.MetaInfo, error) {
	info := metainfo.Info{PieceLength: piece, Name: "blob", Length: int64(len(content))}
	pieces, err := metainfo.GeneratePieces(bytes.NewReader(content), piece, nil)
	if err != nil {
		return nil, err
	}
	info.Pieces = pieces
	raw, err := bencode.Marshal(info)
	return &metainfo.MetaInfo{InfoBytes: raw}, err
}

// Fetch gets a torrent from peers, and returns when it is here; what is in the
// directory already is seeded.
func (n *Naive) Fetch(ctx context.Context, mi *metainfo.MetaInfo, peers []string) error {
	t, err := n.client.AddTorrent(mi)
	if err != nil {
		return err
	}
	for _, p := range peers {
		t.AddPeers([]torrent.PeerInfo{{Addr: torrent.StringAddr(p), Source: torrent.PeerSourceDirect, Trusted: true}})
	}
	t.DownloadAll()
	select {
	case <-t.Complete().On():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("client %s has %d of %d bytes: %w", n.id, t.BytesCompleted(), t.Length(), ctx.Err())
	}
}

// Dir is where it keeps its files.
func (n *Naive) Dir() string { return n.dir }

// Sent is how many bytes of pieces the client has sent.
func (n *Naive) Sent() int64 {
	stats := n.client.Stats()
	return stats.BytesWrittenData.Int64()
}

// Close ends it.
func (n *Naive) Close() { n.client.Close() }
