package offline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
)

// pair gives a site with content and one that accepts it.
func pair(t *testing.T) (from, to *site, manifest []byte) {
	from, to = newSite(t, "site-a"), newSite(t, "site-b")
	from.project("shop")
	manifest = from.push("shop/app", "v1", strings.Repeat("layer ", 1000))
	to.trust(from, "shop")
	return from, to, manifest
}

func TestCarry(t *testing.T) {
	from, to, manifest := pair(t)
	file := from.exportFile(ExportRequest{Projects: []string{"shop"}})

	status, report, text := to.importFile(file, "dry_run=true")
	if status != 200 || !report.DryRun || report.Entries == 0 || report.Blobs.Copied != 2 {
		t.Fatalf("dry run: %d %s", status, text)
	}
	if _, err := to.resolve("shop/app", "v1"); !fault.Is(err, fault.NotFound) {
		t.Errorf("a dry run made the tag: %v", err)
	}

	status, report, text = to.importFile(file)
	if status != 200 || !report.Verified || report.Blobs.Copied != 2 || len(report.Projects) != 1 || !report.Projects[0].StateCompared {
		t.Fatalf("import: %d %s", status, text)
	}
	to.wants("shop/app", "v1", manifest)
	if err := to.put("shop/app", "v2", manifest); !fault.Is(err, fault.Denied) {
		t.Errorf("a push to the mirror: %v", err)
	}
	status, report, text = to.importFile(file)
	if status != 200 || report.Entries != 0 || report.Blobs.Copied != 0 {
		t.Errorf("the same again: %d %s", status, text)
	}

	// A relay carries on what it holds, and a third site trusts the origin only.
	third := newSite(t, "site-c")
	third.trust(from, "*")
	third.trust(to) // may carry, may write nothing
	if status, _, text := third.importFile(to.exportFile(ExportRequest{Projects: []string{"shop"}})); status != 200 {
		t.Fatalf("relayed: %d %s", status, text)
	}
	third.wants("shop/app", "v1", manifest)
}

// Content that is named by sha512 is carried beside the same under sha256; a
// manifest too large for a row is a blob, by its own digest.
func TestCarryBySHA512(t *testing.T) {
	from, to, manifest := pair(t)
	from.algorithm = digest.SHA512
	layer := strings.Repeat("layer ", 1000)
	other := from.push("shop/app", "v2", layer)
	large := from.push("shop/app", "v3", layer, strings.Repeat("note ", 20_000))
	file := from.exportFile(ExportRequest{Projects: []string{"shop"}})
	status, report, text := to.importFile(file)
	if status != 200 || !report.Verified || report.Blobs.Copied != 4 || !report.Projects[0].StateCompared {
		t.Fatalf("import: %d %s", status, text)
	}
	to.wants("shop/app", "v1", manifest)
	to.wants("shop/app", "v2", other)
	to.wants("shop/app", "v3", large)
	for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		if _, err := to.Store.Stat(algorithm.FromString(layer)); err != nil {
			t.Error(err)
		}
	}
	if status, report, text = to.importFile(file); status != 200 || report.Entries != 0 || report.Blobs.Copied != 0 {
		t.Errorf("the same again: %d %s", status, text)
	}
}

// TestExportWhilePushesGoOn: checkpoint, entries and state of a bundle are of one
// moment, whatever happens meanwhile. The importer compares them.
func TestExportWhilePushesGoOn(t *testing.T) {
	from, to, _ := pair(t)
	ctx, stop := context.WithCancel(t.Context())
	var pushing sync.WaitGroup
	defer pushing.Wait()
	defer stop()
	pushed := make(chan struct{})
	last := 0
	pushing.Go(func() {
		for ; ctx.Err() == nil && last < 400; last++ {
			from.push("shop/app", fmt.Sprintf("n%d", last%7), fmt.Sprint("layer ", last))
			if last == 3 {
				close(pushed)
			}
		}
	})
	<-pushed
	for i := range 5 {
		status, report, text := to.importFile(from.exportFile(ExportRequest{}))
		if status != 200 || len(report.Absent) != 0 {
			t.Fatalf("export %d while pushes went on: %d %s", i, status, text)
		}
		for _, p := range report.Projects {
			if p.Project == "shop" && !p.StateCompared {
				t.Errorf("state was not compared: %+v", p)
			}
		}
	}
	stop()
	pushing.Wait()
	if status, _, text := to.importFile(from.exportFile(ExportRequest{})); status != 200 {
		t.Fatalf("the last one: %d %s", status, text)
	}
	tag := fmt.Sprintf("n%d", (last-1)%7)
	manifest, err := from.resolve("shop/app", tag)
	must(t, err)
	to.wants("shop/app", tag, manifest)
}

