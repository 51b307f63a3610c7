package registry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
)

// everyStep asks for all steps and losses; without it the suite takes a sample
// that is another one for each fault. make faults sets it.
const everyStep = "ATOLL_FAULTS"

// told is what a client was told, and what it tried.
type told struct {
	blobs     map[digest.Digest]string // acknowledged, with a repository
	manifests map[digest.Digest][]byte // acknowledged in library/app or library/copy
	tags      map[string]digest.Digest // acknowledged, by repository:tag
	doubt     map[string]digest.Digest // sent and not acknowledged
}

func newTold() *told {
	return &told{map[digest.Digest]string{}, map[digest.Digest][]byte{}, map[string]digest.Digest{}, map[string]digest.Digest{}}
}

// Contents of the push, which are the same in every run.
var (
	layerOne = blobstest.Content(1, 3000)
	layerTwo = blobstest.Content(2, 700)
)

func atOnce(context.Context, int) error { return nil }

const (
	appPath  = "/v2/library/app"
	copyPath = "/v2/library/copy"
)

// push is what clients do, in one: a blob in three requests, one in a single
// request, a configuration in two chunks, a manifest, another under the same tag,
// one too large for a row, a mount into another repository and a manifest there.
func (m *machine) push(h *told) error {
	one, err := m.uploadWhole(h, layerOne)
	if err != nil {
		return err
	}
	two, err := m.uploadAtOnce(h, layerTwo)
	if err != nil {
		return err
	}
	config, err := m.uploadChunks(h, []byte(`{"architecture":"arm64","os":"linux"}`))
	if err != nil {
		return err
	}
	config.MediaType = v1.MediaTypeImageConfig
	if err := m.putManifest(h, appPath, "v1", image(config, nil, one)); err != nil {
		return err
	}
	if err := m.putManifest(h, appPath, "v1", image(config, nil, one, two)); err != nil {
		return err
	}
	large := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: config, Layers: []v1.Descriptor{two},
		Annotations: map[string]string{"note": strings.Repeat("large ", 15_000)}}
	large.SchemaVersion = 2
	data, err := json.Marshal(large)
	if err != nil {
		return err
	}
	if err := m.putManifest(h, appPath, "large", data); err != nil {
		return err
	}
	for _, d := range []digest.Digest{config.Digest, one.Digest} {
		if _, err := m.want(201, "POST", fmt.Sprintf("%s/blobs/uploads/?mount=%s&from=library/app", copyPath, d), nil); err != nil {
			return err
		}
		h.blobs[d] = copyPath
	}
	return m.putManifest(h, copyPath, "v1", image(config, nil, one))
}

func (m *machine) uploadWhole(h *told, data []byte) (v1.Descriptor, error) {
	d := describe(data)
	w, err := m.want(202, "POST", appPath+"/blobs/uploads/", nil)
	if err == nil {
		w, err = m.want(202, "PATCH", w.Header().Get("Location"), data)
	}
	if err == nil {
		w, err = m.want(201, "PUT", w.Header().Get("Location")+"?digest="+d.Digest.String(), nil)
	}
	return d, m.stored(h, d, w, err)
}

func (m *machine) uploadAtOnce(h *told, data []byte) (v1.Descriptor, error) {
	d := describe(data)
	w, err := m.want(201, "POST", appPath+"/blobs/uploads/?digest="+d.Digest.String(), data)
	return d, m.stored(h, d, w, err)
}

func (m *machine) uploadChunks(h *told, data []byte) (v1.Descriptor, error) {
	d := describe(data)
	w, err := m.want(202, "POST", appPath+"/blobs/uploads/", nil)
	for at := 0; err == nil && at < len(data); at += 20 {
		end := min(at+20, len(data))
		w, err = m.want(202, "PATCH", w.Header().Get("Location"), data[at:end], "Content-Range", fmt.Sprintf("%d-%d", at, end-1))
	}
	if err == nil {
		w, err = m.want(201, "PUT", w.Header().Get("Location")+"?digest="+d.Digest.String(), nil)
	}
	return d, m.stored(h, d, w, err)
}

func (m *machine) stored(h *told, d v1.Descriptor, _ *httptest.ResponseRecorder, err error) error {
	if err == nil {
		h.blobs[d.Digest] = appPath
	}
	return err
}

