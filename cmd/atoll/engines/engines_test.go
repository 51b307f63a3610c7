package engines_test

import (
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/cmd/atoll/engines"
)

var update = flag.Bool("update", false, "write the golden files anew")

const ca = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"

// plan has two nodes and, where the engine takes them, two upstreams.
func plan(engine string) engines.Plan {
	p := engines.Plan{
		Engine: engine, CA: []byte(ca), Mirrors: []string{"https://10.0.0.1:5000", "https://10.0.0.2:5000/", "http://127.0.0.1:5000"},
		Upstreams: []engines.Upstream{{Host: "docker.io", Project: "hub"}},
	}
	if engine != engines.Docker {
		p.Upstreams = append(p.Upstreams, engines.Upstream{Host: "registry.example:8443"})
	}
	return p
}

func TestGolden(t *testing.T) {
	for _, engine := range engines.Names() {
		files, _, err := engines.Files(plan(engine))
		if err != nil {
			t.Fatal(err)
		}
		got, err := engines.Print(files)
		if err != nil {
			t.Fatal(err)
		}
		golden := filepath.Join("testdata", engine+".golden")
		if *update {
			if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", engine, diff)
		}
	}
}

func TestWrongPlans(t *testing.T) {
	for name, change := range map[string]func(*engines.Plan){
		"engine":      func(p *engines.Plan) { p.Engine = "rkt" },
		"no mirror":   func(p *engines.Plan) { p.Mirrors = nil },
		"no scheme":   func(p *engines.Plan) { p.Mirrors = []string{"10.0.0.1:5000"} },
		"path":        func(p *engines.Plan) { p.Mirrors = []string{"https://10.0.0.1:5000/v2/"} },
		"password":    func(p *engines.Plan) { p.Mirrors = []string{"https://u:p@10.0.0.1:5000"} },
		"no upstream": func(p *engines.Plan) { p.Upstreams = nil },
		"a path":      func(p *engines.Plan) { p.Upstreams = []engines.Upstream{{Host: "../etc"}} },
		"dots":        func(p *engines.Plan) { p.Upstreams = []engines.Upstream{{Host: ".."}} },
		"not docker's": func(p *engines.Plan) {
			p.Engine, p.Upstreams = engines.Docker, []engines.Upstream{{Host: "quay.io"}}
		},
	} {
		p := plan(engines.Containerd)
		change(&p)
		if _, err := engines.Write(t.TempDir(), p); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// tree reads all files below a directory, with their modes.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		relative, _ := filepath.Rel(root, name)
		all[relative] = info.Mode().String()
		if d.Type().IsRegular() {
			data, err := os.ReadFile(name)
			all[relative] += " " + string(data)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// lay makes files below a root.
func lay(t *testing.T, files map[string]string) (root string) {
	t.Helper()
	root = t.TempDir()
	for name, content := range files {
		full := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// existing is what machines have before.
var existing = map[string]map[string]string{
	"nothing": {},
	"files of the operator": {
		"etc/containerd/config.toml":                     "version = 2\n",
		"etc/containerd/certs.d/docker.io/hosts.toml":    "server = \"https://docker.io\"\n",
		"etc/rancher/k3s/registries.yaml":                "# mine\nmirrors:\n  # the company's\n  docker.io:\n    endpoint:\n      - https://old.example # keep\n      - https://10.0.0.2:5000\n    rewrite:\n      \"(.*)\": \"x/$1\"\n  quay.io:\n    endpoint: [\"https://q.example\"]\nconfigs:\n  old.example:\n    auth:\n      username: u\n",
		"etc/containers/registries.conf":                 "unqualified-search-registries = [\"docker.io\"]\n",
		"etc/docker/daemon.json":                         "{\n    \"log-driver\": \"journald\", \"registry-mirrors\": [\"https://old.example\",\"https://10.0.0.1:5000/\"],\n  \"default-ulimits\": {\"nofile\": {\"Hard\": 64000}}\n}",
		"etc/docker/certs.d/10.0.0.1:5000/ca.crt":        "other\n",
		"etc/containers/registries.conf.d/00-first.conf": "# first\n",
	},
	"empty files": {"etc/docker/daemon.json": "", "etc/rancher/k3s/registries.yaml": "\n"},
}

// Written, written again, for other mirrors, and taken back.
func TestWriteAndUndo(t *testing.T) {
	for name, files := range existing {
		for _, engine := range engines.Names() {
			t.Run(name+"/"+engine, func(t *testing.T) {
				root := lay(t, files)
				before := tree(t, root)
				steps, err := engines.Write(root, plan(engine))
				if err != nil || len(steps) == 0 {
					t.Fatalf("%v %v", steps, err)
				}
				written := tree(t, root)
				again, err := engines.Write(root, plan(engine))
				if err != nil {
					t.Fatal(err)
				}
				for _, s := range again {
					if s.Did != "kept" {
						t.Errorf("writing again: %+v", s)
					}
				}
				if diff := cmp.Diff(written, tree(t, root)); diff != "" {
					t.Errorf("writing again changed (-before +after):\n%s", diff)
				}
				for file, content := range files { // as it was, or kept beside it
					if now := written[file]; !strings.HasSuffix(now, content) && !strings.HasSuffix(written[file+".before-atoll"], content) {
						t.Errorf("%s is lost: %s", file, now)
					}
				}
				other := plan(engine)
				other.Mirrors, other.Upstreams = []string{"http://10.9.9.9:5000"}, other.Upstreams[:1]
				if _, err := engines.Write(root, other); err != nil {
					t.Fatal(err)
				}
				for file, content := range tree(t, root) {
					if !strings.HasSuffix(file, ".before-atoll") && strings.Contains(content, "https://10.0.0.1:5000\"") {
						t.Errorf("%s still names a mirror of the first plan: %s", file, content)
					}
				}
				if _, err := engines.Undo(root, engine); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(before, tree(t, root)); diff != "" {
					t.Errorf("after the undo (-want +got):\n%s", diff)
				}
				if steps, err := engines.Undo(root, engine); err != nil || len(steps) != 0 {
					t.Errorf("undo of nothing: %v %v", steps, err)
				}
			})
		}
	}
}

// What an operator had goes on to work beside the mirrors.
func TestMergedFiles(t *testing.T) {
	root := lay(t, existing["files of the operator"])
	read := func(name string) string {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	for _, engine := range []string{engines.K3s, engines.Docker} {
		if _, err := engines.Write(root, plan(engine)); err != nil {
			t.Fatal(err)
		}
	}
	want := `{
  "log-driver": "journald",
  "registry-mirrors": [
    "https://10.0.0.1:5000",
    "https://10.0.0.2:5000",
    "http://127.0.0.1:5000",
    "https://old.example"
  ],
  "default-ulimits": {
    "nofile": {
      "Hard": 64000
    }
  }
}
`
	if diff := cmp.Diff(want, read("etc/docker/daemon.json")); diff != "" {
		t.Error(diff)
	}
	want = `# mine
mirrors:
  # the company's
  docker.io:
    endpoint:
      - https://10.0.0.1:5000
      - https://10.0.0.2:5000
      - http://127.0.0.1:5000
      - https://old.example
    rewrite:
      (.*): x/$1
  quay.io:
    endpoint:
      - https://q.example
  registry.example:8443:
    endpoint:
      - https://10.0.0.1:5000
      - https://10.0.0.2:5000
      - http://127.0.0.1:5000
configs:
  old.example:
    auth:
      username: u
  10.0.0.1:5000:
    tls:
      ca_file: /etc/rancher/k3s/atoll-ca.crt
  10.0.0.2:5000:
    tls:
      ca_file: /etc/rancher/k3s/atoll-ca.crt
`
	if diff := cmp.Diff(want, read("etc/rancher/k3s/registries.yaml")); diff != "" {
		t.Error(diff)
	}
}

// A file that somebody changed since is left to them, and said so.
func TestChangedSince(t *testing.T) {
	root := lay(t, existing["files of the operator"])
	if _, err := engines.Write(root, plan(engines.Docker)); err != nil {
		t.Fatal(err)
	}
	daemon := filepath.Join(root, "etc/docker/daemon.json")
	if err := os.WriteFile(daemon, []byte(`{"debug":true}`), 0o640); err != nil {
		t.Fatal(err)
	}
	changed := tree(t, root)
	_, writing := engines.Write(root, plan(engines.Docker))
	_, undoing := engines.Undo(root, engines.Docker)
	for _, err := range []error{writing, undoing} {
		if err == nil || !strings.Contains(err.Error(), "daemon.json was changed since") || !strings.Contains(err.Error(), "daemon.json.before-atoll") {
			t.Errorf("a changed file: %v", err)
		}
	}
	if diff := cmp.Diff(changed, tree(t, root)); diff != "" {
		t.Errorf("a refusal changed something:\n%s", diff)
	}
}

// What cannot be merged is refused before anything is written.
func TestUnreadableFiles(t *testing.T) {
	for name, c := range map[string]struct{ engine, file, content string }{
		"no JSON":         {engines.Docker, "etc/docker/daemon.json", `{"a":`},
		"JSON list":       {engines.Docker, "etc/docker/daemon.json", `[]`},
		"JSON and more":   {engines.Docker, "etc/docker/daemon.json", `{} {}`},
		"mirrors no list": {engines.Docker, "etc/docker/daemon.json", `{"registry-mirrors":"x"}`},
		"no YAML":         {engines.K3s, "etc/rancher/k3s/registries.yaml", "a: [\n"},
		"YAML list":       {engines.K3s, "etc/rancher/k3s/registries.yaml", "- a\n"},
		"mirrors no map":  {engines.K3s, "etc/rancher/k3s/registries.yaml", "mirrors: [a]\n"},
	} {
		root := lay(t, map[string]string{c.file: c.content})
		before := tree(t, root)
		if _, err := engines.Write(root, plan(c.engine)); err == nil {
			t.Errorf("%s was merged into", name)
		}
		if diff := cmp.Diff(before, tree(t, root)); diff != "" {
			t.Errorf("%s changed something:\n%s", name, diff)
		}
	}
}

// Writing that was cut off between any two files is completed or undone.
func TestInterrupted(t *testing.T) {
	for _, engine := range engines.Names() {
		for _, finish := range []bool{true, false} {
			root := lay(t, existing["files of the operator"])
			before := tree(t, root)
			if _, err := engines.Write(root, plan(engine)); err != nil {
				t.Fatal(err)
			}
			want := tree(t, root)
			// As after a crash: the record and the backups are there, one file is not.
			for file, content := range before {
				if _, kept := want[file+".before-atoll"]; kept {
					_, text, _ := strings.Cut(content, " ")
					if err := os.WriteFile(filepath.Join(root, file), []byte(text), 0o640); err != nil {
						t.Fatal(err)
					}
				}
			}
			if finish {
				if _, err := engines.Write(root, plan(engine)); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, tree(t, root)); diff != "" {
					t.Errorf("%s completed (-want +got):\n%s", engine, diff)
				}
			}
			if _, err := engines.Undo(root, engine); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, tree(t, root)); diff != "" {
				t.Errorf("%s undone (-want +got):\n%s", engine, diff)
			}
		}
	}
}
