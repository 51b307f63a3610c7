package catalog

import (
	"cmp"
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/rest"
)

type tagJSON struct {
	ID           int64     `json:"id"`
	RepositoryID int64     `json:"repository_id"`
	ArtifactID   int64     `json:"artifact_id"`
	Name         string    `json:"name"`
	PushedAt     time.Time `json:"push_time"`
	PulledAt     time.Time `json:"pull_time"`
	Immutable    bool      `json:"immutable"`
}

type referenceJSON struct {
	ParentID    int64         `json:"parent_id"`
	ChildID     int64         `json:"child_id"`
	ChildDigest string        `json:"child_digest"`
	Platform    *platformJSON `json:"platform,omitempty"`
}

type platformJSON struct {
	Architecture string   `json:"architecture"`
	OS           string   `json:"os"`
	OSVersion    string   `json:"os.version,omitempty"`
	OSFeatures   []string `json:"os.features,omitempty"`
	Variant      string   `json:"variant,omitempty"`
}

type accessoryJSON struct {
	ID            int64     `json:"id"`
	ArtifactID    int64     `json:"artifact_id"`
	SubjectID     int64     `json:"subject_artifact_id"`
	SubjectDigest string    `json:"subject_artifact_digest"`
	SubjectRepo   string    `json:"subject_artifact_repo"`
	Size          int64     `json:"size"`
	Digest        string    `json:"digest"`
	Type          string    `json:"type"`
	Icon          string    `json:"icon"`
	CreatedAt     time.Time `json:"creation_time"`
}

type artifactJSON struct {
	ID                int64             `json:"id"`
	Type              string            `json:"type"`
	MediaType         string            `json:"media_type"` // of the config
	ManifestMediaType string            `json:"manifest_media_type"`
	ArtifactType      string            `json:"artifact_type"`
	ProjectID         int64             `json:"project_id"`
	RepositoryID      int64             `json:"repository_id"`
	RepositoryName    string            `json:"repository_name"`
	Digest            string            `json:"digest"`
	Size              int64             `json:"size"`
	Icon              string            `json:"icon"`
	PushedAt          time.Time         `json:"push_time"`
	PulledAt          time.Time         `json:"pull_time"`
	ExtraAttrs        map[string]any    `json:"extra_attrs"`
	Annotations       map[string]string `json:"annotations,omitempty"`
	References        []referenceJSON   `json:"references"`
	Tags              []tagJSON         `json:"tags"`
	AdditionLinks     map[string]any    `json:"addition_links"`
	Labels            []any             `json:"labels"`
	Accessories       []accessoryJSON   `json:"accessories"`
	// What Harbor does not know of.
	Withheld bool `json:"withheld,omitempty"`
	Absent   bool `json:"absent,omitempty"`
}

var vendorConfig = regexp.MustCompile(`^application/vnd\.[^.]+\.(?:[^.]+\.)*?([a-z0-9-]+)\.config(?:\.|\+|$)`)

// kindOf is what Harbor calls the type of an artifact: a word made of its
// config's media type.
func kindOf(a Artifact) string {
	t := a.ConfigType
	switch {
	case IsIndex(a.MediaType), t == v1.MediaTypeImageConfig, strings.HasPrefix(t, "application/vnd.docker.container.image."):
		return "IMAGE"
	case t == "application/vnd.cncf.helm.config.v1+json":
		return "CHART"
	}
	if m := vendorConfig.FindStringSubmatch(t); m != nil {
		return strings.ToUpper(m[1])
	}
	return "UNKNOWN"
}

// accessoryType maps an artifact type to the few that Harbor knows: its reader
// fails a whole listing on any other.
func accessoryType(artifactType string) string {
	switch artifactType {
	case "application/vnd.dev.cosign.artifact.sig.v1+json", "application/vnd.dev.cosign.simplesigning.v1+json":
		return "signature.cosign"
	case "application/vnd.cncf.notary.signature":
		return "signature.notation"
	case "application/vnd.goharbor.harbor.sbom.v1":
		return "sbom.harbor"
	}
	return "subject.accessory"
}

// cosignTag is the tag under which older cosign keeps a signature. No tag is as
// long as that of a sha512 digest, so that none is found.
func cosignTag(d digest.Digest) string { return d.Algorithm().String() + "-" + d.Encoded() + ".sig" }

