package spread

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/swarm"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// pulls is what the process that is measured has to do.
type pulls struct {
	Way      string
	Dir      string
	From     string // address of the holder
	Torrents string // its address for BitTorrent
	Blobs    []transfer.Blob
}

const pullsEnv = "ATOLL_SPREAD_PULLS"

func TestMain(m *testing.M) {
	flag.Parse()
	if task := os.Getenv(pullsEnv); task != "" {
		peak, err := pull(context.Background(), task)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(peak)
		os.Exit(0)
	}
	if task := os.Getenv(taskEnv); task != "" {
		if err := work(context.Background(), task, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// patterned are blobs that are made up as they are read.
type patterned struct {
	base   []byte // of a piece
	blobs  map[digest.Digest]uint64
	tables map[digest.Digest]transfer.PieceTable
	size   int64
}

// blob is one of them.
type blob struct {
	p      *patterned
	number uint64
}

func (b blob) Size() int64  { return b.p.size }
func (b blob) Close() error { return nil }

// ReadAt reads within one piece, as movers do, or a whole blob in order.
func (b blob) ReadAt(to []byte, off int64) (n int, err error) {
	for n < len(to) && off < b.p.size {
		piece, at := off/transfer.PieceSize, off%transfer.PieceSize
		k := copy(to[n:], b.p.base[at:min(transfer.PieceSize, at+b.p.size-off)])
		if at == 0 && k >= 16 { // no two pieces are the same
			binary.BigEndian.PutUint64(to[n:], b.number)
			binary.BigEndian.PutUint64(to[n+8:], uint64(piece))
		}
		n, off = n+k, off+int64(k)
	}
	if n < len(to) {
		err = io.EOF
	}
	return n, err
}

func (p *patterned) Open(_ context.Context, d digest.Digest) (transfer.Content, error) {
	if number, ok := p.blobs[d]; ok {
		return blob{p, number}, nil
	}
	return nil, transfer.ErrNotHeld
}

func (p *patterned) Pieces(_ context.Context, d digest.Digest) (transfer.PieceTable, error) {
	if t, ok := p.tables[d]; ok {
		return t, nil
	}
	return transfer.PieceTable{}, transfer.ErrNotHeld
}

// add makes a blob.
func (p *patterned) add(number uint64) (transfer.Blob, error) {
	whole := func() io.Reader { return io.NewSectionReader(blob{p, number}, 0, p.size) }
	table, err := transfer.HashPieces(bufferedReader{whole()}, p.size)
	if err != nil {
		return transfer.Blob{}, err
	}
	h := digest.SHA256.Digester()
	if _, err := io.CopyBuffer(h.Hash(), bufferedReader{whole()}, make([]byte, transfer.PieceSize)); err != nil {
		return transfer.Blob{}, err
	}
	d := h.Digest()
	p.blobs[d], p.tables[d] = number, table
	return transfer.Blob{Digest: d, Size: p.size, Root: table.Root()}, nil
}

// bufferedReader reads whole pieces: the first bytes of one come together.
type bufferedReader struct{ io.Reader }

func (r bufferedReader) Read(to []byte) (int, error) {
	return r.Reader.Read(to[:min(len(to), transfer.PieceSize)])
}

// store is a node's store as a source and a sink.
type store struct{ *blobs.Store }

type partial struct{ *blobs.Partial }

func (p partial) Commit(ctx context.Context) error {
	_, err := p.Partial.Commit(ctx)
	return err
}

func (s store) Create(ctx context.Context, b transfer.Blob) (transfer.Partial, error) {
	p, err := s.NewPartial(ctx, b.Digest, b.Size)
	if err != nil {
		return nil, err
	}
	return partial{p}, nil
}

func (store) Open(context.Context, digest.Digest) (transfer.Content, error) {
	return nil, transfer.ErrNotHeld
}

func (store) Pieces(context.Context, digest.Digest) (transfer.PieceTable, error) {
	return transfer.PieceTable{}, transfer.ErrNotHeld
}

// only is the one peer there is.
type only struct{ addr string }

func (o only) Candidates(context.Context, digest.Digest) []transfer.Peer {
	return []transfer.Peer{{ID: "holder", Addr: o.addr}}
}

// proven is a connection that says whose it is, without any proof.
type proven struct {
	net.Conn
	peer string
}

// PeerID of the other end.
func (p proven) PeerID() string { return p.peer }

// fromNode takes the node's connections.
type fromNode struct{ net.Listener }

// Accept implements net.Listener.
func (l fromNode) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return proven{c, "node"}, err
}

func dial(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	return proven{c, "holder"}, err
}

// engines makes a mover, and the carrier that it uses for BitTorrent, which dials torrents
// whoever is meant.
func engines(way string, c stream.Config, torrents string) (mover *stream.Engine, carrier *swarm.Engine, err error) {
	carrier, err = swarm.New(swarm.Config{
		Node: c.Self, Source: c.Source, Peers: c.Peers,
		Dial:     func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx, torrents) },
		Arriving: func(d digest.Digest) (*transfer.Arrival, bool) { return mover.Arriving(d) },
	})
	if err != nil {
		return nil, nil, err
	}
	c.Carrier = func(transfer.Blob, transfer.Way) transfer.Carrier {
		if way == byBitTorrent {
			return carrier
		}
		return nil
	}
	mover, err = stream.New(c)
	return mover, carrier, err
}

