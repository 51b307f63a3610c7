//go:build !(gcs || cloud)

package cloud

func openGCS() opener { return nil }
