package adopt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/project"
)

// library has the repositories whose names have one component.
const library = "library"

// work is one directory being taken over.
type work struct {
	*Adopt
	request Request
	from    tree
	actor   string
	told    func(Progress) error

	report   Report
	progress Progress
}

// place is a repository here and in the directory.
type place struct {
	source              string // its name there
	project, repository string
	contents            contents
	done                map[digest.Digest]error // manifests that were tried, and what came of it
}

// run takes over what the directory holds. Its error ended the work; what was
// only left out is in the report.
func (w *work) run(ctx context.Context) (Report, error) {
	w.report = Report{Dir: w.request.Dir, Kind: w.from.kind(), DryRun: w.request.DryRun, Problems: []Problem{}}
	names, err := w.from.repositories()
	if err != nil {
		return w.report, fault.Wrap(err, fault.Invalid, "the directory cannot be read: %s", reason(err))
	}
	w.progress.Total = len(names)
	for _, name := range names {
		w.progress.Repository = name
		if err := w.repository(ctx, name); err != nil {
			return w.report, err
		}
		w.progress.Done++
		if err := w.told(w.progress); err != nil {
			return w.report, err
		}
	}
	return w.report, nil
}

// fatal reports whether an error would meet everything that follows too.
func fatal(ctx context.Context, err error) bool {
	return ctx.Err() != nil || fault.Is(err, fault.Unavailable) || fault.Is(err, fault.Limit) && codeOf(err) == blobs.CodeNoSpace
}

func codeOf(err error) string {
	code, _, _ := fault.Public(err)
	return code
}

// leave names something that is left out; what would meet all that follows
// ends the work.
func (w *work) leave(ctx context.Context, p Problem, err error) error {
	if fatal(ctx, err) {
		return err
	}
	p.Reason = reason(err)
	w.report.Problems = append(w.report.Problems, p)
	return nil
}

// target says where a repository goes.
func (w *work) target(name string) (project, repository string) {
	if w.request.Project != "" {
		return w.request.Project, name
	}
	if first, rest, ok := strings.Cut(name, "/"); ok {
		return first, rest
	}
	return library, name
}

func (w *work) repository(ctx context.Context, name string) error {
	at := &place{source: name, done: map[digest.Digest]error{}}
	at.project, at.repository = w.target(name)
	err := catalog.CheckRepository(at.repository)
	if err == nil {
		err = w.ensureProject(ctx, at.project)
	}
	if err != nil {
		return w.leave(ctx, Problem{Repository: name}, err)
	}
	var problems []Problem
	at.contents, problems = w.from.read(name)
	w.report.Problems = append(w.report.Problems, problems...)
	for _, d := range at.contents.manifests {
		if err := w.manifest(ctx, at, d); err != nil {
			return err
		}
	}
	if err := w.tags(ctx, at); err != nil {
		return err
	}
	w.report.Repositories++
	return nil
}

func (w *work) ensureProject(ctx context.Context, name string) error {
	if err := project.CheckName(name); err != nil {
		return err
	}
	known := false
	err := w.DB.View(func(v *table.View) (err error) {
		_, known, err = w.Projects.Get(v, name)
		return err
	})
	if err != nil || known || w.request.DryRun {
		return err
	}
	_, err = w.Projects.Create(ctx, project.Draft{Name: name, Actor: w.actor})
	if fault.Is(err, fault.Conflict) {
		return nil // somebody else was first
	}
	return err
}

// manifest takes over a manifest after the manifests that it lists. What cannot
// be taken over is named once, and remembered.
func (w *work) manifest(ctx context.Context, at *place, d digest.Digest) error {
	if _, tried := at.done[d]; tried {
		return nil
	}
	at.done[d] = fault.New(fault.Invalid, "the manifest lists itself")
	err := w.bring(ctx, at, d)
	if err != nil && fatal(ctx, err) {
		return err
	}
	at.done[d] = err
	if err != nil {
		return w.leave(ctx, Problem{Repository: at.source, Digest: d.String()}, err)
	}
	w.report.Manifests++
	return w.told(w.progress)
}

func (w *work) bring(ctx context.Context, at *place, d digest.Digest) error {
	file, err := w.from.find(at.source, d)
	if err != nil {
		return missing(err)
	}
	body, err := readBounded(file, catalog.MaxManifest)
	if err != nil {
		return err
	}
	if got := d.Algorithm().FromBytes(body); got != d {
		return fault.New(fault.Invalid, "it is damaged: its %d bytes have digest %s", len(body), got)
	}
	doc, err := catalog.ParseManifest(mediaType(at.contents.types[d], body), body)
	if err != nil {
		return err
	}
	for _, child := range doc.Children {
		if at.contents.types[child.Digest] == "" {
			at.contents.types[child.Digest] = child.MediaType
		}
		if err := w.manifest(ctx, at, child.Digest); err != nil {
			return err
		}
		if err := at.done[child.Digest]; err != nil {
			return fault.New(fault.Invalid, "it lists manifest %s, which could not be taken over", child.Digest)
		}
	}
	var ds []digest.Digest
	var releases []func()
	defer func() {
		for _, release := range releases {
			release()
		}
	}()
	for _, b := range doc.Blobs() {
		if !w.request.DryRun {
			releases = append(releases, w.Store.Pin(b.Digest)) // no collection between file and row
		}
		switch err := w.blob(ctx, at, b); {
		case err == nil:
			ds = append(ds, b.Digest)
		case catalog.Foreign(b.MediaType) && errors.Is(err, fs.ErrNotExist):
		default:
			return fmt.Errorf("its blob %s: %w", b.Digest, err)
		}
	}
	if w.request.DryRun {
		return nil
	}
	copies, err := w.Copies.Ensure(ctx, ds)
	if err != nil {
		return err
	}
	_, err = w.Catalog.Put(ctx, catalog.Push{
		Project: at.project, Repository: at.repository, Digest: d, MediaType: doc.MediaType, Bytes: body,
		Carrier: catalog.Adopted, Actor: w.actor, At: written(file), Copies: copies,
	})
	return err
}

