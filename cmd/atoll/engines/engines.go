// Package engines tells the container engines of a machine (containerd, k3s,
// podman, docker) to pull through mirrors: it renders their configuration files,
// installs them and takes them back.
//
// Invariants:
//   - What was configured before stays: a file that has one is merged into, and
//     the one before is kept beside it.
//   - Each file changes in one step, and the record of what was done is on disk
//     before the first does; writing again after a crash, or for other mirrors,
//     starts from the files as they were before Atoll.
//   - Undo gives back the very files that were there. It touches none that
//     somebody changed since.
package engines

import (
	"bytes"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"
)

// Names of the engines.
const (
	Containerd = "containerd"
	K3s        = "k3s"
	Podman     = "podman"
	Docker     = "docker"
)

// Names lists the engines that can be configured.
func Names() []string { return []string{Containerd, K3s, Podman, Docker} }

// dockerHub is the upstream that docker's mirrors are for.
const dockerHub = "docker.io"

// Plan is what an engine is to be told.
type Plan struct {
	Engine string
	// Mirrors are the URLs of nodes in the order in which they are tried.
	Mirrors []string
	// Upstreams are the registries that they stand for.
	Upstreams []Upstream
	// CA is the certificate (PEM) that signs the mirrors', if the machine has to
	// be told; nil if not.
	CA []byte
}

// Upstream is a registry that is mirrored.
type Upstream struct {
	Host    string
	Project string // that stands for it; "" is the one of the host's name
}

// File is a configuration file.
type File struct {
	Path string // absolute, with slashes
	// merge gives the file's new content from what was there before Atoll; nil
	// when there was no file.
	merge func(before []byte) ([]byte, error)
}

// Content is the file as it becomes on a machine without one.
func (f File) Content() ([]byte, error) { return f.merge(nil) }

// directory is where an engine's files are, and the record of what was written.
var directories = [...]struct{ engine, dir string }{
	{Containerd, "/etc/containerd"}, {K3s, "/etc/rancher/k3s"}, {Podman, "/etc/containers"}, {Docker, "/etc/docker"},
}

func directory(engine string) (string, error) {
	for _, d := range directories {
		if d.engine == engine {
			return d.dir, nil
		}
	}
	return "", fmt.Errorf("there is no engine %q; choose one of %s", engine, strings.Join(Names(), ", "))
}

// heading says in files of ours where they come from.
func heading(engine string) string {
	return "# Written by atoll mirror-config. Take it back with: atoll mirror-config --for " + engine + " --undo\n"
}

// mirror is a parsed URL of a plan.
type mirror struct {
	url  string // scheme://host, nothing behind it
	host string // with its port
	tls  bool
}

func (p Plan) mirrors() ([]mirror, error) {
	var all []mirror
	for _, text := range p.Mirrors {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
			return nil, fmt.Errorf("%q is not the URL of a node; write it like https://registry.example:5000", text)
		}
		m := mirror{u.Scheme + "://" + u.Host, u.Host, u.Scheme == "https"}
		if !slices.Contains(all, m) {
			all = append(all, m)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no node is named that could be a mirror")
	}
	return all, nil
}

func checkUpstreams(all []Upstream) error {
	if len(all) == 0 {
		return fmt.Errorf("no upstream is named; write it like docker.io")
	}
	for _, u := range all {
		if u.Host == "" || strings.Trim(u.Host, "abcdefghijklmnopqrstuvwxyz0123456789.-:") != "" || strings.Trim(u.Host, ".") == "" {
			return fmt.Errorf("%q is not the host of a registry; write it like docker.io or registry.example:5000", u.Host)
		}
	}
	return nil
}

// Files gives the files of a plan in the order of their paths, and what the
// operator still has to do.
func Files(p Plan) (files []File, notes []string, err error) {
	dir, err := directory(p.Engine)
	if err != nil {
		return nil, nil, err
	}
	mirrors, err := p.mirrors()
	if err == nil {
		err = checkUpstreams(p.Upstreams)
	}
	if err != nil {
		return nil, nil, err
	}
	switch p.Engine {
	case Containerd:
		files, notes = containerd(p, dir, mirrors)
	case K3s:
		files, notes = k3s(p, dir, mirrors)
	case Podman:
		files = podman(p, dir, mirrors)
	case Docker:
		files, notes, err = docker(p, dir, mirrors)
	}
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return files, notes, err
}

// whole is a file that is ours alone.
func whole(name, content string) File {
	return File{Path: name, merge: func([]byte) ([]byte, error) { return []byte(content), nil }}
}

// caFile is the CA's, if there is one and a mirror needs it.
func caFile(p Plan, name string, mirrors []mirror) (File, bool) {
	needed := len(p.CA) > 0 && slices.ContainsFunc(mirrors, func(m mirror) bool { return m.tls })
	return whole(name, string(bytes.TrimSpace(p.CA))+"\n"), needed
}

// containerd reads certs.d/HOST/hosts.toml, and tries the hosts in the order of
// the file before the server.
func containerd(p Plan, dir string, mirrors []mirror) (files []File, notes []string) {
	ca, needed := caFile(p, path.Join(dir, "atoll-ca.crt"), mirrors)
	if needed {
		files = append(files, ca)
	}
	for _, u := range p.Upstreams {
		server := "https://" + u.Host
		if u.Host == dockerHub {
			server = "https://registry-1.docker.io"
		}
		var b strings.Builder
		fmt.Fprintf(&b, "%sserver = %q\n", heading(Containerd), server)
		for _, m := range mirrors {
			fmt.Fprintf(&b, "\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", m.url)
			if m.tls && needed {
				fmt.Fprintf(&b, "  ca = %q\n", ca.Path)
			}
		}
		files = append(files, whole(path.Join(dir, "certs.d", u.Host, "hosts.toml"), b.String()))
	}
	return files, []string{
		`the CRI plugin reads these files only with config_path = "/etc/containerd/certs.d" in /etc/containerd/config.toml (section registry); ctr wants --hosts-dir /etc/containerd/certs.d`,
	}
}

// podman, like all of containers/image, reads drop-ins of registries.conf and a
// certs.d of its own.
func podman(p Plan, dir string, mirrors []mirror) []File {
	var b strings.Builder
	b.WriteString(heading(Podman))
	for _, u := range p.Upstreams {
		project := u.Project
		if project == "" {
			project = strings.ReplaceAll(u.Host, ":", "-")
		}
		fmt.Fprintf(&b, "\n[[registry]]\nprefix = %q\nlocation = %q\n", u.Host, u.Host)
		for _, m := range mirrors {
			fmt.Fprintf(&b, "\n[[registry.mirror]]\nlocation = %q\n", m.host+"/"+project)
			if !m.tls {
				b.WriteString("insecure = true\n")
			}
		}
	}
	files := []File{whole(path.Join(dir, "registries.conf.d", "50-atoll-mirror.conf"), b.String())}
	return append(files, certificates(p, dir, mirrors)...)
}

// certificates gives the files by which podman and docker know a registry's CA.
func certificates(p Plan, dir string, mirrors []mirror) (files []File) {
	for _, m := range mirrors {
		if ca, needed := caFile(p, path.Join(dir, "certs.d", m.host, "atoll-ca.crt"), []mirror{m}); needed {
			files = append(files, ca)
		}
	}
	return files
}

// Print writes out the files as they become on a machine without them.
func Print(files []File) (string, error) {
	var b strings.Builder
	for i, f := range files {
		content, err := f.Content()
		if err != nil {
			return "", fmt.Errorf("%s: %w", f.Path, err)
		}
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "==> %s <==\n%s", f.Path, content)
	}
	return b.String(), nil
}
