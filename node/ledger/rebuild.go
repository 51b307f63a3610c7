package ledger

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/project"
)

// Where manifests go of which no ledger says where they were.
const (
	FoundProject    = "rebuilt"
	FoundRepository = "found"
)

// Rebuilding says what a rebuild works with, besides the room.
type Rebuilding struct {
	Store   *blobs.Store
	Records *blobs.Records
	Copies  blobs.Copies
	From    string // directory of the ledger; "" for the room's own
	// Progress is told now and then what is under way. May be nil.
	Progress func(repository string)
}

// Report says what a rebuild brought back.
type Report struct {
	Projects  int `json:"projects"`
	Manifests int `json:"manifests"`
	Tags      int `json:"tags"`
	// Found are manifests among the blobs of which no ledger told; they are by
	// their digests in the repository rebuilt/found.
	Found    int       `json:"found"`
	Problems []Problem `json:"problems"`
}

// Problem is what could not be brought back, and why.
type Problem struct {
	Name   string `json:"name"` // project/repository, with :tag or @digest
	Reason string `json:"reason"`
}

const actor = "rebuild"

// state is what the ledger amounts to.
type state struct {
	file     io.ReaderAt // nil: none
	projects map[string]*projectState
	bytes    map[digest.Digest]place // where the file has manifests
}

type projectState struct {
	entry     entry.Entry
	artifacts map[artifactKey]entry.Entry
	tags      map[artifactKey]entry.Entry // name is a tag
}

type artifactKey struct{ repository, name string }

func (s *state) apply(at place, r record) error {
	e, err := entry.Decode(r.Value)
	if err != nil {
		return err
	}
	p := s.projects[r.Project]
	if p == nil {
		p = &projectState{artifacts: map[artifactKey]entry.Entry{}, tags: map[artifactKey]entry.Entry{}}
		s.projects[r.Project] = p
	}
	switch e.Kind {
	case entry.ProjectPut:
		p.entry = e
	case entry.ArtifactPut:
		p.artifacts[artifactKey{e.Repository, e.Digest.String()}] = e
		if len(r.Manifest) > 0 {
			s.bytes[e.Digest] = at
		}
	case entry.ArtifactDelete:
		delete(p.artifacts, artifactKey{e.Repository, e.Digest.String()})
	case entry.TagPut:
		p.tags[artifactKey{e.Repository, e.Tag}] = e
	case entry.TagDelete:
		delete(p.tags, artifactKey{e.Repository, e.Tag})
	}
	return nil
}

