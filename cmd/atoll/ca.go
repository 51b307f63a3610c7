package main

import (
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

func newCA() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Print the site's CA certificate (PEM), which clients need to trust its nodes",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			answer, err := c.stream(cmd.Context(), "GET", "/api/atoll/v1/ca", nil)
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			pem, err := io.ReadAll(io.LimitReader(answer.Body, 1<<20))
			if err != nil {
				return err
			}
			return show(cmd, map[string]string{"certificate": string(pem)}, func(w *tabwriter.Writer) { w.Write(pem) })
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}
