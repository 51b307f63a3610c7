package catalog

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/fault"
)

// Limits of a manifest. They bound the Txn that admits it and the work that a
// hostile one can cause.
const (
	MaxManifest    = 16 << 20 // bytes of a manifest, from wherever it comes
	MaxDescriptors = 1000     // blobs and child manifests that one manifest names
	maxDepth       = 32       // nested JSON values
)

// Media types of Docker's schema 2, which the OCI specification grew from, and
// of schema 1, which is refused.
const (
	mediaDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	mediaDockerSchema1  = "application/vnd.docker.distribution.manifest.v1+json"
	mediaDockerSigned1  = "application/vnd.docker.distribution.manifest.v1+prettyjws"
	mediaDockerForeign  = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	mediaOCIForeign     = "application/vnd.oci.image.layer.nondistributable."
)

// Document is what the catalog needs to know of a manifest: what it names and
// what it calls itself.
type Document struct {
	MediaType string
	// ArtifactType as a referrers list shows it: the manifest's own, or the
	// media type of its config where it has none (OCI Distribution 1.1,
	// "Listing Referrers").
	ArtifactType string
	Config       *v1.Descriptor  // nil in an index
	Layers       []v1.Descriptor // as written, duplicates included
	Children     []v1.Descriptor // manifests that an index lists, as written
	Subject      *v1.Descriptor
	Annotations  map[string]string
}

// Blobs gives each blob that the manifest names once, the config first.
func (d Document) Blobs() []v1.Descriptor {
	all := d.Layers
	if d.Config != nil {
		all = append([]v1.Descriptor{*d.Config}, all...)
	}
	return unique(all)
}

// Foreign reports whether a layer of this media type is fetched from elsewhere
// by those who may, so that the registry need not hold it.
func Foreign(mediaType string) bool {
	return mediaType == mediaDockerForeign || strings.HasPrefix(mediaType, mediaOCIForeign)
}

// IsIndex reports whether the media type is that of a list of manifests.
func IsIndex(mediaType string) bool {
	return mediaType == v1.MediaTypeImageIndex || mediaType == mediaDockerList
}

func unique(all []v1.Descriptor) []v1.Descriptor {
	seen := make(map[digest.Digest]bool, len(all))
	out := make([]v1.Descriptor, 0, len(all))
	for _, d := range all {
		if !seen[d.Digest] {
			seen[d.Digest] = true
			out = append(out, d)
		}
	}
	return out
}

func invalidManifest(format string, args ...any) error {
	return fault.New(fault.Invalid, format, args...).WithCode("MANIFEST_INVALID")
}

// ParseManifest reads a manifest that arrived under a media type ("" when the
// carrier named none, then the manifest must name its own). It accepts OCI
// image manifests and indexes with any config and Docker's schema 2 manifests
// and lists. What two readers could understand differently is refused: doubled
// fields, fields in another case, and a body that is both image and index.
func ParseManifest(mediaType string, body []byte) (Document, error) {
	if len(body) > MaxManifest {
		return Document{}, fault.New(fault.Limit, "the manifest has %d bytes; this registry takes at most %d", len(body), MaxManifest).WithCode("MANIFEST_INVALID")
	}
	if err := checkJSON(body); err != nil {
		return Document{}, invalidManifest("the manifest is not usable JSON: %v", err)
	}
	fields, err := object(body, "schemaVersion", "mediaType", "config", "layers", "manifests", "subject", "artifactType", "annotations")
	if err != nil {
		return Document{}, invalidManifest("%v", err)
	}
	named, err := optionalString(fields, "mediaType")
	if err != nil {
		return Document{}, invalidManifest("%v", err)
	}
	mediaType, _, _ = strings.Cut(mediaType, ";")
	mediaType = strings.TrimSpace(mediaType)
	if err := checkVersion(fields, mediaType, named); err != nil {
		return Document{}, err
	}
	if mediaType == "" {
		mediaType = named
	}
	if named != "" && named != mediaType {
		return Document{}, invalidManifest("the manifest calls itself %q but was sent as %q; send it under its own media type", named, mediaType)
	}
	doc := Document{MediaType: mediaType}
	switch mediaType {
	case v1.MediaTypeImageManifest, mediaDockerManifest:
		err = doc.readImage(fields)
	case v1.MediaTypeImageIndex, mediaDockerList:
		err = doc.readIndex(fields)
	case "":
		err = fmt.Errorf("neither the request nor the manifest names a media type; send a Content-Type")
	default:
		err = fmt.Errorf("manifests of media type %q are not taken; OCI image manifests and indexes and Docker schema 2 manifests and lists are", mediaType)
	}
	if err == nil {
		err = doc.readCommon(fields)
	}
	if err != nil {
		return Document{}, invalidManifest("%v", err)
	}
	if n := len(doc.Blobs()) + len(unique(doc.Children)); n > MaxDescriptors {
		return Document{}, fault.New(fault.Limit, "the manifest names %d blobs and manifests; this registry takes at most %d in one", n, MaxDescriptors).WithCode("MANIFEST_INVALID")
	}
	return doc, nil
}

