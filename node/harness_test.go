package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/cluster/member"
)

const password = "Correct1Horse"

// fast are timings at which a test need not wait long for a node to be missed. It
// counts as live as long as ever: where more than one process wants the processor,
// a node is silent for a second without being away.
var fast = member.Timings{
	Heartbeat: time.Second, Election: time.Second, Lease: 500 * time.Millisecond,
	Ping: 100 * time.Millisecond, Live: 3 * time.Second, LeaderWait: 5 * time.Second,
}

// running is a node of a test with a client of it.
type running struct {
	*Node
	Started
	t      testing.TB
	http   *http.Client
	cancel context.CancelFunc
	done   chan error
	logs   *lines
}

// ownHost is a loopback address that is this process's: on the usual one another's
// outgoing connection may take the port of a node that is about to start again.
func ownHost() string {
	return fmt.Sprintf("127.%d.%d.9", 1+os.Getpid()>>8%200, os.Getpid()%256)
}

// config gives a loopback node that founds a site in a new directory.
func config(t testing.TB) Config {
	return Config{
		Data: filepath.Join(t.TempDir(), "data"), Listen: ownHost() + ":0", PeerListen: ownHost() + ":0", Name: "one",
		Init: true, AdminPassword: password, Version: "test", timings: fast,
	}
}

// start runs a node until the test ends and waits until it serves.
func start(t testing.TB, c Config) *running {
	t.Helper()
	r, err := tryStart(t, c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// tryStart is start for a node that may end before it serves.
func tryStart(t testing.TB, c Config) (*running, error) {
	t.Helper()
	r := &running{t: t, done: make(chan error, 1), logs: &lines{}}
	c.Log = slog.New(slog.NewTextHandler(r.logs, &slog.HandlerOptions{Level: slog.LevelInfo}))
	started := make(chan Started, 1)
	c.Started = func(s Started) { started <- s }
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	var err error
	if r.Node, err = New(ctx, c); err != nil {
		cancel()
		return nil, err
	}
	go func() { r.done <- r.Run(ctx) }()
	r.http = &http.Client{Transport: &http.Transport{}}
	select {
	case err := <-r.done:
		cancel()
		return nil, err
	case r.Started = <-started:
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("node %s ended with: %v", c.Name, err)
		}
		if t.Failed() {
			t.Logf("log of %s:\n%s", c.Name, r.logs)
		}
	})
	return r, nil
}

// stop ends the node in order, once.
func (r *running) stop() error {
	if r.cancel == nil {
		return nil
	}
	r.cancel()
	r.cancel = nil
	r.http.CloseIdleConnections()
	return <-r.done
}

// again starts the node anew on what its directory holds, at the same peer port.
func (r *running) again(change ...func(*Config)) *running {
	r.t.Helper()
	if err := r.stop(); err != nil {
		r.t.Fatal(err)
	}
	c := r.config
	c.PeerListen, c.Init, c.Join = r.PeerAddr, false, nil
	for _, fn := range change {
		fn(&c)
	}
	return start(r.t, c)
}

// lines keeps a log.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// answer of a node.
type answer struct {
	t      testing.TB
	what   string
	Status int
	Header http.Header
	Body   []byte
}

func (a answer) want(status int) answer {
	a.t.Helper()
	if a.Status != status {
		a.t.Fatalf("%s answered %d, want %d: %.400s", a.what, a.Status, status, a.Body)
	}
	return a
}

func (a answer) decode(into any) {
	a.t.Helper()
	if err := json.Unmarshal(a.Body, into); err != nil {
		a.t.Fatalf("%s answered %.200s: %v", a.what, a.Body, err)
	}
}

// do asks as admin.
func (r *running) do(method, path string, body []byte, header ...string) answer {
	r.t.Helper()
	return r.as(login{"admin", password}, method, path, body, header...)
}

// login is who asks; the zero value is nobody.
type login struct{ user, secret string }

// as asks as somebody. Headers come as name, value.
func (r *running) as(who login, method, path string, body []byte, header ...string) answer {
	r.t.Helper()
	q, err := http.NewRequestWithContext(r.t.Context(), method, r.URL+path, bytes.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	if who.user != "" {
		q.SetBasicAuth(who.user, who.secret)
	}
	for i := 0; i+1 < len(header); i += 2 {
		q.Header.Set(header[i], header[i+1])
	}
	return send(r.t, r.http, q)
}

func send(t testing.TB, client *http.Client, q *http.Request) answer {
	t.Helper()
	resp, err := client.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", q.Method, q.URL, err)
	}
	return answer{t, q.Method + " " + q.URL.String(), resp.StatusCode, resp.Header, body}
}

