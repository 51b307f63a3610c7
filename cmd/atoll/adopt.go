package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/adopt"
	"github.com/atoll-registry/atoll/node/fault"
)

func newAdopt() *cobra.Command {
	var asked adopt.Request
	cmd := &cobra.Command{
		Use:   "adopt DIR",
		Short: "Take over the storage directory of distribution's registry or of zot",
		Long: `Take over the storage directory of distribution's registry or of zot: its
repositories, tags, manifests, referrers and blobs.

DIR is a directory on the node's machine that the node's user can read. Stop the
registry that it belongs to first. On one file system the blobs are not copied:
both directories then name the same files, and DIR can be removed afterwards.
Nothing in DIR is changed. Each blob is hashed; what is damaged is named and left
out. Run again, it adds what is missing and moves no tag.

app becomes library/app and team/app is app in the project team, which is made,
private, when there is none; with --project all go into one project.`,
		Args: exactArgs("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if asked.Dir, err = filepath.Abs(args[0]); err != nil {
				return err
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			report, err := followAdopt(cmd, c, asked)
			if report == nil {
				return err
			}
			if err := errors.Join(show(cmd, report, func(w *tabwriter.Writer) { printAdopted(w, *report) }), err); err != nil {
				return err
			}
			if n := len(report.Problems); n > 0 {
				return fault.New(fault.Precondition, "%d parts of the directory were left out", n)
			}
			return nil
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().StringVar(&asked.Project, "project", "", "project that takes all repositories, under their whole names")
	cmd.Flags().BoolVar(&asked.DryRun, "dry-run", false, "read names, manifests and sizes, hash nothing and change nothing")
	cmd.Flags().BoolVar(&asked.Copy, "copy", false, "copy the blobs even where links would do, when the other registry goes on with DIR")
	return cmd
}

// followAdopt shows progress until the report comes. With a report and an error
// the node broke off after what the report says.
func followAdopt(cmd *cobra.Command, c *client, asked adopt.Request) (*adopt.Report, error) {
	body, err := json.Marshal(asked)
	if err != nil {
		return nil, err
	}
	answer, err := c.stream(cmd.Context(), "POST", "/api/atoll/v1/adopt", &payload{bytes.NewReader(body), "application/json", int64(len(body))})
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	bar := newProgress(cmd, -1, "adopting")
	defer bar.Finish()
	lines := json.NewDecoder(answer.Body)
	for {
		var line adopt.Line
		if err := lines.Decode(&line); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, fault.Wrap(err, fault.Unavailable, "the node broke off; run the command again, it goes on where it was")
		}
		if p := line.Progress; p != nil {
			bar.Describe(fmt.Sprintf("adopting %s, %d of %d repositories", p.Repository, p.Done, p.Total))
			_ = bar.Set64(p.Bytes) // a bar that cannot be drawn is no failure
		}
		if line.Report != nil {
			if line.Failure != "" {
				err = fault.New(fault.Unavailable, "%s; run the command again, it goes on where it was", line.Failure)
			}
			return line.Report, err
		}
	}
}

func printAdopted(w *tabwriter.Writer, r adopt.Report) {
	row(w, "directory", fmt.Sprintf("%s (%s)", r.Dir, r.Kind))
	row(w, "repositories", r.Repositories)
	row(w, "manifests", r.Manifests)
	row(w, "tags", r.Tags)
	row(w, "blobs", fmt.Sprintf("%d linked, %d copied (%s), %d here already", r.Blobs.Linked, r.Blobs.Copied, size(r.Blobs.Bytes), r.Blobs.Held))
	w.Flush()
	if r.DryRun {
		fmt.Fprintln(w, "dry run: nothing was hashed or changed")
	}
	if len(r.Problems) == 0 {
		return
	}
	fmt.Fprintln(w)
	row(w, "LEFT OUT", "DIGEST", "WHY")
	for _, p := range r.Problems {
		name := p.Repository
		if p.Tag != "" {
			name += ":" + p.Tag
		}
		row(w, name, dash(p.Digest), p.Reason)
	}
}
