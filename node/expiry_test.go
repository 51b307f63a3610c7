package node

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/pki"
)

const day = 24 * time.Hour

// calendar is a clock that a test sets forward, on all machines at once.
type calendar struct{ ahead atomic.Int64 }

func (c *calendar) pass(d time.Duration) { c.ahead.Add(int64(d)) }
func (c *calendar) now() time.Time       { return time.Now().Add(time.Duration(c.ahead.Load())) }

// hangs puts the clock on a node's wall, and has it look at its certificate often.
func (c *calendar) hangs(config *Config) {
	config.clock, config.timings.Renew = c.now, 100*time.Millisecond
}

// insecure lets a test talk to a node whose certificate it cannot judge.
func (r *running) insecure() *running {
	r.http = &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true, // each request shakes hands
	}}
	return r
}

func (r *running) awaitHealthy() {
	r.t.Helper()
	await(r.t, "it is healthy again", func() string {
		if status, parts := r.components(); status != "healthy" {
			return fmt.Sprint(parts)
		}
		return ""
	})
}

// What is watched for its end are the very certificates that are in use.
func TestWatchedCertificates(t *testing.T) {
	n := start(t, config(t))
	watched := map[string]*x509.Certificate{}
	for _, c := range certificates(ground{member: n.member})() {
		if c.Within <= 0 || c.Renew == "" || c.Of == "" {
			t.Errorf("%+v", c)
		}
		watched[c.Code] = c.Leaf
	}
	authority := parseFirst(n.member.CA())
	if got := watched["node-certificate-expiring"]; got == nil || !got.Equal(n.member.Certificate().Leaf) {
		t.Error("the certificate of the node is not watched")
	}
	if got := watched["ca-expiring"]; got == nil || !got.Equal(authority) {
		t.Error("the authority is not watched")
	}
}

// A node whose disk does not keep a new identity cannot renew its certificate. That is
// shown before the end and more sharply behind it, and over as soon as the disk works.
func TestNodeCertificateExpires(t *testing.T) {
	var wall calendar
	c := config(t)
	wall.hangs(&c)
	n := start(t, c)
	name := filepath.Join(n.Data, "identity.json")
	must(t, os.Rename(name, name+".kept"))
	must(t, os.Mkdir(name, 0o700))
	date := n.member.Certificate().Leaf.NotAfter.Format(time.DateOnly)
	wall.pass(pki.NodeLife - 10*day)
	n.shows("node-certificate-expiring", "warning", "", "the certificate by which other nodes know this one ends on "+date)
	n.shows("node-certificate-expiring", "warning", "", "the certificate of node "+n.config.Name+" ends on "+date+" and was not renewed")
	wall.pass(11 * day)
	n.shows("node-certificate-expiring", "critical", "redis", "the certificate by which other nodes know this one has ended on "+date)
	n.shows("node-certificate-expiring", "critical", "redis", "the certificate of node "+n.config.Name+" has ended on "+date+" and was not renewed")
	if _, parts := n.components(); parts["portal"] != "healthy" {
		t.Errorf("health of what clients see: %v", parts)
	}
	p := n.push("library/app", "v1", content(94, 1000))
	n.pull(p, "v1")
	must(t, os.Remove(name))
	must(t, os.Rename(name+".kept", name))
	n.awaitCondition("node-certificate-expiring", false)
	n.awaitHealthy()
	if !n.member.Certificate().Leaf.NotAfter.After(wall.now()) {
		t.Error("it was not renewed")
	}
}

