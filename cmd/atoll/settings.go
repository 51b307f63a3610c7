package main

import (
	"fmt"
	"net/url"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node/settings"
)

const settingsPath = "/api/atoll/v1/settings"

func newSettings() *cobra.Command {
	return group(&cobra.Command{Use: "settings", Short: "Look at the settings of this site and change them while it runs"},
		newSettingsShow(), newSettingsSet(), newSettingsReset())
}

func newSettingsShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show",
		Short: "List the settings, what is in force and what each does",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var all []settings.Entry
			if err := c.call(cmd.Context(), "GET", settingsPath, nil, &all); err != nil {
				return err
			}
			return show(cmd, all, func(w *tabwriter.Writer) {
				row(w, "SETTING", "VALUE", "DEFAULT", "WHAT IT DOES")
				for _, e := range all {
					row(w, e.Name, orNothing(e.Value), orNothing(e.Default), e.Summary)
				}
			})
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func orNothing(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func newSettingsSet() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "set SETTING VALUE",
		Short: "Change a setting on every node of the site, at once",
		Args:  exactArgs("SETTING", "VALUE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var e settings.Entry
			if err := c.call(cmd.Context(), "PUT", settingsPath+"/"+url.PathEscape(args[0]), settings.Change{Value: args[1]}, &e); err != nil {
				return err
			}
			return done(cmd, e, "%s is %s", e.Name, orNothing(e.Value))
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func newSettingsReset() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "reset SETTING",
		Short: "Give a setting its default back",
		Args:  exactArgs("SETTING"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			if err := c.call(cmd.Context(), "DELETE", settingsPath+"/"+url.PathEscape(args[0]), nil, nil); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.ErrOrStderr(), "%s has its default again\n", args[0])
			return err
		},
	}
	clientFlags(cmd)
	return cmd
}
