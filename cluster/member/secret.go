package member

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
)

// Seal encrypts a secret under the site's cluster key, bound to a name.
func (n *Node) Seal(name string, plain []byte) ([]byte, error) { return n.seal("secret "+name, plain) }

// Unseal decrypts what Seal made under the same name on any member.
func (n *Node) Unseal(name string, sealed []byte) ([]byte, error) {
	return n.unseal("secret "+name, sealed)
}

// Resealers are called by the leader when the site has changed its cluster key: each
// seals its rows anew. They must be safe to repeat. It must be called before Run.
func (n *Node) Resealers(reseal ...func(context.Context) error) { n.reseal = reseal }

func (n *Node) seal(name string, plain []byte) ([]byte, error) {
	row, err := n.localSecret()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	key := n.identity.sealing(row)
	if key == nil {
		return nil, errNoKey
	}
	return pki.Seal(key, name, plain)
}

// unseal tries the keys that this node holds: there are several only while the site
// changes its key.
func (n *Node) unseal(name string, sealed []byte) (plain []byte, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	err = errNoKey
	for key := range slices.Chunk(n.identity.ClusterKey, pki.ClusterKeySize) {
		if plain, err = pki.Open(key, name, sealed); err == nil {
			return plain, nil
		}
	}
	return nil, err
}

// ClusterKeys are a copy of the keys that this node holds, one after the other: see
// Identity.ClusterKey. Whoever has it clears it.
func (n *Node) ClusterKeys() []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	return bytes.Clone(n.identity.ClusterKey)
}

// keyIDs are the ids of the cluster keys that this node holds.
func (n *Node) keyIDs() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.identity.keyIDs()
}

func (n *Node) holds(id string) bool { return slices.Contains(n.keyIDs(), id) }

func (n *Node) secret(r table.Reader) (secretRow, error) {
	row, _, _, err := n.rows.secrets.Get(r, theSecret)
	if err != nil {
		err = fmt.Errorf("reading which cluster key is in use: %w", err)
	}
	return row, err
}

func (n *Node) localSecret() (row secretRow, err error) {
	err = n.db.View(func(v *table.View) error {
		row, err = n.secret(v)
		return err
	})
	return row, err
}

// errNoKey: the node has no vote, and no node that has one could be asked instead.
const errNoKey = failure("this takes the site's cluster key, which only the nodes that vote hold, and none of them answers: try again when one is up (atoll cluster status)")

// seals is the id of the key that secrets are sealed with now; errNoKey in a node that
// does not hold it.
func (n *Node) seals() (string, error) {
	row, err := n.localSecret()
	if err != nil {
		return "", err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	key := n.identity.sealing(row)
	if key == nil {
		return "", errNoKey
	}
	return keyID(key), nil
}

// RotateKey has the site's cluster key replaced, while it runs on: see rekey. When that
// is under way already it changes nothing, and says so. A node that lost its vote
// meanwhile may have had the next key, too: it is exposed until another rotation.
func (n *Node) RotateKey(ctx context.Context) (underWay bool, err error) {
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		row, err := n.secret(tx)
		if err != nil {
			return err
		}
		if underWay = row.changing(); underWay {
			return nil
		}
		row.Key = true
		return n.rows.secrets.Put(tx, row, theSecret)
	})
	return underWay, err
}

// forsake says what a node that was stolen held: its certificate, with which it could
// pass for the site to nodes that join, perhaps join tokens, and the cluster key if it
// voted.
func (n *Node) forsake(tx *table.Tx, m Member) error {
	row, err := n.secret(tx)
	if err != nil {
		return err
	}
	row.Tokens, row.Authority = true, true
	row.Key = row.Key || m.Entrusted != 0 || slices.Contains(m.Knew, cmp.Or(row.Next, row.Seals))
	return n.rows.secrets.Put(tx, row, theSecret)
}

// revoking reports whether join tokens are still to be revoked.
func (n *Node) revoking() bool {
	row, err := n.localSecret()
	return err == nil && row.Tokens
}

// replaceSecrets does, as the leader, what the rows say is to be replaced.
func (n *Node) replaceSecrets(ctx context.Context) error {
	row, err := n.localSecret()
	if err != nil {
		return err
	}
	if row.Seals == "" {
		err = n.nameKey(ctx)
	}
	if err == nil && row.Tokens {
		err = errors.Join(n.closeFounders(ctx), n.revokeTokens(ctx))
	}
	if err == nil && row.Key {
		err = n.rotateKey(ctx)
	}
	if err == nil && row.Authority {
		err = n.makeAuthority(ctx)
	}
	return err
}