// A node without a vote whose site is dead for months gets no certificates: neither for
// its peers nor for its clients. It shows both, serves what it has with the old one, and
// gets new ones as soon as one that votes is back.
func TestCertificatesOfANodeAlone(t *testing.T) {
	var wall calendar
	c := config(t)
	wall.hangs(&c)
	one := start(t, c)
	two := join(t, one, "two", wall.hangs, func(c *Config) { c.TLS = TLSAuto }).insecure()
	allLive(t, []*running{one, two})
	p := one.push("library/app", "v1", content(95, 1000))
	two.pull(p, "v1")
	must(t, one.stop())
	wall.pass(pki.NodeLife - 10*day)
	two.shows("node-certificate-expiring", "warning", "redis", "see to it that this node reaches one") // no quorum either
	two.shows("tls-certificate-expiring", "warning", "redis", "the certificate of the site's own authority that clients see ends on ")
	if _, parts := two.components(); parts["portal"] != "healthy" {
		t.Errorf("health of what clients see: %v", parts)
	}
	wall.pass(11 * day)
	two.shows("node-certificate-expiring", "critical", "redis", "has ended on")
	two.shows("tls-certificate-expiring", "critical", "portal", "the certificate of the site's own authority that clients see has ended on ")
	two.pull(p, "v1")
	one = one.again()
	two.awaitCondition("node-certificate-expiring", false)
	two.awaitCondition("tls-certificate-expiring", false)
	two.awaitHealthy()
	one.awaitHealthy()
	one.pull(two.push("library/app", "v2", content(96, 1000)), "v2")
}

// The authority of a site lives for decades. Its end is shown a year before, and over
// when it is replaced.
func TestAuthorityExpires(t *testing.T) {
	var wall calendar
	c := config(t)
	wall.hangs(&c)
	n := start(t, c)
	const step = 390 * day // further at once would not be believed
	for range int(pki.AuthorityLife/step) - 1 {
		wall.pass(step)
		await(t, "the site takes it for the time", func() string {
			if off := wall.now().Sub(n.member.Now()); off > time.Minute || !n.member.Certificate().Leaf.NotAfter.After(n.member.Now()) {
				return fmt.Sprint(off)
			}
			return ""
		})
	}
	if slices.Contains(n.conditions(), "ca-expiring") {
		t.Error("it is spoken of too early")
	}
	wall.pass(step)
	ends := parseFirst(n.member.CA()).NotAfter.Format(time.DateOnly)
	n.shows("ca-expiring", "warning", "", "the certificate of the site's own authority ends on "+ends+": replace it while the nodes are up: atoll cluster rotate ca")
	n.do("POST", "/api/atoll/v1/cluster/rotations/ca", nil).want(http.StatusAccepted)
	n.awaitCondition("ca-expiring", false)
	n.awaitHealthy()
}

// The user's own certificate is spoken of in time, makes what clients see unhealthy
// when it has ended, and is read again when it was replaced.
func TestOwnCertificateExpires(t *testing.T) {
	var wall calendar
	c := config(t)
	wall.hangs(&c)
	dir := t.TempDir()
	c.CertFile, c.KeyFile = filepath.Join(dir, "tls.pem"), filepath.Join(dir, "tls.key")
	writeCertificate(t, c, wall.now().Add(35*day))
	n := start(t, c).insecure()
	n.awaitCondition("tls-certificate-expiring", false)
	wall.pass(10 * day)
	n.shows("tls-certificate-expiring", "warning", "", "put a new certificate and key in place of the files")
	wall.pass(30 * day)
	n.shows("tls-certificate-expiring", "critical", "portal", "that clients see has ended on ")
	writeCertificate(t, c, wall.now().Add(90*day))
	n.awaitCondition("tls-certificate-expiring", false)
	n.awaitHealthy()
}

// writeCertificate puts one that ends then into the files of a configuration, the key
// first, each in one step.
func writeCertificate(t *testing.T, c Config, ends time.Time) {
	t.Helper()
	cert := leaf(t, 1, ends)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	must(t, err)
	for _, f := range []struct {
		name, kind string
		data       []byte
	}{{c.KeyFile, "PRIVATE KEY", key}, {c.CertFile, "CERTIFICATE", cert.Certificate[0]}} {
		must(t, os.WriteFile(f.name+".new", pem.EncodeToMemory(&pem.Block{Type: f.kind, Bytes: f.data}), 0o600))
		must(t, os.Rename(f.name+".new", f.name))
	}
}
