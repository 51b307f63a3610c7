package stream_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// peers asks what it lists.
type peers []transfer.Peer

func (p peers) Candidates(context.Context, digest.Digest) []transfer.Peer { return p }

// mover runs an engine that dials plainly, since these peers lie in HTTP.
func mover(t *testing.T, store *transfertest.Store, ask peers, change func(*stream.Config)) *stream.Engine {
	t.Helper()
	cfg := stream.Config{
		Source: store, Sink: store, Peers: ask,
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		},
		StallTimeout: 300 * time.Millisecond,
		AskTimeout:   5 * time.Second,
		Backoff:      time.Millisecond,
	}
	if change != nil {
		change(&cfg)
	}
	e, err := stream.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return e
}

// answering serves raw bytes: answer gets each request's line and headers.
func answering(t *testing.T, answer func(w io.Writer, r *http.Request)) transfer.Peer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				stop := context.AfterFunc(ctx, func() { c.Close() })
				defer stop()
				in := bufio.NewReader(c)
				for {
					r, err := http.ReadRequest(in)
					if err != nil {
						return
					}
					answer(c, r)
				}
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		ln.Close()
		wg.Wait()
	})
	return transfer.Peer{ID: "hostile", Addr: ln.Addr().String()}
}

func serving(t *testing.T, h http.Handler) transfer.Peer {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return transfer.Peer{ID: "honest", Addr: s.Listener.Addr().String()}
}

func sample(t *testing.T, size int) ([]byte, transfer.Blob, []byte) {
	t.Helper()
	content := bytes.Repeat([]byte("the tide comes and goes\n"), size/24+1)[:size]
	table, err := transfer.HashPieces(bytes.NewReader(content), int64(size))
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := table.MarshalBinary()
	return content, transfer.Blob{Digest: digest.FromBytes(content), Size: int64(size), Root: table.Root()}, raw
}