// Rebuild puts what a ledger tells of, and what is among the blobs besides, into
// the site, as pushes. Done already is no problem: it may be run again.
func (l *Ledger) Rebuild(ctx context.Context, r Rebuilding) (Report, error) {
	if r.Progress == nil {
		r.Progress = func(string) {}
	}
	w := &work{Ledger: l, Rebuilding: r, report: Report{Problems: []Problem{}}, done: map[artifactAt]error{}, named: map[digest.Digest]bool{}}
	w.state = state{projects: map[string]*projectState{}, bytes: map[digest.Digest]place{}}
	from := r.From
	if from == "" {
		from = l.dir
	}
	name, err := read(from, func(at place, rec record) {
		if err := w.state.apply(at, rec); err != nil {
			w.problem(rec.Project, err)
		}
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		w.problem(filepath.Base(from), errors.New("there is no ledger: only manifests over 64 KiB can be found, and no names"))
	case err != nil:
		w.problem(filepath.Base(from), err)
	}
	if name != "" {
		file, err := os.Open(name)
		if err != nil {
			return w.report, err
		}
		defer file.Close()
		w.state.file = file
	}
	if err := w.all(ctx); err != nil {
		return w.report, err
	}
	return w.report, w.find(ctx)
}

// work is one rebuild.
type work struct {
	*Ledger
	Rebuilding
	state  state
	report Report
	done   map[artifactAt]error
	named  map[digest.Digest]bool // what manifests that were put name, and they themselves
}

type artifactAt struct {
	project string
	artifactKey
}

func (w *work) problem(name string, err error) {
	_, text, _ := fault.Public(err)
	if fault.KindOf(err) == fault.Internal {
		text = err.Error()
	}
	w.report.Problems = append(w.report.Problems, Problem{Name: name, Reason: text})
}

// fatal reports whether an error would meet everything that follows too.
func fatal(ctx context.Context, err error) bool {
	return ctx.Err() != nil || fault.Is(err, fault.Unavailable)
}

func (w *work) all(ctx context.Context) error {
	names := make([]string, 0, len(w.state.projects))
	for name := range w.state.projects {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		p := w.state.projects[name]
		if err := w.ensure(ctx, name, p.entry.Public, p.entry.Metadata); err != nil {
			if fatal(ctx, err) {
				return err
			}
			w.problem(name, err)
			continue
		}
		w.report.Projects++
		if err := w.contents(ctx, name, p); err != nil {
			return err
		}
	}
	return nil
}

func (w *work) ensure(ctx context.Context, name string, public bool, metadata map[string]string) error {
	_, err := w.Projects.Create(ctx, project.Draft{Name: name, Public: public, Metadata: metadata, Actor: actor})
	if fault.Is(err, fault.Conflict) {
		return nil // library is there from the beginning, and others from an earlier try
	}
	return err
}

func (w *work) contents(ctx context.Context, name string, p *projectState) error {
	for _, key := range sorted(p.artifacts) {
		w.Progress(name + "/" + key.repository)
		if err := w.bring(ctx, artifactAt{name, key}, p); err != nil && fatal(ctx, err) {
			return err
		}
	}
	for _, key := range sorted(p.tags) {
		e := p.tags[key]
		at := artifactAt{name, artifactKey{key.repository, e.Digest.String()}}
		err, tried := w.done[at]
		if !tried {
			err = fault.New(fault.NotFound, "the ledger does not tell of its manifest %s", e.Digest)
		}
		if err == nil {
			err = w.push(ctx, at, p.artifacts[at.artifactKey], key.name, time.Unix(e.PushedAt, 0))
		}
		if err == nil {
			w.report.Tags++
			continue
		}
		if fatal(ctx, err) {
			return err
		}
		w.problem(name+"/"+key.repository+":"+key.name, err)
	}
	return nil
}

func sorted(m map[artifactKey]entry.Entry) []artifactKey {
	keys := make([]artifactKey, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b artifactKey) int {
		return strings.Compare(a.repository+"\x00"+a.name, b.repository+"\x00"+b.name)
	})
	return keys
}

// bring puts an artifact after the manifests that it lists. What cannot be put
// is named once, and remembered.
func (w *work) bring(ctx context.Context, at artifactAt, p *projectState) error {
	if err, tried := w.done[at]; tried {
		return err
	}
	w.done[at] = fault.New(fault.Invalid, "the manifest lists itself")
	e := p.artifacts[at.artifactKey]
	err := func() error {
		_, doc, err := w.manifest(digest.Digest(at.name), e.MediaType)
		if err != nil {
			return err
		}
		for _, child := range doc.Children {
			below := artifactAt{at.project, artifactKey{at.repository, child.Digest.String()}}
			if _, known := p.artifacts[below.artifactKey]; !known {
				return fault.New(fault.NotFound, "it lists manifest %s, of which the ledger does not tell", child.Digest)
			}
			if err := w.bring(ctx, below, p); err != nil {
				return err
			}
		}
		return w.push(ctx, at, e, "", time.Unix(e.PushedAt, 0))
	}()
	w.done[at] = err
	if err == nil {
		w.report.Manifests++
	} else if !fatal(ctx, err) {
		w.problem(at.project+"/"+at.repository+"@"+at.name, err)
	}
	return err
}

// manifest reads a manifest from the ledger or from among the blobs.
func (w *work) manifest(d digest.Digest, mediaType string) ([]byte, catalog.Document, error) {
	var body []byte
	var err error
	if at, ok := w.state.bytes[d]; ok {
		body, err = manifestAt(w.state.file, at, d)
	} else {
		body, err = w.blob(d)
	}
	if err != nil {
		return nil, catalog.Document{}, err
	}
	doc, err := catalog.ParseManifest(mediaType, body)
	return body, doc, err
}

