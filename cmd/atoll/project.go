package main

import (
	"net/url"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/project"
)

func newProject() *cobra.Command {
	return group(&cobra.Command{Use: "project", Short: "Look after the projects of this site"}, newProjectReplicas())
}

func newProjectReplicas() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "replicas PROJECT [NUMBER | all | default]",
		Short: "Show or say on how many nodes a project's content is kept",
		Long: `Show on how many nodes what a project holds is kept, or say it: a number, all, or
default for the site's setting peers.replicas. What several projects hold is kept on
the most that one of them asks for, and never on fewer than peers.durability says.`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			path := "/api/atoll/v1/projects/" + url.PathEscape(args[0]) + "/replicas"
			var wanted project.Wanted
			if len(args) == 1 {
				if err := c.call(cmd.Context(), "GET", path, nil, &wanted); err != nil {
					return err
				}
				return show(cmd, wanted, func(w *tabwriter.Writer) { row(w, wanted.Replicas) })
			}
			if err := c.call(cmd.Context(), "PUT", path, project.Wanted{Replicas: args[1]}, &wanted); err != nil {
				return err
			}
			return done(cmd, wanted, "the content of %s is to be on so many nodes: %s", args[0], wanted.Replicas)
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}