// Each answer is a lie or nonsense in HTTP. Alone its author gets nowhere; beside an
// honest peer the blob arrives.
func TestLiesInHTTP(t *testing.T) {
	content, blob, table := sample(t, 5*transfer.PieceSize+100)
	size := len(content)
	head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\nAtoll-Held: complete\r\n\r\n", size)
	partial := strings.Replace(head, "complete", "partial", 1)
	pieces := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(table), table)
	// The three questions and how this peer answers each.
	type answers struct{ head, pieces, have, get string }
	for name, a := range map[string]answers{
		"negative size":       {head: "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"},
		"size beyond numbers": {head: "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n"},
		"two sizes":           {head: "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"},
		"no size":             {head: "HTTP/1.1 200 OK\r\n\r\n"},
		"not HTTP":            {head: "SSH-2.0-OpenSSH\r\n"},
		"redirect":            {head: "HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"},
		"endless header":      {head: "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("a", 1<<20) + "\r\n\r\n"},
		"huge table":          {head: head, pieces: "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"},
		"endless table":       {head: head, pieces: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n"},
		"short table":         {head: head, pieces: strings.Replace(pieces[:len(pieces)-1], fmt.Sprint(len(table)), fmt.Sprint(len(table)-1), 1)},
		"table that waits":    {head: head, pieces: strings.Repeat("HTTP/1.1 103 Early\r\n\r\n", 3)},
		"whole for a part":    {head: head, pieces: pieces, get: "HTTP/1.1 200 OK\r\nContent-Length: " + fmt.Sprint(size) + "\r\n\r\n" + string(content)},
		"another range":       {head: head, pieces: pieces, get: "HTTP/1.1 206 Part\r\nContent-Range: bytes 0-0/1\r\nContent-Length: 1\r\n\r\nx"},
		"huge range":          {head: head, pieces: pieces, get: "HTTP/1.1 206 Part\r\nContent-Range: bytes 0-2147483647/2147483648\r\nContent-Length: 2147483648\r\n\r\n"},
		"refused range":       {head: head, pieces: pieces, get: "HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n"},
		"gone":                {head: head, pieces: pieces, get: "HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"},
		"broken":              {head: head, pieces: pieces, get: "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"},
		"huge bitmap":         {head: partial, pieces: pieces, have: "HTTP/1.1 200 OK\r\nAtoll-Held: partial\r\nContent-Length: 999999999\r\n\r\n"},
		"bits beyond the end": {head: partial, pieces: pieces, have: "HTTP/1.1 200 OK\r\nAtoll-Held: partial\r\nContent-Length: 1\r\n\r\n\xff"},
		"claims, never has":   {head: partial, pieces: pieces, have: "HTTP/1.1 200 OK\r\nAtoll-Held: partial\r\nContent-Length: 1\r\n\r\n\xfc", get: "HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"},
		"never has more":      {head: partial, pieces: pieces, have: "HTTP/1.1 200 OK\r\nAtoll-Held: partial\r\nContent-Length: 1\r\n\r\n\x00"},
	} {
		t.Run(name, func(t *testing.T) {
			hostile := answering(t, func(w io.Writer, r *http.Request) {
				say := a.get
				switch {
				case r.Method == http.MethodHead:
					say = a.head
				case strings.HasSuffix(r.URL.Path, "/pieces"):
					say = a.pieces
				case strings.HasSuffix(r.URL.Path, "/have"):
					say = a.have
				}
				_, _ = io.WriteString(w, say)
			})
			store := transfertest.NewStore()
			idle := func(c *stream.Config) { c.IdleTimeout = time.Second }
			// In a test of its own, whose end stops the mover: until then it may hold the
			// store's partial.
			t.Run("alone", func(t *testing.T) {
				fetch, err := mover(t, store, peers{hostile}, idle).Fetch(t.Context(), blob)
				if err != nil {
					t.Fatal(err)
				}
				var none *transfer.NoHolderError
				if err := fetch.Wait(t.Context()); !errors.As(err, &none) || len(none.Asked) != 1 {
					t.Fatalf("error is %v", err)
				}
			})
			full := transfertest.NewStore()
			full.Put(content)
			honest := serving(t, mover(t, full, nil, nil))
			fetch, err := mover(t, store, peers{hostile, honest}, idle).Fetch(t.Context(), blob)
			if err != nil {
				t.Fatal(err)
			}
			if err := fetch.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(store.Bytes(blob.Digest), content) {
				t.Fatal("another blob arrived")
			}
		})
	}
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	content, blob, table := sample(t, 2*transfer.PieceSize)
	store := transfertest.NewStore()
	store.Put(content)
	e := mover(t, store, nil, nil)
	path := "/v1/blob/" + blob.Digest.String()
	for _, c := range []struct {
		method, target, rng string
		status              int
		length              int64
	}{
		{"HEAD", path, "", 200, blob.Size},
		{"GET", path, "", 200, blob.Size},
		{"GET", path, "bytes=1-2", 206, 2},
		{"GET", path, "bytes=999999999-", 416, -1},
		{"GET", path, "bytes=9223372036854775807-9223372036854775807", 416, -1},
		{"GET", path + "/pieces", "", 200, int64(len(table))},
		{"GET", path + "/have?more=0", "", 200, 0},
		{"GET", path + "/have?more=x", "", 200, 0},
		{"GET", "/v1/blob/sha256:00", "", 400, -1},
		{"GET", "/v1/blob/md5:d41d8cd98f00b204e9800998ecf8427e", "", 400, -1},
		{"GET", "/v1/blob/..%2f..%2fetc", "", 400, -1},
		{"GET", "/v1/blob/" + digest.FromString("other").String(), "", 404, -1},
		{"GET", "/v1/blob/" + digest.FromString("other").String() + "/pieces", "", 404, -1},
		{"GET", "/v1/blob/" + digest.FromString("other").String() + "/have", "", 404, -1},
		{"PUT", path, "", 405, -1},
		{"GET", "/", "", 404, -1},
	} {
		r := httptest.NewRequest(c.method, c.target, nil)
		if c.rng != "" {
			r.Header.Set("Range", c.rng)
		}
		w := httptest.NewRecorder()
		e.ServeHTTP(w, r)
		if res := w.Result(); res.StatusCode != c.status || c.length >= 0 && res.ContentLength != c.length {
			t.Errorf("%s %s %s: status %d, length %d", c.method, c.target, c.rng, res.StatusCode, res.ContentLength)
		}
	}
}

// More fetches than there are slots wait for their turn and all arrive; the piece
// buffers are fewer than the requests would like.
func TestFetchesTakeTurns(t *testing.T) {
	full := transfertest.NewStore()
	var blobs []transfer.Blob
	for i := range 12 {
		content, blob, _ := sample(t, 3*transfer.PieceSize+i)
		full.Put(content)
		blobs = append(blobs, blob)
	}
	honest := serving(t, mover(t, full, nil, nil))
	store := transfertest.NewStore()
	e := mover(t, store, peers{honest}, func(c *stream.Config) {
		c.MaxFetches, c.MaxBuffers, c.StallTimeout = 2, 2, 10*time.Second
	})
	var fetches []*transfer.Fetch
	for _, b := range blobs {
		f, err := e.Fetch(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		fetches = append(fetches, f)
	}
	for _, f := range fetches {
		if err := f.Wait(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestFetchNeedsARunningEngine(t *testing.T) {
	_, blob, _ := sample(t, 10)
	store := transfertest.NewStore()
	e, err := stream.New(stream.Config{Source: store, Sink: store, Peers: peers(nil), Dial: func(context.Context, string) (net.Conn, error) { return nil, io.EOF }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Fetch(ctx, blob); !errors.Is(err, context.Canceled) {
		t.Errorf("before Run: %v", err)
	}
	if err := e.Run(ctx); err != nil {
		t.Error(err)
	}
	if _, err := e.Fetch(t.Context(), blob); !errors.Is(err, transfer.ErrStopped) {
		t.Errorf("after Run: %v", err)
	}
	for _, b := range []transfer.Blob{
		{Digest: "sha256:1", Size: 1},
		{Digest: blob.Digest, Size: -1},
		{Digest: blob.Digest, Size: 1, Root: []byte("short")},
		{Digest: blob.Digest, Size: transfer.MaxSize + 1, Root: blob.Root},
	} {
		if _, err := e.Fetch(t.Context(), b); err == nil || errors.Is(err, transfer.ErrStopped) {
			t.Errorf("%+v: %v", b, err)
		}
	}
}