// shape of what an artifact's answer holds beside itself.
type shape struct {
	Tags        bool `query:"with_tag" default:"true"`
	Accessories bool `query:"with_accessory"`
}

type artifactsInput struct {
	repositoryRef
	rest.Paging
	rest.Filter
	shape
}

type artifactInput struct {
	artifactRef
	shape
}

// listArtifacts lists artifacts, the newest first. Those that belong to another
// one of the repository (signatures, SBOMs) are listed with that one only.
func (c *Catalog) listArtifacts(ctx context.Context, in *artifactsInput) (page rest.Page[artifactJSON], err error) {
	if err := CheckRepository(in.Repository); err != nil {
		return page, err
	}
	_, err = c.confirmed(ctx, func(v *table.View) error {
		if _, _, ok, err := c.repositories.Get(v, in.Name, in.Repository); err != nil {
			return err
		} else if !ok {
			return nameUnknown(in.Name, in.Repository)
		}
		all, err := c.artifactsOf(v, in.Name, in.Repository)
		if err != nil {
			return err
		}
		if all, err = c.matching(v, all, in.Q); err != nil {
			return err
		}
		order(all, in.Sort)
		cutOut := rest.PageOf(all, in.Paging)
		page = rest.Page[artifactJSON]{Total: cutOut.Total}
		for _, a := range cutOut.Items {
			item, err := c.artifactJSON(v, a, in.shape)
			if err != nil {
				return err
			}
			page.Items = append(page.Items, item)
		}
		return nil
	})
	return page, err
}

// matching leaves out what the query does not ask for, and accessories.
func (c *Catalog) matching(v *table.View, all []Artifact, q rest.Query) ([]Artifact, error) {
	here, signature := make(map[digest.Digest]bool, len(all)), map[digest.Digest]bool{}
	for _, a := range all {
		here[a.Digest] = true
		tag, _, ok, err := c.tags.Get(v, a.Project, a.Repository, cosignTag(a.Digest))
		if err != nil {
			return nil, err
		}
		if ok {
			signature[tag.Digest] = true
		}
	}
	tagTerm, byTag := q.Find("tags")
	var out []Artifact
	for _, a := range all {
		if a.Subject != "" && here[a.Subject] || signature[a.Digest] {
			continue
		}
		if !q.Holds("digest", a.Digest.String()) || !q.Holds("type", kindOf(a)) || !q.Holds("media_type", a.ConfigType) ||
			!q.Holds("artifact_type", a.ArtifactType) {
			continue
		}
		if byTag {
			tags, err := c.tagsOf(v, a)
			if err != nil {
				return nil, err
			}
			if !tagsHold(tagTerm, tags) {
				continue
			}
		}
		out = append(out, a)
	}
	return out, nil
}

// tagsHold answers q=tags=...: nil asks for artifacts without a tag, * for those
// that have one.
func tagsHold(term rest.Term, tags []Tag) bool {
	if term.Op == rest.Exact && !term.Quoted {
		switch term.Values[0] {
		case "nil":
			return len(tags) == 0
		case "*":
			return len(tags) > 0
		}
	}
	return slices.ContainsFunc(tags, func(t Tag) bool { return term.Holds(t.Name) })
}

func order(all []Artifact, by rest.Sort) {
	slices.SortStableFunc(all, func(a, b Artifact) int {
		for _, key := range by {
			n := 0
			switch key.Key {
			case "push_time":
				n = a.PushedAt.Compare(b.PushedAt)
			case "size":
				n = cmp.Compare(a.Total, b.Total)
			case "digest":
				n = cmp.Compare(a.Digest, b.Digest)
			case "id":
				n = cmp.Compare(a.ID, b.ID)
			}
			if key.Descending {
				n = -n
			}
			if n != 0 {
				return n
			}
		}
		return cmp.Or(b.PushedAt.Compare(a.PushedAt), cmp.Compare(b.ID, a.ID))
	})
}

func (c *Catalog) showArtifact(ctx context.Context, in *artifactInput) (out artifactJSON, err error) {
	if err := CheckRepository(in.Repository); err != nil {
		return out, err
	}
	_, err = c.confirmed(ctx, func(v *table.View) error {
		a, err := c.find(v, in.Name, in.Repository, in.Reference)
		if err != nil {
			return err
		}
		out, err = c.artifactJSON(v, a, in.shape)
		return err
	})
	return out, err
}

