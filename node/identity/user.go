package identity

import (
	"context"
	"fmt"
	"log/slog"
	"time"
	"unicode/utf8"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
)

// AdminName is the user that every site has.
const AdminName = "admin"

// Bounds of a password, in bytes.
const (
	MinPassword = 8
	MaxPassword = 128
)

// userRow is a user, by name. Hash names its algorithm.
type userRow struct {
	Hash      string `cbor:"hash"`
	Admin     bool   `cbor:"admin"`
	CreatedAt int64  `cbor:"created_at"` // unix seconds
	UpdatedAt int64  `cbor:"updated_at"`
}

// EnsureAdmin creates the admin unless the site has it already; only then is the
// password asked for.
func (id *Identity) EnsureAdmin(ctx context.Context, password func() (string, error)) error {
	var hash string
	_, err := id.config.DB.Update(ctx, func(tx *table.Tx) error {
		_, _, ok, err := id.users.Get(tx, AdminName)
		if err != nil || ok {
			return err
		}
		if hash == "" { // once, however often this function is rerun
			secret, err := password()
			if err != nil {
				return fmt.Errorf("find the admin's first password: %w", err)
			}
			if hash, err = newHash(secret); err != nil {
				return err
			}
		}
		now := id.now().Unix()
		return id.users.Put(tx, userRow{Hash: hash, Admin: true, CreatedAt: now, UpdatedAt: now}, AdminName)
	})
	if err != nil {
		return fmt.Errorf("create the admin: %w", err)
	}
	return nil
}

// HasAdmin reports whether this node's state has the admin, who is the last that
// a new site gets.
func (id *Identity) HasAdmin() (bool, error) {
	_, ok, err := id.user(AdminName)
	return ok, err
}

// SetAdminPassword changes the admin's password. Logins with the old one end on
// every node as the change reaches it; tokens live on until they expire.
func (id *Identity) SetAdminPassword(ctx context.Context, password string) error {
	hash, err := newHash(password)
	if err != nil {
		return err
	}
	_, err = id.config.DB.Update(ctx, func(tx *table.Tx) error {
		row, _, ok, err := id.users.Get(tx, AdminName)
		if err != nil {
			return err
		}
		if !ok {
			return fault.New(fault.NotFound, "the site has no user %s yet", AdminName)
		}
		row.Hash, row.UpdatedAt = hash, id.now().Unix()
		return id.users.Put(tx, row, AdminName)
	})
	if err != nil {
		return fmt.Errorf("set the admin's password: %w", err)
	}
	return nil
}

// user reads a user's row from this node's state.
func (id *Identity) user(name string) (row userRow, ok bool, err error) {
	if !plausibleName(name) {
		return userRow{}, false, nil
	}
	err = id.config.DB.View(func(v *table.View) (err error) {
		row, _, ok, err = id.users.Get(v, name)
		return err
	})
	if err != nil {
		return userRow{}, false, fmt.Errorf("read user %s: %w", name, err)
	}
	return row, ok, nil
}

// plausibleName keeps what can be no user's name away from the table.
func plausibleName(name string) bool {
	if name == "" || len(name) > 255 || !utf8.ValidString(name) {
		return false
	}
	for _, c := range name {
		if c < ' ' || c == 0x7f {
			return false
		}
	}
	return true
}

const (
	// loginTTL is how long a password that was right is remembered.
	loginTTL        = 5 * time.Minute
	maxCachedLogins = 1024
)

// login checks a name and password that came from a source.
func (id *Identity) login(ctx context.Context, from, name, password string) (access.Principal, error) {
	row, exists, err := id.user(name)
	if err != nil {
		return access.Principal{}, err
	}
	hash := id.decoy
	if exists {
		hash = row.Hash
	}
	remembered := id.logins.key(name, password, hash)
	if p, ok := id.logins.get(remembered, id.now()); ok {
		return p, nil
	}
	select {
	case id.hashing <- struct{}{}:
		defer func() { <-id.hashing }()
	case <-ctx.Done():
		return access.Principal{}, ctx.Err()
	}
	// A client that starts with many requests at once comes here with all of
	// them: the first one's answer serves the others.
	if p, ok := id.logins.get(remembered, id.now()); ok {
		return p, nil
	}
	if wait := id.attempts.take(from, name, id.now()); wait > 0 {
		id.outcomes.WithLabelValues("password", "limited").Inc()
		return access.Principal{}, fault.New(fault.Limit, "too many failed logins as this user from this address: try again in %s",
			wait.Round(time.Second)).WithCode("TOO_MANY_REQUEST")
	}
	right := matches(hash, password)
	if !right || !exists {
		id.outcomes.WithLabelValues("password", "wrong").Inc()
		id.config.Log.LogAttrs(ctx, slog.LevelInfo, "login refused", slog.String("name", clipName(name)), slog.String("from", from))
		return access.Principal{}, fault.New(fault.Unauthenticated, "wrong name or password")
	}
	id.attempts.forget(from, name)
	id.outcomes.WithLabelValues("password", "right").Inc()
	p := access.Principal{Kind: access.User, Name: name, Admin: row.Admin}
	id.logins.put(remembered, p, id.now().Add(loginTTL))
	return p, nil
}

func clipName(name string) string {
	if len(name) > 64 {
		return name[:64] + "..."
	}
	return name
}