func describe(data []byte) v1.Descriptor {
	return v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

func (m *machine) putManifest(h *told, repository, tag string, data []byte) error {
	d, key := digest.FromBytes(data), repository+":"+tag
	h.doubt[key] = d
	_, err := m.want(201, "PUT", repository+"/manifests/"+tag, data, "Content-Type", v1.MediaTypeImageManifest)
	if err == nil {
		h.manifests[d], h.tags[key] = data, d
		delete(h.doubt, key)
	}
	return err
}

// hold checks what must be true whatever has happened: what was acknowledged is
// there and right, what is visible is whole.
func (m *machine) hold(h *told) {
	m.t.Helper()
	fail := func(format string, args ...any) {
		m.t.Helper()
		m.t.Fatalf(format, args...)
	}
	for d, repository := range h.blobs {
		if data := m.blob(repository, d); data == nil {
			fail("the acknowledged blob %s is not in %s", d, repository)
		}
	}
	for d, data := range h.manifests {
		found := false
		for _, repository := range []string{appPath, copyPath} {
			w, err := m.ask("GET", repository+"/manifests/"+d.String(), nil)
			must(m.t, err)
			found = found || w.Code == 200 && bytes.Equal(w.Body.Bytes(), data)
		}
		if !found {
			fail("the acknowledged manifest %s is missing or wrong", d)
		}
	}
	for _, repository := range []string{appPath, copyPath} {
		for _, tag := range []string{"v1", "large"} {
			key := repository + ":" + tag
			d := m.complete(repository, tag)
			if want := h.tags[key]; d != want && d != h.doubt[key] {
				fail("%s leads to %q, acknowledged was %q, in doubt is %q", key, d, want, h.doubt[key])
			}
		}
		for _, data := range [][]byte{layerOne, layerTwo} {
			m.blob(repository, digest.FromBytes(data)) // there and right, or not there
		}
	}
	all, err := m.store.List("", 1000)
	must(m.t, err)
	for _, d := range all {
		if _, err := m.store.Verify(m.t.Context(), d, atOnce); err != nil {
			fail("a visible blob: %v", err)
		}
	}
}

// blob reads a blob, nil when the repository has none, and fails the test when
// HEAD and GET disagree or the bytes are others.
func (m *machine) blob(repository string, d digest.Digest) []byte {
	m.t.Helper()
	path := repository + "/blobs/" + d.String()
	head, err := m.ask("HEAD", path, nil)
	must(m.t, err)
	w, err := m.ask("GET", path, nil)
	must(m.t, err)
	switch {
	case head.Code != w.Code:
		m.t.Fatalf("HEAD of %s answers %d, GET %d", path, head.Code, w.Code)
	case w.Code == 404:
		return nil
	case w.Code != 200 || digest.FromBytes(w.Body.Bytes()) != d:
		m.t.Fatalf("GET %s: answered %d with %d bytes of %s", path, w.Code, w.Body.Len(), digest.FromBytes(w.Body.Bytes()))
	}
	return w.Body.Bytes()
}

// complete gives what a tag leads to, "" when there is none, and fails the test
// unless all that it needs can be pulled.
func (m *machine) complete(repository, tag string) digest.Digest {
	m.t.Helper()
	w, err := m.ask("GET", repository+"/manifests/"+tag, nil)
	must(m.t, err)
	if w.Code == 404 {
		return ""
	}
	d := digest.Digest(w.Header().Get("Docker-Content-Digest"))
	if w.Code != 200 || digest.FromBytes(w.Body.Bytes()) != d {
		m.t.Fatalf("%s:%s: answered %d with the bytes of %s for %s: %.200s", repository, tag, w.Code, digest.FromBytes(w.Body.Bytes()), d, w.Body)
	}
	var manifest v1.Manifest
	must(m.t, json.Unmarshal(w.Body.Bytes(), &manifest))
	for _, b := range append(manifest.Layers, manifest.Config) {
		if m.blob(repository, b.Digest) == nil {
			m.t.Fatalf("%s:%s needs blob %s, which is not there", repository, tag, b.Digest)
		}
	}
	return d
}

// mend lets the client try again, then takes the power away, and checks each time.
func (m *machine) mend(h *told) {
	m.t.Helper()
	m.hold(h)
	if err := m.push(h); err != nil {
		m.t.Fatalf("the client tries again: %v", err)
	}
	m.hold(h)
	m = m.again(restart{"power cut", faultfs.PowerCut, 0, "9"})
	m.hold(h)
	if len(h.doubt) > 0 || len(h.tags) != 3 {
		m.t.Fatalf("after a push that succeeded %v are in doubt, %v acknowledged", h.doubt, h.tags)
	}
}

// origin is a machine before the first push.
type origin struct {
	disk *faultfs.FS
	rows []byte
	// steps of the disk and proposals that a push without faults takes.
	steps, proposals int
}

func newOrigin(t *testing.T) origin {
	t.Helper()
	m := boot(t, faultfs.New(), t.TempDir(), "1")
	m.close()
	rows, err := os.ReadFile(filepath.Join(m.dir, "state.db"))
	must(t, err)
	o := origin{disk: m.disk, rows: rows}
	m = o.boot(t)
	steps, proposals := m.disk.Steps(), m.log.proposals()
	h := newTold()
	must(t, m.push(h))
	o.steps, o.proposals = m.disk.Steps()-steps, m.log.proposals()-proposals
	m.mend(h)
	if o.steps < 25 || o.proposals < 8 {
		t.Fatalf("a push takes only %d steps and %d proposals", o.steps, o.proposals)
	}
	return o
}

// boot starts a copy of the machine.
func (o origin) boot(t testing.TB) *machine {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "state.db"), o.rows, 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "founded"), nil, 0o600))
	return boot(t, o.disk.Clone(), dir, "1")
}

