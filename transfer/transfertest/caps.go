package transfertest

import (
	"bytes"
	"sync"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// valve is a limiter that is turned while a fetch runs: so many bytes may go, and no more until
// it is turned again. It counts bytes and not time, so what a test sees of it does not depend
// on how fast the machine is.
type valve struct {
	mu      sync.Mutex
	left    int64 // bytes that may go still
	lifted  bool  // there is no limit any more
	passed  int64 // bytes that were let through
	refused int   // times since the last turn
	shut    chan struct{}
}

// insists is how often a valve says no before it is believed that the engine obeys.
const insists = 20

func newValve(left int64) *valve { return &valve{left: left, shut: make(chan struct{})} }

// Take implements transfer.Limiter.
func (v *valve) Take(_ transfer.Flow, n int) time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.lifted || int64(n) <= v.left {
		v.left -= int64(n)
		v.passed += int64(n)
		return 0
	}
	if v.refused++; v.refused == insists {
		close(v.shut)
	}
	return 2 * time.Millisecond
}

// turn lets more bytes through.
func (v *valve) turn(more int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.left += more
	v.refused, v.shut = 0, make(chan struct{})
}

// lift takes the limit away.
func (v *valve) lift() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.lifted = true
}

// held is closed when the valve has said no often enough since the last turn.
func (v *valve) held() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.shut
}

func (v *valve) through() int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.passed
}

// A limit that changes while a fetch runs counts for it, at the end that sends and at the one
// that receives: one that comes stops it, one that rises lets so much more through and no
// more, and when it is lifted the rest comes.
func testLimitsThatChange(t *testing.T, f *fleet) {
	const first, step = 8 * transfer.PieceSize, 6 * transfer.PieceSize
	for name, set := range map[string]func(holder, wanter *options, v *valve){
		"out": func(holder, _ *options, v *valve) { holder.out = v },
		"in":  func(_, wanter *options, v *valve) { wanter.in = v },
	} {
		content := fresh(40*transfer.PieceSize + 77)
		for _, b := range []transfer.Blob{blobOf(t, content), rootless(blobOf(t, content))} {
			v := newValve(first)
			var holder, wanter options
			set(&holder, &wanter, v)
			store := NewStore()
			from := f.node("from", holding(content), holder)
			to := f.node("to", store, wanter, from)
			fetch := f.fetch(to, b)
			for allowed := int64(first); allowed < 3*step; allowed += step {
				select {
				case <-v.held():
				case <-fetch.Done():
					t.Fatalf("%s: the fetch ended after %d bytes were let through: %v", name, v.through(), fetch.Wait(f.ctx()))
				case <-f.ctx().Done():
					t.Fatalf("%s: no limit was asked again after %d bytes", name, v.through())
				}
				passed, held := v.through(), fetch.Progress().Held
				if held > passed {
					t.Errorf("%s: %d bytes are here, %d were let through", name, held, passed)
				}
				if passed <= allowed-step {
					t.Errorf("%s: %d bytes were let through, %d might have been", name, passed, allowed)
				}
				v.turn(step)
			}
			v.lift()
			if err := fetch.Wait(f.ctx()); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if !bytes.Equal(store.Bytes(b.Digest), content) {
				t.Errorf("%s: another blob arrived", name)
			}
			t.Logf("%s, root %v: %d bytes were let through for %d", name, b.Root != nil, v.through(), b.Size)
			if v.through() < b.Size {
				t.Errorf("%s: %d bytes were let through for %d", name, v.through(), b.Size)
			}
			to.stop()
			from.stop()
		}
	}
}
