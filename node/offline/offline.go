// Package offline carries content across an air gap: it gives airgap this site's
// tables and files, and offers export and import of bundles on the API.
//
// What may be taken in, and when it becomes visible, is decided in airgap; the
// gates of the catalog decide about each artifact as they do for a push.
package offline

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/rest"
)

// Fetcher reads blobs that another node of the site holds.
type Fetcher interface {
	Open(ctx context.Context, d digest.Digest, size int64) (io.ReadSeekCloser, error)
}

// Trusts is what this room needs to know of the sites that are trusted.
type Trusts interface {
	Self() (airgap.Site, error)
	All(ctx context.Context) ([]airgap.Trust, error)
	Saw(tx *table.Tx, site string, serial uint64, chain entry.KeyChain) error
	KeyChain(r table.Reader, site string) (entry.KeyChain, error)
}

// Config of Offline. All fields are needed.
type Config struct {
	DB       *table.DB
	Journal  *journal.Journal
	Projects *project.Projects
	Catalog  *catalog.Catalog
	Store    *blobs.Store
	Records  *blobs.Records
	Copies   blobs.Copies
	Fetcher  Fetcher
	Trusts   Trusts
	MinFree  func() int64 // bytes that an import leaves free
	Log      *slog.Logger
}

// Offline is the room.
type Offline struct{ Config }

// New makes the room.
func New(c Config) *Offline { return &Offline{c} }

// ExportRequest says what a bundle shall hold and who may import it.
type ExportRequest struct {
	Projects []string `json:"projects"` // none: all
	To       []string `json:"to"`       // site ids; none: every site that trusts this one
}

// Operations adds the room's operations to the API.
func (o *Offline) Operations(k *rest.Kernel) {
	rest.RegisterStream(k, rest.StreamOperation[struct{}]{
		ID: "exportBundle", Method: http.MethodPost, Path: "/api/atoll/v1/bundles/export", Tag: "bundles",
		Summary: "Write a signed bundle of projects", Permission: access.BundleExport,
		MaxBody: 1 << 20, Consumes: "application/json", Produces: "application/x-tar",
		Do: func(ctx context.Context, _ *struct{}, w http.ResponseWriter, r *http.Request) error {
			return o.export(ctx, w, r)
		},
	})
	rest.RegisterStream(k, rest.StreamOperation[importIn]{
		ID: "importBundle", Method: http.MethodPost, Path: "/api/atoll/v1/bundles/import", Tag: "bundles",
		Summary: "Verify a bundle and take in what it holds", Permission: access.BundleImport,
		Consumes: "application/x-tar", Produces: "application/json",
		Do: func(ctx context.Context, in *importIn, w http.ResponseWriter, r *http.Request) error {
			return o.importBundle(ctx, in, w, r)
		},
	})
}

type importIn struct {
	DryRun bool     `query:"dry_run"`
	As     []string `query:"as"`
}

// names reads THEIRS=OURS pairs.
func (in importIn) names() (map[string]string, error) {
	names := map[string]string{}
	for _, pair := range in.As {
		theirs, ours, ok := strings.Cut(pair, "=")
		if !ok || theirs == "" || ours == "" {
			return nil, fault.New(fault.Invalid, "%q is not THEIRS=OURS, for example library=library-of-b", pair)
		}
		if err := project.CheckName(ours); err != nil {
			return nil, err
		}
		names[theirs] = ours
	}
	return names, nil
}

// refusalCodes are the codes of refusals on the API.
var refusalCodes = []struct {
	reason error
	code   string
	kind   fault.Kind
}{
	{airgap.ErrUntrusted, "BUNDLE_UNTRUSTED", fault.Denied},
	{airgap.ErrAltered, "BUNDLE_ALTERED", fault.Invalid},
	{airgap.ErrTruncated, "BUNDLE_TRUNCATED", fault.Invalid},
	{airgap.ErrNewerFormat, "BUNDLE_NEWER_FORMAT", fault.Invalid},
	{airgap.ErrNotBundle, "BUNDLE_UNKNOWN", fault.Invalid},
	{airgap.ErrNotRecipient, "BUNDLE_NOT_RECIPIENT", fault.Denied},
	{airgap.ErrNotAccepted, "BUNDLE_NOT_ACCEPTED", fault.Denied},
	{airgap.ErrNameTaken, "BUNDLE_NAME_TAKEN", fault.Conflict},
	{airgap.ErrNoSpace, "BUNDLE_NO_SPACE", fault.Limit},
	{airgap.ErrGap, "BUNDLE_GAP", fault.Precondition},
	{airgap.ErrFork, "BUNDLE_FORK", fault.Conflict},
	{airgap.ErrDiverged, "BUNDLE_DIVERGED", fault.Conflict},
	{airgap.ErrNoProject, "NOT_FOUND", fault.NotFound},
}

