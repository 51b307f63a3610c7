package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// manual is docs/operations.md as what it has people type: each section's
// commands. A section may be run once, and every one has to be.
type manual struct {
	t        *testing.T
	sections map[string][]string
}

func readManual(t *testing.T) *manual {
	t.Helper()
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	m := &manual{t: t, sections: map[string][]string{}}
	title := ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		if name, ok := strings.CutPrefix(line, "## "); ok {
			title = name
		} else if command, ok := strings.CutPrefix(line, "    "); ok && strings.TrimSpace(command) != "" {
			m.sections[title] = append(m.sections[title], strings.TrimSpace(command))
		}
	}
	return m
}

// step carries out one command of a section, given its words, and gives what it
// printed.
type step func(ctx context.Context, words []string) string

// run carries out a section, one step a command.
func (m *manual) run(ctx context.Context, title string, steps ...step) (said []string) {
	m.t.Helper()
	commands, ok := m.sections[title]
	if !ok || len(commands) != len(steps) {
		m.t.Fatalf("the section %q of the manual has the commands %q; the test has %d steps for it", title, commands, len(steps))
	}
	delete(m.sections, title)
	for i, command := range commands {
		m.t.Logf("%s: %s", title, command)
		command, _, _ = strings.Cut(command, " > ") // what a file gets is what it prints
		command, _, _ = strings.Cut(command, " # ")
		said = append(said, steps[i](ctx, strings.Fields(command)))
	}
	return said
}

// done fails for sections that nobody ran.
func (m *manual) done() {
	for title, commands := range m.sections {
		m.t.Errorf("nobody ran the section %q of the manual: %q", title, commands)
	}
}

// with puts what a person would type in the place of the manual's capitals.
func with(words []string, pairs ...string) []string {
	out := make([]string, len(words))
	for i, w := range words {
		for p := 0; p < len(pairs); p += 2 {
			w = strings.ReplaceAll(w, pairs[p], pairs[p+1])
		}
		out[i] = w
	}
	return out
}

// on runs a command of the product on a node, against that node.
func (m *manual) on(n *lab.Node, pairs ...string) step {
	return func(ctx context.Context, words []string) string {
		m.t.Helper()
		return m.must(n.Atoll(ctx, with(words[1:], pairs...)...))
	}
}

// typed is on for a command whose quoted words hold spaces.
func (m *manual) typed(n *lab.Node, pairs ...string) step {
	return func(ctx context.Context, words []string) string {
		m.t.Helper()
		var args []string
		for i, part := range strings.Split(strings.Join(words[1:], " "), "'") {
			if i%2 == 1 {
				args = append(args, part)
			} else {
				args = append(args, strings.Fields(part)...)
			}
		}
		return m.must(n.Atoll(ctx, with(args, pairs...)...))
	}
}

// off runs one that needs no node: the manual names the data directory.
func (m *manual) off(n *lab.Node, pairs ...string) step {
	return func(ctx context.Context, words []string) string {
		m.t.Helper()
		said, err := n.Host.Run(ctx, n.Binary(), with(words[1:], append(pairs, "DIR", n.Data)...)...)
		if err != nil {
			m.t.Log(said)
		}
		return m.must(said, err)
	}
}

// start runs atoll serve and waits until it serves.
func (m *manual) start(n *lab.Node, pairs ...string) step {
	return func(ctx context.Context, words []string) string {
		m.t.Helper()
		args := with(words[2:], append(pairs, "DIR", n.Data)...)
		return m.must("", n.Start(ctx, args...))
	}
}

// tool runs another program on a node's machine.
func (m *manual) tool(n *lab.Node, pairs ...string) step {
	return func(ctx context.Context, words []string) string {
		m.t.Helper()
		return m.must(n.Host.Run(ctx, words[0], with(words[1:], pairs...)...))
	}
}

func (m *manual) must(said string, err error) string {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.TrimSpace(said)
}

// await waits for a state of the cluster as a node sees it.
func (m *manual) await(ctx context.Context, n *lab.Node, what string, ok func(lab.Status) bool) {
	m.t.Helper()
	if err := n.WaitStatus(ctx, what, ok); err != nil {
		m.t.Fatal(err)
	}
}

// voting waits until so many nodes are up and vote, and nothing lacks copies.
func (m *manual) voting(ctx context.Context, n *lab.Node, want int) {
	m.t.Helper()
	m.await(ctx, n, fmt.Sprintf("%d voters", want), func(s lab.Status) bool {
		voters := 0
		for _, node := range s.Nodes {
			if node.Voter && node.Up {
				voters++
			}
		}
		return s.Quorum && voters == want && s.UnderReplicated == 0 && !s.Counting
	})
}

