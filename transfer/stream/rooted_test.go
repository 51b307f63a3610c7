package stream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// sluice lets so many pieces pass, and counts what came.
type sluice struct {
	mu           sync.Mutex
	most, passed int
	came         int64
}

func (s *sluice) Take(transfer.Flow, int) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.passed >= s.most {
		return time.Millisecond
	}
	s.passed++
	return 0
}

func (s *sluice) Sent(transfer.Flow, int) {}

func (s *sluice) Received(_ transfer.Flow, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.came += int64(n)
}

func (s *sluice) open(most int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.most = most
}

func (s *sluice) sent() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.passed
}

func (s *sluice) got(n int64) func() bool {
	return func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.came == n
	}
}

// sessions are how many a holder has about a blob.
func sessions(e *Engine, blob transfer.Blob) int {
	e.desk.mu.Lock()
	defer e.desk.mu.Unlock()
	if o := e.desk.offers[blob.Digest]; o != nil {
		return len(o.sessions)
	}
	return 0
}

// A reader that brings the root to a fetch that has none reads at once what has come,
// and nothing of it is sent again.
func TestAReaderBringsTheRoot(t *testing.T) {
	content, blob := random(7*transfer.PieceSize + 100)
	full := transfertest.NewStore()
	full.Put(content)
	s := &sluice{most: 5}
	holder := mover(t, full, peers(nil), func(c *Config) { c.Limiter = s })
	source := serving(t, holder)
	store := transfertest.NewStore()
	e := mover(t, store, peers{source}, func(c *Config) { c.Meter, c.StallTimeout = s, 10*time.Second })
	blind := blob
	blind.Root = nil
	pushed, err := e.Fetch(t.Context(), blind, transfer.For(transfer.Replication))
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the first pieces", s.got(5*transfer.PieceSize))
	if n := pushed.Progress().Held; n != 0 {
		t.Fatalf("%d bytes are held that nobody can verify", n)
	}
	f, err := e.Fetch(t.Context(), blob, transfer.ReadFrom(0))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r := f.Reader(ctx)
	defer r.Close()
	begin := make([]byte, 5*transfer.PieceSize)
	if _, err := io.ReadFull(r, begin); err != nil || !bytes.Equal(begin, content[:len(begin)]) {
		t.Fatalf("the beginning cannot be read: %v", err)
	}
	waitFor(t, "the session without a root to end", func() bool { return sessions(holder, blob) == 1 })
	s.open(100)
	if err := errors.Join(f.Wait(ctx), pushed.Wait(ctx)); err != nil {
		t.Fatal(err)
	}
	if n := s.sent(); n != 8 {
		t.Errorf("%d pieces were sent of a blob of 8", n)
	}
	if !bytes.Equal(store.Bytes(blob.Digest), content) {
		t.Error("another blob arrived")
	}
}

// What came without a root before the node stopped is verified by the root afterwards,
// and only what lacks is sent.
func TestAnAttemptWithoutARootIsOfUse(t *testing.T) {
	content, blob := random(7*transfer.PieceSize + 100)
	full := transfertest.NewStore()
	full.Put(content)
	s := &sluice{most: 5}
	holder := mover(t, full, peers(nil), func(c *Config) { c.Limiter = s })
	source := serving(t, holder)
	store := transfertest.NewStore()
	var cfg Config
	mover(t, store, peers{source}, func(c *Config) {
		c.Meter, c.StallTimeout = s, 10*time.Second
		cfg = *c
	})
	first, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- first.Run(ctx) }()
	blind := blob
	blind.Root = nil
	f, err := first.Fetch(t.Context(), blind)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the first pieces", s.got(5*transfer.PieceSize))
	stop()
	if err := f.Wait(t.Context()); !errors.Is(err, transfer.ErrStopped) {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the session to end", func() bool { return sessions(holder, blob) == 0 })
	s.open(100)
	e := mover(t, store, peers{source}, func(c *Config) { c.StallTimeout = 10 * time.Second })
	if f, err = e.Fetch(t.Context(), blob); err == nil {
		err = f.Wait(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	if n := s.sent(); n != 8 {
		t.Errorf("%d pieces were sent of a blob of 8", n)
	}
	if !bytes.Equal(store.Bytes(blob.Digest), content) {
		t.Error("another blob arrived")
	}
}
