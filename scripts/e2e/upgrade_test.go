package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/version"
	"github.com/atoll-registry/atoll/scripts/lab"
)

// previousBuild gives the binary of the version before: ATOLL_PREVIOUS names one,
// which is how a release is tested against the one before it; its feature level
// must be one below. Else it is this tree built with the tag previous, which
// lowers the level by one (cluster/version/previous.go). It is not built from a
// tag of the repository: there is no release yet, and a shallow clone has no
// history.
func previousBuild(t *testing.T) string {
	t.Helper()
	if binary := os.Getenv("ATOLL_PREVIOUS"); binary != "" {
		return binary
	}
	binary := filepath.Join(t.TempDir(), "atoll-previous")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-tags", "previous", "-ldflags", "-X main.version=previous", "-o", binary, "./cmd/atoll")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the previous version: %v\n%s", err, out)
	}
	return binary
}

// A site of the previous version is upgraded node by node, rolled back node by
// node, upgraded again and finished, while clients push and pull. What was
// acknowledged is on every node at the end, and no pull of it was denied.
func TestRollingUpgradeAndRollBack(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 8*time.Minute)
	previous := previousBuild(t)
	s := newSite(ctx, t, newLab(t), plan{name: "up", net: 87, nodes: 3, binary: previous})
	img := image(ctx, t, 0)
	s.pushAll(ctx, s.nodes[0], img, "library/app", "before")
	load := s.begin(ctx)

	// change puts another version on one node after the other. After each, what is
	// pushed to the node is pulled from the next, which may run the other version,
	// and the other way round.
	change := func(binary, what string, between func(node *lab.Node)) {
		t.Helper()
		for i, node := range s.nodes {
			if err := node.Stop(ctx); err != nil {
				t.Fatal(err)
			}
			node.Use(binary)
			if err := node.Start(ctx); err != nil {
				t.Fatal(err)
			}
			if err := node.WaitStatus(ctx, what+" to be up", allUp); err != nil {
				t.Fatal(err)
			}
			next := s.nodes[(i+1)%3]
			for _, way := range [][2]*lab.Node{{node, next}, {next, node}} {
				tag := fmt.Sprintf("%s-%s-%s", what, way[0].Host.Name, way[1].Host.Name)
				s.pushAll(ctx, way[0], img, "library/app", tag)
				if got := s.pullAll(ctx, way[1], "library/app:"+tag); got != img.Index.String() {
					t.Fatalf("%s serves %s as %s, want %s", way[1].Host.Name, got, tag, img.Index)
				}
			}
			load.advance(t)
			if between != nil && node != s.nodes[2] {
				between(node)
			}
		}
	}
	change(built.atoll, "new", func(node *lab.Node) {
		out := s.refused(ctx, node, built.atoll, "cluster", "upgrade", "--finish", "--data", node.Data)
		if !strings.Contains(out, "not all nodes run the newer version: upgrade up") {
			t.Errorf("finished half way: %s", out)
		}
		if out := s.atoll(ctx, node, "cluster", "status"); !strings.Contains(out, "an upgrade is under way: the older version still runs on up") || !strings.Contains(out, says(version.Level-1)) {
			t.Errorf("the status does not speak of the upgrade:\n%s", out)
		}
	})
	change(previous, "back", nil)
	change(built.atoll, "again", nil)

	first, last := s.nodes[0], s.nodes[2]
	if err := first.WaitStatus(ctx, "advice to finish", func(st lab.Status) bool {
		return st.Level == version.Level-1 && slices.ContainsFunc(st.Advice, func(line string) bool { return strings.Contains(line, "atoll cluster upgrade --finish") })
	}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // safe to repeat
		if out := s.atoll(ctx, last, "cluster", "upgrade", "--finish"); !strings.Contains(out, says(version.Level)) {
			t.Fatalf("finishing the upgrade: %s", out)
		}
	}
	if err := first.WaitStatus(ctx, "the new level", func(st lab.Status) bool { return st.Level == version.Level && allUp(st) }); err != nil {
		t.Fatal(err)
	}

	// From now on the previous version is refused, and told which is not.
	if err := last.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	out, err := last.Host.Run(ctx, previous, "serve", "--data", last.Data, "--listen", last.Registry(), "--name", last.Host.Name)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 8 || !strings.Contains(err.Error(), fmt.Sprintf("its site is at feature level %d", version.Level)) || !strings.Contains(err.Error(), last.Data) {
		t.Errorf("the previous version on a directory of the finished site: %s %v", out, err)
	}
	token := s.atoll(ctx, first, "token", "create")
	stranger := filepath.Join(t.TempDir(), "stranger")
	out, err = last.Host.Run(ctx, previous, "serve", "--data", stranger, "--listen", last.Registry(), "--name", "stranger", "--join", first.PeerAddr(), "--token", token)
	if !errors.As(err, &exit) || exit.ExitCode() != 8 || !strings.Contains(err.Error(), fmt.Sprintf("the site is at feature level %d and the program that wants to join knows levels up to %d", version.Level, version.Level-1)) {
		t.Errorf("the previous version joins the finished site: %s %v", out, err)
	}
	// The new shape is in use: the version of a node that is down is known.
	if out := s.atoll(ctx, first, "cluster", "status", "--format", "json"); strings.Count(out, `"version": "dev"`) != 3 {
		t.Errorf("the status does not know the version of the node that is down:\n%s", out)
	}
	if err := last.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := last.WaitStatus(ctx, "all to be up at last", allUp); err != nil {
		t.Fatal(err)
	}
	load.finish(t)
}

