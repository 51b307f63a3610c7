package identity

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

// keyAlgorithm is the only one yet.
const keyAlgorithm = "Ed25519"

// keyRow is a key that tokens are signed with, by its id. A retired key signs
// nothing new and is kept until the last token that it signed has expired.
type keyRow struct {
	Algorithm string `cbor:"algorithm"`
	Public    []byte `cbor:"public"`
	Private   []byte `cbor:"private"`    // sealed
	CreatedAt int64  `cbor:"created_at"` // unix seconds
	RetiredAt int64  `cbor:"retired_at"` // 0: in use
}

// currentRow names the key that signs. It is one row, so that two nodes that
// start together agree on one key.
type currentRow struct {
	ID string `cbor:"id"`
}

const currentKey = "current"

// signer is an opened key.
type signer struct {
	id  string
	key ed25519.PrivateKey
}

// signers keeps the opened key.
type signers struct {
	mu     sync.Mutex
	opened signer
	// asks bounds how often a key id that is not known here makes this node ask
	// the leader: ids come from outside.
	asks *rate.Limiter
}

func newSigners() *signers {
	return &signers{asks: rate.NewLimiter(rate.Every(time.Second), 3)}
}

func sealName(kid string) string { return "token-key/" + kid }

// RotateTokenKey makes a new key to sign tokens with. Tokens that the old one
// signed stay valid until they expire.
func (id *Identity) RotateTokenKey(ctx context.Context) error {
	return id.newKey(ctx, true)
}

