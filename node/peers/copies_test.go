package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/fault"
)

func TestEnsureCountsWhatIsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		s.run()
		n := s.nodes[0]
		var ds []digest.Digest
		for i := range 2*blobsPerRequest + 3 {
			ds = append(ds, s.put(bytesOf(fmt.Sprint("blob ", i), 100), n))
		}
		copies, err := n.Ensure(t.Context(), append(ds, ds[0]))
		if err != nil || copies != durability {
			t.Fatalf("%d copies, %v; want %d", copies, err, durability)
		}
		for _, d := range ds {
			holders := 0
			for _, o := range s.nodes {
				if o.holds(d) {
					holders++
				}
			}
			if holders < durability {
				t.Fatalf("blob %s is on %d nodes", d, holders)
			}
		}
		// The same again asks nobody for bytes, and a blob of others counts too.
		for _, o := range s.nodes {
			if copies, err := o.Ensure(t.Context(), ds[:5]); err != nil || copies != durability {
				t.Errorf("seen by %s: %d copies, %v", o.id, copies, err)
			}
		}
		if copies, err := n.Ensure(t.Context(), nil); err != nil || copies != durability {
			t.Errorf("a push of metadata only: %d copies, %v", copies, err)
		}
	})
}

// A blob that is named by sha512 is copied, read and rooted like any other.
func TestEnsureCopiesBySHA512(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		s.run()
		b := bytesOf("blob", 700_000)
		d := digest.SHA512.FromBytes(b)
		order := s.byPlacement(d)
		s.putAs(digest.SHA512, b, order[2])
		if copies, err := order[2].Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != durability || !order[0].holds(d) {
			t.Fatalf("%d copies, %v, held at home: %v", copies, err, order[0].holds(d))
		}
		if twin := digest.FromBytes(b); order[0].holds(twin) || order[2].holds(twin) {
			t.Error("the same bytes are there under sha256")
		}
		order[2].setDown(true)
		content, err := order[1].Open(t.Context(), d, int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		defer content.Close()
		if got, err := io.ReadAll(content); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}

func TestEnsureSkipsWhatIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		s.run()
		b := bytesOf("blob", 1000)
		order := s.byPlacement(digest.FromBytes(b))
		d := s.put(b, order[2])
		order[0].setDown(true)
		if copies, err := order[2].Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 2 || !order[1].holds(d) {
			t.Fatalf("one of three down: %d copies, %v", copies, err)
		}
		order[1].setDown(true)
		if copies, err := order[2].Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 1 {
			t.Fatalf("two of three down: %d copies, %v", copies, err)
		}
		// From a node that holds nothing, while the holder is away.
		order[2].setDown(true)
		order[0].setDown(false)
		e := s.put(bytesOf("other", 1000), order[2])
		if _, err := order[0].Ensure(t.Context(), []digest.Digest{e}); !fault.Is(err, fault.Unavailable) {
			t.Errorf("no holder is up: %v", err)
		}
		if _, err := order[0].Ensure(t.Context(), []digest.Digest{digest.FromString("never pushed")}); !fault.Is(err, fault.NotFound) {
			t.Errorf("a blob without a row: %v", err)
		}
	})
}

// TestEnsureFallsBack: a node that is live and cannot take a copy is logged once,
// and the next one takes it.
func TestEnsureFallsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		var blobs []digest.Digest
		self, broken, third := s.nodes[0], s.nodes[1], s.nodes[2]
		s.run(self, third)
		broken.listener(4).Close() // it answers nothing
		for i := 0; len(blobs) < 3; i++ {
			b := bytesOf(fmt.Sprint("blob ", i), 100)
			if order := placement(digest.FromBytes(b), []string{broken.id, third.id}); order[0] == broken.id {
				blobs = append(blobs, s.put(b, self))
			}
		}
		for _, d := range blobs {
			if copies, err := self.Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 2 || !third.holds(d) {
				t.Fatalf("%d copies, %v", copies, err)
			}
		}
		if n := self.logged("could not take its copy"); n != 1 {
			t.Errorf("a node that fails is logged %d times", n)
		}
	})
}

func TestWhileLiveGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		n, other := s.nodes[0], s.nodes[1]
		// As long as the other is live, a call takes what it takes.
		if err := n.whileLive(t.Context(), other.id, func(ctx context.Context) error {
			select {
			case <-time.After(time.Hour):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}); err != nil {
			t.Errorf("a call of an hour to a live node: %v", err)
		}
		began := time.Now()
		err := n.whileLive(t.Context(), other.id, func(ctx context.Context) error {
			other.setDown(true)
			<-ctx.Done()
			return ctx.Err()
		})
		if err == nil || !strings.Contains(err.Error(), "went away") || time.Since(began) > 2*time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		// What was done before the node went away is done.
		if err := n.whileLive(t.Context(), other.id, func(ctx context.Context) error {
			<-ctx.Done()
			return nil
		}); err != nil {
			t.Errorf("a call that succeeded: %v", err)
		}
		want := errors.New("refused")
		if err := n.whileLive(t.Context(), n.id, func(context.Context) error { return want }); !errors.Is(err, want) {
			t.Errorf("a call that failed: %v", err)
		}
	})
}

// TestHungNodeIsGivenUp: a push does not wait for a node that hangs for ever.
func TestHungNodeIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		n, hung := s.nodes[0], s.nodes[1]
		s.run(n)
		d := s.put(bytesOf("blob", 100), n)
		taken := make(chan struct{})
		go func() { // takes the connection and says nothing
			conn, err := hung.listener(4).Accept()
			if err == nil {
				defer conn.Close()
				close(taken)
				<-t.Context().Done()
			}
		}()
		go func() {
			<-taken
			hung.setDown(true)
		}()
		if copies, err := n.Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 1 {
			t.Errorf("%d copies, %v; want the one that there is", copies, err)
		}
	})
}
