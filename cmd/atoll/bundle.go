package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/offline"
)

func newBundle() *cobra.Command {
	return group(&cobra.Command{Use: "bundle", Short: "Carry content between sites in signed files"},
		newBundleExport(), newBundleImport(), newBundleVerify(), newBundleInspect())
}

func newBundleExport() *cobra.Command {
	var request offline.ExportRequest
	var output string
	cmd := &cobra.Command{
		Use:   "export -o FILE",
		Short: "Write a signed bundle of this site's projects (-o - for standard output)",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output == "" {
				return usageError{errors.New("atoll bundle export needs -o FILE (or -o - for standard output)")}
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			body, err := json.Marshal(request)
			if err != nil {
				return err
			}
			answer, err := c.stream(cmd.Context(), "POST", "/api/atoll/v1/bundles/export", &payload{bytes.NewReader(body), "application/json", int64(len(body))})
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			n, err := saveStream(cmd, output, answer.Body)
			if err != nil {
				return err
			}
			if output == "-" {
				return nil
			}
			return done(cmd, exported{output, n}, "wrote %s (%s); check it anywhere with: atoll bundle verify %s --trust SITE.json", output, size(n), output)
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().StringSliceVar(&request.Projects, "project", nil, "projects to export (default: all that this site owns)")
	cmd.Flags().StringSliceVar(&request.To, "to", nil, "ids of the sites that may import it (default: any that trusts this one)")
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write; - for standard output")
	return cmd
}

// exported is what --format json says of a bundle that was written.
type exported struct {
	File string `json:"file"`
	Size int64  `json:"size"` // in bytes
}

// saveStream writes a stream that ends in a trailer-checked way to a file, which
// appears under its name only when it is whole and on stable storage.
func saveStream(cmd *cobra.Command, output string, from io.Reader) (int64, error) {
	bar := newProgress(cmd, -1, "exporting")
	defer bar.Finish()
	if output == "-" {
		return io.Copy(cmd.OutOrStdout(), io.TeeReader(from, bar))
	}
	temp, err := os.CreateTemp(filepath.Dir(output), "."+filepath.Base(output)+".*")
	if err != nil {
		return 0, err
	}
	defer os.Remove(temp.Name()) // does nothing once renamed
	n, err := io.Copy(temp, io.TeeReader(from, bar))
	err = errors.Join(err, temp.Chmod(0o644), temp.Sync(), temp.Close())
	if err != nil {
		return n, fmt.Errorf("writing %s: %w; nothing was kept", output, err)
	}
	return n, os.Rename(temp.Name(), output)
}

func newBundleImport() *cobra.Command {
	var dryRun bool
	var as []string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Verify a bundle and take in what it holds (- for standard input)",
		Args:  exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			file, length, err := openBundle(cmd, args[0])
			if err != nil {
				return err
			}
			defer file.Close()
			query := url.Values{"as": as}
			if dryRun {
				query.Set("dry_run", "true")
			}
			bar := newProgress(cmd, length, "importing")
			answer, err := c.stream(cmd.Context(), "POST", "/api/atoll/v1/bundles/import?"+query.Encode(), &payload{io.TeeReader(file, bar), "application/x-tar", length})
			bar.Finish()
			if err != nil {
				return refusal(err)
			}
			defer answer.Body.Close()
			var report airgap.Report
			if err := json.NewDecoder(io.LimitReader(answer.Body, 64<<20)).Decode(&report); err != nil {
				return fmt.Errorf("reading the report: %w", err)
			}
			return show(cmd, report, func(w *tabwriter.Writer) { printReport(w, report) })
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "verify everything and say what would happen, change nothing")
	cmd.Flags().StringArrayVar(&as, "as", nil, "THEIRS=OURS: take their project under another name here")
	return cmd
}

// refusal gives a node's refusal of a bundle the exit code of refusals.
func refusal(err error) error {
	if code, _, _ := fault.Public(err); strings.HasPrefix(code, "BUNDLE_") {
		return &airgap.Refusal{Reason: errors.New(code), Text: err.Error()}
	}
	return err
}

func openBundle(cmd *cobra.Command, name string) (io.ReadCloser, int64, error) {
	if name == "-" {
		return io.NopCloser(cmd.InOrStdin()), -1, nil
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, 0, usageError{err}
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, info.Size(), nil
}

func newBundleVerify() *cobra.Command {
	var trust string
	cmd := &cobra.Command{
		Use:   "verify FILE --trust SITE.json",
		Short: "Prove on any machine, without a node, that a bundle is whole and from the site you trust",
		Args:  exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if trust == "" {
				return usageError{errors.New("atoll bundle verify needs --trust FILE, the site file that you got from the sending site's people: the key inside a bundle proves nothing")}
			}
			site, err := readSite(trust)
			if err != nil {
				return err
			}
			file, length, err := openBundle(cmd, args[0])
			if err != nil {
				return err
			}
			defer file.Close()
			bar := newProgress(cmd, length, "verifying")
			report, err := airgap.Verify(cmd.Context(), io.TeeReader(file, bar), site)
			bar.Finish()
			if err != nil {
				return err
			}
			return show(cmd, report, func(w *tabwriter.Writer) {
				fmt.Fprintf(w, "verified: whole, unaltered and signed by site %s (%s)\n", site.ID, site.Fingerprint)
				printReport(w, report)
			})
		},
	}
	formatFlag(cmd)
	cmd.Flags().StringVar(&trust, "trust", "", "site file of the site that must have signed the bundle")
	return cmd
}

func newBundleInspect() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Show what a bundle says it holds; checks no signature against a trusted key",
		Args:  exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, _, err := openBundle(cmd, args[0])
			if err != nil {
				return err
			}
			defer file.Close()
			report, err := airgap.Inspect(cmd.Context(), file)
			if err != nil {
				return err
			}
			return show(cmd, report, func(w *tabwriter.Writer) {
				fmt.Fprintln(w, "NOT VERIFIED: this is what the bundle says of itself; use atoll bundle verify")
				printReport(w, report)
			})
		},
	}
	formatFlag(cmd)
	return cmd
}

// newProgress shows a bar when standard error is a person's screen. length is
// -1 when unknown.
func newProgress(cmd *cobra.Command, length int64, what string) *progressbar.ProgressBar {
	return progressbar.NewOptions64(length,
		progressbar.OptionSetDescription(what),
		progressbar.OptionSetWriter(cmd.ErrOrStderr()),
		progressbar.OptionSetVisibility(terminal(cmd.ErrOrStderr())),
		progressbar.OptionShowBytes(true),
		progressbar.OptionClearOnFinish(),
	)
}