// nameKey writes down which key seals, where no row says so yet.
func (n *Node) nameKey(ctx context.Context) error {
	now, err := n.seals()
	if err != nil {
		return err
	}
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		row, err := n.secret(tx)
		if err != nil || row.Seals != "" {
			return err
		}
		row.Seals = now
		return n.rows.secrets.Put(tx, row, theSecret)
	})
	return err
}

// revokeTokens ends all join tokens.
func (n *Node) revokeTokens(ctx context.Context) error {
	const page = 100
	for found := page; found == page; {
		_, err := n.db.Update(ctx, func(tx *table.Tx) error {
			var ids []string
			for row, err := range n.rows.tokens.Scan(tx, table.Range{Limit: page}) {
				if err != nil {
					return err
				}
				ids = append(ids, row.Key[0])
			}
			found = len(ids)
			for _, id := range ids {
				if err := n.rows.tokens.Delete(tx, id); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("revoking the join tokens: %w", err)
		}
	}
	_, err := n.db.Update(ctx, func(tx *table.Tx) error {
		row, err := n.secret(tx)
		if err != nil || !row.Tokens {
			return err
		}
		row.Tokens = false
		return n.rows.secrets.Put(tx, row, theSecret)
	})
	return err
}

// entrust lets a member have the cluster key, or no longer.
func (n *Node) entrust(ctx context.Context, id string, may bool) error {
	_, err := n.db.Update(ctx, func(tx *table.Tx) error {
		row, err := n.secret(tx)
		if err != nil {
			return err
		}
		m, _, ok, err := n.rows.members.Get(tx, id)
		if err != nil || !ok || m.Removed != 0 || may == (m.Entrusted != 0) {
			return err
		}
		if m.Entrusted = 0; may {
			m.Entrusted = time.Now().Unix()
		} else {
			m.Knew = slices.DeleteFunc([]string{row.Seals, row.Next}, func(id string) bool { return id == "" })
		}
		return n.rows.members.Put(tx, m, id)
	})
	return err
}

// exposed are the members that had the key which is in use, or is to be next, and may
// not have it any more.
func (n *Node) exposed() (names []string, err error) {
	row, err := n.localSecret()
	if err != nil {
		return nil, err
	}
	members, err := n.roster()
	for _, m := range members {
		if m.Entrusted == 0 && slices.Contains(m.Knew, cmp.Or(row.Next, row.Seals)) {
			names = append(names, m.Name)
		}
	}
	return names, err
}

// rotateKey makes a new cluster key, as the leader. It is on this node's disk before
// any row names it, and seals nothing before every live member that may have it does.
func (n *Node) rotateKey(ctx context.Context) error {
	fresh, err := pki.NewClusterKey()
	if err != nil {
		return err
	}
	defer clear(fresh)
	next := keyID(fresh)
	now, err := n.seals()
	if err != nil {
		return err
	}
	if err := n.keep(func(keys [][]byte) [][]byte { return append(keys, fresh) }); err != nil {
		return err
	}
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		row, err := n.secret(tx)
		if err != nil {
			return err
		}
		if !row.Key {
			return nil // somebody else has done it
		}
		row.Key, row.Seals = false, cmp.Or(row.Seals, now)
		row.Next = next // in the place of one that was under way: its only holder may be gone
		return n.rows.secrets.Put(tx, row, theSecret)
	})
	return err
}

// keep changes the keys that this node holds: change gives those of them that stay, and
// others, and alters none. It is the one place where they change, under altering.
func (n *Node) keep(change func(keys [][]byte) [][]byte) error {
	return n.alter(func(id *Identity) {
		id.ClusterKey = bytes.Join(change(slices.Collect(slices.Chunk(id.ClusterKey, pki.ClusterKeySize))), nil)
	})
}

// holdKeys fetches the cluster keys that the rows name while this node may have them,
// and forgets those that they no longer do, or all.
func (n *Node) holdKeys(ctx context.Context) error {
	rows, self := n.db.Watch(ctx, "site_secret"), n.db.Watch(ctx, "member", n.Self())
	for {
		pause := time.Minute
		if err := n.holdOnce(ctx); err != nil && ctx.Err() == nil {
			n.log.Info("this node does not hold the cluster keys yet that it should", "error", err)
			pause = n.cfg.Timings.Ping
		}
		tick := time.NewTimer(pause)
		select {
		case <-rows:
		case <-self:
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			return nil
		}
		tick.Stop()
	}
}

