package keyring

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"golang.org/x/crypto/argon2"

	"github.com/atoll-registry/atoll/cluster/pki"
)

// PassphraseName names the provider of NewPassphrase.
const PassphraseName = "passphrase"

// MinPassphrase is the least length in bytes of a passphrase that seals anything.
const MinPassphrase = 8

// Cost is what one guess at a passphrase takes: the parameters of argon2id.
type Cost struct {
	Time    uint32 // passes
	Memory  uint32 // KiB
	Threads uint8
}

// DefaultCost is the second recommendation of RFC 9106, section 4: it fits a
// machine of 512 MiB.
func DefaultCost() Cost { return Cost{Time: 3, Memory: 64 << 10, Threads: 4} }

// Bounds of the cost that a file may ask for, so that a forged one does not take
// all memory or all day.
const (
	maxTime    = 16
	maxMemory  = 256 << 10 // KiB
	maxThreads = 16
	// maxDerived bounds how often one provider derives: the files of a node share a
	// salt, forged ones need not.
	maxDerived = 4
)

const (
	saltSize       = 16
	wrapVersion    = 1
	passphraseHead = 1 + 4 + 4 + 1 + saltSize // version, time, memory, threads, salt
)

// passphrase wraps file keys with a key derived by argon2id. A wrapped key is
// passphraseHead bytes, integers in big endian, then pki.Seal of the file key.
type passphrase struct {
	secret []byte
	cost   Cost
	head   string            // of what is wrapped: that of the first file that was opened
	keys   map[string][]byte // by head
}

// NewPassphrase gives the provider whose key is derived from a passphrase: once for
// all files that were sealed together.
func NewPassphrase(secret []byte, cost Cost) Provider {
	return &passphrase{secret: secret, cost: cost, keys: map[string][]byte{}}
}

func (*passphrase) Name() string { return PassphraseName }

func (p *passphrase) Wrap(ctx context.Context, purpose string, key []byte) ([]byte, error) {
	if p.head == "" {
		if len(p.secret) > 0 && len(p.secret) < MinPassphrase {
			return nil, fmt.Errorf("%w: it has %d bytes, take %d or more", ErrWeak, len(p.secret), MinPassphrase)
		}
		head := []byte{wrapVersion}
		head = binary.BigEndian.AppendUint32(head, p.cost.Time)
		head = binary.BigEndian.AppendUint32(head, p.cost.Memory)
		head = append(head, p.cost.Threads)
		salt := make([]byte, saltSize)
		rand.Read(salt) // never fails: crypto/rand's promise
		p.head = string(append(head, salt...))
	}
	wrapping, err := p.derive(ctx, p.head)
	if err != nil {
		return nil, err
	}
	sealed, err := pki.Seal(wrapping, wrapName(purpose), key)
	return append([]byte(p.head), sealed...), err
}

func (p *passphrase) Unwrap(ctx context.Context, purpose string, blob []byte) ([]byte, error) {
	if len(blob) < passphraseHead || blob[0] != wrapVersion {
		return nil, fmt.Errorf("its key was not wrapped by a passphrase that this version of Atoll knows")
	}
	head := string(blob[:passphraseHead])
	wrapping, err := p.derive(ctx, head)
	if err != nil {
		return nil, err
	}
	key, err := pki.Open(wrapping, wrapName(purpose), blob[passphraseHead:])
	if err != nil {
		return nil, fmt.Errorf("%w: the passphrase is wrong, or the file is damaged: %s", ErrLocked, howToUnlock)
	}
	if p.head == "" {
		p.head = head
	}
	return key, nil
}

// Forget overwrites the passphrase and what was derived from it: the provider takes no
// further call.
func (p *passphrase) Forget() {
	clear(p.secret)
	for _, key := range p.keys {
		clear(key)
	}
	clear(p.keys)
	p.secret = nil
}

func wrapName(purpose string) string { return "file key of " + purpose }

func (p *passphrase) derive(ctx context.Context, head string) ([]byte, error) {
	if key := p.keys[head]; key != nil {
		return key, nil
	}
	if len(p.secret) == 0 {
		return nil, fmt.Errorf("%w: there is no passphrase: %s", ErrLocked, howToUnlock)
	}
	if len(p.keys) >= maxDerived {
		return nil, fmt.Errorf("the files were sealed at %d occasions, which this version of Atoll never does", maxDerived+1)
	}
	cost := Cost{binary.BigEndian.Uint32([]byte(head[1:5])), binary.BigEndian.Uint32([]byte(head[5:9])), head[9]}
	if cost.Time < 1 || cost.Time > maxTime || cost.Memory < 8 || cost.Memory > maxMemory || cost.Threads < 1 || cost.Threads > maxThreads {
		return nil, fmt.Errorf("its key asks for argon2id with %d passes over %d KiB in %d threads, which is beyond what is allowed (%d, %d, %d): it is forged or damaged", cost.Time, cost.Memory, cost.Threads, maxTime, maxMemory, maxThreads)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	key := argon2.IDKey(p.secret, []byte(head[10:]), cost.Time, cost.Memory, cost.Threads, keySize)
	p.keys[head] = key
	return key, nil
}
