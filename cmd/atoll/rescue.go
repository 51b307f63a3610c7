package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/cluster/recovery"
	"github.com/atoll-registry/atoll/node"
)

func newClusterRecover() *cobra.Command {
	var data, clusterKey, logLevel string
	var keys func() (node.Keys, error)
	cmd := &cobra.Command{
		Use:   "recover --data DIR",
		Short: "Make this stopped node, alone, the whole site, when most voters are gone for good",
		Long: `Make this stopped node, alone, the whole site, when most voters are gone for good.

Everything that this node knows is kept; what only the lost nodes knew is not
there. The old state stays beside the new one, in DIR/before-recovery-N. It is
refused while a voter answers, while this node runs, and on a node that was left
out of another recovery. A node that had no vote needs the cluster key of one that
had: see --cluster-key.

Nodes of before that come back with their data are refused from then on. Save what
they alone have (atoll cluster salvage), wipe them (atoll node wipe) and join them
again. If the command is cut short, run it again.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLogger(cmd, logLevel)
			if err != nil {
				return err
			}
			var key []byte
			if clusterKey != "" {
				if key, err = os.ReadFile(clusterKey); err != nil {
					return usageError{err}
				}
			}
			data = dataDir(data)
			opens, err := keys()
			if err != nil {
				return err
			}
			out, err := node.Recover(cmd.Context(), node.Offline{Data: data, Keys: opens, Log: log}, key)
			if err != nil {
				return err
			}
			report := map[string]any{"site": out.Site, "node": out.Node, "epoch": out.Epoch.String(), "kept": filepath.Join(data, out.Kept), "left": out.Left, "resumed": out.Resumed}
			return show(cmd, report, func(w *tabwriter.Writer) {
				row(w, "site", out.Site)
				row(w, "recovery epoch", out.Epoch)
				if len(out.Left) > 0 {
					row(w, "left out", strings.Join(out.Left, ", "))
				}
				row(w, "old state", filepath.Join(data, out.Kept))
				w.Flush()
				fmt.Fprintf(w, "\nstart it:        atoll serve --data %s\nadd other nodes: atoll token create, then atoll serve --join there; those of before first: atoll node wipe --yes\n", data)
			})
		},
	}
	cmd.Flags().StringVar(&data, "data", "", "data directory of the stopped node (default "+node.DefaultDataDir()+")")
	cmd.Flags().StringVar(&clusterKey, "cluster-key", "", "file cluster.key of a node that voted, for one that did not")
	keys = keyFlags(cmd, false)
	cmd.Flags().StringVar(&logLevel, "log-level", "warn", "what to log: debug, info, warn or error")
	formatFlag(cmd)
	return cmd
}

func newClusterSalvage() *cobra.Command {
	var data, output, logLevel string
	var keys func() (node.Keys, error)
	cmd := &cobra.Command{
		Use:   "salvage --data DIR -o FILE",
		Short: "Save what a fenced, stopped node knows and the recovered site does not, as lines of JSON",
		Long: `Save what a fenced, stopped node knows and the recovered site does not: the rows
and journal entries that were written after the point from which the site was
recovered, as lines of JSON. Nothing in the directory changes.

The first line says from which revision on (since); each other line is a row
(table, key, revision, value) or an entry of a journal (log, seq, value). Tags are
the rows of the table "tag"; the content is among the blobs, which a wipe keeps.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if output == "" {
				return usageError{errors.New("name the file to write with -o FILE, or - for standard output")}
			}
			log, err := newLogger(cmd, logLevel)
			if err != nil {
				return err
			}
			data = dataDir(data)
			o := node.Offline{Data: data, Log: log}
			if o.Keys, err = keys(); err != nil {
				return err
			}
			if output == "-" {
				_, err := node.Salvage(cmd.Context(), o, cmd.OutOrStdout())
				return err
			}
			temp, err := os.CreateTemp(filepath.Dir(output), "."+filepath.Base(output)+".*")
			if err != nil {
				return err
			}
			defer os.Remove(temp.Name()) // does nothing once renamed
			var out recovery.Count
			out, err = node.Salvage(cmd.Context(), o, temp)
			if err := errors.Join(err, temp.Sync(), temp.Close()); err != nil {
				return err
			}
			if err := os.Rename(temp.Name(), output); err != nil {
				return err
			}
			return done(cmd, map[string]any{"file": output, "rows": out.Rows, "entries": out.Entries, "since": out.Since, "exact": out.Exact},
				"%s: %d rows and %d journal entries since revision %d", output, out.Rows, out.Entries, out.Since)
		},
	}
	cmd.Flags().StringVar(&data, "data", "", "data directory of the stopped node (default "+node.DefaultDataDir()+")")
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write; - for standard output")
	keys = keyFlags(cmd, false)
	cmd.Flags().StringVar(&logLevel, "log-level", "warn", "what to log: debug, info, warn or error")
	formatFlag(cmd)
	return cmd
}

func newNode() *cobra.Command {
	return group(&cobra.Command{Use: "node", Short: "This machine's node"}, newNodeWipe(), newNodeSeal(), newNodeRekey())
}

func newNodeWipe() *cobra.Command {
	var data string
	var yes bool
	cmd := &cobra.Command{
		Use:   "wipe --data DIR --yes",
		Short: "Make a stopped node's directory one of no node; its blobs stay",
		Long: `Make a stopped node's directory one of no node, so that it can join a site: its
identity, its keys and its copy of the metadata are deleted. Its blobs stay: when
it joins the site again it does not have to fetch them. Delete DIR as a whole to be
rid of them too.

Metadata that only this node has is lost: see atoll cluster salvage.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			data = dataDir(data)
			if !yes {
				return usageError{fmt.Errorf("this deletes the identity, the keys and the metadata of the node in %s; say --yes to do it", data)}
			}
			removed, err := node.Wipe(data)
			if err != nil {
				return err
			}
			return done(cmd, map[string]any{"data": data, "removed": removed},
				"wiped %s (%s); its blobs stay. Join it with: atoll serve --data %s --join ADDR --token TOKEN", data, dash(strings.Join(removed, " ")), data)
		},
	}
	cmd.Flags().StringVar(&data, "data", "", "data directory of the stopped node (default "+node.DefaultDataDir()+")")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	formatFlag(cmd)
	return cmd
}

func newNodeSeal() *cobra.Command {
	var data string
	var yes bool
	cmd := &cobra.Command{
		Use:   "seal --data DIR --yes",
		Short: "Strip a stopped node's identity before its disk is copied to other machines; its blobs stay",
		Long: `Strip a stopped node's identity before its disk is copied to other machines: its id,
its keys, its certificate and its copy of the metadata are deleted, its blobs stay.
Each machine that starts from the copy joins a site as a node of its own and need
not fetch what it has. Two machines with one identity would be one node in two
minds; the second to start refuses to.

If the node was a member, take it out of its site first: atoll cluster remove.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			data = dataDir(data)
			if !yes {
				return usageError{fmt.Errorf("this deletes the identity, the keys and the metadata of the node in %s; say --yes to do it", data)}
			}
			removed, err := node.Wipe(data)
			if err != nil {
				return err
			}
			return done(cmd, map[string]any{"data": data, "removed": removed},
				"sealed %s (%s); copy the disk now. On each copy: atoll serve --data %s --join ADDR --token TOKEN", data, dash(strings.Join(removed, " ")), data)
		},
	}
	cmd.Flags().StringVar(&data, "data", "", "data directory of the stopped node (default "+node.DefaultDataDir()+")")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	formatFlag(cmd)
	return cmd
}
