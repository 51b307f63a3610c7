// Command demo plays Atoll's main job unattended: a site of three nodes, a push to
// one and a pull from another while the blob is still moving, a kill -9, and a
// bundle that crosses an air gap to a site with no route to the first.
//
// It builds a real image from this machine, uses real clients, and cleans up
// after itself. It needs the right to make network namespaces.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	d := &demo{lab: lab.New(), began: time.Now()}
	err := d.play(ctx)
	d.clean()
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo failed:", err)
		os.Exit(1)
	}
	fmt.Printf("\nall of it in %s.\n", time.Since(d.began).Round(time.Second))
}

type demo struct {
	lab    *lab.Lab
	began  time.Time
	dir    string
	atoll  string
	orasgo string
	nodes  []*lab.Node
	step   int
}

func (d *demo) clean() {
	for _, n := range d.nodes {
		n.Kill()
	}
	if err := d.lab.Close(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.RemoveAll(d.dir)
}

func (d *demo) play(ctx context.Context) (err error) {
	if d.dir, err = os.MkdirTemp("", "atoll-demo"); err != nil {
		return err
	}
	if d.atoll, err = filepath.Abs("bin/atoll"); err != nil {
		return err
	}
	if _, err := os.Stat(d.atoll); err != nil {
		return fmt.Errorf("%w: run make demo, which builds it", err)
	}
	d.orasgo = filepath.Join(d.dir, "orasgo")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", d.orasgo, "./scripts/lab/orasgo").CombinedOutput(); err != nil {
		return fmt.Errorf("build the oras-go client: %w: %s", err, out)
	}
	img, err := d.image(ctx)
	if err != nil {
		return err
	}
	a, env, err := d.threeNodes(ctx)
	if err != nil {
		return err
	}
	if err := d.pushAndPull(ctx, a, env, img); err != nil {
		return err
	}
	if err := d.kill(ctx, a, env, img); err != nil {
		return err
	}
	return d.airGap(ctx, a[0], env, img)
}

// title begins a step.
func (d *demo) title(format string, args ...any) {
	d.step++
	fmt.Printf("\n\033[1m%d. %s\033[0m\n", d.step, fmt.Sprintf(format, args...))
}

// show runs a command on a host the way a person would, and prints both what
// was typed and what came back.
func (d *demo) show(ctx context.Context, n *lab.Node, env []string, name string, args ...string) (string, error) {
	typed := strings.Join(append([]string{filepath.Base(name)}, args...), " ")
	typed = strings.NewReplacer(d.dir+"/", "", lab.Password, "$PASSWORD").Replace(typed)
	fmt.Printf("\033[2m%s$\033[0m %s\n", n.Host.Name, typed)
	if name == d.atoll && !strings.Contains(typed, "bundle verify") {
		args = append(args, "--data", n.Data)
	}
	began := time.Now()
	out, err := n.Host.RunEnv(ctx, env, name, args...)
	for line := range strings.Lines(strings.TrimSpace(strings.ReplaceAll(out, d.dir+"/", ""))) {
		fmt.Printf("    %s\n", strings.TrimRight(line, "\n"))
	}
	if took := time.Since(began); took > time.Second {
		fmt.Printf("    \033[2m(%.1f s)\033[0m\n", took.Seconds())
	}
	return out, err
}

// refused shows a command that must fail.
func (d *demo) refused(ctx context.Context, n *lab.Node, env []string, name string, args ...string) error {
	out, err := d.show(ctx, n, env, name, args...)
	if err == nil {
		return fmt.Errorf("that should have been refused: %s", out)
	}
	text := err.Error()
	if i := strings.LastIndex(text, "atoll: "); i >= 0 {
		text = text[i:]
	}
	fmt.Printf("    %s\n    \033[2m(refused, as it should be)\033[0m\n", strings.ReplaceAll(text, d.dir+"/", ""))
	return nil
}