// advises waits until the status advises something.
func (m *manual) advises(ctx context.Context, n *lab.Node, text string) {
	m.t.Helper()
	m.await(ctx, n, "the advice "+text, func(s lab.Status) bool {
		return slices.ContainsFunc(s.Advice, func(a string) bool { return strings.Contains(a, text) })
	})
}

// ends waits until a node has ended by itself.
func (m *manual) ends(ctx context.Context, n *lab.Node) {
	m.t.Helper()
	select {
	case <-n.Process().Done():
	case <-ctx.Done():
		m.t.Fatalf("%s goes on running", n.Host.Name)
	}
}

// leads waits until a node of that name leads, or none of it does.
func (m *manual) leads(ctx context.Context, n *lab.Node, name string) {
	m.t.Helper()
	m.await(ctx, n, name+" to lead", func(s lab.Status) bool {
		for _, node := range s.Nodes {
			if node.Leader {
				return node.Name == name
			}
		}
		return false
	})
}

// Every command of docs/operations.md does what the page says, in the order of
// a site's life.
func TestOperations(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 5*time.Minute)
	l, dir := newLab(t), t.TempDir()
	m := readManual(t)
	machine := func(i int, name string) *lab.Node {
		net := "o"
		if name == "restored" {
			net = "drill" // where it cannot reach the site
		}
		host, err := l.Host(ctx, fmt.Sprint("o", i), net, fmt.Sprintf("10.79.0.%d/24", i))
		if err != nil {
			t.Fatal(err)
		}
		n := lab.NewNode(host, built.atoll, filepath.Join(dir, host.Name), "--name", name)
		t.Cleanup(func() {
			if n.Process() != nil {
				n.Kill()
			}
			if t.Failed() {
				t.Logf("log of %s:\n%s", host.Name, tail(n.Log(), 30))
			}
		})
		return n
	}
	one, two, three, four := machine(1, "one"), machine(2, "two"), machine(3, "three"), machine(4, "four")
	if err := one.Found(ctx); err != nil {
		t.Fatal(err)
	}
	m.run(ctx, "", m.on(one))
	m.together(ctx, machine(8, "a"), machine(9, "b"), machine(10, "c"))
	var token string
	keep := func(do step) step {
		return func(ctx context.Context, words []string) string { token = do(ctx, words); return token }
	}
	join := func(n *lab.Node, more ...string) step {
		return func(ctx context.Context, words []string) string {
			return m.start(n, append(more, "ADDR", one.Host.IP, "TOKEN", token)...)(ctx, words)
		}
	}
	m.run(ctx, "Grow a site", keep(m.on(one)), join(two))
	for _, n := range []*lab.Node{three, four} {
		keep(m.on(one))(ctx, []string{"atoll", "token", "create"})
		join(n)(ctx, []string{"atoll", "serve", "--join", "ADDR:5001", "--token", "TOKEN"})
	}
	m.voting(ctx, one, 3)

	s := &site{t: t, nodes: []*lab.Node{one}}
	var err error
	if s.env, err = lab.Clients(ctx, t.TempDir(), one, two, three); err != nil {
		t.Fatal(err)
	}
	img := image(ctx, t, 1<<20)
	s.pushAll(ctx, one, img, "library/app", "v1")

	m.run(ctx, "Bound what the registry takes of the network", m.on(one), m.typed(one), m.typed(one), m.typed(one), m.typed(one), m.on(one), m.on(one))
	for _, name := range []string{"traffic.links", "traffic.budgets", "traffic.memory"} {
		m.must(one.Atoll(ctx, "settings", "reset", name))
	}
	m.run(ctx, "Choose what moves blobs", m.on(one), m.typed(one))
	m.must(one.Atoll(ctx, "settings", "reset", "peers.transfer-engine"))
	m.run(ctx, "Bring images to nodes before the morning", m.typed(one, "NODE", "three"), m.on(one))

	m.run(ctx, "Something is slow, or nodes do not reach each other", m.on(one))

	m.run(ctx, "Move the leadership", m.on(one, "NODE", "two"))
	m.leads(ctx, one, "two")

	drain := func(name string) step {
		return func(ctx context.Context, words []string) string {
			said := m.on(one, "NODE", name)(ctx, words)
			m.advises(ctx, one, "node "+name+" is drained")
			return said
		}
	}
	m.run(ctx, "Take a node out of service, and back", drain("three"), m.on(one), func(ctx context.Context, words []string) string {
		if err := three.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		m.must("", three.Start(ctx))
		return m.on(one, "NODE", "three")(ctx, words)
	})
	m.voting(ctx, one, 3)

	drain("four")(ctx, []string{"atoll", "cluster", "drain", "four"})
	m.run(ctx, "Remove a node", m.on(one, "NODE", "four"))
	m.ends(ctx, four)
	m.voting(ctx, one, 3)

	three.Kill()
	heir := machine(5, "three")
	m.await(ctx, one, "three to be seen as down", func(s lab.Status) bool {
		for _, node := range s.Nodes {
			if node.Name == "three" {
				return !node.Up
			}
		}
		return false
	})
	m.run(ctx, "Replace a dead node", keep(m.on(one)), func(ctx context.Context, words []string) string {
		return join(heir)(ctx, words[:len(words)-2]) // the machine is called so already
	})
	m.voting(ctx, one, 3)

	m.run(ctx, "Upgrading", m.on(one), m.on(one))
	m.run(ctx, "Renew certificates", m.on(one), m.on(one))
	m.run(ctx, "Replace the site's CA", m.on(one), m.on(one), m.on(one))
	m.run(ctx, "Replace the cluster key", m.on(one), m.on(one))
	m.sealed(ctx, heir)
	m.voting(ctx, one, 3)
	m.run(ctx, "Join tokens", keep(m.on(one)))
	stolen := machine(7, "stolen")
	join(stolen)(ctx, []string{"atoll", "serve", "--join", "ADDR:5001", "--token", "TOKEN"})
	m.run(ctx, "A stolen node", m.on(one, "NODE", "stolen"), m.on(one), m.on(one))
	m.ends(ctx, stolen)
	keep(m.on(one))(ctx, []string{"atoll", "token", "create"}) // the other is void
	m.run(ctx, "Copy a prepared disk to many machines", m.off(four), join(four))
	m.voting(ctx, one, 3)
	if s.env, err = lab.Clients(ctx, t.TempDir(), one, two, heir); err != nil { // of the new CA
		t.Fatal(err)
	}

	m.pair(ctx, machine(11, "voter"), machine(12, "other"))
	m.backups(ctx, s, img, machine(6, "restored"))
	m.recovery(ctx, s, []*lab.Node{one, two, heir, four}, join, keep)
	m.done()
}

