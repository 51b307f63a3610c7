package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/peers"
)

func newToken() *cobra.Command {
	return group(&cobra.Command{Use: "token", Short: "Make the tokens by which nodes join this site"}, newTokenCreate())
}

func newTokenCreate() *cobra.Command {
	var ttl time.Duration
	var uses int
	var bootstrap bool
	var output string
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Print a token that lets a node join (the token alone, on standard output)",
		Long: `Print a token that lets a node join (the token alone, on standard output), made by a
node of the site. With --bootstrap it needs no node: the token is one by which
machines found a site together, when each has it and runs
atoll serve --join A:5001,B:5001,C:5001 --bootstrap-expect 3 --token-file FILE.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if bootstrap {
				for _, name := range []string{"ttl", "uses"} {
					if cmd.Flags().Changed(name) {
						return usageError{fmt.Errorf("--%s is not for a token of --bootstrap, which no node makes", name)}
					}
				}
				return createSiteToken(cmd, output)
			}
			if output != "" {
				return usageError{errors.New("-o is for --bootstrap; a join token is printed")}
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var made peers.JoinToken
			if err := c.call(cmd.Context(), "POST", "/api/atoll/v1/tokens", peers.NewToken{TTLSeconds: int64(ttl / time.Second), Uses: uses}, &made); err != nil {
				return err
			}
			return show(cmd, made, func(w *tabwriter.Writer) { fmt.Fprintln(w, made.Token) })
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().DurationVar(&ttl, "ttl", 24*time.Hour, "how long the token is valid")
	cmd.Flags().IntVar(&uses, "uses", 1, "how many nodes may join with it")
	cmd.Flags().BoolVar(&bootstrap, "bootstrap", false, "make a token by which machines found a site together, without a node")
	cmd.Flags().StringVarP(&output, "output", "o", "", "with --bootstrap: file to write instead, readable to its owner only")
	return cmd
}

// createSiteToken makes a token for atoll serve --bootstrap-expect. A file that is
// there stays: machines may have it.
func createSiteToken(cmd *cobra.Command, output string) error {
	token, err := pki.NewSiteToken()
	if err != nil {
		return err
	}
	if output == "" || output == "-" {
		return show(cmd, struct {
			Token string `json:"token"`
		}{token.String()}, func(w *tabwriter.Writer) { fmt.Fprintln(w, token) })
	}
	file, err := os.OpenFile(output, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fault.New(fault.Conflict, "%s is there already: take another name, or remove it if no machine has its token", output)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(file, token)
	if err = errors.Join(err, file.Sync(), file.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", output, errors.Join(err, os.Remove(output)))
	}
	return done(cmd, struct {
		File string `json:"file"`
	}{output}, "wrote %s; copy it to each machine of the site that is to be, and keep it secret", output)
}
