package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/upgrade"
)

func newClusterUpgrade() *cobra.Command {
	var finish bool
	cmd := &cobra.Command{
		Use:   "upgrade [--finish]",
		Short: "Show how far an upgrade of the nodes is, and end it",
		Long: `Show how far an upgrade of the nodes to a newer version is. While the site is at
the older feature level, the older version may be put back on any node. --finish
raises the level once all nodes run the newer version: only then is used what it
brings to the site's rows, and the older version is refused from then on.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			method := "GET"
			if finish {
				method = "POST"
			}
			var s upgrade.State
			if err := c.call(cmd.Context(), method, "/api/atoll/v1/cluster/upgrade", nil, &s); err != nil {
				return err
			}
			return show(cmd, s, func(w *tabwriter.Writer) { printUpgrade(w, s) })
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().BoolVar(&finish, "finish", false, "raise the site's feature level; the older version cannot be put back after it")
	return cmd
}

func printUpgrade(w *tabwriter.Writer, s upgrade.State) {
	fmt.Fprintf(w, "feature level of the site: %d; this node runs %s, level %d\n", s.Level, s.Version, s.ProgramLevel)
	for _, line := range s.Advice {
		fmt.Fprintln(w, line)
	}
	if len(s.Advice) == 0 {
		fmt.Fprintln(w, "no upgrade is under way")
	}
}
