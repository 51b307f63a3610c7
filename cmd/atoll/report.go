package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/atoll-registry/atoll/airgap"
)

// printReport shows what a bundle holds and, after an import, what became of it.
func printReport(w *tabwriter.Writer, r airgap.Report) {
	row(w, "bundle", r.Bundle)
	row(w, "from site", fmt.Sprintf("%s (%s)", r.Source.Site, r.Source.Name))
	if len(r.Recipients) > 0 {
		row(w, "for sites", strings.Join(r.Recipients, ", "))
	}
	row(w, "newest entry", time.Unix(r.Created, 0).UTC().Format(time.RFC3339))
	row(w, "content", size(r.Size))
	w.Flush()
	printProjects(w, r)
	printImages(w, r)
	printBlobs(w, r)
}

func printProjects(w *tabwriter.Writer, r airgap.Report) {
	fmt.Fprintln(w)
	row(w, "PROJECT", "ENTRIES", "HERE", "OUTCOME", "STATE")
	for _, p := range r.Projects {
		state := "-"
		if p.StateCompared {
			state = "equal at both sites"
		}
		row(w, p.Project, fmt.Sprintf("%d..%d", p.From, p.Size), dash(p.Local), dash(p.Outcome), state)
	}
	w.Flush()
}

func printImages(w *tabwriter.Writer, r airgap.Report) {
	if len(r.Images) == 0 {
		return
	}
	fmt.Fprintln(w)
	row(w, "IMAGE", "DIGEST", "TYPE")
	for _, image := range r.Images {
		name := image.Project + "/" + image.Repository
		if image.Tag != "" {
			name += ":" + image.Tag
		}
		row(w, name, image.Digest, dash(image.Type))
	}
	w.Flush()
}

func printBlobs(w io.Writer, r airgap.Report) {
	fmt.Fprintln(w)
	if r.DryRun {
		fmt.Fprintln(w, "dry run: nothing was changed")
	}
	b := r.Blobs
	if b.Copied+b.Held+b.Staged > 0 {
		fmt.Fprintf(w, "blobs: %d copied (%s), %d held already, %d from an earlier try; %d entries applied\n", b.Copied, size(b.Bytes), b.Held, b.Staged, r.Entries)
	}
	if len(r.Absent) > 0 {
		fmt.Fprintf(w, "%d blobs are known but not held: the source did not have them either\n", len(r.Absent))
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
