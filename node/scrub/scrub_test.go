package scrub

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/settings"
	"github.com/atoll-registry/atoll/transfer"
)

// rig is a room over a disk that can be damaged.
type rig struct {
	*Scrub
	t     testing.TB
	disk  *faultfs.FS
	logs  *bytes.Buffer
	peers *peers
}

// peers are the other nodes of the site: what they hold.
type peers struct {
	mu    sync.Mutex
	store *blobs.Store
	held  map[digest.Digest][]byte
	err   error
	asked int
	away  bool // this node should hold nothing
}

func (p *peers) Bring(ctx context.Context, d digest.Digest, _ int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked++
	if p.err != nil {
		return p.err
	}
	content, ok := p.held[d]
	if !ok {
		return &transfer.NoHolderError{}
	}
	_, err := p.store.Put(ctx, d, bytes.NewReader(content))
	return err
}

func (p *peers) Belongs(digest.Digest) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.away, nil
}

func newRig(t testing.TB) *rig {
	t.Helper()
	db := tabletest.Open(t)
	r := &rig{t: t, disk: faultfs.New(), logs: &bytes.Buffer{}}
	store, err := blobs.Open("/", blobs.Options{FS: r.disk, Boot: "1"})
	if err != nil {
		t.Fatal(err)
	}
	r.peers = &peers{store: store, held: map[digest.Digest][]byte{}}
	log := slog.New(slog.NewTextHandler(r.logs, nil))
	r.Scrub, err = New(Config{
		Node: "n1", Dir: t.TempDir(), DB: db, Store: store, Records: blobs.NewRecords(db), Peers: r.peers,
		Settings: settings.New(db, log), Log: log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	tabletest.Start(t, db)
	return r
}

// again is the room of the next process.
func (r *rig) again() {
	r.t.Helper()
	c := r.Config
	c.Settings = settings.New(tabletest.Open(r.t), c.Log)
	c.Registerer = prometheus.NewRegistry()
	next, err := New(c)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Scrub = next
}

// push makes a blob of the site that this node holds.
func (r *rig) push(seed uint64, size int) digest.Digest {
	r.t.Helper()
	content := blobstest.Content(seed, size)
	d := digest.FromBytes(content)
	info, err := r.Store.Put(r.t.Context(), d, bytes.NewReader(content))
	if err == nil {
		err = r.Records.Add(r.t.Context(), "library", "app", info)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

func (r *rig) file(d digest.Digest) string {
	r.t.Helper()
	for _, name := range r.disk.Dump("blobs") {
		if strings.HasSuffix(name, d.Encoded()) {
			return name
		}
	}
	r.t.Fatalf("no file of %s", d)
	return ""
}

// full makes one pass.
func (r *rig) full() {
	r.t.Helper()
	r.Scrub.rate = quick(r.t)
	r.Start()
	if err := r.pass(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// quick is a rate at which tests need not wait.
func quick(t testing.TB) *settings.Setting[int64] {
	return settings.Define(settings.New(tabletest.Open(t), slog.New(slog.DiscardHandler)), settings.Spec[int64]{
		Name: "rate", Default: "1TiB", Kind: settings.Bytes(1, 1<<40, false),
	})
}

func (r *rig) finding(d digest.Digest) Finding {
	r.t.Helper()
	status, err := r.Status()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range status.Findings {
		if f.Digest == d {
			return f
		}
	}
	return Finding{}
}

func (r *rig) lost(d digest.Digest) bool {
	r.t.Helper()
	b, ok, err := r.row(d)
	if err != nil || !ok {
		r.t.Fatal(ok, err)
	}
	return b.Lost != 0
}

func (r *rig) held(d digest.Digest) bool {
	_, err := r.Store.Stat(d)
	if err != nil && !fault.Is(err, fault.NotFound) {
		r.t.Fatal(err)
	}
	return err == nil
}

// Whatever became of a blob's file, it comes back from a node that has it.
func TestHealedFromAPeer(t *testing.T) {
	damages := map[string]func(r *rig, d digest.Digest){
		"bit flip":   func(r *rig, d digest.Digest) { r.disk.Flip(r.file(d), 77) },
		"unreadable": func(r *rig, d digest.Digest) { r.disk.Spoil(r.file(d), syscall.EIO) },
		"missing": func(r *rig, d digest.Digest) {
			if err := r.disk.Remove(r.file(d)); err != nil {
				r.t.Fatal(err)
			}
		},
	}
	for kind, damage := range damages {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t)
			d, other := r.push(1, 700<<10), r.push(2, 100)
			r.peers.held[d] = blobstest.Content(1, 700<<10)
			damage(r, d)
			r.full()
			blobstest.Check(t, r.Store, blobstest.Content(1, 700<<10))
			if !r.held(other) || r.lost(d) || r.peers.asked != 1 {
				t.Fatalf("the other one is held: %v, this one lost: %v, peers were asked %d times", r.held(other), r.lost(d), r.peers.asked)
			}
			if all, err := r.Store.Quarantined(); err != nil || len(all) > 0 {
				t.Fatalf("left in quarantine: %v, %v", all, err)
			}
			f := r.finding(d)
			if kind == "missing" {
				if f.Digest != "" {
					t.Fatalf("a blob that was simply fetched is reported: %+v", f)
				}
			} else if f.Kind != Damaged || f.State != Healed || f.Size != 700<<10 || f.Repositories[0] != "library/app" {
				t.Fatalf("reported as %+v", f)
			}
			status, _ := r.Status()
			if last := status.Last; last.Finished.IsZero() || last.Damaged+last.Missing != 1 || status.Running || status.Lost != 0 {
				t.Fatalf("status is %+v", status)
			}
		})
	}
}

// What nobody has is named as lost, in its row too, until it is pushed again.
func TestLost(t *testing.T) {
	r := newRig(t)
	d := r.push(1, 5000)
	events := make(chan Finding, 8)
	ctx, cancel := context.WithCancel(t.Context())
	listening, listened := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(listened)
		close(listening)
		r.Found.Each(ctx, 8, func(f Finding, _ int) { events <- f })
	}()
	<-listening
	r.disk.Flip(r.file(d), 4000)
	r.full()
	if r.held(d) || !r.lost(d) {
		t.Fatalf("held: %v, marked lost: %v", r.held(d), r.lost(d))
	}
	if f := r.finding(d); f.State != Lost || f.Kind != Damaged {
		t.Fatalf("reported as %+v", f)
	}
	if n := testutil.ToFloat64(r.metrics.open.WithLabelValues("lost")); n != 1 {
		t.Fatalf("the metric says %v", n)
	}
	lines := strings.Count(r.logs.String(), "level=ERROR")
	r.full()
	if err := r.look(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if now := strings.Count(r.logs.String(), "level=ERROR"); lines != 2 || now != lines {
		t.Fatalf("%d errors in the log, then %d:\n%s", lines, now, r.logs)
	}
	// A restart forgets nothing.
	r.again()
	if f := r.finding(d); f.State != Lost {
		t.Fatalf("after a restart it is %+v", f)
	}
	// A push mends it.
	r.push(1, 5000)
	if r.lost(d) {
		t.Fatal("a pushed blob is still marked lost")
	}
	if err := r.look(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if f := r.finding(d); f.State != Healed {
		t.Fatalf("after the push it is %+v", f)
	}
	if all, err := r.Store.Quarantined(); err != nil || len(all) > 0 {
		t.Fatalf("left in quarantine: %v, %v", all, err)
	}
	cancel()
	<-listened
	select {
	case f := <-events:
		if f.Digest != d {
			t.Fatalf("an event of %+v", f)
		}
	default: // the listener began too late, which Each allows
	}
}

// A disk that could not be read for a while gives the blob back; nothing is lost.
func TestReadableAfterAll(t *testing.T) {
	r := newRig(t)
	d := r.push(1, 5000)
	f, _, err := r.Store.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r.disk.Spoil(r.file(d), syscall.EIO)
	_, err = f.ReadAt(make([]byte, 10), 0)
	r.Unreadable(d, f, err)
	if r.held(d) {
		t.Fatal("a blob that cannot be read is still held")
	}
	r.disk.Spoil(r.disk.Dump("quarantine")[0], nil)
	if err := r.look(t.Context(), <-r.suspects); err != nil {
		t.Fatal(err)
	}
	if !r.held(d) || r.lost(d) || r.finding(d).State != Healed {
		t.Fatalf("held: %v, lost: %v, %+v", r.held(d), r.lost(d), r.finding(d))
	}
}

// While other nodes only fail, the blob waits and is tried again.
func TestWaiting(t *testing.T) {
	r := newRig(t)
	d := r.push(1, 5000)
	r.disk.Flip(r.file(d), 1)
	r.peers.err = context.DeadlineExceeded
	r.full()
	if f := r.finding(d); f.State != Waiting || r.lost(d) {
		t.Fatalf("reported as %+v, lost: %v", f, r.lost(d))
	}
	r.peers.err, r.peers.held[d] = nil, blobstest.Content(1, 5000)
	for _, d := range r.unhealed() {
		if err := r.look(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	if f := r.finding(d); f.State != Healed || !r.held(d) {
		t.Fatalf("reported as %+v", f)
	}
}

// What belongs to other nodes is not missed here, and what is collected is
// neither fetched nor kept in quarantine.
func TestNotMissed(t *testing.T) {
	r := newRig(t)
	d := r.push(1, 5000)
	if err := r.Store.Remove(d); err != nil {
		t.Fatal(err)
	}
	r.peers.away = true
	r.full()
	if r.peers.asked != 0 || r.finding(d).Digest != "" {
		t.Fatalf("asked %d times, %+v", r.peers.asked, r.finding(d))
	}
	r.peers.away = false
	r.full()
	if !r.lost(d) {
		t.Fatal("a missing blob that nobody has is not lost")
	}
	if err := r.Records.Condemn(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if err := r.Records.Gone(t.Context(), d, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := r.look(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	status, err := r.Status()
	if err != nil || len(status.Findings) > 0 || status.Lost > 0 {
		t.Fatalf("%+v, %v", status, err)
	}
}

// Whoever holds a blob that another node called lost takes the mark away.
func TestFoundAfterAll(t *testing.T) {
	r := newRig(t)
	d := r.push(1, 5000)
	if err := r.Records.MarkLost(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	r.full()
	if r.lost(d) {
		t.Fatal("a blob that is held is still marked lost")
	}
	var b blobs.Blob
	err := r.DB.View(func(v *table.View) (err error) { b, _, err = r.Records.Get(v, d); return err })
	if err != nil || b.Copies != 1 {
		t.Fatalf("%+v, %v", b, err)
	}
}

// A pass that is stopped goes on where it was, in the next process too.
func TestGoesOnAfterARestart(t *testing.T) {
	r := newRig(t)
	for i := range 20 {
		r.push(uint64(i), 1000)
	}
	r.Scrub.rate = quick(r.t)
	rows, err := r.rows("")
	if err != nil {
		t.Fatal(err)
	}
	// The disk stops at the eleventh blob.
	ctx, cancel := context.WithCancel(t.Context())
	r.Start()
	r.mu.Lock()
	r.state.Pass.Started = time.Now()
	r.mu.Unlock()
	for _, b := range rows[:10] {
		if err := r.check(ctx, b, 0); err != nil {
			t.Fatal(err)
		}
		r.advance(b.digest)
	}
	cancel()
	if err := r.Run(ctx); err != nil {
		t.Fatal(err)
	}
	r.again()
	if status, err := r.Status(); err != nil || !status.Running || status.Pass.Blobs != 10 || status.Pass.After != rows[9].digest {
		t.Fatalf("%+v, %v", status, err)
	}
	r.Scrub.rate = quick(r.t)
	if err := r.pass(t.Context()); err != nil {
		t.Fatal(err)
	}
	status, err := r.Status()
	if err != nil || status.Running || status.Last.Blobs != 20 || status.Last.Bytes != 20_000 {
		t.Fatalf("%+v, %v", status, err)
	}
	if n := testutil.ToFloat64(r.metrics.checked.WithLabelValues("whole")); n != 10 {
		t.Fatalf("the next process checked %v blobs", n)
	}
}

// Reading keeps to the rate; a rate that is set while it waits is obeyed.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pacer
		begin := time.Now()
		for range 100 {
			if err := p.wait(t.Context(), 1000, 10_000); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(begin); took != 10*time.Second {
			t.Fatalf("100 kB at 10 kB/s took %s", took)
		}
		time.Sleep(time.Hour) // of the bubble: a pause earns nothing
		begin = time.Now()
		for range 10 {
			if err := p.wait(t.Context(), 1000, 1000); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(begin); took != 10*time.Second {
			t.Fatalf("10 kB at 1 kB/s after a pause took %s", took)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := p.wait(ctx, 1<<30, 1); err == nil {
			t.Fatal("waited for a century")
		}
	})
}

// The speed follows from what is held and how often it is to be read.
func TestSpeed(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct{ held, want int64 }{
		{1 << 30, 1 << 20},    // small: in one go, gently
		{1 << 40, 2_272_469},  // 1 TiB in four fifths of a week
		{100 << 40, 10 << 20}, // as much as the setting lets it
	} {
		if got := r.speed(c.held); got != c.want {
			t.Errorf("%d bytes are read at %d bytes/s, want %d", c.held, got, c.want)
		}
	}
	r.Start()
	if got := r.speed(1 << 30); got != 10<<20 {
		t.Errorf("a pass that was asked for reads at %d bytes/s", got)
	}
}

// In two weeks there are three passes, with the week between their beginnings,
// and one more when it is asked for.
func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.push(1, 3<<20)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		begin := time.Now()
		go func() { done <- r.Run(ctx) }()
		passes := func() int {
			synctest.Wait()
			return int(testutil.ToFloat64(r.metrics.checked.WithLabelValues("whole")))
		}
		time.Sleep(time.Minute)
		if n := passes(); n != 1 {
			t.Fatalf("%d passes in the first minute", n)
		}
		status, err := r.Status()
		if err != nil || status.Next == nil || status.Next.Sub(begin) != 7*24*time.Hour {
			t.Fatalf("%+v, %v", status, err)
		}
		if took := status.Last.Finished.Sub(status.Last.Started); took < 3*time.Second || took > 4*time.Second {
			t.Fatalf("3 MiB at 1 MiB/s took %s", took)
		}
		time.Sleep(14*24*time.Hour + 2*time.Hour)
		if n := passes(); n != 3 {
			t.Fatalf("%d passes in two weeks", n)
		}
		r.Start()
		time.Sleep(time.Minute)
		if n := passes(); n != 4 {
			t.Fatalf("%d passes after one was asked for", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}
