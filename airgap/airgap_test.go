package airgap_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/airgap/airgaptest"
	"github.com/atoll-registry/atoll/bundle/entry"
)

// pair is a site with a project and one that trusts it.
func pair(t *testing.T) (a, b *airgaptest.Site) {
	a, b = airgaptest.New(t, "site-a", 10), airgaptest.New(t, "site-b", 20)
	a.Index("lib", "app", "v1", a.Image("lib", "app", "", "layer of amd64"), a.Image("lib", "app", "", "layer of arm64", "shared layer"))
	a.Image("lib", "tools/web", "1.0", "layer of web", "shared layer")
	b.Trust(a, "lib")
	return a, b
}

func export(t *testing.T, s *airgaptest.Site, change func(*airgap.ExportRequest)) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := s.Export(&out, change); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func accept(t *testing.T, s *airgaptest.Site, data []byte) airgap.Report {
	t.Helper()
	report, err := s.Import(bytes.NewReader(data), nil)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// refused imports what has to be refused for the reason, and leave no trace.
func refused(t *testing.T, s *airgaptest.Site, data []byte, reason error, change func(*airgap.ImportOptions)) string {
	t.Helper()
	before := s.Visible()
	_, err := s.Import(bytes.NewReader(data), change)
	var refusal *airgap.Refusal
	if !errors.Is(err, reason) || !errors.As(err, &refusal) {
		t.Errorf("want a refusal for %q, have %v", reason, err)
		return ""
	}
	if s.Visible() != before {
		t.Errorf("refused (%v), but something changed", err)
	}
	return refusal.Text
}

func mentions(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(text, word) {
			t.Errorf("%q does not mention %q", text, word)
		}
	}
}

func TestImport(t *testing.T) {
	a, b := pair(t)
	report := accept(t, b, export(t, a, nil))
	if len(report.Images) != 2 || !report.Verified || report.Blobs.Copied != report.Blobs.Total || report.Entries == 0 {
		t.Errorf("report: %+v", report)
	}
	if p := report.Projects[0]; p.Outcome != airgap.OutcomeNew || p.Local != "lib" || !p.StateCompared {
		t.Errorf("project: %+v", p)
	}
	for _, image := range report.Images {
		if !b.Holds("lib", image.Digest) {
			t.Errorf("%s is not held", image.Reference)
		}
	}
	if b.Staged() != 0 {
		t.Errorf("%d files stay in staging", b.Staged())
	}
	if _, err := json.Marshal(report); err != nil {
		t.Error(err)
	}
}

// An index over images that are named by either algorithm arrives as it left, and
// an update with it.
func TestImportOfBothAlgorithms(t *testing.T) {
	a, b := pair(t)
	var children []digest.Digest
	for _, a.Algorithm = range entry.Algorithms() {
		children = append(children, a.Image("lib", "mixed", "", "shared layer", a.Algorithm.String()))
	}
	var indexes []digest.Digest
	for _, a.Algorithm = range entry.Algorithms() {
		indexes = append(indexes, a.Index("lib", "mixed", a.Algorithm.String(), children...))
	}
	first := export(t, a, nil)
	if report := accept(t, b, first); !report.Verified || report.Blobs.Copied != report.Blobs.Total || !report.Projects[0].StateCompared {
		t.Errorf("report: %+v", report)
	}
	for _, d := range append(children, indexes...) {
		if !b.Holds("lib", d) {
			t.Errorf("%s is not held", d)
		}
	}
	later := a.Image("lib", "mixed", "later", "shared layer", "a layer more")
	if report := accept(t, b, export(t, a, nil)); report.Blobs.Copied == 0 || !b.Holds("lib", later) {
		t.Errorf("the update: %+v", report)
	}
	b.Lose(digest.SHA512.FromString("shared layer"))
	if report := accept(t, b, export(t, a, nil)); report.Blobs.Copied != 1 {
		t.Errorf("the lost blob: %+v", report)
	}
	damaged := bytes.Clone(first)
	damaged[bytes.LastIndex(damaged, []byte("shared layer"))] ^= 1
	c := airgaptest.New(t, "site-c", 30)
	c.Trust(a, "lib")
	refused(t, c, damaged, airgap.ErrAltered, nil)
}

