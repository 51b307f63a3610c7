package main

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/scrub"
)

func newScrub() *cobra.Command {
	return group(&cobra.Command{
		Use:   "scrub",
		Short: "Check the blobs on a node's disk against their digests",
		Long: "Every node reads its blobs again in the background, slowly, and compares them with\ntheir digests. What is damaged or missing is fetched from another node, or named as lost.\n" +
			"How often and how fast: atoll settings show scrub.days, scrub.rate.",
	},
		scrubCommand("status", "Show how far the node has checked its blobs, and what was wrong with them", "GET"),
		scrubCommand("start", "Check all blobs of the node now, at the full rate", "POST"))
}

func scrubCommand(use, short, method string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var status scrub.Status
			if err := c.call(cmd.Context(), method, "/api/atoll/v1/scrub", nil, &status); err != nil {
				return err
			}
			return show(cmd, status, func(w *tabwriter.Writer) { printScrub(w, status) })
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func printScrub(w *tabwriter.Writer, s scrub.Status) {
	switch {
	case s.Running:
		fmt.Fprintf(w, "checking now: %.1f %%, %d blobs, %s\n", s.Percent, s.Pass.Blobs, size(s.Pass.Bytes))
	case s.Next != nil:
		fmt.Fprintf(w, "next check: %s\n", s.Next.Local().Format(time.DateTime))
	default:
		fmt.Fprintln(w, "next check: when atoll scrub start asks for it")
	}
	if s.Last.Finished.IsZero() {
		fmt.Fprintln(w, "last check: never to its end")
	} else {
		fmt.Fprintf(w, "last check: ended %s, %d blobs, %s, damaged: %d, missing: %d\n",
			s.Last.Finished.Local().Format(time.DateTime), s.Last.Blobs, size(s.Last.Bytes), s.Last.Damaged, s.Last.Missing)
	}
	if s.Lost > 0 {
		fmt.Fprintf(w, "lost in the whole site: %d; bring back nodes that are down, or push again what is named below\n", s.Lost)
	}
	if len(s.Findings) == 0 {
		return
	}
	w.Flush()
	fmt.Fprintln(w)
	row(w, "BLOB", "SIZE", "FOUND", "STATE", "WHEN", "REPOSITORIES")
	for _, f := range s.Findings {
		row(w, f.Digest, size(f.Size), f.Kind, f.State, f.At.Local().Format(time.DateTime), strings.Join(f.Repositories, ", "))
	}
}
