//go:build gcs || cloud

package cloud

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"golang.org/x/oauth2"
)

// toEmulator sends what the driver asks of www.googleapis.com, where it opens its
// uploads whatever is configured, to the emulator.
type toEmulator struct{ address string }

func (e toEmulator) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Host == "www.googleapis.com" {
		r = r.Clone(r.Context())
		r.URL.Scheme, r.URL.Host, r.Host = "http", e.address, e.address
	}
	return http.DefaultTransport.RoundTrip(r)
}

// gcsServer runs an emulator of Google Cloud Storage and gives the parameters of a
// bucket in it.
func gcsServer(t *testing.T) (address string, parameters map[string]any) {
	t.Helper()
	address = serve(t, "fake-gcs-server", "test-cloud", func(host, port string) []string {
		return []string{"-backend", "memory", "-scheme", "http", "-host", host, "-port", port, "-public-host", host + ":" + port, "-log-level", "warn"}
	})
	answer, err := http.Post("http://"+address+"/storage/v1/b?project=test", "application/json", bytes.NewReader([]byte(`{"name":"bucket"}`)))
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		t.Fatalf("making the bucket: %s", answer.Status)
	}
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"access_token":"token","token_type":"Bearer","expires_in":3600}`)
	}))
	t.Cleanup(tokens.Close)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return address, map[string]any{"bucket": "bucket", "credentials": map[string]any{
		"type": "service_account", "client_email": "atoll@test.iam.gserviceaccount.com", "private_key_id": "1", "token_uri": tokens.URL,
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	}}
}

func TestConformanceGCS(t *testing.T) {
	address, bucket := gcsServer(t)
	t.Setenv("STORAGE_EMULATOR_HOST", address)
	ctx := context.WithValue(t.Context(), oauth2.HTTPClient, &http.Client{Transport: toEmulator{address}})
	suite(t, ctx, "gcs", bucket)
	// Presigned addresses are for TLS, which the emulator does not speak here.
	reach := func(address string) string { return strings.Replace(address, "https://", "http://", 1) }
	t.Run("presigned", func(t *testing.T) {
		testPresigned(t, usable(t, ctx, "gcs", with(bucket, "rootdirectory", "/presigned")), "Signature", reach)
	})
	t.Run("wrong", func(t *testing.T) {
		testWrong(t, ctx, "gcs", with(bucket, "bucket", "none-such"), "credentials")
		testWrong(t, ctx, "gcs", with(bucket, "credentials", "not-a-map-"+rand.Text()), "credentials")
	})
}
