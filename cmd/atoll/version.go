package main

import (
	"runtime"
	"runtime/debug"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/bundle"
	clusterversion "github.com/atoll-registry/atoll/cluster/version"
)

// version is set by the build (-ldflags -X main.version=...).
var version = "dev"

type versionInfo struct {
	Version      string `json:"version"`
	Revision     string `json:"revision,omitempty"`
	Go           string `json:"go"`
	Platform     string `json:"platform"`
	BundleFormat int    `json:"bundle_format"`
	FeatureLevel int    `json:"feature_level"` // of sites: this one and the one before
	DataFormat   int    `json:"data_format"`   // of data directories
}

func newVersion() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this binary and what it works with",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versionInfo{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, BundleFormat: bundle.Version,
				FeatureLevel: clusterversion.Level, DataFormat: clusterversion.Format}
			if info, ok := debug.ReadBuildInfo(); ok {
				for _, s := range info.Settings {
					if s.Key == "vcs.revision" {
						v.Revision = s.Value
					}
				}
			}
			return show(cmd, v, func(w *tabwriter.Writer) {
				row(w, "atoll", v.Version)
				row(w, "built with", v.Go+" for "+v.Platform)
				row(w, "bundle format", v.BundleFormat)
				row(w, "feature level", v.FeatureLevel)
				row(w, "data format", v.DataFormat)
			})
		},
	}
	formatFlag(cmd)
	return cmd
}