// TestImportGoesOnAfterACrash: the files are among the blobs and their rows are
// not made yet.
func TestImportGoesOnAfterACrash(t *testing.T) {
	for name, crash := range map[string]func(*site) error{
		"before the copies":  func(*site) error { return errCrash },
		"before the rows":    func(s *site) error { s.backend.SetLeader(false); return nil },
		"within a few moves": func(*site) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			from, to, manifest := pair(t)
			file := from.exportFile(ExportRequest{Projects: []string{"shop"}})
			var asked []digest.Digest
			to.copies.set(func(ds []digest.Digest) error {
				asked = ds
				for _, d := range ds {
					if _, err := to.Store.Stat(d); err != nil {
						t.Errorf("asked for copies of what is not here: %v", err)
					}
					if to.live(d) {
						t.Error("the row of a blob was made before its copies")
					}
				}
				return crash(to)
			})
			if name == "within a few moves" { // one of two files was moved
				layer := []byte(strings.Repeat("layer ", 1000))
				_, err := to.Store.Put(t.Context(), digest.FromBytes(layer), bytes.NewReader(layer))
				must(t, err)
			} else {
				if status, _, text := to.importFile(file); status < 500 {
					t.Fatalf("a crash was answered with %d %s", status, text)
				}
				if len(asked) != 2 || to.live(asked[0]) || to.live(asked[1]) {
					t.Fatalf("asked for copies of %v, want two without rows", asked)
				}
			}
			to.backend.SetLeader(true)
			to.copies.set(nil)
			status, report, text := to.importFile(file)
			if status != 200 || report.Blobs.Copied+report.Blobs.Staged != 2 || report.Blobs.Staged == 0 {
				t.Fatalf("the import after the crash: %d %s", status, text)
			}
			to.wants("shop/app", "v1", manifest)
			for _, d := range asked {
				if !to.live(d) {
					t.Errorf("blob %s has no row", d)
				}
			}
			if areas, err := to.Store.Staged(); err != nil || len(areas) != 0 {
				t.Errorf("staging areas that stay: %v, %v", areas, err)
			}
		})
	}
}

func (s *site) live(d digest.Digest) (ok bool) {
	s.t.Helper()
	must(s.t, s.DB.View(func(v *table.View) error {
		row, there, err := s.Records.Get(v, d)
		ok = there && row.State == blobs.Live
		return err
	}))
	return ok
}

// TestLargeManifestThatIsHere: it is a blob of another project, so it is not
// staged, and is read from where it is.
func TestLargeManifestThatIsHere(t *testing.T) {
	from, to, _ := pair(t)
	large := from.push("shop/app", "large", "layer", strings.Repeat("n", 100<<10))
	to.push("library/app", "large", "layer", strings.Repeat("n", 100<<10))
	to.wants("library/app", "large", large)
	if status, _, text := to.importFile(from.exportFile(ExportRequest{})); status != 200 {
		t.Fatalf("import: %d %s", status, text)
	}
	to.wants("shop/app", "large", large)
}

