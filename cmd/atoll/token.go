package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/peers"
)

func newToken() *cobra.Command {
	return group(&cobra.Command{Use: "token", Short: "Make the tokens by which nodes join this site"}, newTokenCreate())
}

func newTokenCreate() *cobra.Command {
	var ttl time.Duration
	var uses int
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Print a token that lets a node join (the token alone, on standard output)",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
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
	return cmd
}
