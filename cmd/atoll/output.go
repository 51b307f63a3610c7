package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// formatFlag adds --format to a command that prints data.
func formatFlag(cmd *cobra.Command) {
	cmd.Flags().String("format", "table", "how to print: table or json")
}

// checkFormat refuses an unknown --format before the command does anything.
func checkFormat(cmd *cobra.Command) error {
	f := cmd.Flags().Lookup("format")
	if f == nil || f.Value.String() == "table" || f.Value.String() == "json" {
		return nil
	}
	return usageError{fmt.Errorf("--format is table or json, not %q", f.Value)}
}

// show prints data as the command's --format says: as JSON, or by the given
// function as text for a person.
func show(cmd *cobra.Command, data any, table func(w *tabwriter.Writer)) error {
	if format, _ := cmd.Flags().GetString("format"); format == "json" {
		enc := json.NewEncoder(cmd.OutOrStdout())
		enc.SetIndent("", "  ")
		return enc.Encode(data)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 4, 2, ' ', 0)
	table(w)
	return w.Flush()
}

// done says what a command did: on standard error for a person, or as data on
// standard output.
func done(cmd *cobra.Command, data any, format string, args ...any) error {
	if chosen, _ := cmd.Flags().GetString("format"); chosen == "json" {
		return show(cmd, data, nil)
	}
	_, err := fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...)
	return err
}

func row(w io.Writer, cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		texts[i] = fmt.Sprint(cell)
	}
	fmt.Fprintln(w, strings.Join(texts, "\t"))
}

// size prints bytes in binary units.
func size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}

// terminal reports whether the stream is a person's screen.
func terminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
