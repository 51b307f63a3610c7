package main

import (
	"cmp"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/prefetch"
)

const prefetchPath = "/api/atoll/v1/prefetch"

func newPrefetch() *cobra.Command {
	return group(&cobra.Command{
		Use: "prefetch", Short: "Bring images to nodes before anybody asks for them",
		Long: "A prefetch brings tags to nodes before a time of the day, as the least urgent of all\ntransfers. What it brought stays on its nodes until it expires or the prefetch is cancelled.",
	}, newPrefetchCreate(), newPrefetchList(), prefetchCommand("show", "Show how far a prefetch is on each node, and its log", "GET"),
		prefetchCommand("cancel", "End a prefetch; what it brought is not kept for it any more", "DELETE"))
}

func newPrefetchCreate() *cobra.Command {
	var s prefetch.Spec
	cmd := &cobra.Command{
		Use:   "create --repo PROJECT/REPOSITORY --tag TAG --to NODE --before HH:MM",
		Short: "Bring tags to nodes before a time of the day, once or by a schedule",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, name := range []string{"repo", "tag", "to", "before"} {
				if !cmd.Flags().Changed(name) {
					return usageError{fmt.Errorf("--%s is missing; see %s --help", name, cmd.CommandPath())}
				}
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var v prefetch.View
			if err := c.call(cmd.Context(), "POST", prefetchPath, s, &v); err != nil {
				return err
			}
			return done(cmd, v, "prefetch %s is on its way; see atoll prefetch show %s", v.ID, v.ID)
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.Repository, "repo", "", "the repository, PROJECT/REPOSITORY")
	f.StringSliceVar(&s.Tags, "tag", nil, "tags, or patterns such as v1.*; several by commas")
	f.StringSliceVar(&s.To, "to", nil, "nodes, or pairs LABEL=VALUE for all that have one; several by commas")
	f.StringVar(&s.Before, "before", "", "the time of the day by which all must be there, HH:MM in the time zone of the setting traffic.timezone")
	f.StringVar(&s.Cron, "cron", "", "begin again and again: minute hour day month weekday, such as '0 1 * * *'")
	f.IntVar(&s.KeepHours, "keep-hours", 0, "hours for which what was brought is kept after that; 0: a week")
	f.StringVar(&s.Engine, "engine", "", "what moves it: stream or bittorrent (default: the setting peers.transfer-engine)")
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func newPrefetchList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the prefetches, the newest first",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var all []prefetch.View
			if err := c.call(cmd.Context(), "GET", prefetchPath, nil, &all); err != nil {
				return err
			}
			return show(cmd, all, func(w *tabwriter.Writer) {
				row(w, "PREFETCH", "STATE", "LAST RUN", "REPOSITORY", "TAGS", "TO", "BEFORE", "SCHEDULE")
				for _, v := range all {
					row(w, v.ID, v.State, dash(string(v.LastRun)), v.Spec.Repository, strings.Join(v.Spec.Tags, ","), strings.Join(v.Spec.To, ","), v.Spec.Before, dash(v.Spec.Cron))
				}
			})
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func prefetchCommand(use, short, method string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   use + " PREFETCH",
		Short: short,
		Args:  exactArgs("PREFETCH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var v prefetch.View
			if err := c.call(cmd.Context(), method, prefetchPath+"/"+url.PathEscape(args[0]), nil, &v); err != nil {
				return err
			}
			if method == "DELETE" {
				return done(cmd, v, "prefetch %s: %s", v.ID, v.State)
			}
			return show(cmd, v, func(w *tabwriter.Writer) { printPrefetch(w, v) })
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func printPrefetch(w *tabwriter.Writer, v prefetch.View) {
	row(w, "prefetch", v.ID)
	row(w, "state", v.State)
	row(w, "what", v.Spec.Repository+": "+strings.Join(v.Spec.Tags, ", "))
	row(w, "where", strings.Join(v.Spec.To, ", "))
	row(w, "by", cmp.Or(v.Spec.Engine, "the site's engine"))
	row(w, "runs", fmt.Sprintf("%d, the last: %s", v.Runs, dash(string(v.LastRun))))
	if v.Next != nil {
		row(w, "next", v.Next.Local().Format(time.DateTime))
	}
	if v.Failure != "" {
		row(w, "failure", v.Failure)
	}
	if p := v.Progress; p != nil {
		row(w, "moves", p.Start.Local().Format(time.DateTime)+" to "+p.Deadline.Local().Format(time.DateTime))
		w.Flush()
		fmt.Fprintln(w)
		row(w, "NODE", "BLOBS", "MISSING", "BYTES LEFT", "RATE", "CAUSE")
		for _, name := range slices.Sorted(maps.Keys(p.Nodes)) {
			n := p.Nodes[name]
			row(w, name, n.Blobs, n.Missing, size(n.Bytes), size(n.Rate)+"/s", dash(n.Cause))
		}
	}
	w.Flush()
	for _, line := range v.Log {
		fmt.Fprintln(w, line)
	}
}