func (d *demo) image(ctx context.Context) (lab.Image, error) {
	d.title("A real image, made from this machine: busybox and a Go program for two platforms, with an SBOM attached")
	img, err := lab.BuildImage(ctx, filepath.Join(d.dir, "image"), 64<<20)
	if err == nil {
		fmt.Printf("    index %s\n    SBOM  %s\n    %d MiB in all\n", img.Index, img.SBOM, img.Size>>20)
	}
	return img, err
}

func (d *demo) node(ctx context.Context, name, sw, cidr string) (*lab.Node, error) {
	h, err := d.lab.Host(ctx, name, sw, cidr)
	if err != nil {
		return nil, err
	}
	return lab.NewNode(h, d.atoll, filepath.Join(d.dir, name)), nil
}

func (d *demo) threeNodes(ctx context.Context) (nodes []*lab.Node, env []string, err error) {
	d.title("Site A: three nodes become one cluster")
	for i := 1; i <= 3; i++ {
		n, err := d.node(ctx, fmt.Sprintf("a%d", i), "a", fmt.Sprintf("10.61.0.%d/24", i))
		if err != nil {
			return nil, nil, err
		}
		if i == 1 {
			fmt.Printf("\033[2ma1$\033[0m atoll serve --init --listen %s\n", n.Registry())
			err = n.Found(ctx)
		} else {
			fmt.Printf("\033[2ma%d$\033[0m atoll serve --join %s --token $(on a1: atoll token create) --listen %s\n", i, nodes[0].PeerAddr(), n.Registry())
			err = n.Join(ctx, nodes[0])
		}
		if err != nil {
			return nil, nil, err
		}
		nodes = append(nodes, n)
		d.nodes = append(d.nodes, n)
	}
	err = nodes[0].WaitStatus(ctx, "three voters", func(s lab.Status) bool {
		voters := 0
		for _, n := range s.Nodes {
			if n.Voter && n.Up {
				voters++
			}
		}
		return voters == 3
	})
	if err != nil {
		return nil, nil, err
	}
	if _, err := d.show(ctx, nodes[0], nil, d.atoll, "cluster", "status"); err != nil {
		return nil, nil, err
	}
	env, err = lab.Clients(ctx, d.dir, nodes...)
	return nodes, env, err
}

func (d *demo) pushAndPull(ctx context.Context, a []*lab.Node, env []string, img lab.Image) error {
	d.title("Push to node 1; the answer comes when two nodes hold it")
	if _, err := d.show(ctx, a[0], env, d.orasgo, "-u", "admin", "-p", lab.Password, "copy", "oci:"+img.Dir+":"+img.Tag, a[0].Registry()+"/app:v1"); err != nil {
		return err
	}
	d.title("Pull from node 3, by tag and by digest, with its referrers")
	if _, err := d.show(ctx, a[2], env, "skopeo", "copy", "-q", "--all", "--preserve-digests", "docker://"+a[2].Registry()+"/app:v1", "oci:"+filepath.Join(d.dir, "pulled")+":v1"); err != nil {
		return err
	}
	if _, err := d.show(ctx, a[2], env, "crane", "digest", a[2].Registry()+"/app@"+img.Index.String()); err != nil {
		return err
	}
	_, err := d.show(ctx, a[2], env, d.orasgo, "-u", "admin", "-p", lab.Password, "discover", a[2].Registry()+"/library/app:v1")
	return err
}