// pull fetches and reads all blobs at once and gives the most memory that this took, in
// MB.
func pull(ctx context.Context, task string) (peak float64, err error) {
	var p pulls
	if err := json.Unmarshal([]byte(task), &p); err != nil {
		return 0, err
	}
	kept, err := blobs.Open(p.Dir, blobs.Options{})
	if err != nil {
		return 0, err
	}
	e, carrier, err := engines(p.Way, stream.Config{Source: store{kept}, Sink: store{kept}, Peers: only{p.From}, Self: "node", Dial: dial}, p.Torrents)
	if err != nil {
		return 0, err
	}
	go func() { _ = e.Run(ctx) }() // the process ends with it
	go func() { _ = carrier.Run(ctx) }()
	ended := make(chan error)
	for _, b := range p.Blobs {
		go func() {
			fetch, err := e.Fetch(ctx, b, transfer.ReadFrom(0))
			if err == nil {
				r := fetch.Reader(ctx)
				defer r.Close()
				var n int64
				if n, err = io.Copy(io.Discard, r); err == nil && n != b.Size {
					err = fmt.Errorf("%d bytes of %d", n, b.Size)
				}
			}
			if err == nil {
				err = fetch.Wait(ctx)
			}
			ended <- err
		}()
	}
	for range p.Blobs {
		if err := <-ended; err != nil {
			return 0, err
		}
	}
	return peakMemory()
}

// peakMemory is the most that this process has had in memory, in MB.
func peakMemory() (float64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for text := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(text, "VmHWM:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb / 1024, err
		}
	}
	return 0, fmt.Errorf("this kernel does not tell VmHWM")
}

// Eight clients pull as many big blobs at once through one node, a process of its own with a
// store on disk, by either engine.
func TestMemoryOfPulls(t *testing.T) {
	p := &patterned{
		base: make([]byte, transfer.PieceSize), size: int64(*mib) << 20,
		blobs: map[digest.Digest]uint64{}, tables: map[digest.Digest]transfer.PieceTable{},
	}
	rand.NewChaCha8([32]byte{7}).Read(p.base)
	var addr [2]net.Listener
	for i := range addr {
		var err error
		if addr[i], err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	task := pulls{From: addr[0].Addr().String(), Torrents: addr[1].Addr().String()}
	for i := range 8 {
		b, err := p.add(uint64(i))
		if err != nil {
			t.Fatal(err)
		}
		task.Blobs = append(task.Blobs, b)
	}
	holder, carrier, err := engines(byStream, stream.Config{Source: p, Sink: transfertest.NewStore(), Peers: only{}, Self: "holder", Dial: dial}, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer addr[1].Close()
	defer cancel()
	wg.Go(func() { _ = holder.Serve(ctx, fromNode{addr[0]}) })
	wg.Go(func() { _ = carrier.Run(ctx) })
	wg.Go(func() { _ = carrier.Serve(fromNode{addr[1]}) })
	for _, way := range []string{byStream, byBitTorrent} {
		task.Way, task.Dir = way, filepath.Join(t.TempDir(), "blobs")
		peak := task.run(ctx, t)
		row(fmt.Sprintf("pulls8_of_%d_mib_rss_%s", *mib, way), peak, "MB", 128)
		if peak > 128 {
			t.Errorf("eight pulls by %s took %.0f MB", way, peak)
		}
		if err := os.RemoveAll(task.Dir); err != nil { // it is large
			t.Fatal(err)
		}
	}
}

// run has another process do the task, and gives the most memory that it had, in MB.
func (p pulls) run(ctx context.Context, t *testing.T) float64 {
	t.Helper()
	raw, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), pullsEnv+"="+string(raw))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	peak, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
	if err != nil {
		t.Fatal(err)
	}
	return peak
}