func TestImportTwice(t *testing.T) {
	a, b := pair(t)
	data := export(t, a, nil)
	accept(t, b, data)
	before, puts := b.Visible(), b.Puts
	report := accept(t, b, data)
	if !report.NothingNew() || report.Projects[0].Outcome != airgap.OutcomeUnchanged || b.Visible() != before {
		t.Errorf("second import: %+v", report)
	}
	if b.Puts-puts > 5 { // its entries and manifests, no blob
		t.Errorf("%d files written", b.Puts-puts)
	}
}

func TestImportHealsALostBlob(t *testing.T) {
	a, b := pair(t)
	data := export(t, a, nil)
	accept(t, b, data)
	before := b.Visible()
	b.Lose(digest.FromString("shared layer"))
	if report := accept(t, b, data); report.Blobs.Copied != 1 || report.Entries != 0 || b.Visible() != before {
		t.Errorf("report: %+v", report)
	}
}

func TestDryRunWritesNothing(t *testing.T) {
	a, b := pair(t)
	before := b.Visible()
	report, err := b.Import(bytes.NewReader(export(t, a, nil)), func(o *airgap.ImportOptions) { o.DryRun = true })
	if err != nil || b.Visible() != before || b.Puts != 0 {
		t.Fatalf("%d writes, %v", b.Puts, err)
	}
	if !report.DryRun || report.Entries == 0 || report.Blobs.Copied != report.Blobs.Total {
		t.Errorf("report: %+v", report)
	}
}

func TestUpdates(t *testing.T) {
	a, b := pair(t)
	first := export(t, a, nil)
	accept(t, b, first)
	id := a.LogID("lib")
	d := a.Image("lib", "app", "v2", "shared layer", "new layer")
	a.Write("lib", entry.Entry{Kind: entry.TagDelete, At: 1003, Repository: "tools/web", Tag: "1.0"})
	size := uint64(7)
	delta := export(t, a, func(r *airgap.ExportRequest) { r.Basis = map[entry.LogID]uint64{id: size} })
	full := export(t, a, nil)

	c := airgaptest.New(t, "site-c", 30)
	c.Trust(a, "*")
	mentions(t, refused(t, c, delta, airgap.ErrGap, nil), "lib", "0 to 6")

	report := accept(t, b, delta)
	if p := report.Projects[0]; p.Outcome != airgap.OutcomeUpdated || p.Applied != size || report.Entries != 3 || report.Blobs.Copied != 2 || !b.Holds("lib", d) {
		t.Errorf("delta: %+v", report)
	}
	if report := accept(t, b, full); !report.NothingNew() {
		t.Errorf("full after delta: %+v", report)
	}
	// An older bundle brings nothing back, the deleted tag least of all.
	before := b.Visible()
	if report := accept(t, b, first); report.Projects[0].Outcome != airgap.OutcomeBehind || b.Visible() != before || report.Blobs.Copied != 0 {
		t.Errorf("older bundle: %+v", report)
	}
	accept(t, c, full)
	if sb, _ := b.StateRoot(t.Context(), id); true {
		if sc, _ := c.StateRoot(t.Context(), id); sb != sc {
			t.Error("two ways to one log, two states")
		}
	}
}

func TestRelay(t *testing.T) {
	a, b := pair(t)
	accept(t, b, export(t, a, nil))
	relayed := export(t, b, nil)
	c := airgaptest.New(t, "site-c", 30)
	c.Trust(b, "*")
	mentions(t, refused(t, c, relayed, airgap.ErrUntrusted, nil), "site-a", "relays")
	c.Trust(a, "lib")
	if report := accept(t, c, relayed); report.Source.Site != "site-b" || report.Projects[0].Log.Site != "site-a" {
		t.Errorf("report: %+v", report)
	}
	// It comes home and says nothing new.
	a.Trust(b, "*")
	if report := accept(t, a, relayed); !report.NothingNew() || report.Projects[0].Outcome != airgap.OutcomeOwn || !report.Projects[0].StateCompared {
		t.Errorf("at its origin: %+v", report)
	}
	// Nor does it bring a project back that was deleted there.
	emptied := airgaptest.New(t, "site-a", 10)
	emptied.Trust(b, "*")
	before := emptied.Visible()
	if report := accept(t, emptied, relayed); !report.NothingNew() || emptied.Visible() != before {
		t.Errorf("deleted at its origin: %+v", report)
	}
}

