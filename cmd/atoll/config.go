package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// applySettings gives every flag that was not typed its value from the
// ATOLL_... variable of the same name (peer-listen: ATOLL_PEER_LISTEN), else
// from the configuration file.
func applySettings(cmd *cobra.Command) error {
	file, err := readConfig(cmd)
	if err != nil {
		return err
	}
	var errs []error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Changed || f.Name == "help" || f.Name == "config" {
			return
		}
		value, from := os.Getenv(envName(f.Name)), envName(f.Name)
		if value == "" {
			value, from = file[f.Name], "the configuration file"
		}
		if value == "" {
			return
		}
		if err := cmd.Flags().Set(f.Name, value); err != nil {
			errs = append(errs, usageError{fmt.Errorf("--%s from %s: %w", f.Name, from, err)})
		}
	})
	return errors.Join(errs...)
}

func envName(flag string) string {
	return "ATOLL_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// readConfig reads the file of --config or ATOLL_CONFIG: a flat map from flag
// name to value; a list stands for a comma-separated value. A key that is no
// flag of atoll serve is an error, so that a typing slip is not ignored.
func readConfig(cmd *cobra.Command) (map[string]string, error) {
	name, _ := cmd.Flags().GetString("config")
	if name == "" {
		name = os.Getenv("ATOLL_CONFIG")
	}
	if name == "" {
		return nil, nil
	}
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, usageError{fmt.Errorf("there is no configuration file %s", name)}
	}
	if err != nil {
		return nil, err
	}
	var raw map[string]any
	if err := yaml.Unmarshal(data, &raw); err != nil {
		return nil, usageError{fmt.Errorf("%s is no YAML map of settings: %w", name, err)}
	}
	known := newServe().Flags()
	values := make(map[string]string, len(raw))
	for key, value := range raw {
		if known.Lookup(key) == nil {
			return nil, usageError{fmt.Errorf("%s: there is no setting %q; the settings are the flags of atoll serve --help", name, key)}
		}
		switch v := value.(type) {
		case []any:
			parts := make([]string, len(v))
			for i, part := range v {
				parts[i] = fmt.Sprint(part)
			}
			values[key] = strings.Join(parts, ",")
		default:
			values[key] = fmt.Sprint(v)
		}
	}
	return values, nil
}