// socket asks over the node's Unix socket, without credentials.
func (r *running) socket(method, path string, body []byte) answer {
	r.t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(r.Data, SocketName))
	}}
	defer transport.CloseIdleConnections()
	q, err := http.NewRequestWithContext(r.t.Context(), method, "http://node"+path, bytes.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	return send(r.t, &http.Client{Transport: transport}, q)
}

// pushed is an image in a registry.
type pushed struct {
	repository string
	manifest   []byte
	digest     digest.Digest
	blobs      [][]byte // config, layer
	answer     answer   // to the manifest
	tag        string   // where a test has more than one
}

// push puts an image with one layer into a repository.
func (r *running) push(repository, tag string, layer []byte) pushed {
	r.t.Helper()
	p := pushed{repository: repository, blobs: [][]byte{[]byte(`{"os":"linux","architecture":"arm64"}`), layer}}
	for _, b := range p.blobs {
		r.do("POST", "/v2/"+repository+"/blobs/uploads/?digest="+digest.FromBytes(b).String(), b, "Content-Type", "application/octet-stream").want(201)
	}
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: describe(v1.MediaTypeImageConfig, p.blobs[0]),
		Layers: []v1.Descriptor{describe(v1.MediaTypeImageLayer, p.blobs[1])},
	}
	var err error
	if p.manifest, err = json.Marshal(m); err != nil {
		r.t.Fatal(err)
	}
	p.digest = digest.FromBytes(p.manifest)
	p.answer = r.do("PUT", "/v2/"+repository+"/manifests/"+tag, p.manifest, "Content-Type", v1.MediaTypeImageManifest).want(201)
	return p
}

func describe(mediaType string, b []byte) v1.Descriptor {
	return v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// pull reads an image by its tag and its digest and holds it to what was pushed.
func (r *running) pull(p pushed, tag string) {
	r.t.Helper()
	for _, reference := range []string{tag, p.digest.String()} {
		var got []byte
		await(r.t, "the manifest, or an election's end", func() string {
			a := r.do("GET", "/v2/"+p.repository+"/manifests/"+reference, nil)
			if a.Status == 503 {
				return string(a.Body) // not here yet, and no leader to ask
			}
			got = a.want(200).Body
			return ""
		})
		if !bytes.Equal(got, p.manifest) {
			r.t.Fatalf("manifest %s is %s, want %s", reference, got, p.manifest)
		}
	}
	for _, b := range p.blobs {
		if got := r.do("GET", "/v2/"+p.repository+"/blobs/"+digest.FromBytes(b).String(), nil).want(200).Body; !bytes.Equal(got, b) {
			r.t.Fatalf("a blob of %d bytes came as %d others", len(b), len(got))
		}
	}
}

// await waits until ok says "", for a minute at most.
func await(t testing.TB, what string, ok func() string) {
	t.Helper()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		wrong := ok()
		if wrong == "" {
			return
		}
		select {
		case <-tick.C:
		case <-limit.C:
			t.Fatalf("%s: %s", what, wrong)
		}
	}
}

// leaks gives a function that holds the goroutines to those of now.
func leaks(t testing.TB) func() {
	before := runtime.NumGoroutine()
	return func() {
		t.Helper()
		limit := time.NewTimer(5 * time.Second)
		defer limit.Stop()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		// Raft 1.8.0 never answers what is in its queues when it ends, so whoever
		// asked it at that moment waits for ever: one goroutine, at the end of a process.
		unanswered := func() int {
			stacks := make([]byte, 1<<20)
			return strings.Count(string(stacks[:runtime.Stack(stacks, true)]), "raft.(*deferError).Error(")
		}
		for runtime.NumGoroutine() > before && runtime.NumGoroutine()-unanswered() > before {
			select {
			case <-tick.C:
			case <-limit.C:
				var all strings.Builder
				_ = pprof.Lookup("goroutine").WriteTo(&all, 1)
				t.Errorf("%d goroutines, %d before the node:\n%s", runtime.NumGoroutine(), before, all.String())
				return
			}
		}
	}
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return !errors.Is(err, os.ErrNotExist)
}