func TestRefusals(t *testing.T) {
	a, b := pair(t)
	data := export(t, a, nil)
	stranger := airgaptest.New(t, "site-x", 50)
	mentions(t, refused(t, stranger, data, airgap.ErrUntrusted, nil), "site-a", a.Public().Fingerprint, "atoll site trust")

	impostor := airgaptest.New(t, "site-a", 60)
	impostor.Image("lib", "app", "v1", "evil layer")
	refused(t, b, export(t, impostor, nil), airgap.ErrUntrusted, nil)

	addressed := export(t, a, func(r *airgap.ExportRequest) { r.Recipients = []string{"site-c", "site-d"} })
	mentions(t, refused(t, b, addressed, airgap.ErrNotRecipient, nil), "site-c, site-d", "site-b")
	addressed = export(t, a, func(r *airgap.ExportRequest) { r.Recipients = []string{"site-c", "site-b"} })
	b.Space = 10
	mentions(t, refused(t, b, addressed, airgap.ErrNoSpace, nil), "MiB")
	b.Space = 1 << 40

	a.Image("secret", "app", "v1", "secret layer")
	mentions(t, refused(t, b, export(t, a, func(r *airgap.ExportRequest) { r.Projects = []string{"secret"} }), airgap.ErrNotAccepted, nil), "secret", "--accept")

	b.Image("lib", "own", "v1", "own layer")
	mentions(t, refused(t, b, data, airgap.ErrNameTaken, nil), "--as lib=")
	as := func(value string) func(*airgap.ImportOptions) {
		return func(o *airgap.ImportOptions) { o.As = map[string]string{"lib": value} }
	}
	refused(t, b, data, airgap.ErrNameTaken, as("Not Valid"))
	mentions(t, refused(t, b, data, airgap.ErrNoProject, func(o *airgap.ImportOptions) { o.As = map[string]string{"other": "x"} }), "other")
	report, err := b.Import(bytes.NewReader(data), as("lib-of-a"))
	if err != nil || report.Projects[0].Local != "lib-of-a" || !b.Holds("lib-of-a", report.Images[0].Digest) {
		t.Errorf("--as: %+v, %v", report.Projects, err)
	}
	mentions(t, refused(t, b, data, airgap.ErrNameTaken, as("again")), "lib-of-a")
	if report := accept(t, b, data); !report.NothingNew() {
		t.Errorf("without --as the second time: %+v", report)
	}
}

func TestOnlyAcceptedProjectsComeIn(t *testing.T) {
	a, b := pair(t)
	secret := a.Image("secret", "app", "v1", "secret layer")
	report := accept(t, b, export(t, a, nil))
	if b.Holds("secret", secret) || report.Blobs.Ignored != 2 || len(report.Projects) != 2 || report.Projects[1].Outcome != airgap.OutcomeNotAccepted {
		t.Errorf("report: %+v", report)
	}
	if has, _ := b.Has(t.Context(), digest.FromString("secret layer")); has {
		t.Error("a blob of a project that is not accepted came in")
	}
}

func TestNewIncarnationIsNotMixedIn(t *testing.T) {
	a, b := pair(t)
	accept(t, b, export(t, a, nil))
	restored := airgaptest.New(t, "site-a", 10)
	restored.Incarnation = "inc2"
	restored.Image("lib", "app", "v1", "after the restore")
	mentions(t, refused(t, b, export(t, restored, nil), airgap.ErrNameTaken, nil), "inc2", "inc1", "--as lib=")
}

