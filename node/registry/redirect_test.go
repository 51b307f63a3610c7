package registry_test

import (
	"net/http"
	"strings"
	"testing"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/inmemory"

	"github.com/atoll-registry/atoll/node/blobs/cloud"
	"github.com/atoll-registry/atoll/node/registry"
)

// pointing is an object store that gives addresses.
type pointing struct{ storagedriver.StorageDriver }

func (pointing) RedirectURL(r *http.Request, path string) (string, error) {
	return "https://bucket.example" + path + "?signed=" + r.Method, nil
}

// With redirects on, a GET of a blob in an object store is sent there once the
// client may have it; all else is answered as ever.
func TestRedirect(t *testing.T) {
	for _, on := range []bool{true, false} {
		n := single(t, func(c *registry.Config) {
			c.Redirect = on
			c.Store.Rehome(cloud.New(t.Context(), pointing{inmemory.New()}, cloud.Direct))
		})
		n.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		content := []byte("a layer in a bucket")
		d := n.pushBlob("library/app", content).Digest
		path := "/v2/library/app/blobs/" + d.String()
		n.do("HEAD", path, nil).want(http.StatusOK)
		if on {
			a := n.do("GET", path, nil).want(http.StatusTemporaryRedirect)
			if to := a.header.Get("Location"); !strings.HasPrefix(to, "https://bucket.example/blobs/sha256/") || !strings.Contains(to, d.Encoded()) {
				t.Errorf("sent to %q", to)
			}
			n.as("").do("GET", path, nil).want(http.StatusUnauthorized)
		} else if a := n.do("GET", path, nil, "Range", "bytes=2-6").want(http.StatusPartialContent); string(a.body) != "layer" {
			t.Errorf("the range reads %q", a.body)
		}
		n.do("GET", path[:len(path)-1]+"0", nil).want(http.StatusNotFound)
	}
}
