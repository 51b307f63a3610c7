package lab

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	_ "crypto/sha256" // the algorithm of every digest here
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is what BuildImage wrote.
type Image struct {
	Dir   string        // an OCI image layout
	Tag   string        // the reference of the index in the layout
	Index digest.Digest // the two-platform index
	SBOM  digest.Digest // the manifest of the attached SBOM
	Size  int64         // bytes of all blobs
}

const sbomType = "application/spdx+json"

// BuildImage makes a real image from this machine and writes it as an OCI layout
// into dir: for amd64 and arm64 a layer with busybox's file system, one with a
// Go program and, when ballast > 0, one of that many random bytes; an index over
// both; and an SBOM of the program that refers to the index.
func BuildImage(ctx context.Context, dir string, ballast int64) (Image, error) {
	l := layout{dir: dir}
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return Image{}, err
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return Image{}, fmt.Errorf("busybox, which the image's file system is made of: %w", err)
	}
	base, err := l.layer(map[string]string{"bin/busybox": busybox})
	if err != nil {
		return Image{}, err
	}
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	var version string
	for _, arch := range []string{"amd64", "arm64"} {
		program := filepath.Join(dir, "hello-"+arch)
		defer os.Remove(program)
		if version, err = compile(ctx, program, arch); err != nil {
			return Image{}, err
		}
		layers := []layerBlob{base}
		own, err := l.layer(map[string]string{"usr/bin/hello": program})
		if err != nil {
			return Image{}, err
		}
		layers = append(layers, own)
		if ballast > 0 {
			random, err := l.random(ballast)
			if err != nil {
				return Image{}, err
			}
			layers = append(layers, random)
		}
		manifest, err := l.manifest(arch, layers)
		if err != nil {
			return Image{}, err
		}
		index.Manifests = append(index.Manifests, manifest)
	}
	indexBlob, err := l.json(v1.MediaTypeImageIndex, index)
	if err != nil {
		return Image{}, err
	}
	sbom, err := l.sbom(indexBlob, version)
	if err != nil {
		return Image{}, err
	}
	image := Image{Dir: dir, Tag: "v1", Index: indexBlob.Digest, SBOM: sbom.Digest}
	indexBlob.Annotations = map[string]string{v1.AnnotationRefName: image.Tag}
	top := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{indexBlob, sbom}}
	if err := l.file("index.json", top); err != nil {
		return Image{}, err
	}
	image.Size = l.size
	return image, l.file(v1.ImageLayoutFile, v1.ImageLayout{Version: v1.ImageLayoutVersion})
}

func compile(ctx context.Context, output, arch string) (version string, err error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", output, "github.com/atoll-registry/atoll/scripts/lab/hello")
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compiling the image's program for %s: %w: %s", arch, err, out)
	}
	out, err := exec.CommandContext(ctx, "go", "version", "-m", output).Output()
	return string(out), err
}

// layout collects blobs of an OCI image layout.
type layout struct {
	dir  string
	size int64
}

type layerBlob struct {
	descriptor v1.Descriptor
	diffID     digest.Digest
}

// layer makes a gzip layer of files: name in the image -> file on this machine.
func (l *layout) layer(files map[string]string) (layerBlob, error) {
	var raw bytes.Buffer
	tw := tar.NewWriter(&raw)
	for name, source := range files {
		data, err := os.ReadFile(source)
		if err != nil {
			return layerBlob{}, err
		}
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data)), ModTime: time.Unix(0, 0)}); err != nil {
			return layerBlob{}, err
		}
		if _, err := tw.Write(data); err != nil {
			return layerBlob{}, err
		}
	}
	if err := tw.Close(); err != nil {
		return layerBlob{}, err
	}
	var packed bytes.Buffer
	gz := gzip.NewWriter(&packed)
	if _, err := gz.Write(raw.Bytes()); err != nil {
		return layerBlob{}, err
	}
	if err := gz.Close(); err != nil {
		return layerBlob{}, err
	}
	descriptor, err := l.blob(v1.MediaTypeImageLayerGzip, packed.Bytes())
	return layerBlob{descriptor, digest.FromBytes(raw.Bytes())}, err
}

// random makes an uncompressed layer that holds one file of n random bytes.
func (l *layout) random(n int64) (layerBlob, error) {
	temp, err := os.CreateTemp(l.dir, "ballast")
	if err != nil {
		return layerBlob{}, err
	}
	defer os.Remove(temp.Name()) // does nothing once renamed
	digester := digest.Canonical.Digester()
	counted := &countingWriter{w: io.MultiWriter(temp, digester.Hash())}
	tw := tar.NewWriter(counted)
	if err := tw.WriteHeader(&tar.Header{Name: "var/ballast", Mode: 0o644, Size: n, ModTime: time.Unix(0, 0)}); err != nil {
		return layerBlob{}, err
	}
	if _, err := io.CopyN(tw, rand.Reader, n); err != nil {
		return layerBlob{}, err
	}
	if err := tw.Close(); err != nil {
		return layerBlob{}, err
	}
	if err := temp.Close(); err != nil {
		return layerBlob{}, err
	}
	d := digester.Digest()
	l.size += counted.n
	return layerBlob{v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: d, Size: counted.n}, d}, os.Rename(temp.Name(), l.path(d))
}

func (l *layout) manifest(arch string, layers []layerBlob) (v1.Descriptor, error) {
	platform := v1.Platform{OS: "linux", Architecture: arch}
	created := time.Unix(0, 0).UTC()
	config := v1.Image{Created: &created, Platform: platform, Config: v1.ImageConfig{Entrypoint: []string{"/usr/bin/hello"}}, RootFS: v1.RootFS{Type: "layers"}}
	manifest := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
	for _, layer := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, layer.diffID)
		manifest.Layers = append(manifest.Layers, layer.descriptor)
	}
	var err error
	if manifest.Config, err = l.json(v1.MediaTypeImageConfig, config); err != nil {
		return v1.Descriptor{}, err
	}
	descriptor, err := l.json(v1.MediaTypeImageManifest, manifest)
	descriptor.Platform = &platform
	return descriptor, err
}

// sbom lists the modules of the program and refers to its subject.
func (l *layout) sbom(subject v1.Descriptor, goVersion string) (v1.Descriptor, error) {
	document := map[string]any{"spdxVersion": "SPDX-2.3", "SPDXID": "SPDXRef-DOCUMENT", "name": "hello", "comment": goVersion}
	layer, err := l.json(sbomType, document)
	if err != nil {
		return v1.Descriptor{}, err
	}
	empty, err := l.blob(v1.MediaTypeEmptyJSON, []byte("{}"))
	if err != nil {
		return v1.Descriptor{}, err
	}
	descriptor, err := l.json(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		ArtifactType: sbomType, Config: empty, Layers: []v1.Descriptor{layer}, Subject: &subject,
	})
	descriptor.ArtifactType = sbomType
	return descriptor, err
}

func (l *layout) path(d digest.Digest) string {
	return filepath.Join(l.dir, "blobs", d.Algorithm().String(), d.Encoded())
}

func (l *layout) blob(mediaType string, data []byte) (v1.Descriptor, error) {
	d := digest.FromBytes(data)
	l.size += int64(len(data))
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}, os.WriteFile(l.path(d), data, 0o644)
}

func (l *layout) json(mediaType string, value any) (v1.Descriptor, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return l.blob(mediaType, data)
}

func (l *layout) file(name string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(l.dir, name), data, 0o644)
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