// asFault gives a refusal its kind and code; other errors stay as they are.
func asFault(err error) error {
	var refusal *airgap.Refusal
	if !errors.As(err, &refusal) {
		return err
	}
	for _, r := range refusalCodes {
		if errors.Is(err, r.reason) {
			return fault.Wrap(err, r.kind, "%s", refusal.Text).WithCode(r.code)
		}
	}
	return fault.Wrap(err, fault.Invalid, "%s", refusal.Text)
}

// export streams a bundle. What can be refused is refused before the first byte.
func (o *Offline) export(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	var asked ExportRequest
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
		return fault.Wrap(err, fault.Invalid, "the body is no export request: {\"projects\": [...], \"to\": [...]}")
	}
	self, err := o.Trusts.Self()
	if err != nil {
		return err
	}
	request := airgap.ExportRequest{Site: self, Projects: asked.Projects, Recipients: asked.To}
	// What is exported holds all that was acknowledged before it was asked for.
	if err := o.DB.ReadIndex(ctx); err != nil {
		return err
	}
	if err := o.DB.View(func(v *table.View) (err error) {
		request.Key, err = o.Journal.Signer(ctx, v)
		return err
	}); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/x-tar")
	buffered := bufio.NewWriterSize(w, 1<<20)
	report, err := airgap.Export(ctx, buffered, request, airgap.Source{Journal: export{o}, Content: export{o}})
	if err != nil {
		return asFault(err)
	}
	o.Log.Info("bundle exported", "bundle", report.Bundle, "projects", len(report.Projects), "bytes", report.Size, "user", access.From(ctx).Name)
	return buffered.Flush()
}

// importBundle verifies what streams in and takes it in after its last byte.
func (o *Offline) importBundle(ctx context.Context, in *importIn, w http.ResponseWriter, r *http.Request) error {
	// The answer to a refusal is sent while the client may still be sending.
	_ = http.NewResponseController(w).EnableFullDuplex() // HTTP/2 is so anyway
	var report airgap.Report
	options, err := o.importOptions(ctx, in)
	if err == nil {
		report, err = airgap.Import(ctx, bufio.NewReaderSize(r.Body, 1<<20), options, airgap.Target{Catalog: target{o}, Blobs: storage{o}})
	}
	if err != nil {
		o.Log.Warn("bundle not imported", "bundle", report.Bundle, "source", report.Source.Site, "user", access.From(ctx).Name, "err", err)
		rest.WriteError(w, asFault(err))
		afterRefusal(w, r.Body)
		return nil
	}
	o.Log.Info("bundle imported", "bundle", report.Bundle, "source", report.Source.Site, "entries", report.Entries, "blobs", report.Blobs.Copied,
		"dry_run", in.DryRun, "user", access.From(ctx).Name)
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(report)
}

func (o *Offline) importOptions(ctx context.Context, in *importIn) (options airgap.ImportOptions, err error) {
	options.DryRun = in.DryRun
	if options.As, err = in.names(); err != nil {
		return options, err
	}
	if options.Self, err = o.Trusts.Self(); err != nil {
		return options, err
	}
	options.Trust, err = o.Trusts.All(ctx)
	return options, err
}

// drainTime bounds how long a client that was refused is let finish sending.
const drainTime = 30 * time.Second

// afterRefusal reads on what the client still sends, so that it gets to read the
// answer instead of a broken connection.
func afterRefusal(w http.ResponseWriter, body io.Reader) {
	control := http.NewResponseController(w)
	if control.Flush() != nil || control.SetReadDeadline(time.Now().Add(drainTime)) != nil {
		return
	}
	_, _ = io.Copy(io.Discard, body) // whatever it is, it is not wanted
}
