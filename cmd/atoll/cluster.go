package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/peers"
)

func newCluster() *cobra.Command {
	return group(&cobra.Command{Use: "cluster", Short: "Look at the nodes of this site"}, newClusterStatus())
}

func newClusterStatus() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show who is up, who leads and votes, what lacks copies, and what to do",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var status peers.Status
			if err := c.call(cmd.Context(), "GET", "/api/atoll/v1/cluster", nil, &status); err != nil {
				return err
			}
			return show(cmd, status, func(w *tabwriter.Writer) { printStatus(w, status) })
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func printStatus(w *tabwriter.Writer, s peers.Status) {
	row(w, "NODE", "ADDRESS", "STATE", "ROLE", "LAG")
	for _, n := range s.Nodes {
		state, role := "down", "non-voter"
		if n.Up {
			state = "up"
		}
		if n.Voter {
			role = "voter"
		}
		if n.Leader {
			role = "leader"
		}
		name := n.Name
		if n.ID == s.Self {
			name += " (this node)"
		}
		row(w, name, n.Addr, state, role, n.Lag)
	}
	w.Flush()
	fmt.Fprintf(w, "\nblobs: %d, lacking copies: %d, lost: %d\n", s.Blobs, s.UnderReplicated, s.Lost)
	for _, line := range s.Advice {
		fmt.Fprintln(w, line)
	}
}
