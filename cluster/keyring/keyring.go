// Package keyring keeps the files of a data directory that hold a node's keys so
// that whoever has the disk alone cannot read them.
//
// Each protected file is sealed with a key of its own, its file key. A Provider
// wraps the file keys with a key that is not on the disk, or that never leaves its
// device. Without a provider the files are plain, 0600: the provider "file".
//
// Invariants:
//
//   - A file is sealed as a whole or plain as a whole, and bound to its name, to the
//     provider's name and to the format: it opens under no other.
//   - A ring that has a provider reads no plain file, and one that has none reads no
//     sealed one: nobody can put a plain file in the place of a sealed one unnoticed.
//   - The provider is asked when a ring is opened and at no other time.
//   - Where RekeyFile lies, nothing else is read or written before Finish.
package keyring

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/pki"
)

// Provider wraps file keys with a key that it keeps to itself. A file key has 32
// bytes; purpose is the name of its file, which the provider binds to what it gives,
// so that a wrapped key does not open for another. Both calls may be slow, and come
// one after the other. Unwrap gives an error that wraps ErrLocked when the key that
// it takes is not the one that wrapped.
//
// The passphrase provider is in this package. The interface asks for nothing that
// takes the provider's own key out of where it is:
//
//   - A TPM 2.0: Wrap seals the 32 bytes below a storage key that is not exportable
//     (TPM2_Create with the purpose in the authorisation policy or hashed into its
//     auth value) and gives the public and private part of the object; Unwrap is
//     TPM2_Load and TPM2_Unseal, where a policy over PCRs may bind it to the boot.
//   - PKCS#11: Wrap is C_Encrypt with CKM_AES_GCM under a key of the token with
//     CKA_EXTRACTABLE false, the purpose being the additional data; Unwrap is
//     C_Decrypt. The 32 bytes fit one block of any token.
type Provider interface {
	Name() string
	Wrap(ctx context.Context, purpose string, key []byte) ([]byte, error)
	Unwrap(ctx context.Context, purpose string, blob []byte) ([]byte, error)
}

// File names the provider that does nothing: plain files, 0600.
const File = "file"

var (
	// ErrLocked: what opens the files was not given, or is not the right one.
	ErrLocked = errors.New("the node's keys stay locked")
	// ErrWeak: the passphrase is too short to seal anything.
	ErrWeak = errors.New("the passphrase is guessed too soon")
	// ErrPlain: a file is plain where sealed ones are asked for.
	ErrPlain = errors.New("a file with keys is not sealed")
)

// howToUnlock ends each message about a passphrase.
const howToUnlock = "give the passphrase that they were sealed with, by --key-passphrase-file FILE, by ATOLL_KEY_PASSPHRASE_FILE or as the systemd credential atoll-key-passphrase; nothing was changed"

const (
	format   = 1
	keySize  = pki.ClusterKeySize
	maxBytes = 16 << 20 // of a protected file
)

// sealedJSON is a sealed file: one line of JSON that begins with marker. A version
// that does not know it takes it for an identity of format 0 and refuses it.
type sealedJSON struct {
	Format   int    `json:"atoll_sealed"`
	Provider string `json:"provider"`
	Key      []byte `json:"key"`  // the file key, wrapped
	Data     []byte `json:"data"` // pki.Seal under the file key
}

var marker = []byte(`{"atoll_sealed":`)

// Ring reads and writes the protected files of a node. It is good for several
// goroutines. A nil Ring is that of the provider "file".
type Ring struct {
	provider string
	current  map[string]fileKey // by name: what is written is sealed with it
	known    map[string][]byte  // by name and wrapped key
}

type fileKey struct{ key, wrapped []byte }

// Open makes the ring of the files of these names, which are in some of the
// directories or in none yet. Errors: ErrLocked, ErrPlain.
func Open(ctx context.Context, p Provider, names []string, dirs ...string) (*Ring, error) {
	if p == nil {
		return nil, nil
	}
	r := &Ring{provider: p.Name(), current: map[string]fileKey{}, known: map[string][]byte{}}
	for _, dir := range dirs {
		for _, name := range names {
			if err := r.learn(ctx, p, filepath.Join(dir, name)); err != nil {
				return nil, err
			}
		}
	}
	return r, r.complete(ctx, p, names)
}

// Fresh makes a ring with new keys for the files of these names.
func Fresh(ctx context.Context, p Provider, names []string) (*Ring, error) {
	return Open(ctx, p, names)
}

// learn takes the key of a file that is there.
func (r *Ring) learn(ctx context.Context, p Provider, path string) error {
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && erased(data) {
		return nil
	}
	if err != nil {
		return err
	}
	name := filepath.Base(path)
	file, err := r.parse(path, data)
	if err != nil {
		return err
	}
	key, err := p.Unwrap(ctx, name, file.Key)
	if err != nil {
		return fmt.Errorf("opening %s: %w", path, err)
	}
	if len(key) != keySize {
		return fmt.Errorf("opening %s: the key provider %s gave a key of %d bytes instead of %d", path, r.provider, len(key), keySize)
	}
	if _, ok := r.current[name]; !ok {
		r.current[name] = fileKey{key, file.Key}
	}
	r.known[name+"\x00"+string(file.Key)] = key
	return nil
}