func (n *Node) holdOnce(ctx context.Context) error {
	row, err := n.localSecret()
	if err != nil || row.Seals == "" {
		return err
	}
	self, ok, err := n.member(n.Self())
	if err != nil || !ok {
		return err
	}
	if self.Entrusted == 0 {
		return n.forget(ctx)
	}
	for _, id := range []string{row.Seals, row.Next} {
		if id == "" || n.holds(id) {
			continue
		}
		key, err := n.fetchKey(ctx, id)
		if err != nil {
			return err
		}
		err = n.keep(func(keys [][]byte) [][]byte { return append(keys, key) })
		clear(key)
		if err != nil {
			return err
		}
	}
	if row.Next != "" || row.Former != "" || len(n.keyIDs()) == 1 {
		return nil
	}
	// Nothing is forgotten on the word of a state that may be old: a key that this
	// node has just made is in no row yet.
	fresh, err := n.db.Confirmed(ctx, func(v *table.View) error {
		row, err = n.secret(v)
		return err
	})
	if err != nil || fresh.Stale || row.Next != "" || row.Former != "" {
		return err
	}
	return n.keep(func(keys [][]byte) [][]byte {
		return slices.DeleteFunc(keys, func(key []byte) bool { return keyID(key) != row.Seals })
	})
}

// forget removes the cluster keys of a node that may not have them any more: not on
// the word of a state that may be old, and never those that nobody else is known to hold.
func (n *Node) forget(ctx context.Context) error {
	if len(n.keyIDs()) == 0 {
		return nil
	}
	var self Member
	var row secretRow
	fresh, err := n.db.Confirmed(ctx, func(v *table.View) (err error) {
		if row, err = n.secret(v); err == nil {
			self, _, _, err = n.rows.members.Get(v, n.Self())
		}
		return err
	})
	if err != nil || fresh.Stale || self.Entrusted != 0 {
		return err
	}
	others := slices.DeleteFunc(n.Live(), func(m Member) bool { return m.ID == self.ID })
	for _, id := range []string{row.Seals, row.Former} { // another opens nothing any more
		proved := func(m Member) bool { return slices.Contains(n.peers.of(m.ID).Keys, id) }
		if n.holds(id) && !slices.ContainsFunc(others, proved) {
			return errors.New("this node may not have the cluster key any more, but no other node that is up has proved to hold it: it is kept until one has")
		}
	}
	if err := n.keep(func([][]byte) [][]byte { return nil }); err != nil {
		return err
	}
	n.log.Info("this node has no vote any more: it has erased the site's cluster key")
	return nil
}

// fetchKey asks the voters for a cluster key, also one that is being removed: it may be
// the only one. Others do not have it.
func (n *Node) fetchKey(ctx context.Context, id string) ([]byte, error) {
	in := n.raft.Load()
	if in == nil {
		return nil, errStarting
	}
	silent := []error{errNoKey}
	for _, s := range in.servers() {
		if s.Suffrage != raft.Voter || s.ID == in.self {
			continue
		}
		var answer keyAnswer
		err := n.askShortly(ctx, string(s.Address), pathKey+"?id="+id, &answer)
		if err == nil && keyID(answer.Key) == id {
			return answer.Key, nil
		}
		if err == nil {
			err = errors.New("it answered with another key")
		}
		silent = append(silent, fmt.Errorf("the node at %s: %w", s.Address, err))
	}
	return nil, errors.Join(silent...)
}

// askShortly is ask of a node that may be down.
func (n *Node) askShortly(ctx context.Context, addr, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timings.Live)
	defer cancel()
	return n.ask(ctx, addr, path, into)
}

type keyAnswer struct {
	Key []byte `json:"key"`
}

// serveKey gives a cluster key to a member that votes or is about to, as its row
// says: and the leader is asked, not a state that may be old.
func (n *Node) serveKey(w http.ResponseWriter, r *http.Request) {
	peer, _ := r.Context().Value(peerKey{}).(string)
	var m Member
	var ok bool
	fresh, err := n.db.Confirmed(r.Context(), func(v *table.View) (err error) {
		m, _, ok, err = n.rows.members.Get(v, peer)
		return err
	})
	if err != nil || fresh.Stale || !ok || m.Removed != 0 || m.Entrusted == 0 {
		http.Error(w, "you are no member of the site that may have its cluster key, as far as this node knows", http.StatusForbidden)
		return
	}
	key := n.copyOf(r.URL.Query().Get("id"))
	defer clear(key)
	if key == nil {
		http.Error(w, "this node does not hold the key", http.StatusNotFound)
		return
	}
	n.reply(w, keyAnswer{Key: key})
}

// copyOf is a copy of a key that this node holds; nil when it does not.
func (n *Node) copyOf(id string) []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	return bytes.Clone(n.identity.key(id))
}

