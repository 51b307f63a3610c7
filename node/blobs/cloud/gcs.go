//go:build gcs || cloud

package cloud

import (
	"context"
	"maps"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/gcs"
)

func openGCS() opener { return newGCS }

func newGCS(ctx context.Context, parameters map[string]any) (storagedriver.StorageDriver, error) {
	if given, ok := parameters["credentials"].(map[string]any); ok {
		// The driver wants what an older YAML library made of them.
		credentials := map[any]any{}
		for name, value := range given {
			credentials[name] = value
		}
		parameters = maps.Clone(parameters)
		parameters["credentials"] = credentials
	}
	return gcs.FromParameters(ctx, parameters)
}
