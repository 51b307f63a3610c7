//go:build !(s3 || cloud)

package cloud

func openS3() opener { return nil }
