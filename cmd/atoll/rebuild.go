package main

import (
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/ledger"
)

func newRebuild() *cobra.Command {
	c := node.Config{Version: version}
	var logLevel string
	var keys func() (node.Keys, error)
	cmd := &cobra.Command{
		Use:   "rebuild --data DIR",
		Short: "Make a new site out of a node's blobs when all metadata is gone",
		Long: `Make a new site out of a node's blobs when all metadata is gone: no other node and
no backup is left, and meta.db and raft are missing in DIR.

Projects, repositories, tags and manifests come back as far as the node's ledger
tells (DIR/ledger, which each node keeps a few seconds behind); referrers follow
from the manifests. Manifests among the blobs of which it does not tell are put
into the repository rebuilt/found, by digest. Users, settings, trusted sites and
the identity of the old site do not come back: the site is a new one, with a new
password of admin. What the node was before is kept in DIR/before-rebuild. If the
command is cut short, run it again.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if c.Log, err = newLogger(cmd, logLevel); err != nil {
				return err
			}
			c.Data = dataDir(c.Data)
			if c.Keys, err = keys(); err != nil {
				return err
			}
			c.AdminPassword = os.Getenv("ATOLL_ADMIN_PASSWORD")
			bar := newProgress(cmd, -1, "rebuilding")
			report, err := node.Rebuild(cmd.Context(), c, func(name string) { bar.Describe("rebuilding " + name) })
			bar.Finish()
			if err != nil {
				return err
			}
			if err := show(cmd, report, func(w *tabwriter.Writer) { printRebuilt(w, report, c.Data) }); err != nil {
				return err
			}
			if n := len(report.Problems); n > 0 {
				return fault.New(fault.Precondition, "%d parts could not be brought back", n)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&c.Data, "data", "", "data directory of the stopped node (default "+node.DefaultDataDir()+")")
	cmd.Flags().StringVar(&c.Name, "name", "", "name of the node for people (default: the machine's)")
	cmd.Flags().StringVar(&logLevel, "log-level", "warn", "what to log: debug, info, warn or error")
	keys = keyFlags(cmd, true)
	formatFlag(cmd)
	return cmd
}

func printRebuilt(w *tabwriter.Writer, r ledger.Report, data string) {
	row(w, "projects", r.Projects)
	row(w, "manifests", r.Manifests)
	row(w, "tags", r.Tags)
	if r.Found > 0 {
		row(w, "without a name", fmt.Sprintf("%d manifests, in %s/%s by digest", r.Found, ledger.FoundProject, ledger.FoundRepository))
	}
	w.Flush()
	for _, p := range r.Problems {
		fmt.Fprintf(w, "left out: %s: %s\n", p.Name, p.Reason)
	}
	fmt.Fprintf(w, "\nstart it: atoll serve --data %s\n", data)
}
