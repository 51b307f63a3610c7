package keyring

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atoll-registry/atoll/cluster/pki"
)

var names = []string{"identity.json", "cluster.key", "server.json"}

// quick is a cost that tests can pay often.
var quick = Cost{Time: 1, Memory: 64, Threads: 1}

// device stands for a TPM or a token: it wraps under a key that nothing gets out of
// it, in objects that it alone can tell.
type device struct {
	key   []byte
	calls int
}

func newDevice() *device {
	d := &device{key: make([]byte, keySize)}
	rand.Read(d.key)
	return d
}

func (*device) Name() string { return "device" }

func (d *device) Wrap(_ context.Context, purpose string, key []byte) ([]byte, error) {
	d.calls++
	return pki.Seal(d.key, purpose, key)
}

func (d *device) Unwrap(_ context.Context, purpose string, blob []byte) ([]byte, error) {
	d.calls++
	key, err := pki.Open(d.key, purpose, blob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLocked, err)
	}
	return key, nil
}

func open(t *testing.T, p Provider, dir string) *Ring {
	t.Helper()
	r, err := Open(t.Context(), p, names, dir)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func secretOf(name string) []byte { return []byte("the secret of " + name) }

func fill(t *testing.T, r *Ring, dir string) {
	t.Helper()
	for _, name := range names {
		if err := r.Write(filepath.Join(dir, name), secretOf(name)); err != nil {
			t.Fatal(err)
		}
	}
}

func holds(t *testing.T, r *Ring, dir string) {
	t.Helper()
	for _, name := range names {
		if got, err := r.Read(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, secretOf(name)) {
			t.Fatalf("%s: %q, %v", name, got, err)
		}
	}
}

// discloses reports whether a secret can be read in any file of the directory.
func discloses(t *testing.T, dir string) bool {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(data, []byte("the secret of")) || bytes.Contains(data, []byte("dGhlIHNlY3JldCBvZ")) {
			return true
		}
	}
	return false
}

// Whatever keeps the key: files that it sealed open for it after a start, for nothing
// else, and show nothing.
func TestProviders(t *testing.T) {
	dev := newDevice()
	for name, same := range map[string]func() (right, wrong Provider){
		"device": func() (Provider, Provider) { return dev, newDevice() },
		"passphrase": func() (Provider, Provider) {
			return NewPassphrase([]byte("correct horse"), quick), NewPassphrase([]byte("correct hearse"), quick)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			right, _ := same()
			first := open(t, right, dir)
			fill(t, first, dir)
			holds(t, first, dir)
			if discloses(t, dir) {
				t.Fatal("a secret lies on the disk")
			}
			right, wrong := same()
			again := open(t, right, dir)
			holds(t, again, dir)
			// What is written after a start opens at the next.
			fill(t, again, dir)
			right, _ = same()
			holds(t, open(t, right, dir), dir)

			before := contents(t, dir)
			if _, err := Open(t.Context(), wrong, names, dir); !errors.Is(err, ErrLocked) {
				t.Errorf("with the wrong key: %v", err)
			}
			var plain *Ring
			if _, err := plain.Read(filepath.Join(dir, names[0])); !errors.Is(err, ErrLocked) {
				t.Errorf("without a key: %v", err)
			}
			if before != contents(t, dir) {
				t.Error("a wrong key altered the files")
			}
			if got, err := ProviderOf(dir, names); err != nil || got != right.Name() {
				t.Errorf("the provider is said to be %q, %v", got, err)
			}
		})
	}
}

func contents(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&all, "%s %q\n", e.Name(), data)
	}
	return all.String()
}

// The device is asked when the ring is opened and never again: reading and writing
// take no call.
func TestTheProviderIsAskedAtTheStart(t *testing.T) {
	dir, dev := t.TempDir(), newDevice()
	r := open(t, dev, dir)
	calls := dev.calls
	fill(t, r, dir)
	holds(t, r, dir)
	if dev.calls != calls {
		t.Errorf("%d calls after the start", dev.calls-calls)
	}
}

// One start derives once, however many files there are.
func TestOneDerivation(t *testing.T) {
	dir := t.TempDir()
	fill(t, open(t, NewPassphrase([]byte("correct horse"), quick), dir), dir)
	os.Remove(filepath.Join(dir, names[1])) // its key is made anew
	p := NewPassphrase([]byte("correct horse"), quick).(*passphrase)
	open(t, p, dir)
	if len(p.keys) != 1 {
		t.Errorf("%d derivations for %d files", len(p.keys), len(names))
	}
}

