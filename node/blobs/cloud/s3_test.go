//go:build s3 || cloud

package cloud

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// s3server runs a real S3 server and gives the parameters of a bucket in it.
func s3server(t *testing.T) map[string]any {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"data/bucket", "attributes"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	access, secret := rand.Text(), rand.Text()
	address := serve(t, "versitygw", "testdeps", func(host, port string) []string {
		// Attributes in files: a temporary directory may be where the kernel has none.
		return []string{"--port", host + ":" + port, "--access", access, "--secret", secret, "--quiet",
			"posix", "--sidecar", filepath.Join(dir, "attributes"), filepath.Join(dir, "data")}
	})
	return map[string]any{
		"accesskey": access, "secretkey": secret, "bucket": "bucket", "region": "us-east-1", "forcepathstyle": "true",
		"regionendpoint": "http://" + address, "secure": "false",
	}
}

func TestConformanceS3(t *testing.T) {
	bucket := s3server(t)
	suite(t, t.Context(), "s3", bucket)
	t.Run("presigned", func(t *testing.T) {
		testPresigned(t, usable(t, t.Context(), "s3", with(bucket, "rootdirectory", "/presigned")), "Signature", strings.Clone)
	})
	t.Run("wrong", func(t *testing.T) {
		testWrong(t, t.Context(), "s3", with(bucket, "bucket", "none-such"), "secretkey")
		testWrong(t, t.Context(), "s3", with(bucket, "secretkey", "wrong-secret-"+rand.Text()), "secretkey")
		nowhere := with(bucket, "region", "")
		delete(nowhere, "regionendpoint")
		testWrong(t, t.Context(), "s3", nowhere, "secretkey")
	})
}
