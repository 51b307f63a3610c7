package identity

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
)

const (
	// Service is the name that tokens are for; Harbor's clients know it.
	Service = "harbor-registry"

	tokenIssuer = "atoll-token-issuer"
	tokenLife   = 30 * time.Minute
	// tokenSkew is how far the clocks of two nodes may be apart.
	tokenSkew = 5 * time.Minute
	// verifiedTTL is how long a token that was verified is not verified again,
	// and so how long a user that was removed keeps what its tokens allow.
	verifiedTTL     = time.Minute
	maxCachedTokens = 4096
	maxTokenLength  = 16 << 10
)

// claims of a token. They are opaque to clients.
type claims struct {
	Issuer    string           `json:"iss"`
	Subject   string           `json:"sub"`
	Audience  string           `json:"aud"`
	Expires   *jwt.NumericDate `json:"exp"`
	NotBefore *jwt.NumericDate `json:"nbf"`
	IssuedAt  *jwt.NumericDate `json:"iat"`
	ID        string           `json:"jti"`
	// Kind of the principal: "" for anonymous, user or system.
	Kind   string  `json:"atoll_kind,omitempty"`
	Access []scope `json:"access"`
}

// The kinds of principals in a token.
const (
	kindUser   = "user"
	kindSystem = "system"
)

func (c *claims) GetExpirationTime() (*jwt.NumericDate, error) { return c.Expires, nil }
func (c *claims) GetIssuedAt() (*jwt.NumericDate, error)       { return c.IssuedAt, nil }
func (c *claims) GetNotBefore() (*jwt.NumericDate, error)      { return c.NotBefore, nil }
func (c *claims) GetIssuer() (string, error)                   { return c.Issuer, nil }
func (c *claims) GetSubject() (string, error)                  { return c.Subject, nil }
func (c *claims) GetAudience() (jwt.ClaimStrings, error)       { return jwt.ClaimStrings{c.Audience}, nil }

// issued is a token with what its holder is told about it.
type issued struct {
	token string
	at    time.Time
}

// issue signs a token that allows the principal what granted lists, which the
// caller has narrowed to what it may do.
func (id *Identity) issue(p access.Principal, granted []scope) (issued, error) {
	now := id.now().Truncate(time.Second)
	var serial [8]byte
	rand.Read(serial[:]) // never fails: crypto/rand's promise
	c := &claims{
		Issuer: tokenIssuer, Subject: p.Name, Audience: Service,
		Expires: jwt.NewNumericDate(now.Add(tokenLife)), NotBefore: jwt.NewNumericDate(now.Add(-tokenSkew)),
		IssuedAt: jwt.NewNumericDate(now), ID: hex.EncodeToString(serial[:]), Access: granted,
	}
	switch p.Kind {
	case access.Anonymous:
	case access.User:
		c.Kind = kindUser
	case access.System:
		c.Kind = kindSystem
	default:
		return issued{}, fmt.Errorf("issue a token to a principal of kind %d", p.Kind)
	}
	t := jwt.NewWithClaims(jwt.SigningMethodEdDSA, c)
	kid, key := id.config.Keys.TokenKey()
	t.Header["kid"] = kid
	signed, err := t.SignedString(key)
	if err != nil {
		return issued{}, fmt.Errorf("sign a token: %w", err)
	}
	return issued{signed, now}, nil
}

// Verify says whose token it is, with the grants of the token as the principal's
// Grants. A token that does not hold is fault.Unauthenticated. A token that was
// verified a short while ago costs a MAC and a lookup.
func (id *Identity) Verify(ctx context.Context, token string) (access.Principal, error) {
	if len(token) > maxTokenLength {
		return access.Principal{}, fault.New(fault.Unauthenticated, "the token is %d bytes long: no token of this registry is", len(token))
	}
	now := id.now()
	known := id.verified.key(token)
	if v, ok := id.verified.get(known, now); ok {
		// The node that issued it may have been removed since: that is looked up.
		key, err := id.config.Keys.TokenPublic(v.kid)
		if err == nil && key != nil {
			return v.Principal, nil
		}
	}
	c, kid, err := id.parse(ctx, token)
	if err != nil {
		id.outcomes.WithLabelValues("token", "wrong").Inc()
		return access.Principal{}, err
	}
	p, err := id.bearer(c)
	if err != nil {
		return access.Principal{}, err
	}
	id.outcomes.WithLabelValues("token", "right").Inc()
	until := now.Add(verifiedTTL)
	if end := c.Expires.Add(tokenSkew); end.Before(until) {
		until = end
	}
	id.verified.put(known, verified{p, kid}, until)
	return p, nil
}

// verified is the principal of a token that held, and who had signed it.
type verified struct {
	access.Principal
	kid string
}

// parse checks signature, times and audience.
func (id *Identity) parse(ctx context.Context, token string) (c *claims, kid string, err error) {
	c = &claims{}
	var lookup error // not the token's fault
	_, err = jwt.ParseWithClaims(token, c, func(t *jwt.Token) (any, error) {
		kid, _ = t.Header["kid"].(string)
		if kid == "" || len(kid) > maxKid {
			return nil, errors.New("no key id of ours")
		}
		key, err := id.publicKey(ctx, kid)
		if err != nil {
			lookup = err
			return nil, err
		}
		if key == nil {
			return nil, errors.New("the key is not known")
		}
		return key, nil
	},
		jwt.WithValidMethods([]string{jwt.SigningMethodEdDSA.Alg()}), jwt.WithIssuer(tokenIssuer), jwt.WithAudience(Service),
		jwt.WithExpirationRequired(), jwt.WithLeeway(tokenSkew), jwt.WithTimeFunc(id.now), jwt.WithStrictDecoding())
	switch {
	case lookup != nil:
		return nil, "", lookup
	case errors.Is(err, jwt.ErrTokenExpired):
		return nil, "", fault.Wrap(err, fault.Unauthenticated, "the token has expired: ask for a new one")
	case err != nil:
		return nil, "", fault.Wrap(err, fault.Unauthenticated, "the token is not valid here: ask for a new one")
	}
	return c, kid, nil
}

// bearer makes the principal of a token that holds. A user's rights are read
// anew, so that a token never outlives its user for long.
func (id *Identity) bearer(c *claims) (access.Principal, error) {
	p := access.Principal{Name: c.Subject, Grants: []access.Grant{}}
	switch c.Kind {
	case "":
		p.Kind, p.Name = access.Anonymous, ""
	case kindSystem:
		p.Kind = access.System
	case kindUser:
		row, ok, err := id.user(c.Subject)
		if err != nil {
			return access.Principal{}, err
		}
		if !ok {
			return access.Principal{}, fault.New(fault.Unauthenticated, "the user of this token does not exist any more")
		}
		p.Kind, p.Admin = access.User, row.Admin
	default:
		return access.Principal{}, fault.New(fault.Unauthenticated, "the token is of a kind that this version does not know")
	}
	for _, s := range c.Access {
		switch {
		case s.Type == typeRepository:
			p.Grants = append(p.Grants, access.Grant{Repository: repositoryName(s.Name), Actions: s.Actions})
		case s.Type == typeRegistry && s.Name == "catalog":
			p.Grants = append(p.Grants, access.Grant{Repository: access.Catalog, Actions: s.Actions})
		}
	}
	return p, nil
}