func TestForkRaisesAnAlarm(t *testing.T) {
	a, b := pair(t)
	data := export(t, a, nil)
	accept(t, b, data)
	twin, _ := pair(t)
	twin.Rewrite("lib", 6, entry.Entry{Kind: entry.TagPut, At: 1002, Repository: "tools/web", Tag: "2.0", Digest: digest.FromString("x"), PushedAt: 1})
	mentions(t, refused(t, b, export(t, twin, nil), airgap.ErrFork, nil), "alarm", "site-a")
	twin.Image("lib", "app", "v9", "longer history")
	refused(t, b, export(t, twin, nil), airgap.ErrFork, nil)
	// Nor does a site take its own log back with more in it than it has.
	a.Image("lib", "app", "v3", "later layer")
	later := export(t, a, nil)
	old, _ := pair(t)
	mentions(t, refused(t, old, later, airgap.ErrFork, nil), "own project")
}

func TestDivergenceRaisesAnAlarm(t *testing.T) {
	a, b := pair(t)
	data := export(t, a, nil)
	accept(t, b, data)
	b.Tamper(a.LogID("lib"))
	mentions(t, refused(t, b, data, airgap.ErrDiverged, nil), "alarm")
	a.Tamper(a.LogID("lib"))
	if _, err := a.Export(io.Discard, nil); err == nil || !strings.Contains(err.Error(), "alarm") {
		t.Errorf("export of a tampered state: %v", err)
	}
}

func TestOlderKeyDocumentIsRefused(t *testing.T) {
	a, b := pair(t)
	old := export(t, a, nil)
	key, err := entry.KeyOf(a.Online)
	if err != nil {
		t.Fatal(err)
	}
	a.Certify(entry.OnlineKey{Key: key, State: entry.KeyActive})
	accept(t, b, export(t, a, nil))
	mentions(t, refused(t, b, old, airgap.ErrUntrusted, nil), "key document 1", "2 already")
}

