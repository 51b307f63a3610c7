package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/airgap"
)

func newSite() *cobra.Command {
	return group(&cobra.Command{Use: "site", Short: "This site's identity, and which other sites may write here"},
		newSiteShow(), newSiteTrust(), newSiteDistrust())
}

func newSiteShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show this site's identity and the sites that it trusts; with --format json: the file for atoll site trust elsewhere",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var site airgap.Site
			if err := c.call(cmd.Context(), "GET", "/api/atoll/v1/site", nil, &site); err != nil {
				return err
			}
			var trusts []airgap.Trust
			if format, _ := cmd.Flags().GetString("format"); format == "table" {
				if err := c.call(cmd.Context(), "GET", "/api/atoll/v1/site/trusts", nil, &trusts); err != nil {
					return err
				}
			}
			return show(cmd, site, func(w *tabwriter.Writer) { printSite(w, site, trusts) })
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}

func printSite(w *tabwriter.Writer, site airgap.Site, trusts []airgap.Trust) {
	row(w, "site", site.ID)
	row(w, "name", site.Name)
	row(w, "incarnation", site.Incarnation)
	row(w, "public key", site.RootKey)
	row(w, "fingerprint", site.Fingerprint)
	w.Flush()
	if len(trusts) == 0 {
		fmt.Fprintln(w, "\nno other site may write here; allow one with: atoll site trust FILE --accept PROJECT")
		return
	}
	fmt.Fprintln(w)
	row(w, "TRUSTED SITE", "NAME", "MAY WRITE", "FINGERPRINT")
	for _, t := range trusts {
		accept := strings.Join(t.Accept, ",")
		if accept == "" {
			accept = "nothing"
		}
		row(w, t.Site.ID, t.Site.Name, accept, t.Site.Fingerprint)
	}
}

func newSiteTrust() *cobra.Command {
	var accept []string
	var fingerprint string
	cmd := &cobra.Command{
		Use:   "trust FILE --accept PROJECT[,PROJECT...]",
		Short: "Trust another site: FILE is what atoll site show --format json printed there",
		Long:  "Trust another site: FILE is what atoll site show --format json printed there.\nCompare the fingerprint with that site's people over a way that you trust, then\npass it with --fingerprint, or confirm it when asked.",
		Args:  exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			site, err := readSite(args[0])
			if err != nil {
				return err
			}
			if err := confirmFingerprint(cmd, site, fingerprint); err != nil {
				return err
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			var trusted airgap.Trust
			if err := c.call(cmd.Context(), "POST", "/api/atoll/v1/site/trusts", airgap.Trust{Site: site, Accept: accept}, &trusted); err != nil {
				return err
			}
			return show(cmd, trusted, func(w *tabwriter.Writer) {
				if len(accept) == 0 {
					fmt.Fprintf(w, "site %s is trusted but may write nothing; allow projects with --accept\n", site.ID)
					return
				}
				fmt.Fprintf(w, "site %s may write: %s\n", site.ID, strings.Join(accept, ", "))
			})
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().StringSliceVar(&accept, "accept", nil, "projects that this site may write, by the names that they have there; '*' for all")
	cmd.Flags().StringVar(&fingerprint, "fingerprint", "", "the fingerprint that the site's key must have (SHA256:...)")
	return cmd
}

func readSite(name string) (airgap.Site, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return airgap.Site{}, usageError{err}
	}
	var site airgap.Site
	if err := json.Unmarshal(data, &site); err != nil {
		return site, usageError{fmt.Errorf("%s is no site file (make one there with: atoll site show --format json > FILE): %w", name, err)}
	}
	if err := site.Validate(); err != nil {
		return site, usageError{fmt.Errorf("%s is no site file (make one there with: atoll site show --format json > FILE): %w", name, err)}
	}
	return site, nil
}

// confirmFingerprint compares the site's key with what the person says it must
// be; on a terminal it asks. Without either the file is taken as it is.
func confirmFingerprint(cmd *cobra.Command, site airgap.Site, want string) error {
	have := site.Fingerprint
	if want != "" {
		if want != have {
			return usageError{fmt.Errorf("the file's key has the fingerprint %s, not %s: it is not the site you expect", have, want)}
		}
		return nil
	}
	if !terminal(cmd.InOrStdin()) {
		return nil
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "site %s (%s)\nfingerprint %s\nIs that what its people told you? (yes/no) ", site.ID, site.Name, have)
	line, err := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "yes" {
		return usageError{fmt.Errorf("not confirmed: nothing changed")}
	}
	return nil
}

func newSiteDistrust() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "distrust SITE",
		Short: "Stop accepting anything from a site; what it wrote so far stays",
		Args:  exactArgs("SITE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			if err := c.call(cmd.Context(), "DELETE", "/api/atoll/v1/site/trusts/"+url.PathEscape(args[0]), nil, nil); err != nil {
				return err
			}
			return done(cmd, map[string]string{"id": args[0]}, "site %s is trusted no longer", args[0])
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	return cmd
}
