// Command orasgo is a small client on the oras-go library, whose own command
// line is not to be had as a Go module: copy between registries and layouts with
// referrers, attach a file, discover what is attached.
//
//	orasgo [-u USER] [-p PASSWORD] [--plain] copy   FROM TO
//	orasgo ...                               attach REF TYPE FILE
//	orasgo ...                               discover REF [TYPE]
//
// A reference is HOST/REPOSITORY:TAG, HOST/REPOSITORY@DIGEST, or oci:DIR:TAG (a
// directory or tar file in OCI layout).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/retry"
)

type options struct {
	username, password string
	plain              bool
}

func main() {
	var o options
	flag.StringVar(&o.username, "u", "", "user name")
	flag.StringVar(&o.password, "p", "", "password")
	flag.BoolVar(&o.plain, "plain", false, "plain HTTP")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := o.run(ctx, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "orasgo:", err)
		os.Exit(1)
	}
}

func (o options) run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 3 && args[0] == "copy":
		return o.copy(ctx, args[1], args[2])
	case len(args) == 4 && args[0] == "attach":
		return o.attach(ctx, args[1], args[2], args[3])
	case len(args) == 2 && args[0] == "discover":
		return o.discover(ctx, args[1], "")
	case len(args) == 3 && args[0] == "discover":
		return o.discover(ctx, args[1], args[2])
	}
	return fmt.Errorf("usage: copy FROM TO | attach REF TYPE FILE | discover REF [TYPE]")
}

func (o options) repository(ref string) (*remote.Repository, error) {
	repo, err := remote.NewRepository(ref)
	if err != nil {
		return nil, err
	}
	repo.PlainHTTP = o.plain
	client := &auth.Client{Client: retry.DefaultClient, Cache: auth.NewCache()}
	if o.username != "" {
		client.Credential = auth.StaticCredential(repo.Reference.Registry, auth.Credential{Username: o.username, Password: o.password})
	}
	repo.Client = client
	return repo, nil
}

// target opens a reference; tag is the tag or digest in it.
func (o options) target(ctx context.Context, ref string) (target oras.GraphTarget, tag string, err error) {
	if path, ok := strings.CutPrefix(ref, "oci:"); ok {
		colon := strings.LastIndex(path, ":")
		if colon < 0 {
			return nil, "", fmt.Errorf("%s: want oci:PATH:TAG", ref)
		}
		store, err := oci.NewWithContext(ctx, path[:colon])
		return store, path[colon+1:], err
	}
	repo, err := o.repository(ref)
	if err != nil {
		return nil, "", err
	}
	return repo, repo.Reference.Reference, nil
}

// source opens a reference for reading only, which a tar file in OCI layout can
// be.
func (o options) source(ctx context.Context, ref string) (oras.ReadOnlyGraphTarget, string, error) {
	if path, ok := strings.CutPrefix(ref, "oci:"); ok {
		if colon := strings.LastIndex(path, ":"); colon > 0 {
			if info, err := os.Stat(path[:colon]); err == nil && info.Mode().IsRegular() {
				store, err := oci.NewFromTar(ctx, path[:colon])
				return store, path[colon+1:], err
			}
		}
	}
	return o.target(ctx, ref)
}

func (o options) copy(ctx context.Context, from, to string) error {
	source, tag, err := o.source(ctx, from)
	if err != nil {
		return err
	}
	target, toTag, err := o.target(ctx, to)
	if err != nil {
		return err
	}
	root, err := oras.ExtendedCopy(ctx, source, tag, target, toTag, oras.DefaultExtendedCopyOptions)
	if err != nil {
		return err
	}
	fmt.Println(root.Digest)
	return nil
}

func (o options) attach(ctx context.Context, ref, artifactType, file string) error {
	repo, err := o.repository(ref)
	if err != nil {
		return err
	}
	subject, err := repo.Resolve(ctx, repo.Reference.Reference)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	layer, err := oras.PushBytes(ctx, repo, artifactType, data)
	if err != nil {
		return err
	}
	packed, err := oras.PackManifest(ctx, repo, oras.PackManifestVersion1_1, artifactType, oras.PackManifestOptions{Subject: &subject, Layers: []v1.Descriptor{layer}})
	if err != nil {
		return err
	}
	fmt.Println(packed.Digest)
	return nil
}

func (o options) discover(ctx context.Context, ref, artifactType string) error {
	repo, err := o.repository(ref)
	if err != nil {
		return err
	}
	subject, err := repo.Resolve(ctx, repo.Reference.Reference)
	if err != nil {
		return err
	}
	return repo.Referrers(ctx, subject, artifactType, func(referrers []v1.Descriptor) error {
		for _, r := range referrers {
			fmt.Println(r.Digest, r.ArtifactType)
		}
		return nil
	})
}
