package node

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/fault"
)

// quickly is a cost that tests can pay often.
var quickly = keyring.Cost{Time: 1, Memory: 64, Threads: 1}

func filesOf(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if e.Name() != "lock" {
			all[e.Name()] = string(text)
		}
	}
	return all
}

// A start with the new passphrase, or the command again, brings to its end what was
// cut short at any step; with the wrong one nothing changes.
func TestRekeyIsFinished(t *testing.T) {
	crash := errors.New("crash")
	sealed := Keys{Provider: keyring.PassphraseName, Passphrase: []byte("battery staple"), cost: quickly}
	for _, at := range []string{keyring.RekeyFile, "identity.json", member.ClusterKeyFile, "founding.json"} {
		for _, how := range []string{"start", "command"} {
			t.Run(at+" "+how, func(t *testing.T) {
				dir := t.TempDir()
				made, err := member.Found(dir, "one", "10.0.0.1:5001", nil)
				if err != nil {
					t.Fatal(err)
				}
				p, err := sealed.provider(sealed.Provider)
				if err != nil {
					t.Fatal(err)
				}
				r := keyring.Rekeying{Dir: dir, Names: protected()}
				if r.To, err = keyring.Fresh(t.Context(), p, append(protected(), keyring.RekeyFile)); err != nil {
					t.Fatal(err)
				}
				r.Step = func(name string) error {
					if name == at {
						return crash
					}
					return nil
				}
				if err := r.Run(); !errors.Is(err, crash) {
					t.Fatal(err)
				}
				before := filesOf(t, dir)
				for _, wrong := range []Keys{{}, {Passphrase: []byte("not the one")}} {
					if _, err := wrong.open(t.Context(), dir); !fault.Is(err, fault.Denied) {
						t.Errorf("a start with %q: %v", wrong.Passphrase, err)
					}
					if _, err := Rekey(t.Context(), dir, Keys{}, Keys{Provider: keyring.PassphraseName, Passphrase: []byte("not the one")}); !fault.Is(err, fault.Denied) {
						t.Errorf("the command with another passphrase: %v", err)
					}
				}
				if after := filesOf(t, dir); !maps.Equal(before, after) {
					t.Errorf("a wrong passphrase made %v of %v", slices.Sorted(maps.Keys(after)), slices.Sorted(maps.Keys(before)))
				}
				if how == "command" {
					if out, err := Rekey(t.Context(), dir, Keys{}, sealed); err != nil || !out.Resumed || out.Former != keyring.PassphraseName {
						t.Fatalf("%+v, %v", out, err)
					}
				}
				keys, err := Keys{Passphrase: sealed.Passphrase}.open(t.Context(), dir)
				if err != nil {
					t.Fatal(err)
				}
				if id, err := member.LoadIdentity(dir, keys); err != nil || id.NodeID != made.NodeID || string(id.ClusterKey) != string(made.ClusterKey) {
					t.Errorf("%+v, %v", id.NodeID, err)
				}
				if _, err := os.Stat(filepath.Join(dir, keyring.RekeyFile)); err == nil {
					t.Error("the file of what is to become is still there")
				}
			})
		}
	}
}

// A node that has started has the passphrase in memory no more.
func TestStartOverwritesThePassphrase(t *testing.T) {
	c := config(t)
	c.Keys = Keys{Provider: keyring.PassphraseName, Passphrase: []byte("battery staple"), cost: quickly}
	n := start(t, c)
	if !bytes.Equal(c.Keys.Passphrase, make([]byte, len(c.Keys.Passphrase))) {
		t.Error("the passphrase is still there")
	}
	p := n.push("library/app", "v1", content(91, 1000))
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	again := n.again(func(c *Config) { c.Keys.Passphrase = []byte("battery staple") })
	again.pull(p, "v1")
}

// What a recovery kept with keys in it is named, because it stays as it was.
func TestRekeyNamesWhatItLeaves(t *testing.T) {
	dir := t.TempDir()
	if _, err := member.Found(dir, "one", "10.0.0.1:5001", nil); err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(dir, "before-recovery-1")
	if err := os.Mkdir(kept, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(kept, member.ClusterKeyFile), []byte("key"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := Rekey(t.Context(), dir, Keys{}, Keys{Provider: keyring.PassphraseName, Passphrase: []byte("battery staple"), cost: quickly})
	if err != nil || !slices.Equal(out.Left, []string{"before-recovery-1"}) {
		t.Errorf("%+v, %v", out, err)
	}
}
