package e2e

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// helm packages charts, pushes them to one node, and finds them from the other by
// version, by a range of versions and as dependencies.
func helm(ctx context.Context, b bench) {
	dir := b.t.TempDir()
	own := b.with("HELM_CONFIG_HOME="+dir, "HELM_CACHE_HOME="+dir, "HELM_DATA_HOME="+dir, "DOCKER_CONFIG="+dir)
	login := func(node *lab.Node, password string) []string {
		return []string{"registry", "login", "--ca-file", b.ca(), "-u", "admin", "-p", password, node.Registry()}
	}
	if said := own.refused(ctx, b.use, "helm", login(b.use, "wrong")...); !strings.Contains(said, "401") && !strings.Contains(said, "unauthorized") {
		b.t.Errorf("a wrong password: %s", said)
	}
	for _, node := range []*lab.Node{b.push, b.use} {
		own.run(ctx, node, "helm", login(node, lab.Password)...)
	}
	files := func(chart string, texts map[string]string) string {
		for name, text := range texts {
			file := filepath.Join(dir, chart, name)
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				b.t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				b.t.Fatal(err)
			}
		}
		return filepath.Join(dir, chart)
	}
	chart := files("app", map[string]string{
		"Chart.yaml":            "apiVersion: v2\nname: app\nversion: 0.0.0\ndescription: made on " + b.push.Host.Name + "\n",
		"templates/config.yaml": "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {{ .Release.Name }}-{{ .Chart.Version }}\n",
	})
	// A tag cannot hold a version's plus sign: helm writes an underscore for it.
	for _, version := range []string{"1.2.0", "1.3.0+build.7", "2.0.0"} {
		own.run(ctx, b.push, "helm", "package", chart, "--version", version, "--destination", dir)
		packed := filepath.Join(dir, "app-"+version+".tgz")
		if version == "1.2.0" { // helm takes along what lies beside the package
			files("", map[string]string{"app-1.2.0.tgz.prov": "the provenance of app"})
		}
		own.run(ctx, b.push, "helm", "push", "--ca-file", b.ca(), packed, "oci://"+b.push.Registry()+"/helm/charts")
	}
	var image v1.Manifest
	b.manifest(ctx, "helm/charts/app:1.2.0", v1.MediaTypeImageManifest, &image)
	var kinds []string
	for _, layer := range image.Layers {
		kinds = append(kinds, layer.MediaType)
	}
	slices.Sort(kinds)
	want := []string{"application/vnd.cncf.helm.chart.content.v1.tar+gzip", "application/vnd.cncf.helm.chart.provenance.v1.prov"}
	if image.Config.MediaType != "application/vnd.cncf.helm.config.v1+json" || !slices.Equal(kinds, want) {
		b.t.Errorf("the chart has a config of the type %s and layers of %v, want %v", image.Config.MediaType, kinds, want)
	}
	b.wire(b.use).get(ctx, "/v2/helm/charts/app/manifests/1.3.0_build.7", http.StatusOK)

	from := "oci://" + b.use.Registry() + "/helm/charts/app"
	for asked, version := range map[string]string{"": "2.0.0", "1.2.0": "1.2.0", "^1.0.0": "1.3.0+build.7"} {
		to := b.t.TempDir()
		args := []string{"pull", "--ca-file", b.ca(), "--destination", to, from}
		if asked != "" {
			args = append(args, "--version", asked)
		}
		if asked == "1.2.0" {
			args = append(args, "--prov")
		}
		own.run(ctx, b.use, "helm", args...)
		names := []string{"app-" + version + ".tgz"}
		if asked == "1.2.0" {
			names = append(names, names[0]+".prov")
		}
		for _, name := range names {
			pushed, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				b.t.Fatal(err)
			}
			if pulled, err := os.ReadFile(filepath.Join(to, name)); err != nil || string(pulled) != string(pushed) {
				b.t.Errorf("the version %q: %s is not what was pushed: %v", asked, name, err)
			}
		}
	}
	if made := own.run(ctx, b.use, "helm", "template", "--ca-file", b.ca(), "--version", "1.2.0", "rel", from); !strings.Contains(made, "name: rel-1.2.0") {
		b.t.Errorf("helm template: %s", made)
	}
	if said := own.refused(ctx, b.use, "helm", "pull", "--ca-file", b.ca(), "--version", "9.9.9", "--destination", dir, from); !strings.Contains(said, "not found") {
		b.t.Errorf("a version that is not there: %s", said)
	}
	parent := files("parent", map[string]string{
		"Chart.yaml": "apiVersion: v2\nname: parent\nversion: 1.0.0\ndependencies:\n- name: app\n  version: 1.x\n  repository: oci://" + b.use.Registry() + "/helm/charts\n",
	})
	own.run(ctx, b.use, "helm", "dependency", "update", parent) // has no flag for a CA: it takes the system's
	if _, err := os.Stat(filepath.Join(parent, "charts", "app-1.3.0+build.7.tgz")); err != nil {
		b.t.Errorf("the dependency: %v", err)
	}
}
