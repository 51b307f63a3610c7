//go:build s3 || cloud

package cloud

import (
	"context"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	s3 "github.com/distribution/distribution/v3/registry/storage/driver/s3-aws"
)

func openS3() opener { return newS3 }

func newS3(ctx context.Context, parameters map[string]any) (storagedriver.StorageDriver, error) {
	return s3.FromParameters(ctx, parameters)
}
