package entry

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"testing"
)

func document(t *testing.T, serial uint64, root []ed25519.PrivateKey, threshold int, online ...OnlineKey) KeyDocument {
	t.Helper()
	d := KeyDocument{Site: "site-a", Serial: serial, Issued: 1, Threshold: threshold, Online: online}
	for _, key := range root {
		d.Root = append(d.Root, mustKey(t, key))
	}
	return d
}

func signed(t *testing.T, d KeyDocument, keys ...ed25519.PrivateKey) []byte {
	t.Helper()
	payload, err := MarshalJSON(d)
	if err != nil {
		t.Fatal(err)
	}
	var all []byte
	switch len(keys) {
	case 1:
		all, err = SealEnvelope(KeyChainType, payload, keys[0])
	case 2:
		all, err = SealEnvelope(KeyChainType, payload, keys[0], keys[1])
	default:
		all, err = SealEnvelope(KeyChainType, payload, keys[0], keys[1], keys[2])
	}
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestKeyChainRotation(t *testing.T) {
	r1, r2, o1, o2, o3 := testKey(1), testKey(2), testKey(3), testKey(4), testKey(5)
	var chain KeyChain
	chain = chain.Add(signed(t, document(t, 1, []ed25519.PrivateKey{r1}, 1, OnlineKey{mustKey(t, o1), KeyActive}), r1))
	chain = chain.Add(signed(t, document(t, 2, []ed25519.PrivateKey{r1}, 1, OnlineKey{mustKey(t, o1), KeyRetired}, OnlineKey{mustKey(t, o2), KeyActive}), r1))
	// The root itself changes: old and new sign.
	chain = chain.Add(signed(t, document(t, 3, []ed25519.PrivateKey{r2}, 1, OnlineKey{mustKey(t, o1), KeyRetired}, OnlineKey{mustKey(t, o2), KeyRevoked}, OnlineKey{mustKey(t, o3), KeyActive}), r1, r2))
	for name, trusted := range map[string]ed25519.PrivateKey{"the first root, two rotations ago": r1, "the newest root": r2} {
		keys, err := chain.Verify("site-a", mustKey(t, trusted))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if keys.Serial != 3 || len(keys.Signing()) != 1 || keys.Signing()[0] != mustKey(t, o3) || len(keys.Checkpoints()) != 2 {
			t.Errorf("%s: %+v", name, keys)
		}
	}
	if _, err := chain.Verify("site-b", mustKey(t, r1)); !errors.Is(err, ErrSignature) {
		t.Errorf("for another site: %v", err)
	}
	if _, err := chain.Verify("site-a", mustKey(t, o1)); !errors.Is(err, ErrSignature) {
		t.Errorf("from an online key: %v", err)
	}
	if site, root, err := chain.Claimed(); err != nil || site != "site-a" || root != mustKey(t, r1) {
		t.Errorf("claimed: %s %s %v", site, root, err)
	}
}

func TestKeyChainRefuses(t *testing.T) {
	r1, r2, evil, o1 := testKey(1), testKey(2), testKey(9), testKey(3)
	active := func(k ed25519.PrivateKey) OnlineKey { return OnlineKey{mustKey(t, k), KeyActive} }
	first := signed(t, document(t, 1, []ed25519.PrivateKey{r1}, 1, active(o1)), r1)
	roots := []ed25519.PrivateKey{r1, r2}
	for name, chain := range map[string]KeyChain{
		"empty":                         {},
		"no line end":                   first[:len(first)-1],
		"signed by another":             signed(t, document(t, 1, []ed25519.PrivateKey{r1}, 1, active(evil)), evil),
		"a root of its own":             signed(t, document(t, 1, []ed25519.PrivateKey{evil}, 1, active(evil)), evil),
		"root changed without it":       KeyChain(first).Add(signed(t, document(t, 2, []ed25519.PrivateKey{evil}, 1, active(evil)), evil)),
		"trusted root named, not asked": signed(t, document(t, 1, []ed25519.PrivateKey{evil, r1}, 1, active(evil)), evil),
		"skips a number":                KeyChain(first).Add(signed(t, document(t, 3, []ed25519.PrivateKey{r1}, 1, active(o1)), r1)),
		"goes back":                     KeyChain(first).Add(first),
		"one of two":                    signed(t, document(t, 1, roots, 2, active(o1)), r1),
		"one key twice":                 signed(t, document(t, 1, roots, 2, active(o1)), r1, r1),
		"garbage":                       KeyChain("{}\n"),
	} {
		if keys, err := chain.Verify("site-a", mustKey(t, r1)); err == nil {
			t.Errorf("%s: accepted, %+v", name, keys)
		}
	}
	two := KeyChain(signed(t, document(t, 1, roots, 2, active(o1)), r1, r2))
	if _, err := two.Verify("site-a", mustKey(t, r2)); err != nil {
		t.Errorf("two of two: %v", err)
	}
	for i := range first {
		flipped := bytes.Clone(first)
		flipped[i] ^= 1 << (i % 8)
		if _, err := KeyChain(flipped).Verify("site-a", mustKey(t, r1)); err == nil {
			t.Errorf("byte %d flipped: accepted", i)
		}
	}
}

func TestKey(t *testing.T) {
	k := mustKey(t, testKey(1))
	if k != mustKey(t, testKey(1).Public()) || !bytes.Contains(k.PEM(), []byte(k)) || len(k.Fingerprint()) != len("SHA256:")+43 {
		t.Errorf("%s %s %s", k, k.PEM(), k.Fingerprint())
	}
	for _, bad := range []Key{"", "x", k + "=", k[:len(k)-4], Key(" " + k), "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE"} {
		if _, err := bad.Ed25519(); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if err := k.Verify([]byte("m"), make([]byte, 64)); !errors.Is(err, ErrSignature) {
		t.Errorf("zero signature: %v", err)
	}
}
