package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/atoll-registry/atoll/node/storage"
)

// storageChoice reads --storage and the values of --storage-config: NAME=VALUE, or
// a file of them, in YAML or JSON. Secrets belong in a file or in the environment,
// where other users of the machine do not see them.
func storageChoice(kind string, config []string) (storage.Choice, error) {
	c := storage.Choice{Kind: kind}
	for _, text := range config {
		name, value, pair := strings.Cut(text, "=")
		given := map[string]any{name: value}
		if !pair {
			body, err := os.ReadFile(text)
			if err != nil {
				return c, usageError{fmt.Errorf("--storage-config %s is neither NAME=VALUE nor a file that can be read: %w", text, err)}
			}
			given = nil
			if err := yaml.Unmarshal(body, &given); err != nil {
				return c, usageError{fmt.Errorf("--storage-config %s: the file is no list of NAME: VALUE lines", text)} // its text may hold secrets
			}
		}
		for name, value := range given {
			if name == "" {
				return c, usageError{errors.New("--storage-config wants NAME=VALUE, for example bucket=images")}
			}
			if c.Parameters == nil {
				c.Parameters = map[string]any{}
			}
			c.Parameters[name] = value
		}
	}
	return c, nil
}
