package identity

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"runtime/debug"
	"strings"

	"golang.org/x/crypto/argon2"

	"github.com/atoll-registry/atoll/node/fault"
)

// The cost of a hash, sized for small boxes: 19 MiB and two passes is the least
// that OWASP's password storage advice names, and takes about 40 ms on one core
// of a small PC.
const (
	hashMemory  = 19 * 1024 // KiB
	hashPasses  = 2
	hashLanes   = 1
	hashSalt    = 16
	hashLength  = 32
	hashVersion = argon2.Version

	// hashingAtOnce bounds the memory that logins take: 2 x 19 MiB.
	hashingAtOnce = 2
)

// newHash hashes a password in the PHC string format, which names algorithm,
// version and cost.
func newHash(password string) (string, error) {
	if len(password) < MinPassword || len(password) > MaxPassword {
		return "", fault.New(fault.Invalid, "a password has %d to %d bytes, this one has %d", MinPassword, MaxPassword, len(password))
	}
	salt := make([]byte, hashSalt)
	rand.Read(salt) // never fails: crypto/rand's promise
	return encodeHash(salt, derive([]byte(password), standardHash(salt))), nil
}

// decoyHash is what a login under a name that does not exist is checked against.
func decoyHash() string {
	random := make([]byte, hashSalt+hashLength)
	rand.Read(random)
	return encodeHash(random[:hashSalt], random[hashSalt:])
}

// derive is argon2id. It gives back the memory that it took, which would stay the
// process's otherwise: several times what everything else in an idle node takes.
func derive(password []byte, h storedHash) []byte {
	sum := argon2.IDKey(password, h.salt, h.passes, h.memory, h.lanes, uint32(len(h.sum)))
	debug.FreeOSMemory()
	return sum
}

func encodeHash(salt, sum []byte) string {
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", hashVersion, hashMemory, hashPasses, hashLanes,
		b64.EncodeToString(salt), b64.EncodeToString(sum))
}

// storedHash is a parsed hash.
type storedHash struct {
	memory, passes uint32
	lanes          uint8
	salt, sum      []byte
}

// standardHash is a hash to be made with the cost of today.
func standardHash(salt []byte) storedHash {
	return storedHash{memory: hashMemory, passes: hashPasses, lanes: hashLanes, salt: salt, sum: make([]byte, hashLength)}
}

func parseHash(s string) (storedHash, error) {
	var h storedHash
	parts := strings.Split(s, "$")
	if len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" || parts[2] != fmt.Sprintf("v=%d", hashVersion) {
		return h, fmt.Errorf("password hash is not argon2id of version %d", hashVersion)
	}
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &h.memory, &h.passes, &h.lanes); err != nil {
		return h, fmt.Errorf("cost of password hash: %w", err)
	}
	// A row is ours, but a row with an absurd cost must not take the node down.
	if h.memory < 8 || h.memory > 256*1024 || h.passes < 1 || h.passes > 16 || h.lanes < 1 || h.lanes > 8 {
		return h, fmt.Errorf("cost of password hash %q is out of bounds", parts[3])
	}
	var err error
	if h.salt, err = base64.RawStdEncoding.DecodeString(parts[4]); err != nil {
		return h, fmt.Errorf("salt of password hash: %w", err)
	}
	if h.sum, err = base64.RawStdEncoding.DecodeString(parts[5]); err != nil {
		return h, fmt.Errorf("password hash: %w", err)
	}
	if len(h.salt) < 8 || len(h.salt) > 64 || len(h.sum) < 16 || len(h.sum) > 64 {
		return h, fmt.Errorf("password hash has a salt of %d and a sum of %d bytes", len(h.salt), len(h.sum))
	}
	return h, nil
}

// matches reports in constant time whether the password has the hash. A hash
// that cannot be read matches nothing.
func matches(hash, password string) bool {
	h, err := parseHash(hash)
	if err != nil || len(password) > MaxPassword {
		// No such password can be set: the length is the client's own and tells
		// it nothing. Spend the time all the same.
		derive(nil, standardHash(make([]byte, hashSalt)))
		return false
	}
	sum := derive([]byte(password), h)
	return subtle.ConstantTimeCompare(sum, h.sum) == 1
}
