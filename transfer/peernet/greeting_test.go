package peernet_test

import (
	"crypto/tls"
	"errors"
	"testing"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

type tlsConfig = tls.Config

func plainTLS() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{peernet.ProtoNode}}
}

// FuzzGreeting: whatever a proven peer says first, it is let in only by a greeting
// that is whole and right, and nothing behind that is read.
func FuzzGreeting(f *testing.F) {
	f.Add(true, false, []byte{peernet.ServiceBlob, 1, '1', 'x'})
	f.Add(true, true, []byte("ATQ1\x07\x011rest"))
	f.Add(true, true, []byte("ATQ"))
	f.Add(false, false, []byte{0, 1, '1', 'y'})
	f.Add(false, false, []byte{3, 255, 'a'})
	f.Add(false, true, []byte{})
	f.Fuzz(func(t *testing.T, accept, overQUIC bool, said []byte) {
		j := &judge{own: "1"}
		n, err := peernet.New(peernet.Config{Epoch: func() string { return j.own }, Meet: j.meet})
		if err != nil {
			t.Fatal(err)
		}
		n.Listen(peernet.ServiceBlob)
		left, err := peernet.Greet(n, accept, overQUIC, said)
		want := []byte{0, 1, '1'}
		if accept {
			want = []byte{peernet.ServiceBlob, 1, '1'}
		}
		if accept && overQUIC {
			want = append([]byte("ATQ1"), want...)
		}
		right := len(said) >= len(want) && string(said[:len(want)]) == string(want)
		if right != (err == nil) {
			t.Fatalf("%x: %v", said, err)
		}
		if right && left != len(said)-len(want) {
			t.Fatalf("%x: %d bytes are left", said, left)
		}
	})
}

// TestTransportNames: what a flag says.
func TestTransportNames(t *testing.T) {
	for text, want := range map[string]peernet.Transport{"": peernet.Auto, "auto": peernet.Auto, "tcp": peernet.OnlyTCP, "quic": peernet.OnlyQUIC} {
		if got, err := peernet.ParseTransport(text); err != nil || got != want {
			t.Errorf("%q is %v, %v", text, got, err)
		}
	}
	if _, err := peernet.ParseTransport("udp"); err == nil {
		t.Error("udp is taken")
	}
	cfg := config(t, transfertest.NewSite(t, "site-a"), "node-a")
	n, err := peernet.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Dial(within(t), "no port", 1); err == nil || errors.Is(err, peernet.ErrRefused) {
		t.Errorf("error is %v", err)
	}
}