// TestViewsAreShort: no view of the database is open while bytes move, which may
// take days: it would keep the engine from reusing what was deleted since.
func TestViewsAreShort(t *testing.T) {
	from, to, manifest := pair(t)
	// The layer is on another node of the site.
	layer := []byte(strings.Repeat("layer ", 1000))
	must(t, from.Store.Remove(digest.FromBytes(layer)))
	from.elsewhere.held[digest.FromBytes(layer)] = layer
	look := func(s *site, doing string) func() {
		return func() {
			if n := s.reads.open.Load(); n != 0 {
				t.Errorf("%s with %d views open", doing, n)
			}
		}
	}
	from.elsewhere.look = look(from, "reading from another node")
	self, err := from.trusts.Self()
	must(t, err)
	request := airgap.ExportRequest{Site: self, Projects: []string{"shop"}}
	must(t, from.DB.View(func(v *table.View) (err error) {
		request.Key, err = from.Journal.Signer(t.Context(), v)
		return err
	}))
	var file bytes.Buffer
	_, err = airgap.Export(t.Context(), &looking{Writer: &file, look: look(from, "writing a bundle")}, request,
		airgap.Source{Journal: export{from.Offline}, Content: export{from.Offline}})
	must(t, err)

	to.copies.set(nil)
	options, err := to.importOptions(t.Context(), &importIn{})
	must(t, err)
	_, err = airgap.Import(t.Context(), &looking{Reader: &file, look: look(to, "reading a bundle")}, options,
		airgap.Target{Catalog: target{to.Offline}, Blobs: storage{to.Offline}})
	must(t, err)
	to.wants("shop/app", "v1", manifest)
}

type looking struct {
	io.Writer
	io.Reader
	look func()
}

func (l *looking) Write(p []byte) (int, error) { l.look(); return l.Writer.Write(p) }
func (l *looking) Read(p []byte) (int, error)  { l.look(); return l.Reader.Read(p) }

// TestRefusalReachesWhoStillSends: the answer is whole before the body is.
func TestRefusalReachesWhoStillSends(t *testing.T) {
	from, to, _ := pair(t)
	file := from.exportFile(ExportRequest{})
	delete(to.trusts.known, "site-a") // trusted no more
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	must(t, err)
	local := httptest.NewUnstartedServer(to.handler())
	local.Listener.Close()
	local.Listener = l
	local.Start()
	defer local.Close()
	overSocket := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	for name, test := range map[string]struct {
		client *http.Client
		url    string
		query  string
		status int
		code   string
	}{
		"over TCP":                  {to.serve().Client(), to.serve().URL, "", 403, "BUNDLE_UNTRUSTED"},
		"over the socket":           {overSocket, "http://node", "", 403, "BUNDLE_UNTRUSTED"},
		"a name that is none":       {to.serve().Client(), to.serve().URL, "?as=shop", 400, "BAD_REQUEST"},
		"a name that is none, here": {overSocket, "http://node", "?as=shop", 400, "BAD_REQUEST"},
	} {
		t.Run(name, func(t *testing.T) {
			body, send := io.Pipe()
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, test.url+"/api/atoll/v1/bundles/import"+test.query, body)
			must(t, err)
			r.Header.Set("As", "admin")
			answered := make(chan struct{})
			var sending sync.WaitGroup
			sending.Go(func() {
				// The beginning, which says whose it is, and then nothing until the
				// answer is here. The rest is sent for as long as somebody takes it.
				if _, err := send.Write(file[:min(len(file), 64<<10)]); err == nil {
					<-answered
					for range 64 {
						if _, err := send.Write(make([]byte, 256<<10)); err != nil {
							break
						}
					}
				}
				send.Close()
			})
			resp, err := test.client.Do(r)
			if err != nil {
				close(answered)
				sending.Wait()
				t.Fatal(err)
			}
			text, err := io.ReadAll(resp.Body)
			close(answered)
			resp.Body.Close()
			sending.Wait()
			if err != nil {
				t.Errorf("the answer broke off: %v", err)
			}
			refused(t, resp.StatusCode, string(text), test.status, test.code)
		})
	}
}