// A sealed file opens under its name only, and neither a plain file nor one of another
// ring passes for it.
func TestFilesAreBound(t *testing.T) {
	dir, dev := t.TempDir(), newDevice()
	r := open(t, dev, dir)
	fill(t, r, dir)
	a, b := filepath.Join(dir, names[0]), filepath.Join(dir, names[1])
	was, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	put := func(path string, data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(b, was)
	if got, err := r.Read(b); err == nil {
		t.Errorf("another file's content was read: %q", got)
	}
	if _, err := Open(t.Context(), dev, names, dir); !errors.Is(err, ErrLocked) {
		t.Errorf("opened with another file's key: %v", err)
	}
	put(b, secretOf(names[1]))
	if _, err := r.Read(b); !errors.Is(err, ErrPlain) {
		t.Errorf("a plain file was taken: %v", err)
	}
	if _, err := Open(t.Context(), dev, names, dir); !errors.Is(err, ErrPlain) {
		t.Errorf("opened over a plain file: %v", err)
	}
	var file sealedJSON
	if err := json.Unmarshal(was, &file); err != nil {
		t.Fatal(err)
	}
	for what, alter := range map[string]func(f *sealedJSON){
		"data":     func(f *sealedJSON) { f.Data[len(f.Data)-1]++ },
		"provider": func(f *sealedJSON) { f.Provider = "other" },
		"format":   func(f *sealedJSON) { f.Format++ },
		"key":      func(f *sealedJSON) { f.Key[len(f.Key)-1]++ },
	} {
		altered := file
		altered.Data, altered.Key = bytes.Clone(file.Data), bytes.Clone(file.Key)
		alter(&altered)
		text, err := json.Marshal(altered)
		if err != nil {
			t.Fatal(err)
		}
		put(a, text)
		if _, err := r.Read(a); err == nil {
			t.Errorf("a file with another %s was read", what)
		}
	}
	if _, err := r.Read(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// A forged file cannot ask for more memory or time than is allowed, nor for many
// derivations.
func TestForgedCosts(t *testing.T) {
	for what, cost := range map[string]Cost{
		"memory": {1, maxMemory + 1, 1}, "time": {maxTime + 1, 64, 1}, "threads": {1, 64, maxThreads + 1},
		"no time": {0, 64, 1}, "no threads": {1, 64, 0}, "no memory": {1, 0, 1},
	} {
		p := NewPassphrase([]byte("correct horse"), quick).(*passphrase)
		blob, err := p.Wrap(t.Context(), "a", make([]byte, keySize))
		if err != nil {
			t.Fatal(err)
		}
		forged := NewPassphrase([]byte("correct horse"), quick).(*passphrase)
		copy(blob[1:], []byte{byte(cost.Time >> 24), byte(cost.Time >> 16), byte(cost.Time >> 8), byte(cost.Time),
			byte(cost.Memory >> 24), byte(cost.Memory >> 16), byte(cost.Memory >> 8), byte(cost.Memory), cost.Threads})
		if _, err := forged.Unwrap(t.Context(), "a", blob); err == nil || !strings.Contains(err.Error(), "beyond what is allowed") || len(forged.keys) > 0 {
			t.Errorf("%s: %v after %d derivations", what, err, len(forged.keys))
		}
	}
	p := NewPassphrase([]byte("correct horse"), quick).(*passphrase)
	var err error
	for range maxDerived + 1 {
		other := NewPassphrase([]byte("correct horse"), quick)
		blob, wrapped := other.Wrap(t.Context(), "a", make([]byte, keySize))
		if wrapped != nil {
			t.Fatal(wrapped)
		}
		_, err = p.Unwrap(t.Context(), "a", blob)
	}
	if err == nil || len(p.keys) != maxDerived {
		t.Errorf("%d derivations: %v", len(p.keys), err)
	}
	for _, blob := range [][]byte{nil, {wrapVersion}, make([]byte, 200)} {
		if _, err := p.Unwrap(t.Context(), "a", blob); err == nil {
			t.Errorf("%d bytes of nothing were unwrapped", len(blob))
		}
	}
	if _, err := NewPassphrase([]byte("short"), quick).Wrap(t.Context(), "a", make([]byte, keySize)); !errors.Is(err, ErrWeak) {
		t.Error("a passphrase of five bytes seals")
	}
}

// What was given and what was derived is overwritten when it is not needed any more; the
// ring goes on.
func TestForget(t *testing.T) {
	dir, secret := t.TempDir(), []byte("correct horse")
	p := NewPassphrase(secret, quick).(*passphrase)
	r := open(t, p, dir)
	fill(t, r, dir)
	var derived []byte
	for _, key := range p.keys {
		derived = key
	}
	p.Forget()
	if !bytes.Equal(secret, make([]byte, len(secret))) || len(derived) == 0 || !bytes.Equal(derived, make([]byte, len(derived))) {
		t.Error("the passphrase or its key is still in memory")
	}
	holds(t, r, dir)
	fill(t, r, dir)
	holds(t, open(t, NewPassphrase([]byte("correct horse"), quick), dir), dir)
	if _, err := p.Wrap(t.Context(), "a", make([]byte, keySize)); !errors.Is(err, ErrLocked) {
		t.Errorf("it wraps without its passphrase: %v", err)
	}
}

// A file that was being erased is what it was without a provider: zeros.
func TestErased(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, names[1])
	if err := os.WriteFile(path, make([]byte, 90), 0o600); err != nil {
		t.Fatal(err)
	}
	r := open(t, newDevice(), dir)
	if got, err := r.Read(path); err != nil || !erased(got) {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := ProviderOf(dir, names); got != "" || err != nil {
		t.Errorf("provider %q, %v", got, err)
	}
}

// Whatever the change of provider, and wherever it is cut short: before RekeyFile is
// there nothing has changed, and from then on Finish brings it to its end. Nothing
// that was sealed lies plain on the way.
func TestRekeyCutShort(t *testing.T) {
	crash := errors.New("crash")
	one, two := func() Provider { return NewPassphrase([]byte("correct horse"), quick) }, func() Provider { return NewPassphrase([]byte("battery staple"), quick) }
	file := func() Provider { return nil }
	dev := newDevice()
	device := func() Provider { return dev }
	ring := func(t *testing.T, p Provider, names []string, dirs ...string) *Ring {
		t.Helper()
		r, err := Open(t.Context(), p, names, dirs...)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for what, way := range map[string][2]func() Provider{
		"seal": {file, one}, "open": {one, file}, "another passphrase": {one, two}, "into a device": {one, device},
	} {
		from, to := way[0], way[1]
		for _, at := range []string{RekeyFile, names[0], names[1], names[2], "done", "nowhere"} {
			t.Run(what+" "+at, func(t *testing.T) {
				dir := t.TempDir()
				fill(t, ring(t, from(), names, dir), dir)
				left := filepath.Join(dir, names[0]+".tmp-123")
				if err := os.WriteFile(left, secretOf(names[0]), 0o600); err != nil {
					t.Fatal(err)
				}
				r := Rekeying{Dir: dir, Names: names, From: ring(t, from(), names, dir), To: ring(t, to(), append([]string{RekeyFile}, names...))}
				r.Step = func(name string) error {
					if name == at {
						return crash
					}
					return nil
				}
				if err := r.Run(); (at == "nowhere") != (err == nil) || err != nil && !errors.Is(err, crash) {
					t.Fatal(err)
				}
				after := Rekeying{Dir: dir, Names: names, To: ring(t, to(), []string{RekeyFile}, dir)}
				if err := after.Finish(); err != nil {
					t.Fatal(err)
				}
				holds(t, ring(t, to(), names, dir), dir)
				if entries, err := os.ReadDir(dir); err != nil || len(entries) != len(names) {
					t.Errorf("%v left, %v", entries, err)
				}
				if sealed := to() != nil; sealed && discloses(t, dir) {
					t.Error("a secret lies plain")
				}
			})
		}
	}
}

// RekeyFile is sealed as what it makes, and a forged one places nothing elsewhere.
func TestRekeyFile(t *testing.T) {
	dir, dev := t.TempDir(), newDevice()
	var plain *Ring
	fill(t, plain, dir)
	to, err := Fresh(t.Context(), dev, append([]string{RekeyFile}, names...))
	if err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	r := Rekeying{Dir: dir, Names: names, To: to, Step: func(string) error { return stop }}
	if err := r.Run(); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, RekeyFile)); err != nil || !bytes.HasPrefix(data, marker) {
		t.Errorf("the file is not sealed: %q, %v", data, err)
	}
	if got, err := ProviderOf(dir, names); got != "device" || err != nil {
		t.Errorf("provider %q, %v", got, err)
	}
	if err := (Rekeying{Dir: dir, Names: names}).Finish(); !errors.Is(err, ErrLocked) {
		t.Errorf("finished without the key: %v", err)
	}
	forged := planJSON{Format: format, Files: []planFile{{"identity.json", []byte("mine")}, {"../outside", []byte("mine")}}}
	if err := plain.WriteJSON(filepath.Join(dir, RekeyFile), forged); err != nil {
		t.Fatal(err)
	}
	if err := (Rekeying{Dir: dir, Names: names}).Finish(); err == nil {
		t.Error("a name outside was taken")
	}
	holds(t, plain, dir)
	if _, err := os.Stat(filepath.Join(dir, "..", "outside")); err == nil {
		t.Error("a file was placed outside")
	}
}
