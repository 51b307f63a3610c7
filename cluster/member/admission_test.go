package member

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
)

func goodRequest(t testing.TB) joinRequest {
	t.Helper()
	token, err := pki.NewToken(pki.KindJoin, make([]byte, pki.PinSize))
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	return joinRequest{Token: token.String(), Node: table.NewID(), Name: "node2", Addr: "10.0.0.2:5001", API: "https://10.0.0.2:5000", CSR: csr, Feature: 1}
}

func TestParseJoin(t *testing.T) {
	encode := func(change func(*joinRequest)) []byte {
		r := goodRequest(t)
		change(&r)
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := encode(func(*joinRequest) {})
	if a, err := parseJoin(good); err != nil || a.keyHash == "" {
		t.Fatalf("a good request: %v", err)
	}
	// A newer node may say more than this version knows.
	if a, err := parseJoin(append([]byte(`{"x":{"y":[1]},`), good[1:]...)); err != nil || a.Name != "node2" {
		t.Errorf("a request with a field that is not known: %v", err)
	}
	for name, body := range map[string][]byte{
		"empty":          nil,
		"no JSON":        []byte("GET / HTTP/1.1"),
		"two values":     append(good, good...),
		"a field twice":  append([]byte(`{"node":"x",`), good[1:]...),
		"in two cases":   append([]byte(`{"NODE":"x",`), good[1:]...),
		"token":          encode(func(r *joinRequest) { r.Token = "ATOLL1-join" }),
		"kind of token":  encode(func(r *joinRequest) { r.Token = strings.Replace(r.Token, "-join-", "-robot-", 1) }),
		"node id":        encode(func(r *joinRequest) { r.Node = "../../etc" }),
		"name":           encode(func(r *joinRequest) { r.Name = "a\nb" }),
		"address":        encode(func(r *joinRequest) { r.Addr = "0.0.0.0:5001" }),
		"port":           encode(func(r *joinRequest) { r.Addr = "10.0.0.1" }),
		"API":            encode(func(r *joinRequest) { r.API = "javascript:alert(1)" }),
		"CSR":            encode(func(r *joinRequest) { r.CSR = []byte("x") }),
		"CSR signature":  encode(func(r *joinRequest) { r.CSR[len(r.CSR)-1] ^= 1 }),
		"no feature":     encode(func(r *joinRequest) { r.Feature = 0 }),
		"negative level": encode(func(r *joinRequest) { r.Feature = -1 }),
	} {
		var no *joining.Refusal
		if _, err := parseJoin(body); !errors.As(err, &no) || no.Code != joining.CodeMalformed || !errors.Is(err, pki.ErrMalformed) {
			t.Errorf("%s: %v, want a refusal as malformed", name, err)
		}
	}
}

func FuzzParseJoin(f *testing.F) {
	good, err := json.Marshal(goodRequest(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"token":"ATOLL1-join-a-b-c","csr":"AAAA"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		a, err := parseJoin(body)
		if err == nil && (len(a.Node) != 32 || checkName(a.Name) != nil || checkAddr(a.Addr) != nil || a.keyHash == "") {
			t.Errorf("let %+v pass", a.joinRequest)
		}
	})
}

func TestFound(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	if _, err := LoadIdentity(dir, nil); !errors.Is(err, ErrEmpty) {
		t.Fatalf("an absent directory gives %v, want ErrEmpty", err)
	}
	made, err := Found(dir, "node1", "10.0.0.1:5001", nil)
	if err != nil {
		t.Fatal(err)
	}
	read, err := LoadIdentity(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if read.NodeID != made.NodeID || read.SiteID != made.SiteID || string(read.ClusterKey) != string(made.ClusterKey) {
		t.Errorf("founded %+v, read %+v", made, read)
	}
	if _, err := Found(dir, "node1", "10.0.0.1:5001", nil); !errors.Is(err, ErrFounded) {
		t.Errorf("founding twice gives %v", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f.Name(), info.Mode())
		}
	}
	for _, bad := range []struct{ name, addr string }{{"", "10.0.0.1:1"}, {"a b", "10.0.0.1:1"}, {"a", ":5001"}, {"a", "[::]:5001"}, {"a", "10.0.0.1:0"}} {
		if _, err := Found(t.TempDir(), bad.name, bad.addr, nil); err == nil {
			t.Errorf("founded as %q at %q", bad.name, bad.addr)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, ClusterKeyFile), []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadIdentity(dir, nil); err == nil || errors.Is(err, ErrEmpty) {
		t.Errorf("a damaged cluster key gives %v", err)
	}
	// A node without a vote has none; one that was cut short while it erased it has zeros.
	for _, forgotten := range [][]byte{nil, make([]byte, 32)} {
		if err := os.WriteFile(filepath.Join(dir, ClusterKeyFile), forgotten, 0o600); err != nil {
			t.Fatal(err)
		}
		if id, err := LoadIdentity(dir, nil); err != nil || len(id.ClusterKey) != 0 {
			t.Errorf("without the cluster key: %v, %v", id.ClusterKey, err)
		}
	}
}

func TestFoundingBesideStrayState(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "raft"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Found(dir, "node1", "10.0.0.1:5001", nil); err == nil {
		t.Error("founded a site where a log without an identity lies")
	}
}

func TestRenewAt(t *testing.T) {
	id, err := Found(t.TempDir(), "node1", "10.0.0.1:5001", nil)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := id.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	moments := make(map[time.Time]bool)
	for range 50 {
		age := time.Until(renewAt(cert.Leaf, table.NewID())).Hours() / pki.NodeLife.Hours()
		if age < 0.49 || age > 0.81 {
			t.Errorf("renews after %.0f %% of the life", age*100)
		}
		moments[renewAt(cert.Leaf, table.NewID())] = true
	}
	if len(moments) < 20 {
		t.Errorf("50 nodes renew at %d moments", len(moments))
	}
}