func (d *demo) kill(ctx context.Context, a []*lab.Node, env []string, img lab.Image) error {
	d.title("kill -9 node 1: pulls go on, a push waits for the new leader and goes on")
	a[0].Kill()
	if _, err := d.show(ctx, a[1], env, "crane", "digest", a[1].Registry()+"/app:v1"); err != nil {
		return err
	}
	if _, err := d.show(ctx, a[1], env, "crane", "tag", a[1].Registry()+"/library/app:v1", "v2"); err != nil {
		return err
	}
	if _, err := d.show(ctx, a[1], nil, d.atoll, "cluster", "status"); err != nil {
		return err
	}
	d.title("Node 1 comes back and catches up by itself")
	if err := a[0].Start(ctx); err != nil {
		return err
	}
	if err := a[0].WaitStatus(ctx, "all to be up", func(s lab.Status) bool {
		for _, n := range s.Nodes {
			if !n.Up {
				return false
			}
		}
		return s.Quorum && !s.Counting && s.UnderReplicated == 0
	}); err != nil {
		return err
	}
	out, err := d.show(ctx, a[0], env, "crane", "digest", a[0].Registry()+"/app:v2")
	if err == nil && strings.TrimSpace(out) != img.Index.String() {
		err = fmt.Errorf("node 1 serves %s, want %s", out, img.Index)
	}
	return err
}

func (d *demo) airGap(ctx context.Context, from *lab.Node, env []string, img lab.Image) error {
	d.title("Site B, in another world: no route between them")
	to, err := d.node(ctx, "b1", "b", "10.62.0.1/24")
	if err != nil {
		return err
	}
	if err := to.Found(ctx); err != nil {
		return err
	}
	d.nodes = append(d.nodes, to)
	if _, err := to.Host.Run(ctx, "ping", "-c1", "-W1", from.Host.IP); err == nil {
		return fmt.Errorf("site B reaches site A")
	}
	fmt.Printf("    b1 cannot reach %s\n", from.Host.IP)

	d.title("Site A exports a signed bundle to the stick; it is an OCI layout to any tool")
	stick, identity := filepath.Join(d.dir, "stick.tar"), filepath.Join(d.dir, "site-a.json")
	if _, err := d.show(ctx, from, env, d.atoll, "bundle", "export", "-o", stick); err != nil {
		return err
	}
	if _, err := d.show(ctx, from, env, "skopeo", "inspect", "--format", "{{.Name}} {{.Architecture}} {{.Digest}}", "oci-archive:"+stick+":library--app--v1"); err != nil {
		return err
	}
	site, err := from.Atoll(ctx, "site", "show", "--format", "json")
	if err != nil {
		return err
	}
	if err := os.WriteFile(identity, []byte(site), 0o644); err != nil {
		return err
	}
	d.title("A laptop with no node proves what is on the stick")
	if _, err := d.show(ctx, to, nil, d.atoll, "bundle", "verify", stick, "--trust", identity); err != nil {
		return err
	}
	d.title("Site B refuses it until it is told to trust site A; and a bundle with one flipped bit")
	if err := d.refused(ctx, to, nil, d.atoll, "bundle", "import", stick); err != nil {
		return err
	}
	if _, err := d.show(ctx, to, nil, d.atoll, "site", "trust", identity, "--accept", "library"); err != nil {
		return err
	}
	if err := d.flip(stick); err != nil {
		return err
	}
	if err := d.refused(ctx, to, nil, d.atoll, "bundle", "import", stick+".flipped", "--as", "library=library-a"); err != nil {
		return err
	}
	d.title("Site B imports it; the same digests are there, under a name of its own choice")
	if _, err := d.show(ctx, to, nil, d.atoll, "bundle", "import", stick, "--as", "library=library-a"); err != nil {
		return err
	}
	envB, err := lab.Clients(ctx, d.dir, to)
	if err != nil {
		return err
	}
	out, err := d.show(ctx, to, envB, "crane", "digest", to.Registry()+"/library-a/app:v1")
	if err == nil && strings.TrimSpace(out) != img.Index.String() {
		err = fmt.Errorf("site B serves %s, want %s", out, img.Index)
	}
	if err != nil {
		return err
	}
	_, err = d.show(ctx, to, envB, d.orasgo, "-u", "admin", "-p", lab.Password, "discover", to.Registry()+"/library-a/app:v1")
	return err
}

// flip copies the bundle with one bit changed in its middle.
func (d *demo) flip(name string) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	data[len(data)/2] ^= 1
	return os.WriteFile(name+".flipped", data, 0o644)
}
