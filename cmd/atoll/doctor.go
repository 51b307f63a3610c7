package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node"
	"github.com/atoll-registry/atoll/node/doctor"
	"github.com/atoll-registry/atoll/node/fault"
)

func newDoctor() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Examine a node, its machine and its ways to the others, and say what to change",
		Long: `Examine a node: buffers, congestion control, disk, memory, certificate; and for each
other node whether TCP and UDP get through both ways, the clocks, the MTU and which
transport is used. One line each, with what to change; the exit code is 1 when
something is bad. Of a node that does not run only the machine is examined.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, err := examine(cmd)
			if err != nil {
				return err
			}
			if err := show(cmd, report, func(w *tabwriter.Writer) { printFindings(w, report) }); err != nil {
				return err
			}
			if report.Worst() == doctor.Bad {
				return errors.New("something is bad: see the lines above that begin with bad")
			}
			return nil
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

// examine asks the node, or looks at the machine when no node runs on it.
func examine(cmd *cobra.Command) (report doctor.Report, err error) {
	server, _ := cmd.Flags().GetString("server")
	data, _ := cmd.Flags().GetString("data")
	if data == "" {
		data = node.DefaultDataDir()
	}
	_, absent := os.Stat(filepath.Join(data, node.SocketName))
	if server == "" && absent != nil {
		return localReport(cmd.Context(), data)
	}
	c, err := newClient(cmd)
	if err != nil {
		return report, err
	}
	err = c.call(cmd.Context(), "GET", "/api/atoll/v1/doctor", nil, &report)
	if server == "" && fault.Is(err, fault.Unavailable) { // a socket that a dead node left
		return localReport(cmd.Context(), data)
	}
	return report, err
}

func localReport(ctx context.Context, data string) (doctor.Report, error) {
	if _, err := os.Stat(data); err != nil {
		return doctor.Report{}, fault.Wrap(err, fault.NotFound, "there is no data directory %s; name the node's with --data DIR, or a node elsewhere with --server URL", data)
	}
	return doctor.Report{Findings: doctor.Local(ctx, data)}, nil
}

func printFindings(w *tabwriter.Writer, r doctor.Report) {
	if !r.Running {
		fmt.Fprintln(w, "the node does not run: only its machine was examined")
	}
	for _, f := range r.Findings {
		text := f.Text
		if f.Remedy != "" {
			text += " -> " + f.Remedy
		}
		row(w, f.State, f.Check, f.Peer, strings.ReplaceAll(text, "\n", " "))
	}
}