// sample gives the steps to take of n: all of them, or one of four and another
// fourth for each fault.
func sample(n, fault int) (steps []int) {
	stride := 4
	if os.Getenv(everyStep) != "" {
		stride = 1
	}
	for i := fault % stride; i < n; i += stride {
		steps = append(steps, i)
	}
	return steps
}

var restarts = []restart{
	{"killed", faultfs.Killed, 0, "1"},
	{"power cut", faultfs.PowerCut, 0, "2"},
	{"torn 1", faultfs.Torn, 1, "2"},
	{"torn 2", faultfs.Torn, 2, "2"},
}

// The machine stops before any step of a push, on the disk or in the log, or
// right after a commit; what it lost is gone when it starts again.
func TestPushCrashes(t *testing.T) {
	o := newOrigin(t)
	for i, r := range restarts {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			for _, step := range sample(o.steps, i) {
				t.Run(fmt.Sprint("disk ", step), func(t *testing.T) {
					m := o.boot(t)
					m.disk.Inject(m.disk.Steps()+step, faultfs.Fault{Crash: true, Short: step * 37 % 700})
					m.crash(r, step)
				})
			}
			for kind, fault := range map[string]logFault{"before": stopBefore, "after": stopAfter} {
				for _, at := range sample(o.proposals, i+int(fault)) {
					t.Run(fmt.Sprint(kind, " proposal ", at), func(t *testing.T) {
						m := o.boot(t)
						m.log.inject(at, fault)
						m.crash(r, at)
					})
				}
			}
		})
	}
}

// crash pushes until the machine stops and goes on from there.
func (m *machine) crash(r restart, step int) {
	m.t.Helper()
	h := newTold()
	if err := m.push(h); !errors.Is(err, faultfs.ErrCrashed) && !(err == nil && m.disk.Crashed()) {
		m.t.Fatalf("the push ended with %v before the machine stopped", err)
	}
	r.seed += uint64(step) << 8
	m.again(r).mend(h)
}

// Any step fails once and the node goes on: the client hears of it or not, and
// when it tries again all is well.
func TestPushFaults(t *testing.T) {
	o := newOrigin(t)
	faults := []struct {
		name  string
		fault faultfs.Fault
	}{
		{"EIO", faultfs.Fault{Err: syscall.EIO}},
		{"ENOSPC", faultfs.Fault{Err: syscall.ENOSPC, Short: 100}},
		{"short write", faultfs.Fault{Short: 50}},
	}
	for i, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			for _, step := range sample(o.steps, i) {
				t.Run(fmt.Sprint("disk ", step), func(t *testing.T) {
					m := o.boot(t)
					m.disk.Inject(m.disk.Steps()+step, f.fault)
					h := newTold()
					_ = m.push(h) // whether it fails is the step's business
					m.mend(h)
				})
			}
		})
	}
	for name, fault := range map[string]logFault{"lost reply": loseReply, "dropped": dropIt} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, at := range sample(o.proposals, int(fault)) {
				t.Run(fmt.Sprint("proposal ", at), func(t *testing.T) {
					m := o.boot(t)
					m.log.inject(at, fault)
					h := newTold()
					if err := m.push(h); err != nil {
						t.Fatalf("the node could have asked again: %v", err)
					}
					m.mend(h)
				})
			}
		})
	}
}

// A disk that is full from some step on refuses what is pushed and serves what it
// has; when there is space again the client goes on.
func TestPushToAFullDisk(t *testing.T) {
	o := newOrigin(t)
	for _, room := range []int64{0, 500, 3100, 3900, 60_000} {
		t.Run(fmt.Sprint(room, " bytes free"), func(t *testing.T) {
			m := o.boot(t)
			_, total, err := m.disk.Space()
			must(t, err)
			free, _, err := m.disk.Space()
			must(t, err)
			m.disk.SetCapacity(total - free + room)
			h := newTold()
			if err := m.push(h); err == nil || errors.Is(err, faultfs.ErrCrashed) {
				t.Fatalf("the push ended with %v on a full disk", err)
			}
			m.hold(h)
			m.disk.SetCapacity(0)
			m.mend(h)
		})
	}
}
