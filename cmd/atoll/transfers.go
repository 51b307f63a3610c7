package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/traffic"
)

const transfersPath = "/api/atoll/v1/transfers"

func newTransfers() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "transfers",
		Short: "Show the blobs on their way between nodes and to clients, like top",
		Long: "Shows what moves in the whole site: which blob, from where to where, how fast, how long\nit will take, and which cap holds it back; above that what each node has in use of its limits. On a terminal the list is live; elsewhere it is\nprinted once. " +
			"With --watch --format json each line is one list. Caps and limits: atoll settings show (traffic.…).",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			once, _ := cmd.Flags().GetBool("once")
			watch, _ := cmd.Flags().GetBool("watch")
			if once && watch {
				return usageError{fmt.Errorf("--once and --watch exclude each other")}
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			format, _ := cmd.Flags().GetString("format")
			live := terminal(cmd.OutOrStdout())
			if !watch && (once || format == "json" || !live) {
				var v traffic.View
				if err := c.call(cmd.Context(), "GET", transfersPath, nil, &v); err != nil {
					return err
				}
				return show(cmd, v, func(w *tabwriter.Writer) { printTransfers(w, v) })
			}
			return watchTransfers(cmd.Context(), c, func(v traffic.View) error {
				if format == "json" {
					return json.NewEncoder(cmd.OutOrStdout()).Encode(v)
				}
				return redraw(cmd.OutOrStdout(), live, v)
			})
		},
	}
	cmd.Flags().Bool("once", false, "print the list once and end")
	cmd.Flags().Bool("watch", false, "go on printing the list, also where there is no terminal")
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

// watchTransfers reads the events of a node until ctx ends, and connects again when
// the node says that this client was too slow.
func watchTransfers(ctx context.Context, c *client, each func(traffic.View) error) error {
	for {
		answer, err := c.stream(ctx, "GET", transfersPath+"/events", nil)
		if err != nil {
			return err
		}
		dropped, err := readEvents(answer.Body, each)
		answer.Body.Close()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return err
		case !dropped:
			return fault.New(fault.Unavailable, "%s ended the list; start the command again", c.name)
		}
	}
}

// eventMax bounds a line of an event.
const eventMax = 16 << 20

func readEvents(r io.Reader, each func(traffic.View) error) (dropped bool, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, eventMax)
	event := ""
	for lines.Scan() {
		if name, ok := strings.CutPrefix(lines.Text(), "event: "); ok {
			event = name
		}
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		switch {
		case ok && event == "dropped":
			return true, nil
		case ok && event == "transfers":
			var v traffic.View
			if err := json.Unmarshal([]byte(data), &v); err != nil {
				return false, fmt.Errorf("an event of the node cannot be read: %w", err)
			}
			if err := each(v); err != nil {
				return false, err
			}
		}
	}
	return false, nil // the connection ended, by whomever
}

// redraw prints the list over the one before on a terminal, else below it.
func redraw(to io.Writer, live bool, v traffic.View) error {
	var b strings.Builder
	if live {
		b.WriteString("\x1b[H\x1b[2J")
	}
	w := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	printTransfers(w, v)
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := io.WriteString(to, b.String())
	return err
}

func printTransfers(w *tabwriter.Writer, v traffic.View) {
	sum := int64(0)
	for _, one := range v.Transfers {
		sum += one.Rate
	}
	fmt.Fprintf(w, "%s: %d transfers, %s/s\n", v.At.Local().Format(time.TimeOnly), len(v.Transfers), size(sum))
	for _, s := range v.Silent {
		fmt.Fprintf(w, "node %s did not answer: %.120s\n", s.Node, s.Cause)
	}
	w.Flush()
	fmt.Fprintln(w)
	row(w, "NODE", "FETCHES", "OF THEM UNASKED", "ANSWERS", "CONNECTIONS", "MEMORY")
	for _, n := range v.Nodes {
		row(w, n.Node, of(n.Fetches), of(n.Background), of(n.Answers), of(n.Connections), size(n.Memory.Taken)+" of "+size(n.Memory.Most))
	}
	if len(v.Transfers) == 0 {
		return
	}
	w.Flush()
	fmt.Fprintln(w)
	row(w, "BLOB", "REPOSITORY", "FROM", "TO", "CLASS", "BY", "RATE", "DONE", "SIZE", "ETA", "HELD BACK BY")
	for _, one := range v.Transfers {
		row(w, shortDigest(one.Blob.String()), dash(one.Repository), one.From, one.To, one.Class, dash(one.Engine), size(one.Rate)+"/s", size(one.Done), size(one.Size),
			eta(one.ETA), dash(one.HeldBack))
	}
}

// of is how much of a limit is in use.
func of(b traffic.Bound) string { return fmt.Sprintf("%d of %d", b.Taken, b.Most) }

// shortDigest keeps as much of a digest as tells blobs apart for a person.
func shortDigest(d string) string {
	_, hex, _ := strings.Cut(d, ":")
	return cmp.Or(hex[:min(12, len(hex))], d)
}

func eta(seconds int64) string {
	if seconds < 0 {
		return "-"
	}
	return (time.Duration(seconds) * time.Second).String()
}
