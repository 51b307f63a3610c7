package registry_test

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/node/registry"
)

// valve is what an operator's caps are to a registry.
type valve struct {
	mu     sync.Mutex
	capped bool
	rate   float64 // bytes per second, when capped
	next   time.Time
	took   int64
	begun  []registry.Outgoing
	ended  int
}

func (v *valve) Begin(_ context.Context, o registry.Outgoing) (registry.Paced, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.begun = append(v.begun, o)
	return v, nil
}

func (v *valve) Capped() bool { v.mu.Lock(); defer v.mu.Unlock(); return v.capped }

func (v *valve) Take(n int) time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	if now := time.Now(); v.capped {
		if now.Before(v.next) {
			return v.next.Sub(now)
		}
		v.next = now.Add(time.Duration(float64(n) / v.rate * float64(time.Second)))
	}
	v.took += int64(n)
	return 0
}

func (v *valve) End() { v.mu.Lock(); defer v.mu.Unlock(); v.ended++ }

// Caps never take a blob off the kernel's way of sending: without one in force the
// file goes in the same pieces as if there were nothing, with one between pieces.
func TestEgressKeepsSendfile(t *testing.T) {
	plain, v := single(t), &valve{}
	paced := plain.site.start("paced", plain.dir, func(c *registry.Config) { c.Egress = v })
	data := random(1 << 20)
	d := plain.pushBlob("app", data).Digest
	get := func(n *node) *fileSpy {
		r := httptest.NewRequest("GET", "/v2/app/blobs/"+d.String(), nil)
		r.SetBasicAuth("admin", password)
		w := &fileSpy{ResponseRecorder: httptest.NewRecorder()}
		n.server.Config.Handler.ServeHTTP(w, r)
		if w.other > 0 || !bytes.Equal(w.Body.Bytes(), data) {
			t.Errorf("%d pieces did not come as files, or the blob changed", w.other)
		}
		return w
	}
	want := get(plain).files
	if got := get(paced).files; got != want {
		t.Errorf("without a cap in force %d pieces go, and %d without an Egress", got, want)
	}
	v.capped, v.rate = true, 1<<30
	if got := get(paced).files; got <= want {
		t.Errorf("with a cap the steps are not smaller: %d and %d", got, want)
	}
	if v.took != 2<<20 || len(v.begun) != 2 || v.ended != 2 {
		t.Errorf("of 2 MiB in 2 answers %d bytes in %d were counted, %d ended", v.took, len(v.begun), v.ended)
	}
	if o := v.begun[0]; o.Digest != d || o.Size != 1<<20 || o.Project != "library" || o.Repository != "app" || o.User != "admin" || o.Client != "admin@192.0.2.1" {
		t.Errorf("it was told %+v", o)
	}
	// A question without content, and what fits in one packet, are not bothered.
	small := plain.pushBlob("app", random(100)).Digest
	if head, whole := paced.do("HEAD", "/v2/app/blobs/"+d.String(), nil), paced.do("GET", "/v2/app/blobs/"+small.String(), nil); head.status != 200 || whole.status != 200 {
		t.Errorf("HEAD is answered %d, a small blob %d", head.status, whole.status)
	}
	if len(v.begun) != 2 {
		t.Errorf("%d answers were announced", len(v.begun))
	}
}

// A cap that is set while an answer is under way counts for what is left of it, and a
// client that leaves does not wait for it.
func TestEgressHoldsBack(t *testing.T) {
	plain, v := single(t), &valve{capped: true, rate: 64 << 10}
	paced := plain.site.start("paced", plain.dir, func(c *registry.Config) { c.Egress = v })
	d := plain.pushBlob("app", random(1<<20)).Digest
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5500*time.Millisecond)
		defer cancel()
		r := httptest.NewRequest("GET", "/v2/app/blobs/"+d.String(), nil).WithContext(ctx)
		r.SetBasicAuth("admin", password)
		w := httptest.NewRecorder()
		func() {
			defer func() {
				if cut := recover(); cut != http.ErrAbortHandler {
					t.Errorf("the answer ended with %v", cut)
				}
			}()
			paced.server.Config.Handler.ServeHTTP(w, r)
		}()
		if took := time.Since(began); took != 5500*time.Millisecond {
			t.Errorf("the client left after 5.5 s, the answer ended after %v", took)
		}
		if n := w.Body.Len(); n != 6*64<<10 {
			t.Errorf("at 64 KiB/s %d bytes went in 5.5 s", n)
		}
		if v.ended != 1 {
			t.Error("the answer did not end")
		}
	})
}
