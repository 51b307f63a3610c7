package registry_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/registry"
	"github.com/atoll-registry/atoll/node/settings"
)

// machine is a node of one member whose disk and whose log can stop or fail at
// any step: blobs over faultfs, rows in a bbolt file, the registry's handler
// over both. The machine stops as a whole: once the disk has, nothing is
// committed any more, and the other way round.
type machine struct {
	t       testing.TB
	disk    *faultfs.FS
	dir     string // of the rows
	engine  kv.Engine
	db      *table.DB
	store   *blobs.Store
	log     *failingLog
	handler http.Handler
	stopped chan struct{}
	stop    func()
}

// logFault is what happens at one proposal.
type logFault uint8

const (
	stopBefore logFault = iota + 1 // the machine stops, nothing was committed
	stopAfter                      // the machine stops, the rows are committed
	loseReply                      // committed, and nobody hears of it
	dropIt                         // not committed, and nobody hears of it
)

// failingLog commits at once what the machine proposes, until a fault.
type failingLog struct {
	*tabletest.Backend
	m *machine

	mu    sync.Mutex
	n     int // proposals
	at    int
	fault logFault
}

// inject makes the proposal with a number from now on fail.
func (l *failingLog) inject(at int, fault logFault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.at, l.fault = l.n+at, fault
}

func (l *failingLog) proposals() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

// Propose implements table.Backend.
func (l *failingLog) Propose(ctx context.Context, txn []byte) (kv.Result, error) {
	l.mu.Lock()
	fault := logFault(0)
	if l.n == l.at {
		fault = l.fault
	}
	l.n++
	l.mu.Unlock()
	if l.m.disk.Crashed() {
		l.m.stop()
		return kv.Result{}, context.Canceled
	}
	switch fault {
	case stopBefore:
		l.m.halt()
		return kv.Result{}, context.Canceled
	case stopAfter:
		_, _ = l.Backend.Propose(ctx, txn) // whatever it is, nobody hears of it
		l.m.halt()
		return kv.Result{}, context.Canceled
	case loseReply:
		l.LoseReplies(1)
	case dropIt:
		l.DropProposals(1)
	}
	return l.Backend.Propose(ctx, txn)
}

// halt stops the machine.
func (m *machine) halt() {
	m.disk.Stop()
	m.stop()
}

// largeManifests keeps manifests that are too large for a row as a node does.
type largeManifests struct {
	store   *blobs.Store
	db      *table.DB
	records *blobs.Records
}

func (l largeManifests) Put(ctx context.Context, d digest.Digest, body []byte) error {
	defer l.store.Pin(d)()
	if _, err := l.store.Put(ctx, d, bytes.NewReader(body)); err != nil {
		return err
	}
	_, err := l.db.Update(ctx, func(tx *table.Tx) error { return l.records.Live(tx, d, int64(len(body))) })
	return err
}

func (l largeManifests) Read(_ context.Context, d digest.Digest) ([]byte, error) {
	f, _, err := l.store.OpenBlob(d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// boot starts a machine on what a disk and a directory hold.
func boot(t testing.TB, disk *faultfs.FS, dir, bootID string) *machine {
	t.Helper()
	m := &machine{t: t, disk: disk, dir: dir, stopped: make(chan struct{})}
	m.stop = sync.OnceFunc(func() { close(m.stopped) })
	log := slog.New(slog.DiscardHandler)
	var err error
	m.engine, err = kv.OpenBolt(filepath.Join(dir, "state.db"))
	must(t, err)
	t.Cleanup(m.close)
	m.db = table.New(m.engine, log)
	m.db.SetPatience(tabletest.Patience)
	m.store, err = blobs.Open("/", blobs.Options{FS: disk, Boot: bootID})
	must(t, err)
	tuning := settings.New(m.db, log)
	records := blobs.NewRecords(m.db)
	scopes := journal.New(m.db, plainSealer{})
	projects := project.New(m.db, scopes)
	content, err := catalog.New(catalog.Config{
		DB: m.db, Records: records, Journal: scopes, Projects: projects, Big: largeManifests{m.store, m.db, records},
	})
	must(t, err)
	projects.Attach(content)
	g, err := registry.New(registry.Config{
		NodeID: "n1", DB: m.db, Catalog: content, Projects: projects, Journal: scopes, Store: m.store, Records: records,
		Auth: nobody{}, Settings: registry.DefineSettings(tuning), Log: log, Registerer: prometheus.NewRegistry(),
	})
	must(t, err)
	m.handler = g.Handler()
	must(t, m.db.Build(t.Context()))
	m.log = &failingLog{Backend: tabletest.NewBackend(m.db), m: m, at: -1}
	m.db.Attach(m.log)
	if _, err := os.Stat(filepath.Join(dir, "founded")); err != nil {
		_, err = scopes.EnsureSite(t.Context(), "here", "here")
		must(t, err)
		must(t, projects.EnsureLibrary(t.Context(), "admin"))
		must(t, os.WriteFile(filepath.Join(dir, "founded"), nil, 0o600))
	}
	return m
}

func (m *machine) close() {
	m.stop()
	if m.engine != nil {
		must(m.t, m.engine.Close())
		m.engine = nil
	}
}

// again starts the machine anew after it stopped, with what the loss leaves.
func (m *machine) again(r restart) *machine {
	m.t.Helper()
	m.close()
	m.disk.Restart(r.loss, r.seed)
	return boot(m.t, m.disk, m.dir, r.boot)
}

// restart is what happens to a machine that stopped.
type restart struct {
	name string
	loss faultfs.Loss
	seed uint64
	boot string
}

// nobody is never asked: requests here come with their user.
type nobody struct{}

func (nobody) Authenticate(*http.Request) (access.Principal, error) {
	return access.Principal{}, fault.New(fault.Unauthenticated, "log in")
}

func (nobody) Challenge(http.ResponseWriter, *http.Request, ...string) {}

// ask sends a request as admin. A machine that has stopped answers nothing.
func (m *machine) ask(method, path string, body []byte, headers ...string) (*httptest.ResponseRecorder, error) {
	ctx, cancel := context.WithTimeout(access.WithPrincipal(m.t.Context(), access.Principal{Kind: access.User, Name: "admin", Admin: true}), 10*time.Second)
	defer cancel()
	go func() { // nothing goes on in a machine that has stopped
		select {
		case <-m.stopped:
			cancel()
		case <-ctx.Done():
		}
	}()
	var from io.Reader
	if body != nil {
		from = bytes.NewReader(body)
	}
	q := httptest.NewRequestWithContext(ctx, method, path, from)
	for i := 0; i < len(headers); i += 2 {
		q.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	m.handler.ServeHTTP(w, q)
	if m.disk.Crashed() {
		return nil, faultfs.ErrCrashed
	}
	return w, nil
}

// want asks, and fails unless the answer has the status.
func (m *machine) want(status int, method, path string, body []byte, headers ...string) (*httptest.ResponseRecorder, error) {
	w, err := m.ask(method, path, body, headers...)
	if err == nil && w.Code != status {
		err = fmt.Errorf("%s %s: answered %d, want %d: %.300s", method, path, w.Code, status, w.Body)
	}
	return w, err
}
