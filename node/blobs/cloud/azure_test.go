//go:build azure || cloud

package cloud

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob"
)

// certificate writes a certificate for 127.0.0.1 and its key.
func certificate(t *testing.T, certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// azureServer runs Microsoft's emulator of Azure Blob Storage and gives the
// parameters of a container in it. It speaks TLS: the driver's presigned URLs are
// good for nothing else.
func azureServer(t *testing.T) map[string]any {
	t.Helper()
	dir := t.TempDir()
	cert, private := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	certificate(t, cert, private)
	secret := make([]byte, 64)
	_, _ = rand.Read(secret) // it never fails
	key := base64.StdEncoding.EncodeToString(secret)
	address := serve(t, "azurite-blob", "test-cloud", func(host, port string) []string {
		return []string{"--blobHost", host, "--blobPort", port, "--location", dir, "--cert", cert, "--key", private, "--silent", "--disableTelemetry", "--skipApiVersionCheck"}
	}, "AZURITE_ACCOUNTS=atoll:"+key)
	url := "https://" + address + "/atoll"
	credential, err := azblob.NewSharedKeyCredential("atoll", key)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer transport.CloseIdleConnections()
	client, err := azblob.NewClientWithSharedKeyCredential(url, credential, &azblob.ClientOptions{ClientOptions: azcore.ClientOptions{Transport: transport}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.CreateContainer(t.Context(), "blobs", nil); err != nil {
		t.Fatal(err)
	}
	// As a flag brings it, everything is text.
	return map[string]any{"accountname": "atoll", "accountkey": key, "container": "blobs", "serviceurl": url, "skipverify": "true"}
}

func TestConformanceAzure(t *testing.T) {
	container := azureServer(t)
	suite(t, t.Context(), "azure", container)
	t.Run("presigned", func(t *testing.T) {
		testPresigned(t, usable(t, t.Context(), "azure", with(container, "rootdirectory", "/presigned")), "sig", strings.Clone)
	})
	t.Run("wrong", func(t *testing.T) {
		testWrong(t, t.Context(), "azure", with(container, "container", "none-such"), "accountkey")
		other := base64.StdEncoding.EncodeToString([]byte("wrong-secret-" + rand.Text()))
		testWrong(t, t.Context(), "azure", with(container, "accountkey", other), "accountkey")
	})
}