// RevokeTokenKeys makes a new key to sign tokens with and ends all tokens that the
// others signed, because somebody may have got hold of those.
func (id *Identity) RevokeTokenKeys(ctx context.Context) error {
	if err := id.newKey(ctx, true); err != nil {
		return err
	}
	_, err := id.config.DB.Update(ctx, func(tx *table.Tx) error {
		current, _, _, err := id.current.Get(tx, currentKey)
		if err != nil {
			return err
		}
		var others []string
		for row, err := range id.keys.Scan(tx, table.Range{Limit: 100}) {
			if err != nil {
				return err
			}
			if row.Key[0] != current.ID {
				others = append(others, row.Key[0])
			}
		}
		for _, kid := range others {
			if err := id.keys.Delete(tx, kid); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("revoke the token keys: %w", err)
	}
	return nil
}

// Reseal seals the private keys anew, with the key that the site has changed to.
func (id *Identity) Reseal(ctx context.Context) error {
	_, err := id.config.DB.Update(ctx, func(tx *table.Tx) error {
		again := map[string]keyRow{}
		for row, err := range id.keys.Scan(tx, table.Range{Limit: 100}) {
			if err != nil {
				return err
			}
			again[row.Key[0]] = row.Value
		}
		for kid, row := range again {
			seed, err := id.config.Sealer.Unseal(sealName(kid), row.Private)
			if err != nil {
				return err
			}
			if row.Private, err = id.config.Sealer.Seal(sealName(kid), seed); err != nil {
				return err
			}
			if err := id.keys.Put(tx, row, kid); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("seal the token keys anew: %w", err)
	}
	return nil
}

// newKey puts a fresh key in place of the current one, or, unless replace, only
// where there is none.
func (id *Identity) newKey(ctx context.Context, replace bool) error {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return fmt.Errorf("make a token key: %w", err)
	}
	sum := sha256.Sum256(public)
	kid := hex.EncodeToString(sum[:8])
	sealed, err := id.config.Sealer.Seal(sealName(kid), private.Seed())
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "this node cannot keep a new token key: it does not hold the cluster's key; use another node")
	}
	now := id.now()
	_, err = id.config.DB.Update(ctx, func(tx *table.Tx) error {
		current, _, ok, err := id.current.Get(tx, currentKey)
		if err != nil || ok && !replace {
			return err
		}
		if ok {
			if err := id.retire(tx, current.ID, now); err != nil {
				return err
			}
		}
		row := keyRow{Algorithm: keyAlgorithm, Public: public, Private: sealed, CreatedAt: now.Unix()}
		if err := id.keys.Put(tx, row, kid); err != nil {
			return err
		}
		return id.current.Put(tx, currentRow{kid}, currentKey)
	})
	if err != nil {
		return fmt.Errorf("store a token key: %w", err)
	}
	return nil
}

// retire marks a key as replaced and deletes those whose tokens have all
// expired.
func (id *Identity) retire(tx *table.Tx, kid string, now time.Time) error {
	var expired []string
	for row, err := range id.keys.Scan(tx, table.Range{Limit: 100}) {
		if err != nil {
			return err
		}
		if at := row.Value.RetiredAt; at != 0 && now.Unix() > at+int64((tokenLife+tokenSkew)/time.Second) {
			expired = append(expired, row.Key[0])
		}
	}
	for _, old := range expired {
		if err := id.keys.Delete(tx, old); err != nil {
			return err
		}
	}
	row, _, ok, err := id.keys.Get(tx, kid)
	if err != nil || !ok {
		return err
	}
	row.RetiredAt = now.Unix()
	return id.keys.Put(tx, row, kid)
}

// signer gives the key that signs now; the first time in a site's life it makes
// one.
func (id *Identity) signer(ctx context.Context) (signer, error) {
	kid, row, err := id.currentSigner()
	if err != nil {
		return signer{}, err
	}
	if kid == "" {
		if err := id.newKey(ctx, false); err != nil {
			return signer{}, err
		}
		if kid, row, err = id.currentSigner(); err != nil {
			return signer{}, err
		}
		if kid == "" {
			return signer{}, fault.New(fault.Unavailable, "the site has no token key yet: try again in a few seconds")
		}
	}
	s := id.signers
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opened.id == kid {
		return s.opened, nil
	}
	seed, err := id.config.Sealer.Unseal(sealName(kid), row.Private)
	if err != nil {
		return signer{}, fault.Wrap(err, fault.Unavailable, "this node cannot issue tokens: it does not hold the cluster's key; log in at another node")
	}
	if row.Algorithm != keyAlgorithm || len(seed) != ed25519.SeedSize {
		return signer{}, fmt.Errorf("token key %s is %s with a seed of %d bytes", kid, row.Algorithm, len(seed))
	}
	s.opened = signer{kid, ed25519.NewKeyFromSeed(seed)}
	return s.opened, nil
}

// currentSigner reads which key signs now; "" when there is none here.
func (id *Identity) currentSigner() (kid string, row keyRow, err error) {
	err = id.config.DB.View(func(v *table.View) error {
		current, _, ok, err := id.current.Get(v, currentKey)
		if err != nil || !ok {
			return err
		}
		if row, _, ok, err = id.keys.Get(v, current.ID); err == nil && ok {
			kid = current.ID
		}
		return err
	})
	if err != nil {
		return "", keyRow{}, fmt.Errorf("read the token key: %w", err)
	}
	return kid, row, nil
}

// publicKey finds the key that a token says it was signed with; nil when there
// is none. A token may be younger than what this node knows, so an unknown id is
// looked up again behind a read index, within bounds.
func (id *Identity) publicKey(ctx context.Context, kid string) (ed25519.PublicKey, error) {
	key, err := id.lookupPublic(kid)
	if key != nil || err != nil || !id.signers.asks.Allow() {
		return key, err
	}
	if err := id.config.DB.ReadIndex(ctx); err != nil {
		return nil, fmt.Errorf("look for token key %s: %w", kid, err)
	}
	return id.lookupPublic(kid)
}

func (id *Identity) lookupPublic(kid string) (ed25519.PublicKey, error) {
	var row keyRow
	var ok bool
	err := id.config.DB.View(func(v *table.View) (err error) {
		row, _, ok, err = id.keys.Get(v, kid)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read token key %s: %w", kid, err)
	}
	if !ok || row.Algorithm != keyAlgorithm || len(row.Public) != ed25519.PublicKeySize {
		return nil, nil
	}
	return ed25519.PublicKey(row.Public), nil
}