// sealed gives a node's keys a passphrase, and takes it away again.
func (m *manual) sealed(ctx context.Context, n *lab.Node) {
	m.t.Helper()
	file := filepath.Join(m.t.TempDir(), "passphrase")
	m.must("", os.WriteFile(file, []byte("a passphrase of this test\n"), 0o600))
	stopped := func(do step) step {
		return func(ctx context.Context, words []string) string {
			m.must("", n.Stop(ctx))
			return do(ctx, words)
		}
	}
	m.run(ctx, "Seal the keys of a node with a passphrase",
		stopped(m.off(n, "FILE", file)), m.start(n, "FILE", file), stopped(m.off(n, "FILE", file)))
	m.must("", n.Start(ctx))
}

// together founds a site on three machines that are told the same.
func (m *manual) together(ctx context.Context, nodes ...*lab.Node) {
	m.t.Helper()
	file := filepath.Join(m.t.TempDir(), "site-token")
	pairs := []string{"site-token", file}
	for i, n := range nodes {
		pairs = append(pairs, string(rune('A'+i))+":5001", n.PeerAddr())
	}
	m.run(ctx, "Found a site on several machines at once", m.off(nodes[0], pairs...), func(ctx context.Context, words []string) string {
		started := make(chan error)
		for _, n := range nodes {
			go func() { started <- n.Start(ctx, with(words[2:], pairs...)...) }()
		}
		var errs []error
		for range nodes {
			errs = append(errs, <-started)
		}
		return m.must("", errors.Join(errs...))
	})
	for _, n := range nodes {
		m.voting(ctx, n, 3)
	}
	for _, n := range nodes {
		n.Kill()
	}
}

// pair loses the voter of two nodes, and makes the other the site.
func (m *manual) pair(ctx context.Context, voter, other *lab.Node) {
	m.t.Helper()
	m.must("", voter.Found(ctx))
	m.must("", other.Join(ctx, voter))
	s := &site{t: m.t, nodes: []*lab.Node{voter}}
	var err error
	if s.env, err = lab.Clients(ctx, m.t.TempDir(), voter, other); err != nil {
		m.t.Fatal(err)
	}
	img := image(ctx, m.t, 0)
	s.pushAll(ctx, voter, img, "library/app", "v1")
	m.await(ctx, other, "two copies of everything", func(st lab.Status) bool {
		return len(st.Nodes) == 2 && st.UnderReplicated == 0 && !st.Counting
	})
	if said := m.must(other.Atoll(ctx, "cluster", "status")); !strings.Contains(said, "pushes wait") {
		m.t.Errorf("the status does not say what two nodes are worth:\n%s", said)
	}
	voter.Kill()
	if got := s.pullAll(ctx, other, "app:v1"); got != img.Index.String() {
		m.t.Errorf("with the voter lost the other serves %s, want %s", got, img.Index)
	}
	m.must("", other.Stop(ctx))
	m.run(ctx, "One of two nodes is lost", m.off(other, "FILE", filepath.Join(voter.Data, "cluster.key")), m.start(other))
	again := image(ctx, m.t, 0)
	s.pushAll(ctx, other, again, "library/app", "v2")
	if got := s.pullAll(ctx, other, "app:v1"); got != img.Index.String() {
		m.t.Errorf("as the site it serves %s, want %s", got, img.Index)
	}
	other.Kill()
}