func TestRefusals(t *testing.T) {
	from, to, _ := pair(t)
	file := from.exportFile(ExportRequest{Projects: []string{"shop"}})
	before := to.revision()
	status, _, text := to.importFile(file[:len(file)*2/3])
	refused(t, status, text, 400, "BUNDLE_TRUNCATED")
	flipped := bytes.Clone(file)
	flipped[len(flipped)/2] ^= 1
	status, _, text = to.importFile(flipped)
	refused(t, status, text, 400, "BUNDLE_ALTERED")
	status, _, text = to.importFile(bytes.Repeat([]byte("no bundle at all"), 1000))
	refused(t, status, text, 400, "BUNDLE_UNKNOWN")
	status, _, text = to.importFile(from.exportFile(ExportRequest{Projects: []string{"shop"}, To: []string{"site-c"}}))
	refused(t, status, text, 403, "BUNDLE_NOT_RECIPIENT")
	to.trust(from, "else")
	status, _, text = to.importFile(file)
	refused(t, status, text, 403, "BUNDLE_NOT_ACCEPTED")
	if after := to.revision(); after != before {
		t.Errorf("refusals wrote revisions %d to %d", before, after)
	}
	to.trust(from, "*")
	to.project("shop")
	status, _, text = to.importFile(file)
	refused(t, status, text, 409, "BUNDLE_NAME_TAKEN")
	if status, _, text = to.importFile(file, "as=shop=theirs"); status != 200 {
		t.Errorf("under another name: %d %s", status, text)
	}
	for _, as := range []string{"as=shop", "as==x", "as=shop=", "as=shop=UPPER"} {
		if status, _, text := to.importFile(file, as); status != 400 {
			t.Errorf("%s: %d %s", as, status, text)
		}
	}

	for _, body := range []string{"", "{", `{"projects":1}`} {
		if status, out := to.ask("admin", "export", strings.NewReader(body)); status != 400 {
			t.Errorf("export of %q: %d %s", body, status, out)
		}
	}
	status, out := to.ask("admin", "export", strings.NewReader(`{"projects":["none"]}`))
	refused(t, status, string(out), 404, "NOT_FOUND")
	for as, want := range map[string]int{"": 401, "eve": 403} {
		for _, what := range []string{"import", "export"} {
			if status, out := to.ask(as, what, strings.NewReader("{}")); status != want {
				t.Errorf("%s as %q: %d %s", what, as, status, out)
			}
		}
	}
}

func (s *site) revision() (n uint64) {
	s.t.Helper()
	must(s.t, s.DB.View(func(v *table.View) error { n = v.Revision(); return nil }))
	return n
}

func TestEveryReasonHasACode(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range refusalCodes {
		err := asFault(fmt.Errorf("wrapped: %w", &airgap.Refusal{Reason: r.reason, Text: "what to do"}))
		code, text, _ := fault.Public(err)
		if code != r.code || text != "what to do" || !fault.Is(err, r.kind) || seen[code] {
			t.Errorf("%v is %s %q", r.reason, code, text)
		}
		seen[code] = true
	}
	if err := asFault(&airgap.Refusal{Reason: errors.New("new"), Text: "what to do"}); !fault.Is(err, fault.Invalid) {
		t.Errorf("a reason without a code: %v", err)
	}
	if err := asFault(errCrash); !fault.Is(err, fault.Internal) {
		t.Errorf("no refusal: %v", err)
	}
}

// TestBlobsOfTheSiteCount: what another node holds is not carried twice, and what
// nobody holds is named.
func TestBlobsOfTheSiteCount(t *testing.T) {
	from, to, _ := pair(t)
	layer := []byte(strings.Repeat("layer ", 1000))
	d := digest.FromBytes(layer)
	to.blob("library/app", "application/octet-stream", layer)
	must(t, to.Store.Remove(d)) // the row says that the site has it
	status, report, text := to.importFile(from.exportFile(ExportRequest{}))
	if status != 200 || report.Blobs.Held != 1 || report.Blobs.Copied != 1 {
		t.Fatalf("import: %d %s", status, text)
	}
	if _, err := (export{to.Offline}).Size(t.Context(), digest.FromString("nowhere")); err == nil {
		t.Error("a blob that nobody has was found")
	}
	if _, err := (export{to.Offline}).Open(t.Context(), d); !fault.Is(err, fault.Unavailable) {
		t.Errorf("its holder is down: %v", err)
	}
}