// complete makes keys for the files that are not there yet.
func (r *Ring) complete(ctx context.Context, p Provider, names []string) error {
	for _, name := range names {
		if _, ok := r.current[name]; ok {
			continue
		}
		key := make([]byte, keySize)
		rand.Read(key) // never fails: crypto/rand's promise
		wrapped, err := p.Wrap(ctx, name, key)
		if err != nil {
			return fmt.Errorf("making the key of %s: %w", name, err)
		}
		r.current[name] = fileKey{key, wrapped}
		r.known[name+"\x00"+string(wrapped)] = key
	}
	return nil
}

// Provider is the name of the ring's provider.
func (r *Ring) Provider() string {
	if r == nil {
		return File
	}
	return r.provider
}

// Read gives the content of a protected file; fs.ErrNotExist when there is none. A
// file of zeros, which is one that was being erased, is given as it is.
func (r *Ring) Read(path string) ([]byte, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	if erased(data) || r == nil && !bytes.HasPrefix(data, marker) {
		return data, nil
	}
	file, err := r.parse(path, data)
	if err != nil {
		return nil, err
	}
	name := filepath.Base(path)
	key := r.known[name+"\x00"+string(file.Key)]
	if key == nil {
		return nil, fmt.Errorf("%w: %s was sealed by another start of this node since the keys were opened: start again", ErrLocked, path)
	}
	plain, err := pki.Open(key, r.bound(name), file.Data)
	if err != nil {
		return nil, fmt.Errorf("%s is damaged, or was not sealed under this name: %w", path, err)
	}
	return plain, nil
}

// ReadJSON reads what WriteJSON wrote.
func (r *Ring) ReadJSON(path string, into any) error {
	data, err := r.Read(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("%s is damaged: %w", path, err)
	}
	return nil
}

// Write puts data in the place of a protected file, durably, as atomicfile.Write.
func (r *Ring) Write(path string, data []byte) error {
	return r.write(path, data, atomicfile.Write)
}

// WriteSecret is Write that overwrites what was there, as atomicfile.WriteSecret.
func (r *Ring) WriteSecret(path string, data []byte) error {
	return r.write(path, data, atomicfile.WriteSecret)
}

// WriteJSON is Write of a value as JSON.
func (r *Ring) WriteJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return r.Write(path, append(data, '\n'))
}

func (r *Ring) write(path string, data []byte, write func(string, []byte) error) error {
	sealed, err := r.seal(filepath.Base(path), data)
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return write(path, sealed)
}

// seal gives the bytes of a file.
func (r *Ring) seal(name string, data []byte) ([]byte, error) {
	if r == nil {
		return data, nil
	}
	key, ok := r.current[name]
	if !ok {
		return nil, fmt.Errorf("the key ring has no key for a file of the name %s", name)
	}
	sealed, err := pki.Seal(key.key, r.bound(name), data)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(sealedJSON{format, r.provider, key.wrapped, sealed})
	return append(text, '\n'), err
}

// bound is what a sealed file is bound to.
func (r *Ring) bound(name string) string {
	return fmt.Sprintf("keyring %d %s %s", format, r.provider, name)
}

// parse refuses a file that is not sealed as the ring's are.
func (r *Ring) parse(path string, data []byte) (file sealedJSON, err error) {
	if !bytes.HasPrefix(data, marker) {
		return file, fmt.Errorf("%w: %s, while the provider is %s. If nobody has put it there, seal it with atoll node rekey, or take it away", ErrPlain, path, r.Provider())
	}
	if file, err = parse(path, data); err != nil {
		return file, err
	}
	if r == nil {
		return file, fmt.Errorf("%w: %s is sealed by the key provider %s: %s", ErrLocked, path, file.Provider, howToUnlock)
	}
	if file.Provider != r.provider {
		return file, fmt.Errorf("%w: %s is sealed by the key provider %s, not by %s", ErrLocked, path, file.Provider, r.provider)
	}
	return file, nil
}

func parse(path string, data []byte) (file sealedJSON, err error) {
	if err := json.Unmarshal(data, &file); err != nil {
		return file, fmt.Errorf("%s is damaged: %w", path, err)
	}
	if file.Format != format {
		return file, fmt.Errorf("%s is sealed in format %d, this version of Atoll reads %d: run the version that wrote it, or a newer one", path, file.Format, format)
	}
	return file, nil
}

// ProviderOf names the provider of the files of these names in dir, or of what a
// Rekey that was cut short makes of them; "" when there are none.
func ProviderOf(dir string, names []string) (string, error) {
	for _, name := range append([]string{RekeyFile}, names...) {
		path := filepath.Join(dir, name)
		data, err := readFile(path)
		switch {
		case errors.Is(err, fs.ErrNotExist), err == nil && erased(data):
			continue
		case err != nil:
			return "", err
		case !bytes.HasPrefix(data, marker):
			return File, nil
		}
		file, err := parse(path, data)
		return file.Provider, err
	}
	return "", nil
}

// erased: a file that was being erased, or an empty one.
func erased(data []byte) bool { return bytes.Count(data, []byte{0}) == len(data) }

// readFile reads a file that may not be larger than any of ours.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if len(data) > maxBytes {
		return nil, fmt.Errorf("%s is larger than any file of this kind: it is not Atoll's", path)
	}
	return data, nil
}
