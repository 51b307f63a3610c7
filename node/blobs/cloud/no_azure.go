//go:build !(azure || cloud)

package cloud

func openAzure() opener { return nil }