func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(err, fault.NotFound, "the directory does not hold it")
	}
	return err
}

// written is when a file was, so that what goes by age goes on as before; never
// in the future.
func written(file string) time.Time {
	now := time.Now()
	if info, err := os.Stat(file); err == nil && info.ModTime().Before(now) && info.ModTime().Unix() > 0 {
		return info.ModTime()
	}
	return now
}

// mediaType is what the directory says, or the manifest itself; an OCI manifest
// need not say what it is, and then its form does.
func mediaType(said string, body []byte) string {
	if said != "" {
		return said
	}
	if _, err := catalog.ParseManifest("", body); err == nil {
		return ""
	}
	for _, guess := range []string{v1.MediaTypeImageManifest, v1.MediaTypeImageIndex} {
		if _, err := catalog.ParseManifest(guess, body); err == nil {
			return guess
		}
	}
	return ""
}

// blob makes a blob held, verified, and seen by the repository.
func (w *work) blob(ctx context.Context, at *place, b v1.Descriptor) error {
	if info, err := w.Store.Stat(b.Digest); err == nil {
		w.report.Blobs.Held++
		return w.link(ctx, at, info)
	} else if !fault.Is(err, fault.NotFound) {
		return err
	}
	file, err := w.from.find(at.source, b.Digest)
	if err != nil {
		return missing(err)
	}
	found, err := os.Stat(file)
	if err != nil {
		return err
	}
	if found.Size() != b.Size {
		return fault.New(fault.Invalid, "it is damaged: it has %d bytes, not %d", found.Size(), b.Size)
	}
	if w.request.DryRun {
		w.count(false, b.Size)
		return nil
	}
	info, linked, err := w.Store.Take(ctx, b.Digest, file, !w.request.Copy)
	if err != nil {
		return err
	}
	w.count(linked, info.Size)
	if err := w.told(w.progress); err != nil {
		return err
	}
	return w.link(ctx, at, info)
}

func (w *work) count(linked bool, size int64) {
	if linked {
		w.report.Blobs.Linked++
	} else {
		w.report.Blobs.Copied++
	}
	w.report.Blobs.Bytes += size
	w.progress.Bytes += size
}

func (w *work) link(ctx context.Context, at *place, info blobs.Info) error {
	if w.request.DryRun {
		return nil
	}
	return w.Records.Add(ctx, at.project, at.repository, info)
}

// tags points the tags that are not here yet.
func (w *work) tags(ctx context.Context, at *place) error {
	here, err := w.tagsHere(ctx, at)
	if err != nil {
		return err
	}
	names := make([]string, 0, len(at.contents.tags))
	for tag := range at.contents.tags {
		names = append(names, tag)
	}
	slices.Sort(names)
	for _, tag := range names {
		d := at.contents.tags[tag]
		problem := Problem{Repository: at.source, Tag: tag, Digest: d.String()}
		err := at.done[d]
		switch now, taken := here[tag]; {
		case err != nil:
			err = fault.New(fault.Invalid, "its manifest could not be taken over")
		case taken && now != d:
			err = fault.New(fault.Conflict, "the tag is here already and points to %s; it stays", now)
		case !taken:
			err = w.tag(ctx, at, tag, d)
		}
		if err == nil {
			w.report.Tags++
		} else if err := w.leave(ctx, problem, err); err != nil {
			return err
		}
	}
	return nil
}

func (w *work) tag(ctx context.Context, at *place, tag string, d digest.Digest) error {
	if err := catalog.CheckTag(tag); err != nil || w.request.DryRun {
		return err
	}
	file, err := w.from.find(at.source, d)
	if err != nil {
		return missing(err)
	}
	body, err := readBounded(file, catalog.MaxManifest)
	if err != nil {
		return err
	}
	_, err = w.Catalog.Put(ctx, catalog.Push{
		Project: at.project, Repository: at.repository, Tag: tag, Digest: d, MediaType: mediaType(at.contents.types[d], body), Bytes: body,
		Carrier: catalog.Adopted, Actor: w.actor, At: written(file),
	})
	return err
}

// tagsHere reads the tags that the repository has on this site.
func (w *work) tagsHere(ctx context.Context, at *place) (map[string]digest.Digest, error) {
	here := map[string]digest.Digest{}
	for after, more := "", true; more; {
		tags, page, err := w.Catalog.Tags(ctx, at.project, at.repository, after, 1000)
		if fault.Is(err, fault.NotFound) {
			return here, nil // not a repository yet
		}
		if err != nil {
			return nil, err
		}
		for _, t := range tags {
			here[t.Name] = t.Digest
			after = t.Name
		}
		more = page.More && len(tags) > 0
	}
	return here, nil
}
