package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/cmd/atoll/engines"
	"github.com/atoll-registry/atoll/node"
	"github.com/atoll-registry/atoll/node/peers"
	"github.com/atoll-registry/atoll/node/settings"
)

// mirrorFlags are what atoll mirror-config was asked for.
type mirrorFlags struct {
	engine, root, ca   string
	servers, upstreams []string
	write, undo        bool
}

func newMirrorConfig() *cobra.Command {
	var f mirrorFlags
	cmd := &cobra.Command{
		Use:   "mirror-config --for " + strings.Join(engines.Names(), "|"),
		Short: "Print or install the files by which a container engine pulls through this site",
		Long: `Print or install the files by which a container engine of this machine pulls the
images of other registries through this site: from the node on this machine first,
then from its peers, then from the registry itself.

--write merges into what is there, keeps the files from before, and changes nothing
when repeated; --undo gives them back. Without either, the files are printed as
they would be on a machine without any.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains(engines.Names(), f.engine) {
				return usageError{fmt.Errorf("--for is one of %s, not %q", strings.Join(engines.Names(), ", "), f.engine)}
			}
			if f.write && f.undo {
				return usageError{errors.New("--write and --undo exclude each other")}
			}
			if f.undo {
				steps, err := engines.Undo(f.root, f.engine)
				return showSteps(cmd, f, steps, err)
			}
			plan, err := f.plan(cmd)
			if err != nil {
				return err
			}
			files, notes, err := engines.Files(plan)
			if err != nil {
				return usageError{err}
			}
			if !f.write {
				text, err := engines.Print(files)
				if err == nil {
					_, err = io.WriteString(cmd.OutOrStdout(), text)
				}
				return errors.Join(err, note(cmd, notes...))
			}
			steps, err := engines.Write(f.root, plan)
			return errors.Join(showSteps(cmd, f, steps, err), note(cmd, notes...))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.engine, "for", "", "the engine: "+strings.Join(engines.Names(), ", "))
	flags.StringSliceVar(&f.servers, "server", nil, "URLs of the nodes, in the order in which they are tried (default: the node on this machine, then its peers)")
	flags.StringSliceVar(&f.upstreams, "upstream", []string{"docker.io"}, "the registries whose images come through this site")
	flags.BoolVar(&f.write, "write", false, "install the files")
	flags.BoolVar(&f.undo, "undo", false, "give back the files from before --write")
	flags.StringVar(&f.root, "root", "", "directory that stands for / , to prepare another machine's disk")
	flags.StringVar(&f.ca, "ca", "", "file with the CA certificate of the site (default: what the node says)")
	flags.String("data", "", "data directory of the node on this machine (default "+node.DefaultDataDir()+")")
	formatFlag(cmd)
	return cmd
}

func note(cmd *cobra.Command, notes ...string) error {
	for _, n := range notes {
		if _, err := fmt.Fprintln(cmd.ErrOrStderr(), "note: "+n); err != nil {
			return err
		}
	}
	return nil
}

func showSteps(cmd *cobra.Command, f mirrorFlags, steps []engines.Step, err error) error {
	if steps == nil {
		steps = []engines.Step{}
	}
	if err != nil && len(steps) == 0 {
		return err
	}
	shown := show(cmd, steps, func(w *tabwriter.Writer) {
		for _, s := range steps {
			row(w, s.Did, s.Path)
		}
		if len(steps) == 0 {
			fmt.Fprintf(w, "nothing was written for %s\n", f.engine)
		}
	})
	return errors.Join(err, shown)
}

// plan finds out what the engine is to be told: from the command line, else from
// the node.
func (f mirrorFlags) plan(cmd *cobra.Command) (p engines.Plan, err error) {
	p = engines.Plan{Engine: f.engine, Mirrors: f.servers}
	c, err := newClient(cmd)
	if err != nil && len(f.servers) == 0 {
		return p, err
	}
	if err != nil || len(f.servers) > 0 && c.base != socketBase && !slices.Contains(f.servers, c.base) {
		c = nil // no node, or one that may be of another site: the command line says it all
	}
	if len(f.servers) == 0 {
		if p.Mirrors, err = nodeURLs(cmd.Context(), c); err != nil {
			return p, err
		}
	}
	projects := map[string]string{}
	if c != nil {
		projects = mirrorProjects(cmd.Context(), c)
	}
	for _, host := range f.upstreams {
		p.Upstreams = append(p.Upstreams, engines.Upstream{Host: host, Project: projects[host]})
	}
	switch {
	case f.ca != "":
		p.CA, err = os.ReadFile(f.ca)
	case !strings.Contains(strings.Join(p.Mirrors, " "), "https://"):
	case c == nil:
		err = note(cmd, "no node could be asked for the site's CA: unless this machine knows it already, pass it with --ca FILE")
	default:
		p.CA, err = siteCA(cmd.Context(), c)
	}
	return p, err
}

// nodeURLs asks a node where clients find it and its peers. A loopback address of
// another machine is of no use here.
func nodeURLs(ctx context.Context, c *client) (urls []string, err error) {
	var all []peers.Endpoint
	if err := c.call(ctx, "GET", "/api/atoll/v1/endpoints", nil, &all); err != nil {
		return nil, err
	}
	for _, e := range all {
		if c.base == socketBase || !loopbackURL(e.URL) || loopbackURL(c.base) {
			urls = append(urls, e.URL)
		}
	}
	return urls, nil
}

func loopbackURL(text string) bool {
	u, err := url.Parse(text)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() == "localhost" || err == nil && ip.IsLoopback()
}

// mirrorProjects asks which projects stand for which upstreams. Who may not see
// it gets the default.
func mirrorProjects(ctx context.Context, c *client) map[string]string {
	var e settings.Entry
	if err := c.call(ctx, "GET", settingsPath+"/mirror.projects", nil, &e); err != nil {
		return nil
	}
	projects, err := settings.Pairs(func(string, string) error { return nil }).Parse(e.Value)
	if err != nil {
		return nil
	}
	return projects
}

// siteCA asks a node for the certificate of its site's CA.
func siteCA(ctx context.Context, c *client) ([]byte, error) {
	answer, err := c.stream(ctx, "GET", "/api/atoll/v1/ca", nil)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	return io.ReadAll(io.LimitReader(answer.Body, 1<<20))
}