func TestFlippedBytesChangeNothing(t *testing.T) {
	a, b := pair(t)
	data := export(t, a, nil)
	before := b.Visible()
	for i := 0; i < len(data); i++ {
		// Package bundle has every byte; here it is about what stays behind.
		if data[i] == 0 && i%61 != 0 || i%11 != 0 {
			continue
		}
		flipped := bytes.Clone(data)
		flipped[i] ^= 1 << (i % 8)
		_, err := b.Import(bytes.NewReader(flipped), nil)
		var refusal *airgap.Refusal
		if !errors.As(err, &refusal) || refusal.Text == "" {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
	if b.Visible() != before {
		t.Error("something changed")
	}
	accept(t, b, data)
}

// TestInterrupted cuts the stream at every length class, again and again on one
// site: nothing is visible until the end, and nothing is staged twice.
func TestInterrupted(t *testing.T) {
	a, b := pair(t)
	data := export(t, a, nil)
	before := b.Visible()
	for n := 0; n < len(data); n += 419 {
		if _, err := b.Import(bytes.NewReader(data[:n]), nil); !errors.Is(err, airgap.ErrTruncated) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
	pulled := errors.New("the stick was pulled out")
	if _, err := b.Import(io.MultiReader(bytes.NewReader(data[:len(data)-600]), iotest.ErrReader(pulled)), nil); !errors.Is(err, pulled) {
		t.Errorf("an I/O error becomes %v", err)
	}
	if b.Visible() != before {
		t.Error("something became visible")
	}
	puts := b.Puts
	report := accept(t, b, data)
	if report.Blobs.Copied != 0 || report.Blobs.Staged != report.Blobs.Total || b.Puts != puts {
		t.Errorf("resumed: %+v, %d puts", report.Blobs, b.Puts-puts)
	}
	if files := report.Blobs.Total + 4 + 1; puts != files { // 4 manifests, 1 file of entries
		t.Errorf("%d files written for %d", puts, files)
	}
}

// TestKilledAnywhere kills the site at every write and runs the import again.
func TestKilledAnywhere(t *testing.T) {
	a, reference := pair(t)
	data := export(t, a, nil)
	accept(t, reference, data)
	for budget := 0; ; budget++ {
		_, b := pair(t)
		b.Budget = budget
		_, err := b.Import(bytes.NewReader(data), nil)
		if err == nil {
			if budget < 15 {
				t.Errorf("only %d writes", budget)
			}
			return
		}
		if !errors.Is(err, airgaptest.ErrKilled) {
			t.Fatalf("killed at write %d: %v", budget, err)
		}
		puts := b.Puts
		b.Budget = -1
		report := accept(t, b, data)
		if b.Visible() != reference.Visible() {
			t.Errorf("killed at write %d: another result", budget)
		}
		if report.Blobs.Copied > report.Blobs.Total-max(0, puts-5) {
			t.Errorf("killed at write %d with %d files staged: %+v", budget, puts, report.Blobs)
		}
		if again := accept(t, b, data); !again.NothingNew() || b.Staged() != 0 {
			t.Errorf("killed at write %d: %+v, %d files stay staged", budget, again, b.Staged())
		}
	}
}

func TestVerifyAndInspect(t *testing.T) {
	a, b := pair(t)
	data := export(t, a, nil)
	report, err := airgap.Verify(t.Context(), bytes.NewReader(data), b.Public(), a.Public())
	if err != nil || !report.Verified || report.Warning != "" || len(report.Images) != 2 {
		t.Errorf("verify: %+v, %v", report, err)
	}
	if report, err = airgap.Verify(t.Context(), bytes.NewReader(data), b.Public()); !errors.Is(err, airgap.ErrUntrusted) || report.Verified {
		t.Errorf("verify with another site: %v", err)
	}
	if report, err = airgap.Verify(t.Context(), bytes.NewReader(data)); !errors.Is(err, airgap.ErrUntrusted) || report.Verified {
		t.Errorf("verify with none: %v", err)
	}
	report, err = airgap.Inspect(t.Context(), bytes.NewReader(data))
	if err != nil || report.Verified || !strings.Contains(report.Warning, "UNVERIFIED") || len(report.Images) != 2 || report.Source.Site != "site-a" {
		t.Errorf("inspect: %+v, %v", report, err)
	}
}

func TestExport(t *testing.T) {
	a, _ := pair(t)
	a.Write("library")
	one, two := export(t, a, nil), export(t, a, nil)
	if !bytes.Equal(one, two) {
		t.Error("two exports of one state differ")
	}
	report, err := airgap.Inspect(t.Context(), bytes.NewReader(one))
	if err != nil || len(report.Projects) != 1 {
		t.Errorf("the unused project is exported: %+v, %v", report.Projects, err)
	}
	report, err = a.Export(io.Discard, func(r *airgap.ExportRequest) { r.Projects = []string{"library"} })
	if err != nil || len(report.Projects) != 1 || report.Projects[0].Project != "library" {
		t.Errorf("named, it is not: %+v, %v", report.Projects, err)
	}
	if _, err := a.Export(io.Discard, func(r *airgap.ExportRequest) { r.Projects = []string{"nope"} }); !errors.Is(err, airgap.ErrNoProject) {
		t.Errorf("unknown project: %v", err)
	}
	empty := airgaptest.New(t, "site-e", 70)
	if _, err := empty.Export(io.Discard, nil); !errors.Is(err, airgap.ErrNoProject) {
		t.Errorf("nothing to export: %v", err)
	}
}

func TestSiteDocument(t *testing.T) {
	good := airgaptest.New(t, "site-a", 10).Public()
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	other := airgaptest.New(t, "site-b", 20).Public()
	for name, bad := range map[string]airgap.Site{
		"fingerprint of another": {ID: good.ID, Incarnation: good.Incarnation, RootKey: good.RootKey, Fingerprint: other.Fingerprint},
		"no key":                 {ID: good.ID, Incarnation: good.Incarnation},
		"bad id":                 {ID: "../x", Incarnation: "i", RootKey: good.RootKey, Fingerprint: good.Fingerprint},
	} {
		if bad.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestAccepts(t *testing.T) {
	for pattern, want := range map[string]bool{"*": true, "lib": true, "lib*": true, "l?b": true, "": false, "library": false, "[": false} {
		if (airgap.Trust{Accept: []string{pattern}}).Accepts("lib") != want {
			t.Errorf("%q: want %v", pattern, want)
		}
	}
	if (airgap.Trust{}).Accepts("lib") {
		t.Error("accepted without a pattern")
	}
}