// blob reads a blob of a manifest's size at most, and proves it.
func (w *work) blob(d digest.Digest) ([]byte, error) {
	file, size, err := w.Store.OpenBlob(d)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if size > catalog.MaxManifest {
		return nil, fault.New(fault.Limit, "blob %s is larger than any manifest", d)
	}
	body, err := io.ReadAll(io.LimitReader(file, size))
	if err == nil && d.Algorithm().FromBytes(body) != d {
		err = fault.New(fault.Invalid, "blob %s is damaged", d)
	}
	return body, err
}

func (w *work) push(ctx context.Context, at artifactAt, e entry.Entry, tag string, when time.Time) error {
	d := digest.Digest(at.name)
	body, doc, err := w.manifest(d, e.MediaType)
	if err != nil {
		return err
	}
	var ds []digest.Digest
	for _, b := range doc.Blobs() {
		release := w.Store.Pin(b.Digest)
		defer release()
		info, err := w.Store.Stat(b.Digest)
		if fault.Is(err, fault.NotFound) && catalog.Foreign(b.MediaType) {
			continue
		}
		if err == nil {
			err = w.Records.Add(ctx, at.project, at.repository, info)
		}
		if err != nil {
			return fmt.Errorf("its blob %s: %w", b.Digest, err)
		}
		ds = append(ds, b.Digest)
	}
	copies, err := w.Copies.Ensure(ctx, ds)
	if err != nil {
		return err
	}
	_, err = w.Catalog.Put(ctx, catalog.Push{
		Project: at.project, Repository: at.repository, Tag: tag, Digest: d, MediaType: doc.MediaType, Bytes: body,
		Carrier: catalog.Adopted, Actor: actor, At: when, Copies: copies,
	})
	if err == nil {
		w.named[d] = true
		for _, b := range append(doc.Blobs(), doc.Children...) {
			w.named[b.Digest] = true
		}
	}
	return err
}

// find looks among the blobs for manifests that no ledger tells of.
func (w *work) find(ctx context.Context) error {
	found := &projectState{artifacts: map[artifactKey]entry.Entry{}}
	for after := digest.Digest(""); ; {
		ds, err := w.Store.List(after, page)
		if err != nil || len(ds) == 0 {
			return errors.Join(err, w.keepFound(ctx, found))
		}
		after = ds[len(ds)-1]
		for _, d := range ds {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if info, err := w.Store.Stat(d); w.named[d] || err != nil || info.Size > catalog.MaxManifest {
				continue
			}
			body, err := w.blob(d)
			if err != nil {
				continue // damaged: the scrub names it
			}
			if mediaType := guess(body); mediaType != "" {
				found.artifacts[artifactKey{FoundRepository, d.String()}] = entry.Entry{MediaType: mediaType, PushedAt: time.Now().Unix()}
			}
		}
	}
}

// guess gives the media type of what can only be a manifest; "" for all else.
func guess(body []byte) string {
	if len(body) == 0 || body[0] != '{' {
		return ""
	}
	for _, mediaType := range []string{"", v1.MediaTypeImageManifest, v1.MediaTypeImageIndex} {
		if doc, err := catalog.ParseManifest(mediaType, body); err == nil && len(doc.Blobs())+len(doc.Children) > 0 {
			return doc.MediaType
		}
	}
	return ""
}

func (w *work) keepFound(ctx context.Context, found *projectState) error {
	if len(found.artifacts) == 0 {
		return nil
	}
	if err := w.ensure(ctx, FoundProject, false, nil); err != nil {
		return err
	}
	before := w.report.Manifests
	for _, key := range sorted(found.artifacts) {
		if err := w.bring(ctx, artifactAt{FoundProject, key}, found); err != nil && fatal(ctx, err) {
			return err
		}
	}
	w.report.Found = w.report.Manifests - before
	w.report.Manifests = before
	return nil
}