// backups carries a site to a new machine by a file.
func (m *manual) backups(ctx context.Context, s *site, img lab.Image, fresh *lab.Node) {
	m.t.Helper()
	one, stick := s.nodes[0], m.t.TempDir()
	key := filepath.Join(stick, "backup.key")
	files := []string{"/mnt/usb/site.backup", filepath.Join(stick, "site.backup"), "backup.key", key}
	var public string
	m.run(ctx, "Back up a site", func(ctx context.Context, words []string) string {
		m.tool(one, files...)(ctx, words)
		text, err := os.ReadFile(key)
		if err != nil {
			m.t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if p, ok := strings.CutPrefix(line, "# public key: "); ok {
				public = strings.TrimSpace(p)
			}
		}
		return public
	}, func(ctx context.Context, words []string) string {
		return m.on(one, append(files, "age1...", public)...)(ctx, words)
	}, m.off(one, files...), func(ctx context.Context, words []string) string {
		out := m.on(one)(ctx, words)
		if !strings.Contains(out, "last backup: ") || !strings.Contains(out, "encrypted to "+public) {
			m.t.Errorf("the status does not show the backup:\n%s", out)
		}
		return out
	})
	m.run(ctx, "Restore a site from a backup", m.off(fresh, append([]string{"site.backup", filepath.Join(stick, "site.backup")}, files[2:]...)...), m.start(fresh))
	restored := &site{t: m.t, nodes: []*lab.Node{fresh}}
	var err error
	if restored.env, err = lab.Clients(ctx, m.t.TempDir(), fresh); err != nil {
		m.t.Fatal(err)
	}
	if got := restored.pullAll(ctx, fresh, "app:v1"); got != img.Index.String() {
		m.t.Errorf("the restored site serves %s, want %s", got, img.Index)
	}
	fresh.Kill()
}

// recovery makes one survivor of three the site, and takes an old one back.
func (m *manual) recovery(ctx context.Context, s *site, nodes []*lab.Node, join func(*lab.Node, ...string) step, keep func(step) step) {
	m.t.Helper()
	one, two := nodes[0], nodes[1]
	img := image(ctx, m.t, 0)
	for _, n := range nodes {
		n.Kill()
	}
	m.run(ctx, "Most voters are gone for good", m.off(one), m.start(one))
	s.pushAll(ctx, one, img, "library/app", "after")
	m.must("", two.Start(ctx))
	m.await(ctx, two, "the old node to be fenced", func(st lab.Status) bool { return !st.Quorum })
	if err := two.Stop(ctx); err != nil {
		m.t.Fatal(err)
	}
	saved := filepath.Join(m.t.TempDir(), "saved.json")
	keep(m.on(one))(ctx, []string{"atoll", "token", "create"})
	m.run(ctx, "A node of before the recovery comes back", m.off(two, "saved.json", saved), m.off(two), join(two))
	if got := s.pullAll(ctx, two, "app:after"); got != img.Index.String() {
		m.t.Errorf("the node that came back serves %s, want %s", got, img.Index)
	}

	m.voting(ctx, one, 1)
	if err := two.Stop(ctx); err != nil {
		m.t.Fatal(err)
	}
	for _, lost := range []string{"meta.db", "raft"} {
		if err := os.RemoveAll(filepath.Join(two.Data, lost)); err != nil {
			m.t.Fatal(err)
		}
	}
	m.run(ctx, "All metadata is gone", m.off(two), m.start(two))
	rebuilt := &site{t: m.t, nodes: []*lab.Node{two}}
	var err error
	if rebuilt.env, err = lab.Clients(ctx, m.t.TempDir(), two); err != nil {
		m.t.Fatal(err)
	}
	// The admin's password is new; anybody may pull from the library.
	if got := rebuilt.run(ctx, two, "skopeo", "inspect", "--no-creds", "--format", "{{.Digest}}", "docker://"+two.Registry()+"/app:after"); got != img.Index.String() {
		m.t.Errorf("the rebuilt site serves %s, want %s", got, img.Index)
	}
}
