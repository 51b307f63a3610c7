// Package identity says who makes a request: it keeps the users, checks names
// and passwords, and issues and verifies the registry's tokens.
//
// Invariants:
//   - Passwords are kept as argon2id hashes only, and a failed login costs the
//     same whether the name exists or not.
//   - A password is hashed once in a few minutes and not once a request: between,
//     a keyed MAC in memory stands for it. The MAC covers the stored hash, so a
//     changed password ends it at once.
//   - A token carries what was asked and allowed when it was issued, and a
//     principal that came with one always has Grants, even if empty: it is never
//     wider than its token.
//   - Tokens are signed with the key of the node that issues them, and end when that
//     node is removed; see Keys.
package identity

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
)

// Projects finds a project by its name: false when there is none.
type Projects interface {
	Lookup(ctx context.Context, name string) (access.Project, bool, error)
}

// Config of an Identity. ExternalURL may be empty.
type Config struct {
	DB         *table.DB
	Keys       Keys
	Projects   Projects
	Log        *slog.Logger
	Registerer prometheus.Registerer
	// ExternalURL is where clients find the node. Its scheme is used in
	// challenges for requests that name its host: behind a proxy that ends TLS
	// the node cannot see it.
	ExternalURL string
}

// Identity is safe for use by many goroutines.
type Identity struct {
	config Config
	users  *table.Table[userRow]

	hashing  chan struct{} // bounds the memory that hashing passwords takes
	decoy    string        // a hash that no password has
	logins   *cache[access.Principal]
	verified *cache[verified]
	attempts *attempts
	asks     *rate.Limiter
	outcomes *prometheus.CounterVec

	now func() time.Time
}

// New makes an Identity on a database that is not built yet, since it defines
// tables.
func New(c Config) (*Identity, error) {
	if c.DB == nil || c.Keys == nil || c.Projects == nil || c.Log == nil || c.Registerer == nil {
		return nil, errors.New("identity: database, keys, projects, log and registerer are all needed")
	}
	var secret [32]byte
	rand.Read(secret[:]) // never fails: crypto/rand's promise
	id := &Identity{
		config:   c,
		users:    table.Define[userRow](c.DB, "user"),
		hashing:  make(chan struct{}, hashingAtOnce),
		decoy:    decoyHash(),
		logins:   newCache[access.Principal](secret, maxCachedLogins),
		verified: newCache[verified](secret, maxCachedTokens),
		attempts: newAttempts(),
		asks:     newAsks(),
		outcomes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "atoll_identity_logins_total", Help: "Checks of credentials by kind (password, token) and outcome.",
		}, []string{"kind", "outcome"}),
		now: time.Now,
	}
	if err := c.Registerer.Register(id.outcomes); err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return id, nil
}

// Authenticate says who makes the request: nobody in particular without
// credentials, or fault.Unauthenticated when the credentials are wrong. A
// request that came over the node's own socket carries its principal in the
// context already, and keeps it whatever its headers say.
func (id *Identity) Authenticate(r *http.Request) (access.Principal, error) {
	if p := access.From(r.Context()); p.Kind != access.Anonymous {
		return p, nil
	}
	header := r.Header.Get("Authorization")
	if header == "" {
		return access.Principal{}, nil
	}
	scheme, credentials, _ := strings.Cut(header, " ")
	switch strings.ToLower(scheme) {
	case "basic":
		name, password, ok := r.BasicAuth()
		if !ok {
			return access.Principal{}, fault.New(fault.Unauthenticated, "the Authorization header is not a valid name and password")
		}
		return id.login(r.Context(), source(r), name, password)
	case "bearer":
		return id.Verify(r.Context(), strings.TrimSpace(credentials))
	}
	return access.Principal{}, fault.New(fault.Unauthenticated, "the Authorization header is neither Basic nor Bearer")
}

// source is where a request comes from, for counting failures: the address, or
// for IPv6 the network, which one client has to itself.
func source(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return host
	}
	if addr = addr.Unmap(); addr.Is4() {
		return addr.String()
	}
	network, err := addr.WithZone("").Prefix(64)
	if err != nil {
		return host
	}
	return network.String()
}