func says(level int) string { return fmt.Sprintf("feature level of the site: %d", level) }

func allUp(st lab.Status) bool {
	up := 0
	for _, n := range st.Nodes {
		if n.Up {
			up++
		}
	}
	return st.Quorum && up == 3
}

// load pushes small images under new tags and pulls them, through whichever node
// takes the request, until it is finished.
type load struct {
	site   *site
	wires  []*wire
	stop   context.CancelFunc
	done   chan struct{}
	mu     sync.Mutex
	pushed map[string]string // digest by tag of what was acknowledged
	pulls  int
	seen   int     // pushes when advance was called last
	broken []error // what must not be
}

func (s *site) begin(ctx context.Context) *load {
	ctx, stop := context.WithCancel(ctx)
	l := &load{site: s, stop: stop, done: make(chan struct{}), pushed: map[string]string{}}
	for _, node := range s.nodes {
		l.wires = append(l.wires, s.wire(node))
	}
	go func() {
		defer close(l.done)
		for i := 0; ctx.Err() == nil; i++ {
			l.push(ctx, i)
			l.pull(ctx, i)
		}
	}()
	s.t.Cleanup(func() { stop(); <-l.done })
	return l
}

// around gives the nodes' answers, from the i-th on, until one is good.
func (l *load) around(ctx context.Context, i int, good func(*wire) bool) {
	for ; ctx.Err() == nil; i++ {
		if good(l.wires[i%len(l.wires)]) {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// content of the i-th image: a manifest over one blob, which is its config.
func content(i int) (blob, manifest []byte) {
	blob = fmt.Appendf(nil, `{"number":%d}`, i)
	return blob, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"%s","size":%d},"layers":[]}`, digestOf(blob), len(blob))
}

func digestOf(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

func (l *load) push(ctx context.Context, i int) {
	blob, manifest := content(i)
	tag := fmt.Sprintf("load%d", i)
	send := func(w *wire, method, path, kind string, body []byte) bool {
		var from io.Reader = bytes.NewReader(body)
		q := w.request(ctx, method, path, from)
		q.Header.Set("Content-Type", kind)
		a := w.do(q)
		return a.err == nil && a.status == http.StatusCreated
	}
	l.around(ctx, i, func(w *wire) bool {
		return send(w, http.MethodPost, "/v2/library/load/blobs/uploads/?digest="+digestOf(blob), "application/octet-stream", blob)
	})
	l.around(ctx, i, func(w *wire) bool {
		return send(w, http.MethodPut, "/v2/library/load/manifests/"+tag, "application/vnd.oci.image.manifest.v1+json", manifest)
	})
	if ctx.Err() == nil {
		l.mu.Lock()
		l.pushed[tag] = digestOf(manifest)
		l.mu.Unlock()
	}
}

// pull reads what was just acknowledged, from another node than it was pushed to.
func (l *load) pull(ctx context.Context, i int) {
	blob, manifest := content(i)
	for path, want := range map[string][]byte{fmt.Sprintf("/v2/library/load/manifests/load%d", i): manifest, "/v2/library/load/blobs/" + digestOf(blob): blob} {
		l.around(ctx, i+1, func(w *wire) bool {
			a := w.do(w.request(ctx, http.MethodGet, path, nil))
			switch {
			case a.err != nil || a.status == http.StatusServiceUnavailable:
				return false // it is being replaced, or cannot know: another does
			case ctx.Err() == nil && (a.status != http.StatusOK || !bytes.Equal(a.body, want)):
				l.mu.Lock()
				l.broken = append(l.broken, fmt.Errorf("%s answers %s with %d %.200s", w.node.Host.Name, path, a.status, a.body))
				l.mu.Unlock()
			}
			return true
		})
	}
	l.mu.Lock()
	l.pulls++
	l.mu.Unlock()
}

// advance waits until more was pushed since it was called last.
func (l *load) advance(t *testing.T) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		l.mu.Lock()
		pushed := len(l.pushed)
		l.mu.Unlock()
		if pushed > l.seen {
			l.seen = pushed
			return
		}
		select {
		case <-l.done:
			t.Fatal("nothing more was pushed")
		default:
		}
	}
}

// finish ends the load and reads everything from every node.
func (l *load) finish(t *testing.T) {
	t.Helper()
	l.advance(t)
	l.stop()
	<-l.done
	for _, err := range l.broken {
		t.Error(err)
	}
	ctx := t.Context()
	for _, w := range l.wires {
		for tag, want := range l.pushed {
			if a := w.get(ctx, "/v2/library/load/manifests/"+tag, http.StatusOK); digestOf(a.body) != want {
				t.Errorf("%s serves %s as %s, want %s", w.node.Host.Name, tag, digestOf(a.body), want)
			}
		}
	}
	t.Logf("%d pushes acknowledged, %d pulls", len(l.pushed), l.pulls)
}
