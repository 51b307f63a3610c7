package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/storage"
)

func newBlobs() *cobra.Command {
	return group(&cobra.Command{Use: "blobs", Short: "Look after where a node keeps its blobs"}, newBlobsMigrate())
}

// pollEvery is how often the command asks how far the node is.
const pollEvery = 500 * time.Millisecond

func newBlobsMigrate() *cobra.Command {
	var to string
	var config []string
	var remove, status bool
	cmd := &cobra.Command{
		Use:   "migrate --to local|s3|gcs|azure",
		Short: "Move a node's blobs to another storage while it serves",
		Long: `Move a node's blobs to another storage while it serves.

New blobs go to the new storage at once; those that are elsewhere are read where
they are until each has been copied and its digest verified. The node goes on by
itself when this command is interrupted, and where it was when it is killed.
Afterwards start the node with the new --storage and --storage-config.

In a site of several nodes run it on each: they share what is in the new storage.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			choice, err := storageChoice(to, config)
			if err != nil {
				return err
			}
			if to == "" && !status {
				return usageError{errors.New("atoll blobs migrate needs --to local, s3, gcs or azure; or --status to see how far it is")}
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var now storage.Status
			if status {
				err = c.call(cmd.Context(), "GET", "/api/atoll/v1/blobs/migration", nil, &now)
			} else if err = c.call(cmd.Context(), "POST", "/api/atoll/v1/blobs/migration", storage.Request{To: choice, Delete: remove}, &now); err == nil {
				now, err = followMove(cmd, c)
			}
			if err != nil {
				return err
			}
			if err := show(cmd, now, func(w *tabwriter.Writer) { printMove(w, now) }); err != nil {
				return err
			}
			if now.State == storage.Incomplete {
				return fault.New(fault.Precondition, "%d blobs could not be moved; they stay where they are", len(now.Problems))
			}
			return nil
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().StringVar(&to, "to", "", "storage to move to: local, s3, gcs or azure")
	cmd.Flags().StringSliceVar(&config, "storage-config", nil, "its parameters, as for atoll serve: NAME=VALUE, or a file of them")
	cmd.Flags().BoolVar(&remove, "delete", false, "remove each blob from the old storage once the new one holds it")
	cmd.Flags().BoolVar(&status, "status", false, "only show how far a move is")
	return cmd
}

// followMove shows progress until the move is over.
func followMove(cmd *cobra.Command, c *client) (storage.Status, error) {
	bar := newProgress(cmd, -1, "moving blobs")
	defer bar.Finish()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		var now storage.Status
		if err := c.call(cmd.Context(), "GET", "/api/atoll/v1/blobs/migration", nil, &now); err != nil {
			return now, err
		}
		what := fmt.Sprintf("moving blobs, %d of %d", now.Checked, now.Total)
		if now.Waiting != "" {
			what += ", waiting: " + now.Waiting
		}
		bar.Describe(what)
		_ = bar.Set64(now.Bytes) // a bar that cannot be drawn is no failure
		if now.State != storage.Running {
			return now, nil
		}
		select {
		case <-cmd.Context().Done():
			return now, context.Cause(cmd.Context())
		case <-tick.C:
		}
	}
}

func printMove(w *tabwriter.Writer, s storage.Status) {
	row(w, "state", s.State)
	row(w, "from", dash(s.From))
	row(w, "to", s.To)
	if s.State != storage.None {
		row(w, "blobs", fmt.Sprintf("%d of %d, %d of them copied (%s)", s.Checked, s.Total, s.Moved, size(s.Bytes)))
	}
	if s.Waiting != "" {
		row(w, "waiting", s.Waiting)
	}
	for _, p := range s.Problems {
		row(w, "left", p.Digest+": "+p.Reason)
	}
	if s.State == storage.Done {
		fmt.Fprintln(w, "\nstart the node with this --storage from now on")
	}
}
