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
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
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
	if err != nil {
		fmt.Fprintf(errs, "atoll: %v\n", err)
	}
	return exitCode(err)
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "atoll",
		Short:         "A container registry for places a cloud registry cannot reach",
		Long:          "Atoll is a container registry in one binary: nodes of one site form a cluster,\nsites exchange content by signed bundle files.\n\nStart a site on this machine:   atoll serve --init\nAdd a node to it:               atoll token create, then atoll serve --join ADDR --token TOKEN\nCarry content to another site:  atoll bundle export -o site.tar, then atoll bundle import site.tar\n" + exitCodesHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return applySettings(cmd)
		},
	}
	root.PersistentFlags().String("config", "", "configuration file in YAML: one key a flag, for example `listen: 0.0.0.0:443`")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(newServe(), newToken(), newCluster(), newSite(), newBundle(), newCA(), newLogin(), newVersion())
	return root
}

// exactArgs is cobra.ExactArgs with an error that says what to type.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return usageError{fmt.Errorf("%s takes %d argument(s) %v, got %d; see %s --help", cmd.CommandPath(), len(names), names, len(args), cmd.CommandPath())}
		}
		return nil
	}
}
