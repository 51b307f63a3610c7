//go:build azure || cloud

package cloud

import (
	"context"
	"fmt"
	"maps"
	"strconv"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/azure" // registers itself
	"github.com/distribution/distribution/v3/registry/storage/driver/factory"
)

func openAzure() opener { return newAzure }

func newAzure(ctx context.Context, parameters map[string]any) (storagedriver.StorageDriver, error) {
	parameters = maps.Clone(parameters)
	// This driver, unlike the others, takes no number or boolean as text.
	if text, ok := parameters["max_retries"].(string); ok {
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, fmt.Errorf("max_retries is no number")
		}
		parameters["max_retries"] = n
	}
	if text, ok := parameters["skipverify"].(string); ok {
		skip, err := strconv.ParseBool(text)
		if err != nil {
			return nil, fmt.Errorf("skipverify is neither true nor false")
		}
		parameters["skipverify"] = skip
	}
	// The driver wants to be told what the key is for.
	if parameters["credentials"] == nil && parameters["accountkey"] != nil {
		parameters["credentials"] = map[string]any{"type": azure.CredentialsTypeSharedKey}
	}
	// How often the driver asks whether a copy has ended, each time waiting a tenth
	// of a second longer: its own 5 give a large blob one second.
	if parameters["max_retries"] == nil {
		parameters["max_retries"] = 30
	}
	return factory.Create(ctx, "azure", parameters)
}
