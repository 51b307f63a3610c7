package e2e

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// What the tests run: built once by TestMain.
type binaries struct{ atoll, orasgo string }

var built binaries

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "atoll-e2e")
	if err == nil {
		built = binaries{filepath.Join(dir, "atoll"), filepath.Join(dir, "orasgo")}
		err = build(map[string]string{built.atoll: "./cmd/atoll", built.orasgo: "./scripts/lab/orasgo"})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func build(packages map[string]string) error {
	for output, pkg := range packages {
		cmd := exec.Command("go", "build", "-o", output, pkg)
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", pkg, err, out)
		}
	}
	return nil
}

// deadline gives each scenario a hard end.
func deadline(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// site is a site of nodes on hosts of one switch.
type site struct {
	t     *testing.T
	nodes []*lab.Node
	env   []string // by which clients reach the nodes
}

// plan says what site a test wants.
type plan struct {
	name  string // its nodes are NAME1, NAME2 ...
	net   int    // its hosts are 10.NET.0.1, .2 ... on a switch of their own: no other net has a route to them
	nodes int
	args  []string // further flags of every node
	// caches: all nodes but the first are caches, which keep nothing for the site and fetch
	// only what their clients ask for.
	caches bool
	// host changes a host before the node on it starts; i counts from 1.
	host func(i int, h *lab.Host) error
	// binary that the nodes run; the one that TestMain built when "".
	binary string
}

// newSite starts a site and waits until all its nodes are up and vote.
func newSite(ctx context.Context, t *testing.T, l *lab.Lab, p plan) *site {
	t.Helper()
	s := &site{t: t}
	dir := t.TempDir()
	for i := 1; i <= p.nodes; i++ {
		host, err := l.Host(ctx, fmt.Sprintf("%s%d", p.name, i), p.name, fmt.Sprintf("10.%d.0.%d/24", p.net, i))
		if err != nil {
			t.Fatal(err)
		}
		if p.host != nil {
			if err := p.host(i, host); err != nil {
				t.Fatal(err)
			}
		}
		node := lab.NewNode(host, cmp.Or(p.binary, built.atoll), filepath.Join(dir, host.Name), p.args...)
		switch {
		case i == 1:
			err = node.Found(ctx)
		case p.caches:
			err = node.Join(ctx, s.nodes[0], asCache...)
		default:
			err = node.Join(ctx, s.nodes[0])
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(node.Kill)
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("log of %s:\n%s", host.Name, tail(node.Log(), 80))
			}
		})
		s.nodes = append(s.nodes, node)
	}
	voters := min(5, p.nodes-(p.nodes+1)%2) // always an odd number, and five at most
	if err := s.nodes[0].WaitStatus(ctx, "all to be up and vote", func(st lab.Status) bool {
		up, vote := 0, 0
		for _, node := range st.Nodes {
			if node.Up {
				up++
			}
			if node.Voter {
				vote++
			}
		}
		return st.Quorum && up == p.nodes && vote == voters
	}); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.env, err = lab.Clients(ctx, t.TempDir(), s.nodes...); err != nil {
		t.Fatal(err)
	}
	return s
}

// in gives the site to a subtest.
func (s *site) in(t *testing.T) *site {
	copied := *s
	copied.t = t
	return &copied
}

// with gives the site with further environment variables for its clients.
func (s *site) with(env ...string) *site {
	copied := *s
	copied.env = append(slices.Clip(s.env), env...)
	return &copied
}

func newLab(t *testing.T) *lab.Lab {
	l := lab.New()
	t.Cleanup(func() {
		if err := l.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return l
}

func tail(text string, n int) string {
	lines := strings.Split(text, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// run runs a client on the node's host and fails the test when it fails.
func (s *site) run(ctx context.Context, node *lab.Node, name string, args ...string) string {
	s.t.Helper()
	out, err := node.Host.RunEnv(ctx, s.env, name, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// refused runs a client that must fail, and gives what it said.
func (s *site) refused(ctx context.Context, node *lab.Node, name string, args ...string) string {
	s.t.Helper()
	out, err := node.Host.RunEnv(ctx, s.env, name, args...)
	if err == nil {
		s.t.Fatalf("%s %v did not fail: %s", name, args, out)
	}
	return err.Error()
}

// atoll runs a command of the product against the node.
func (s *site) atoll(ctx context.Context, node *lab.Node, args ...string) string {
	s.t.Helper()
	out, err := node.Atoll(ctx, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// image builds the test image.
func image(ctx context.Context, t *testing.T, ballast int64) lab.Image {
	t.Helper()
	img, err := lab.BuildImage(ctx, t.TempDir(), ballast)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// pushAll pushes the image with its index, both platforms and the SBOM.
func (s *site) pushAll(ctx context.Context, node *lab.Node, img lab.Image, repository, tag string) {
	s.t.Helper()
	s.run(ctx, node, built.orasgo, "-u", "admin", "-p", lab.Password, "copy",
		"oci:"+img.Dir+":"+img.Tag, node.Registry()+"/"+repository+":"+tag)
}

// pullAll pulls an image with all its platforms into a new OCI layout, which
// skopeo does with every digest checked, and gives the digest of its index.
func (s *site) pullAll(ctx context.Context, node *lab.Node, reference string) string {
	s.t.Helper()
	dir := s.t.TempDir()
	s.run(ctx, node, "skopeo", "copy", "--all", "--preserve-digests", "docker://"+node.Registry()+"/"+reference, "oci:"+dir+":x")
	return s.run(ctx, node, "crane", "digest", node.Registry()+"/"+reference)
}

// asCache are the flags of a node that is a cache. Its size is given, or it would let
// go of what a test counts on where this machine's disk is nearly full.
var asCache = []string{"--cache", "--cache-size", "1GiB"}
