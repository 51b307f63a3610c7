package identity

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"time"

	"golang.org/x/time/rate"
)

// Keys are those that tokens are signed with. Each node has one of its own, so that
// it issues tokens when it is all that is left of its site, and so that the tokens of
// a node end with it.
type Keys interface {
	// TokenKey is this node's, and the id by which any node finds its public half.
	TokenKey() (kid string, key ed25519.PrivateKey)
	// TokenPublic finds the public half of a member's key as the newest local state
	// has it; nil when it knows none of that id, or its node was removed.
	TokenPublic(kid string) (ed25519.PublicKey, error)
}

// maxKid bounds the key ids of others' tokens.
const maxKid = 128

// newAsks bounds how often a key id that is not known here makes this node ask the
// leader: ids come from outside.
func newAsks() *rate.Limiter { return rate.NewLimiter(rate.Every(time.Second), 3) }

// publicKey finds the key that a token says it was signed with; nil when there is
// none. The node that signed may have joined after what this one knows, so an
// unknown id is looked up again behind a read index, within bounds. Without a leader
// to ask, what is known here decides.
func (id *Identity) publicKey(ctx context.Context, kid string) (ed25519.PublicKey, error) {
	key, err := id.config.Keys.TokenPublic(kid)
	if key != nil || err != nil || !id.asks.Allow() {
		return key, err
	}
	if err := id.config.DB.ReadIndex(ctx); err != nil {
		return nil, nil // a client that is refused gets itself a token of this node
	}
	if key, err = id.config.Keys.TokenPublic(kid); err != nil {
		return nil, fmt.Errorf("look for token key %s: %w", kid, err)
	}
	return key, nil
}