// rekey takes the change of the cluster key one step further, as the leader: when
// every live member that may have it holds the next key, it seals; when all of them
// seal with it, the rows that are sealed with the former are sealed anew, and the former is
// forgotten.
func (n *Node) rekey(ctx context.Context) error {
	row, err := n.localSecret()
	if err != nil || row.Next == "" && row.Former == "" || time.Since(n.begun) < n.cfg.Timings.Live {
		return err
	}
	if row.Former == "" && !n.holds(row.Next) {
		// What others say of it is not asked: one that claimed to have it would keep the
		// site from ever changing its key.
		key, err := n.fetchKey(ctx, row.Next)
		clear(key)
		if err != nil {
			return n.repeat(ctx, row)
		}
		return nil // holdKeys takes it
	}
	ready := func(p ping) bool { return slices.Contains(p.Keys, row.Next) }
	if row.Former != "" {
		ready = func(p ping) bool { return p.Seals == row.Seals }
	}
	if waiting, err := n.unready(func(m Member, p ping) bool { return m.Entrusted == 0 || ready(p) }); err != nil || len(waiting) > 0 {
		return err
	}
	then := row
	then.Seals, then.Next, then.Former = row.Next, "", row.Seals
	if row.Former != "" {
		for _, reseal := range append([]func(context.Context) error{n.resealAuthority}, n.reseal...) {
			if err := reseal(ctx); err != nil {
				return fmt.Errorf("sealing the site's secrets with its new key: %w", err)
			}
		}
		then.Seals, then.Next, then.Former = row.Seals, row.Next, ""
	}
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		if now, err := n.secret(tx); err != nil || now != row {
			return err
		}
		return n.rows.secrets.Put(tx, then, theSecret)
	})
	if err == nil && row.Former != "" {
		n.log.Info("the site has changed its cluster key; the former one opens nothing any more")
	}
	return err
}

// repeat has another key made in the place of the next one, which its maker took down
// with it. Nothing is sealed with it yet.
func (n *Node) repeat(ctx context.Context, row secretRow) error {
	_, err := n.db.Update(ctx, func(tx *table.Tx) error {
		if now, err := n.secret(tx); err != nil || now != row {
			return err
		}
		again := row
		again.Next, again.Key = "", true
		return n.rows.secrets.Put(tx, again, theSecret)
	})
	return err
}

// resealAuthority seals the keys of the authorities anew.
func (n *Node) resealAuthority(ctx context.Context) error {
	_, err := n.db.Update(ctx, func(tx *table.Tx) error {
		rows, err := n.authorities(tx)
		if err != nil {
			return err
		}
		for key, row := range rows {
			if row.SealedKey == nil {
				continue
			}
			plain, err := n.unseal(caKeyName, row.SealedKey)
			if err != nil {
				return err
			}
			if row.SealedKey, err = n.seal(caKeyName, plain); err != nil {
				return err
			}
			if err := n.rows.authority.Put(tx, row, key); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

// TokenKey is this node's key to sign registry tokens with, and the id by which any
// node finds its public half. Each node has a key of its own: it needs nobody to issue
// tokens, and what it issued ends when it is removed.
func (n *Node) TokenKey() (kid string, key ed25519.PrivateKey) {
	return tokenKeyID(n.Self(), n.tokenPublic()), n.token
}

// TokenPublic finds the public half of a member's key by its id, in the newest local
// state; nil when no member has it, or that one was removed. Its own key a node knows
// before its row does.
func (n *Node) TokenPublic(kid string) (ed25519.PublicKey, error) {
	node, _, _ := strings.Cut(kid, "-")
	m, ok, err := n.member(node)
	if err != nil {
		return nil, fmt.Errorf("looking for token key %.100q: %w", kid, err)
	}
	public := ed25519.PublicKey(m.TokenKey)
	if node == n.Self() {
		public = n.tokenPublic()
	}
	if !ok && node != n.Self() || m.Removed != 0 || len(public) != ed25519.PublicKeySize || tokenKeyID(node, public) != kid {
		return nil, nil
	}
	return public, nil
}

func (n *Node) tokenPublic() ed25519.PublicKey {
	return n.token.Public().(ed25519.PublicKey)
}

func tokenKeyID(node string, public ed25519.PublicKey) string {
	sum := sha256.Sum256(public)
	return node + "-" + hex.EncodeToString(sum[:8])
}

// ensureTokenKey makes the node's token key where there is none yet.
func (id *Identity) ensureTokenKey(dir string, keys *keyring.Ring) error {
	if len(id.TokenKey) == ed25519.SeedSize {
		return nil
	}
	id.TokenKey = make([]byte, ed25519.SeedSize)
	rand.Read(id.TokenKey) // never fails: crypto/rand's promise
	return id.save(dir, keys)
}
