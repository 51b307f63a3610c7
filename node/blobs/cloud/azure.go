//go:build azure || cloud

package cloud

import (
	"context"
	"fmt"
	"maps"
	"strconv"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/azure" // registers itself
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
	return factory.Create(ctx, "azure", parameters)
}
