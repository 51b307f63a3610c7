// Command atoll is the whole product: the node (atoll serve) and every command
// that talks to one or works on a bundle without any.
//
// Each subcommand has a file of its own that reads flags and calls a room; no
// decision about content is made here. Flags win over ATOLL_... variables,
// which win over the configuration file (see config.go). Exit codes are in
// exit.go.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	// The QUIC library would print about small buffers past the log; atoll doctor says it.
	_ = os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run executes one command line and gives the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	err := root.ExecuteContext(ctx)
	code := exitCode(err)
	switch {
	case code == exitInterrupted:
		fmt.Fprintln(errs, "atoll: interrupted") // the rest is only what that made of the work
	case err != nil:
		fmt.Fprintf(errs, "atoll: %v\n", err)
	}
	return code
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "atoll",
		Short:         "A container registry for places a cloud registry cannot reach",
		Long:          "Atoll is a container registry in one binary: nodes of one site form a cluster,\nsites exchange content by signed bundle files.\n\nStart a site on this machine:   atoll serve --init\nAdd a node to it:               atoll token create, then atoll serve --join ADDR --token TOKEN\nCarry content to another site:  atoll bundle export -o site.tar, then atoll bundle import site.tar\n" + exitCodesHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := applySettings(cmd); err != nil {
				return err
			}
			return checkFormat(cmd)
		},
	}
	root.PersistentFlags().String("config", "", "configuration file in YAML: one key a flag, for example listen: 0.0.0.0:443")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.CompletionOptions.DisableDefaultCmd = true
	return group(root, newServe(), newToken(), newCluster(), newNode(), newBackup(), newRestore(), newRebuild(), newScrub(), newDoctor(), newSite(), newBundle(), newBlobs(), newAdopt(), newSettings(), newTransfers(), newPrefetch(), newProject(), newMirrorConfig(), newCA(), newLogin(), newVersion())
}

// group makes a command that only holds others: alone it prints its help, and
// what it does not hold is a wrong command line.
func group(cmd *cobra.Command, commands ...*cobra.Command) *cobra.Command {
	cmd.AddCommand(commands...)
	cmd.Args = cobra.ArbitraryArgs // else cobra answers, with another exit code
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return usageError{fmt.Errorf("there is no command %s %s; see %s --help", cmd.CommandPath(), args[0], cmd.CommandPath())}
	}
	return cmd
}

// exactArgs is cobra.ExactArgs with an error that says what to type.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		want := "no argument"
		if len(names) > 0 {
			want = strings.Join(names, " ")
		}
		return usageError{fmt.Errorf("%s takes %s, not %q; see %s --help", cmd.CommandPath(), want, strings.Join(args, " "), cmd.CommandPath())}
	}
}
