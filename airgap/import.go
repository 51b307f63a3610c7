package airgap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle"
	"github.com/atoll-registry/atoll/bundle/entry"
)

// ImportOptions says who imports and what is allowed.
type ImportOptions struct {
	Self  Site    // this site
	Trust []Trust // what it was told about others
	// As gives a project another name here: by its name at its origin, or by
	// "SITE/NAME" where two origins use one name.
	As map[string]string
	// DryRun checks everything to the last byte and writes nothing.
	DryRun bool
}

// Import brings a bundle into a site. An error that is a *Refusal says what was
// wrong; after any error the site has what it had before, except that entries
// may have been applied in order up to some point if it struck after the last
// byte was verified. Running it again goes on from there; blobs verified before
// are not written again. The report is filled as far as the import came.
func Import(ctx context.Context, r io.Reader, options ImportOptions, target Target) (Report, error) {
	i := &importer{options: options, target: target}
	i.report.DryRun = options.DryRun
	err := i.run(ctx, r)
	return i.report, plain(err)
}

// plain finds the refusal in an error that passed through a staging area.
func plain(err error) error {
	var refusal *Refusal
	if errors.As(err, &refusal) {
		return refusal
	}
	return err
}

type importer struct {
	options ImportOptions
	target  Target
	report  Report
	b       *bundle.Reader
	logs    []*incoming // in the order of the bundle
	notes   Staging     // entries and manifests: never committed
	blobs   Staging
	held    map[digest.Digest]bool // manifests that the bundle brought
}

// incoming is a log of the bundle as the site sees it.
type incoming struct {
	bundle.Goal
	scope   Scope
	known   bool
	wanted  bool // its blobs and entries are
	entries bundle.File
	signed  []byte // checkpoint
	report  *Project
}