// checkVersion refuses schema 1 by name, because an old client that sends it
// needs to hear what to change.
func checkVersion(fields map[string]json.RawMessage, mediaType, named string) error {
	var version json.Number
	if raw, ok := fields["schemaVersion"]; ok && string(raw) == "2" {
		version = "2"
	} else if ok {
		if err := json.Unmarshal(raw, &version); err != nil {
			return invalidManifest("schemaVersion must be the number 2")
		}
	}
	schema1 := func(t string) bool { return t == mediaDockerSchema1 || t == mediaDockerSigned1 }
	if schema1(mediaType) || schema1(named) || version == "1" {
		return invalidManifest("Docker manifest schema 1 is not taken: its digests do not cover the content; push with a client that writes schema 2 or OCI (any Docker since 1.10)")
	}
	if version != "2" {
		return invalidManifest("schemaVersion must be the number 2")
	}
	return nil
}

func (d *Document) readImage(fields map[string]json.RawMessage) error {
	if _, both := fields["manifests"]; both {
		return fmt.Errorf("the manifest has both layers and manifests, so that readers could disagree what it is; send one kind")
	}
	raw, ok := fields["config"]
	if !ok || isNull(raw) {
		return fmt.Errorf("the manifest has no config; an artifact without one names the empty descriptor %s", v1.DescriptorEmptyJSON.Digest)
	}
	config, err := descriptor(raw, "config")
	if err != nil {
		return err
	}
	d.Config = &config
	d.Layers, err = descriptors(fields["layers"], "layers")
	return err
}

func (d *Document) readIndex(fields map[string]json.RawMessage) error {
	for _, name := range []string{"layers", "config"} {
		if _, both := fields[name]; both {
			return fmt.Errorf("the index also has %q, so that readers could disagree what it is; send one kind", name)
		}
	}
	if raw, ok := fields["manifests"]; !ok || isNull(raw) {
		return fmt.Errorf("the index has no list of manifests; an empty one is written as []")
	}
	var err error
	d.Children, err = descriptors(fields["manifests"], "manifests")
	return err
}

func (d *Document) readCommon(fields map[string]json.RawMessage) error {
	if raw, ok := fields["subject"]; ok && !isNull(raw) {
		subject, err := descriptor(raw, "subject")
		if err != nil {
			return err
		}
		d.Subject = &subject
	}
	var err error
	if d.ArtifactType, err = optionalString(fields, "artifactType"); err != nil {
		return err
	}
	if d.ArtifactType == "" && d.Config != nil {
		d.ArtifactType = d.Config.MediaType
	}
	if raw, ok := fields["annotations"]; ok {
		if d.Annotations, ok = texts(raw); !ok {
			return fmt.Errorf("annotations must map strings to strings")
		}
	}
	return nil
}

func optionalString(fields map[string]json.RawMessage, name string) (string, error) {
	raw, ok := fields[name]
	if !ok || isNull(raw) {
		return "", nil
	}
	s, err := textOf(raw)
	if err != nil {
		return "", fmt.Errorf("%s must be a string", name)
	}
	if len(s) > 255 || strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
		return "", fmt.Errorf("%s must be a media type of at most 255 characters", name)
	}
	return s, nil
}

func descriptors(raw json.RawMessage, name string) ([]v1.Descriptor, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	list, ok := list(raw)
	if !ok {
		return nil, fmt.Errorf("%s must be a list", name)
	}
	// A few duplicates are normal (an image may repeat a layer); a list far
	// beyond the limit is not worth reading.
	if len(list) > 4*MaxDescriptors {
		return nil, fmt.Errorf("%s has %d descriptors; at most %d are taken", name, len(list), MaxDescriptors)
	}
	out := make([]v1.Descriptor, 0, len(list))
	for i, item := range list {
		d, err := descriptor(item, fmt.Sprintf("%s[%d]", name, i))
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func descriptor(raw json.RawMessage, name string) (v1.Descriptor, error) {
	fields, err := object(raw, "mediaType", "digest", "size", "platform", "artifactType", "annotations")
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("%s: %w", name, err)
	}
	var d v1.Descriptor
	if d.MediaType, err = optionalString(fields, "mediaType"); err != nil {
		return v1.Descriptor{}, fmt.Errorf("%s: %w", name, err)
	}
	if d.ArtifactType, err = optionalString(fields, "artifactType"); err != nil {
		return v1.Descriptor{}, fmt.Errorf("%s: %w", name, err)
	}
	if d.MediaType == "" {
		return v1.Descriptor{}, fmt.Errorf("%s has no mediaType", name)
	}
	text, err := textOf(fields["digest"])
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("%s has no digest", name)
	}
	if d.Digest, err = entry.ParseDigest(text); err != nil {
		return v1.Descriptor{}, fmt.Errorf("%s: %w", name, err)
	}
	if d.Size, err = sizeOf(fields["size"]); err != nil || d.Size < 0 {
		return v1.Descriptor{}, fmt.Errorf("%s has no size in bytes", name)
	}
	if p, ok := fields["platform"]; ok && !isNull(p) {
		d.Platform = new(v1.Platform)
		if err := json.Unmarshal(p, d.Platform); err != nil {
			return v1.Descriptor{}, fmt.Errorf("%s has a platform that is not one", name)
		}
	}
	return d, nil
}