func (c *Catalog) artifactJSON(v *table.View, a Artifact, with shape) (artifactJSON, error) {
	_, projectID, _, err := c.projects.Describe(v, a.Project)
	if err != nil {
		return artifactJSON{}, err
	}
	repo, meta, _, err := c.repositories.Get(v, a.Project, a.Repository)
	if err != nil {
		return artifactJSON{}, err
	}
	out := artifactJSON{
		ID: a.ID, Type: kindOf(a), MediaType: cmp.Or(a.ConfigType, a.MediaType), ManifestMediaType: a.MediaType, ArtifactType: a.ArtifactType,
		ProjectID: projectID, RepositoryID: idOf(meta, repo.Slot), RepositoryName: a.Project + "/" + a.Repository,
		Digest: a.Digest.String(), Size: a.Total, PushedAt: a.PushedAt, ExtraAttrs: map[string]any{}, AdditionLinks: map[string]any{},
		Withheld: a.Withheld, Absent: a.Absent,
	}
	if with.Tags {
		if out.Tags, err = c.tagsJSON(v, a); err != nil {
			return out, err
		}
	}
	if with.Accessories {
		if out.Accessories, err = c.accessories(v, a); err != nil {
			return out, err
		}
	}
	return out, c.addContent(v, a, &out)
}

// addContent fills in what only the manifest says. One that is too large for a
// row may be on another node and is not fetched for a listing.
func (c *Catalog) addContent(v *table.View, a Artifact, out *artifactJSON) error {
	body, _, ok, err := c.manifests.Get(v, a.Digest.String())
	if err != nil || !ok {
		return err
	}
	doc, err := ParseManifest(a.MediaType, body.Bytes)
	if err != nil {
		return fmt.Errorf("read manifest %s, which was admitted once: %w", a.Digest, err)
	}
	out.Annotations = doc.Annotations
	for _, child := range doc.Children {
		key := []string{a.Project, a.Repository, child.Digest.String()}
		row, meta, ok, err := c.artifacts.Get(v, key...)
		if err != nil {
			return err
		}
		ref := referenceJSON{ParentID: a.ID, ChildDigest: child.Digest.String()}
		if ok {
			ref.ChildID = row.artifact(key, meta).ID
		}
		if p := child.Platform; p != nil {
			ref.Platform = &platformJSON{Architecture: p.Architecture, OS: p.OS, OSVersion: p.OSVersion, OSFeatures: p.OSFeatures, Variant: p.Variant}
		}
		out.References = append(out.References, ref)
	}
	return nil
}

func (c *Catalog) tagsJSON(v *table.View, a Artifact) ([]tagJSON, error) {
	repo, meta, _, err := c.repositories.Get(v, a.Project, a.Repository)
	if err != nil {
		return nil, err
	}
	tags, err := c.tagsOf(v, a)
	if err != nil {
		return nil, err
	}
	var out []tagJSON
	for _, t := range tags {
		out = append(out, tagJSON{ID: t.ID, RepositoryID: idOf(meta, repo.Slot), ArtifactID: a.ID, Name: t.Name, PushedAt: t.PushedAt})
	}
	return out, nil
}

// accessories are the artifacts that refer to this one, and the signature that
// cosign keeps under a tag made of its digest.
func (c *Catalog) accessories(v *table.View, a Artifact) ([]accessoryJSON, error) {
	var out []accessoryJSON
	add := func(x Artifact, kind string) {
		out = append(out, accessoryJSON{
			ID: x.ID, ArtifactID: x.ID, SubjectID: a.ID, SubjectDigest: a.Digest.String(), SubjectRepo: a.Project + "/" + a.Repository,
			Size: x.Total, Digest: x.Digest.String(), Type: kind, CreatedAt: x.PushedAt,
		})
	}
	found, _, err := c.referrersOf(v, Referrers{Project: a.Project, Repository: a.Repository, Subject: a.Digest})
	if err != nil {
		return nil, err
	}
	for _, m := range found {
		add(m.Artifact, accessoryType(m.ArtifactType))
	}
	tag, _, ok, err := c.tags.Get(v, a.Project, a.Repository, cosignTag(a.Digest))
	if err != nil || !ok {
		return out, err
	}
	key := []string{a.Project, a.Repository, tag.Digest.String()}
	row, meta, ok, err := c.artifacts.Get(v, key...)
	if err == nil && ok && row.Subject == "" {
		add(row.artifact(key, meta), "signature.cosign")
	}
	return out, err
}