func (i *importer) run(ctx context.Context, r io.Reader) error {
	var err error
	if i.b, err = bundle.Open(&during{ctx.Err, r}); err != nil {
		return err
	}
	i.report.describe(i.b.Claims())
	for _, step := range []func(context.Context) error{i.authenticate, i.admit, i.stageNotes, i.stageBlobs, i.apply} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// authenticate decides whether to listen to the bundle at all.
func (i *importer) authenticate(context.Context) error {
	self := i.options.Self
	err := i.b.Authenticate(func(site string) (entry.Key, bool) {
		if site == self.ID {
			return self.RootKey, true
		}
		trust, ok := i.trust(site)
		return trust.Site.RootKey, ok
	})
	if err != nil {
		return err
	}
	p := i.b.Claims()
	for _, goal := range append([]bundle.Goal{{LogID: entry.LogID{Site: p.Source.Site}}}, p.Target...) {
		trust, ok := i.trust(goal.Site)
		if serial := i.b.Keys(goal.Site).Serial; ok && serial < trust.Serial {
			return refuse(ErrUntrusted, "the bundle brings key document %d of site %s, this site has seen %d already: a key may have been revoked since. Have the bundle exported again", serial, goal.Site, trust.Serial)
		}
	}
	if len(p.Recipients) > 0 && !slices.Contains(p.Recipients, self.ID) {
		return refuse(ErrNotRecipient, "the bundle is addressed to %s; this site is %s. Have it exported with --to %s, or without --to", strings.Join(p.Recipients, ", "), self.ID, self.ID)
	}
	return nil
}

func (i *importer) trust(site string) (Trust, bool) {
	for _, trust := range i.options.Trust {
		if trust.Site.ID == site {
			return trust, true
		}
	}
	return Trust{}, false
}

// admit decides for every log whether and under which name it comes in.
func (i *importer) admit(ctx context.Context) error {
	if err := i.checkNames(); err != nil {
		return err
	}
	for n, goal := range i.b.Claims().Target {
		log := &incoming{Goal: goal, report: &i.report.Projects[n]}
		i.logs = append(i.logs, log)
		trust, _ := i.trust(goal.Site)
		own := goal.Site == i.options.Self.ID
		if !own && !trust.Accepts(goal.Project) {
			log.report.Outcome = OutcomeNotAccepted
			continue
		}
		var err error
		if log.scope, log.known, err = i.target.Catalog.Scope(ctx, goal.LogID); err != nil {
			return fmt.Errorf("look up log %s: %w", goal.LogID, err)
		}
		log.report.Applied = log.scope.Applied
		switch applied := log.scope.Applied; {
		case own && !log.known:
			// Deleted here since, or of an earlier incarnation: it is not for a
			// courier to bring it back.
			log.report.Outcome = OutcomeOwn
			continue
		case own && goal.Size > applied:
			return refuse(ErrFork, "alarm: the bundle has %d entries of this site's own project %s, the site has %d: it was set back to an older state without a new incarnation. Nothing was imported; do not write to the project before this is resolved", goal.Size, goal.Project, applied)
		case own:
			log.report.Outcome = OutcomeOwn
		case log.report.From > applied:
			return refuse(ErrGap, "the bundle carries project %s of site %s from entry %d on, but this site has applied %d of them: entries %d to %d are missing. Import the bundle that came before this one, or have a full one exported", goal.Project, goal.Site, log.report.From, applied, applied, log.report.From-1)
		case !log.known:
			log.report.Outcome, log.wanted = OutcomeNew, true
		case goal.Size > applied:
			log.report.Outcome, log.wanted = OutcomeUpdated, true
		case goal.Size == applied:
			log.report.Outcome, log.wanted = OutcomeUnchanged, true
		default:
			log.report.Outcome = OutcomeBehind
		}
		if err := i.name(ctx, log); err != nil {
			return err
		}
	}
	return i.admitted()
}

// checkNames refuses --as for a project that the bundle does not have.
func (i *importer) checkNames() error {
	var names []string
	for _, goal := range i.b.Claims().Target {
		names = append(names, goal.Project)
	}
	for theirs := range i.options.As {
		if !slices.ContainsFunc(i.b.Claims().Target, func(goal bundle.Goal) bool { return theirs == goal.Project || theirs == goal.Site+"/"+goal.Project }) {
			return refuse(ErrNoProject, "--as names project %q, which is not in the bundle; it has %s", theirs, strings.Join(names, ", "))
		}
	}
	return nil
}

// admitted refuses a bundle of which no log is left.
func (i *importer) admitted() error {
	var names []string
	for _, log := range i.logs {
		if log.report.Outcome != OutcomeNotAccepted {
			return nil
		}
		names = append(names, log.Project)
	}
	return refuse(ErrNotAccepted, "site %s is trusted, but may not write here what the bundle brings (%s): allow it with `atoll site trust FILE --accept %s`", i.logs[0].Site, strings.Join(names, ", "), names[0])
}

// name decides what a log's project is called here. A project that is here
// already keeps its name, whatever it is called elsewhere.
func (i *importer) name(ctx context.Context, log *incoming) error {
	as, renamed := i.options.As[log.Site+"/"+log.Project]
	if !renamed {
		as, renamed = i.options.As[log.Project]
	}
	if log.known {
		log.report.Local = log.scope.Project
		if renamed && as != log.scope.Project {
			return refuse(ErrNameTaken, "project %s of site %s is here already, as %s: leave --as %s=%s out", log.Project, log.Site, log.scope.Project, log.Project, as)
		}
		return nil
	}
	if !renamed {
		as = log.Project
	}
	if !entry.ValidProject(as) {
		return refuse(ErrNameTaken, "--as %s=%s: %q is no valid project name; use lower-case letters, digits and . _ - between them", log.Project, as, as)
	}
	holder, taken, err := i.target.Catalog.Holder(ctx, as)
	if err != nil {
		return fmt.Errorf("look up project %s: %w", as, err)
	}
	for _, other := range i.logs {
		if other != log && other.report.Local == as {
			holder, taken = other.LogID, true
		}
	}
	if taken && holder.Site == log.Site && holder.Scope == log.Scope {
		return refuse(ErrNameTaken, "site %s goes on with project %s in a new incarnation, %s; this site holds it from the incarnation %s. Import it beside the old one with --as %s=NAME, or delete the old one first", log.Site, log.Project, log.Incarnation, holder.Incarnation, log.Project)
	}
	if taken {
		return refuse(ErrNameTaken, "this site has another project called %s: import the one of site %s under another name with --as %s=NAME", as, log.Site, log.Project)
	}
	log.scope = Scope{Log: log.LogID, Project: as}
	log.report.Local = as
	return nil
}

// stageNotes reads entries and manifests, which are small, and learns from them
// what of the rest is wanted.
func (i *importer) stageNotes(ctx context.Context) error {
	var need int64
	for _, f := range i.b.Files() {
		if f.Role == bundle.RoleEntries || f.Role == bundle.RoleManifest {
			need += f.Size
		}
	}
	if err := i.openStaging(ctx, need); err != nil {
		return err
	}
	for _, log := range i.logs {
		if err := i.checkLog(ctx, log); err != nil {
			return err
		}
	}
	_, err := i.b.NextLog()
	if err == io.EOF {
		return nil
	}
	return cmp.Or(err, errors.New("read bundle: more logs than its statement names"))
}

func (i *importer) openStaging(ctx context.Context, need int64) error {
	if err := i.fits(ctx, need); err != nil || i.options.DryRun {
		return err
	}
	area := "bundle-" + i.report.Bundle[:32]
	var err error
	if i.notes, err = i.target.Blobs.Stage(ctx, area+"-notes"); err != nil {
		return fmt.Errorf("open staging: %w", err)
	}
	if i.blobs, err = i.target.Blobs.Stage(ctx, area); err != nil {
		return fmt.Errorf("open staging: %w", err)
	}
	return nil
}

func (i *importer) fits(ctx context.Context, need int64) error {
	free, err := i.target.Blobs.Free(ctx)
	if err != nil {
		return fmt.Errorf("ask for free space: %w", err)
	}
	if need > free {
		return refuse(ErrNoSpace, "the bundle needs %d MiB here, %d MiB may be written: make room and run the import again", need>>20+1, max(free, 0)>>20)
	}
	return nil
}

// checkLog verifies the entries of a log and that they go on where the site is.
func (i *importer) checkLog(ctx context.Context, log *incoming) error {
	scope, err := i.b.NextLog()
	if err != nil {
		return err
	}
	log.entries, log.signed = scope.Entries, scope.Checkpoint
	body := scope.Body()
	if log.wanted && !i.options.DryRun {
		if err := i.keep(ctx, i.notes, scope.Entries, body); err != nil {
			return err
		}
		kept, err := i.notes.Open(ctx, scope.Entries.Digest())
		if err != nil {
			return fmt.Errorf("open staged entries of %s: %w", log.LogID, err)
		}
		defer kept.Close()
		body = kept
	}
	at := scope.From
	if log.known {
		at = max(scope.From, min(log.scope.Applied, log.Size))
	}
	have, err := scope.Check(body, at)
	if err != nil || !log.known || log.scope.Applied < at || at == 0 {
		return err
	}
	want, err := i.target.Catalog.Root(ctx, log.LogID, at)
	if err != nil {
		return fmt.Errorf("root of log %s: %w", log.LogID, err)
	}
	if have != want {
		return refuse(ErrFork, "alarm: site %s signed two histories of project %s (log %s): among the first %d entries some differ from those this site applied. Its key is misused or it was set back; nothing was imported, and nothing more will be from this log until its operator explains it", log.Site, log.Project, log.LogID, at)
	}
	return nil
}

// keep puts a file of the bundle into a staging area, unless it is there.
func (i *importer) keep(ctx context.Context, area Staging, f bundle.File, r io.Reader) error {
	there, err := area.Has(ctx, f.Digest())
	if err != nil {
		return fmt.Errorf("look into staging: %w", err)
	}
	if there {
		_, err = io.Copy(io.Discard, r)
		return err
	}
	if err := area.Put(ctx, Blob{Digest: f.Digest(), Size: f.Size, Role: f.Role}, r); err != nil {
		return fmt.Errorf("stage %s: %w", f.Path, err)
	}
	return nil
}

// stageBlobs reads the rest of the bundle to its last byte.
func (i *importer) stageBlobs(ctx context.Context) error {
	i.held = map[digest.Digest]bool{}
	var wanted map[digest.Digest]bool
	for {
		blob, err := i.b.NextBlob()
		if err != nil && err != io.EOF {
			return err
		}
		if wanted == nil && (err != nil || blob.Role != bundle.RoleManifest) {
			i.report.contents(i.b)
			var selectErr error
			if wanted, selectErr = i.selectBlobs(ctx); selectErr != nil {
				return selectErr
			}
		}
		if err != nil {
			i.report.Verified = true
			return nil
		}
		switch {
		case blob.Role == bundle.RoleManifest:
			i.held[blob.Digest()] = true
			if !i.options.DryRun {
				if err := i.keep(ctx, i.notes, blob.File, blob); err != nil {
					return err
				}
			}
		case wanted[blob.Digest()]:
			i.report.Blobs.Copied++
			i.report.Blobs.Bytes += blob.Size
			if !i.options.DryRun {
				if err := i.keep(ctx, i.blobs, blob.File, blob); err != nil {
					return err
				}
			}
		}
	}
}

// selectBlobs sorts the blobs of the bundle into those to write and the others,
// and checks that they fit.
func (i *importer) selectBlobs(ctx context.Context) (map[digest.Digest]bool, error) {
	reached, err := i.b.Reach(func(id entry.LogID) bool {
		return slices.ContainsFunc(i.logs, func(log *incoming) bool { return log.LogID == id && log.wanted })
	})
	if err != nil {
		return nil, err
	}
	wanted := map[digest.Digest]bool{}
	var need int64
	for _, f := range i.b.Files() {
		if f.Role != bundle.RoleConfig && f.Role != bundle.RoleLayer {
			continue
		}
		if !reached[f.Digest()] {
			i.report.Blobs.Ignored++
			continue
		}
		held, err := i.target.Blobs.Has(ctx, f.Digest())
		if err != nil {
			return nil, fmt.Errorf("look for blob %s: %w", f.Digest(), err)
		}
		staged := false
		if !held && i.blobs != nil {
			if staged, err = i.blobs.Has(ctx, f.Digest()); err != nil {
				return nil, fmt.Errorf("look into staging: %w", err)
			}
		}
		switch {
		case held:
			i.report.Blobs.Held++
		case staged:
			i.report.Blobs.Staged++
		default:
			wanted[f.Digest()] = true
			need += f.Size
		}
	}
	return wanted, i.fits(ctx, need)
}
