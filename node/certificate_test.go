package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
)

// site issues certificates as a site does that may be without a leader.
type site struct {
	t    *testing.T
	kept *tls.Certificate

	mu      sync.Mutex
	leader  bool
	hangs   bool // the leader takes questions and does not answer
	issued  int
	renewal int
}

func (s *site) ServerCertificate(ctx context.Context, _ []string) (tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.hangs:
		s.mu.Unlock()
		<-ctx.Done()
		s.mu.Lock()
		return tls.Certificate{}, ctx.Err()
	case !s.leader:
		return tls.Certificate{}, errors.New("no leader")
	}
	s.issued++
	return leaf(s.t, int64(s.issued), time.Now().Add(30*day)), nil
}

func (s *site) KeptServerCertificate() (tls.Certificate, bool) {
	if s.kept == nil {
		return tls.Certificate{}, false
	}
	return *s.kept, true
}

func (s *site) Identity() member.Identity {
	s.mu.Lock()
	defer s.mu.Unlock()
	return member.Identity{Renewal: s.renewal}
}

func (s *site) Now() time.Time { return time.Now() }

func (s *site) set(leader, hangs bool, renewal int) {
	s.mu.Lock()
	s.leader, s.hangs, s.renewal = leader, hangs, renewal
	s.mu.Unlock()
}

// leaf is a certificate that ends then, with a serial number to know it by.
func leaf(t *testing.T, serial int64, ends time.Time) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Second), NotAfter: ends, DNSNames: []string{"registry.example"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: parsed}
}

// keeps runs a certificate of the site; the function gives what a handshake gets (a
// serial number, 0 for none) and how long it waits for it.
func keeps(t *testing.T, from *site) (*siteCertificate, func() (int64, time.Duration)) {
	t.Helper()
	c := newSiteCertificate([]string{"registry.lan"})
	c.from = from
	go func() { _ = c.keep(t.Context()) }()
	synctest.Wait()
	return c, func() (int64, time.Duration) {
		began := time.Now()
		cert, err := c.certificate(t.Context())
		if err != nil {
			return 0, time.Since(began)
		}
		return cert.Leaf.SerialNumber.Int64(), time.Since(began)
	}
}

// A leader that comes soon after the node is asked for the certificate again at once,
// and clients wait for it.
func TestTheFirstCertificateIsSoonThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from := &site{t: t}
		_, handshake := keeps(t, from)
		if serial, took := handshake(); serial != 0 || took != firstPatience {
			t.Errorf("with no leader a client gets certificate %d after %v, want none after %v", serial, took, firstPatience)
		}
		fresh := &site{t: t}
		_, handshake = keeps(t, fresh)
		time.AfterFunc(2*time.Second, func() { fresh.set(true, false, 0) })
		if serial, took := handshake(); serial != 1 || took > 4*time.Second {
			t.Errorf("with a leader from the second second on a client gets certificate %d after %v, want 1 within 4 s", serial, took)
		}
	})
}

// Nobody waits for a leader that is gone while there is a certificate that is good.
func TestAnOldCertificateServesWhileNobodyRenewsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kept := leaf(t, 99, time.Now().Add(30*day))
		from := &site{t: t, kept: &kept, hangs: true}
		c, handshake := keeps(t, from)
		if err := c.first(t.Context()); err != nil {
			t.Fatal(err)
		}
		if serial, took := handshake(); serial != 99 || took > newerPatience {
			t.Errorf("after a start with a leader that does not answer: certificate %d after %v, want the kept one within %v", serial, took, newerPatience)
		}
		from.set(true, false, 0)
		time.Sleep(certificateTry + certificateMaxPause)
		if serial, took := handshake(); serial != 1 || took != 0 {
			t.Errorf("with the leader back: certificate %d after %v, want a new one at once", serial, took)
		}
		from.set(true, false, 1)
		if serial, took := handshake(); serial != 2 || took != 0 {
			t.Errorf("once the node's own was renewed: certificate %d after %v, want a newer one", serial, took)
		}
		from.set(false, false, 2)
		handshake() // finds it due, and nobody there
		for range 3 {
			if serial, took := handshake(); serial != 2 || took != 0 {
				t.Errorf("with the leader gone again: certificate %d after %v, want the old one at once", serial, took)
			}
		}
	})
}

// A node whose clients ask for nothing gets a newer certificate in time: when the first
// one asks, nobody may be there who could make it.
func TestACertificateIsRenewedWithoutClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := keeps(t, &site{t: t, leader: true})
		<-time.After(21 * day)
		if got := c.shown().SerialNumber.Int64(); got != 2 {
			t.Errorf("after three weeks of 30 days there is certificate %d", got)
		}
	})
}
