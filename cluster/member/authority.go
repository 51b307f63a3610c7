package member

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
)

// Limits of a join token.
const (
	MaxTokenUses = 1000
	MaxTokenTTL  = 366 * 24 * time.Hour
)

// Seal encrypts a secret under the site's cluster key, bound to a name.
func (n *Node) Seal(name string, plain []byte) ([]byte, error) {
	return pki.Seal(n.Identity().ClusterKey, "secret "+name, plain)
}

// Unseal decrypts what Seal made under the same name on any member.
func (n *Node) Unseal(name string, sealed []byte) ([]byte, error) {
	return pki.Open(n.Identity().ClusterKey, "secret "+name, sealed)
}

// authority reads the site's authority out of its sealed row.
func (n *Node) authority(r table.Reader) (*pki.Authority, error) {
	row, _, ok, err := n.rows.authority.Get(r, theAuthority)
	if err != nil {
		return nil, fmt.Errorf("reading the site's authority: %w", err)
	}
	if !ok {
		return nil, errNoAuthority
	}
	keyPEM, err := pki.Open(n.Identity().ClusterKey, caKeyName, row.SealedKey)
	if err != nil {
		return nil, err
	}
	return pki.LoadAuthority(row.Cert, keyPEM)
}

// failure is one that passes: a client may try again.
type failure string

func (f failure) Error() string     { return string(f) }
func (f failure) Unavailable() bool { return true }

const errNoAuthority = failure("the site's authority is not known to this node yet: try again in a few seconds")

// localAuthority reads the authority from the newest local state.
func (n *Node) localAuthority() (a *pki.Authority, err error) {
	err = n.db.View(func(v *table.View) error {
		a, err = n.authority(v)
		return err
	})
	return a, err
}

// ServerCertificate issues a certificate for the public listener, good for the
// DNS names and IP addresses given. It lives for pki.ServerLife. A node that
// has just joined waits here until it has caught up with the site's authority.
func (n *Node) ServerCertificate(ctx context.Context, sans []string) (tls.Certificate, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	row := n.db.Watch(ctx, "site_authority")
	authority, err := n.localAuthority()
	for errors.Is(err, errNoAuthority) {
		select {
		case <-row:
		case <-ctx.Done():
			return tls.Certificate{}, fmt.Errorf("%w (%w)", err, ctx.Err())
		}
		authority, err = n.localAuthority()
	}
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := pki.NewKey()
	if err != nil {
		return tls.Certificate{}, err
	}
	cert, err := authority.IssueServer(key.Public(), sans, n.Now())
	if err != nil {
		return tls.Certificate{}, err
	}
	keyPEM, err := pki.MarshalKey(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(append(cert, authority.CertPEM()...), keyPEM)
}

// CreateToken makes a token by which uses nodes may join within ttl. Its text
// is shown once; the site keeps a hash.
func (n *Node) CreateToken(ctx context.Context, ttl time.Duration, uses int) (string, error) {
	if ttl <= 0 || ttl > MaxTokenTTL {
		return "", fmt.Errorf("a join token lives for more than nothing and at most %d days", int(MaxTokenTTL.Hours()/24))
	}
	if uses < 1 || uses > MaxTokenUses {
		return "", fmt.Errorf("a join token has 1 to %d uses", MaxTokenUses)
	}
	pin, err := pki.PinPEM(n.CA())
	if err != nil {
		return "", err
	}
	token, err := pki.NewToken(pki.KindJoin, pin)
	if err != nil {
		return "", err
	}
	now := n.Now()
	row := tokenRow{Kind: token.Kind, Hash: pki.HashSecret(token.Secret), Created: now.Unix(), Expires: now.Add(ttl).Unix(), Uses: uses}
	if _, err := n.db.Update(ctx, func(tx *table.Tx) error { return n.rows.tokens.Put(tx, row, token.ID) }); err != nil {
		return "", fmt.Errorf("storing the join token: %w", err)
	}
	return token.String(), nil
}

// keyHash identifies the node's key.
func (id Identity) keyHash() (string, error) {
	key, err := pki.ParseKey(id.Key)
	if err != nil {
		return "", err
	}
	return pki.KeyHash(key.Public())
}

// renewAt is when a node asks for a new certificate: at a moment between 50 and
// 80 % of the old one's life that depends on the node, so that a site that was
// founded in one go does not renew in one go.
func renewAt(cert *x509.Certificate, node string) time.Time {
	h := fnv.New32a()
	h.Write([]byte(node)) // never fails
	start := issuedAt(cert)
	life := cert.NotAfter.Sub(start)
	return start.Add(life/2 + life*3/10*time.Duration(h.Sum32()%1024)/1024)
}

// issuedAt is the time by which a certificate of the authority was made.
func issuedAt(cert *x509.Certificate) time.Time { return cert.NotBefore.Add(pki.Backdate) }

// renew replaces the node's certificate in time.
func (n *Node) renew(ctx context.Context) error {
	for {
		pause := n.cfg.Timings.Renew
		if now := n.Now(); now.After(renewAt(n.Certificate().Leaf, n.Self())) {
			pause = min(pause, time.Minute) // when it fails
			if err := n.renewOnce(ctx, now); err != nil && ctx.Err() == nil {
				n.log.Warn("renewing this node's certificate", "expires", n.Certificate().Leaf.NotAfter, "error", err)
			}
		}
		if !sleep(ctx, pause) {
			return nil
		}
	}
}

// renewOnce asks the other members, who confirm that this node is one. When
// none grants it the node signs by itself if it holds the site's authority:
// after a long sleep the certificates of all may have expired, and then nobody
// can ask anybody.
func (n *Node) renewOnce(ctx context.Context, now time.Time) error {
	id := n.Identity()
	key, err := pki.ParseKey(id.Key)
	if err != nil {
		return err
	}
	members, err := n.roster()
	if err != nil {
		return err
	}
	var cert []byte
	var refusals []error
	for _, m := range members {
		if m.ID == id.NodeID {
			continue
		}
		if cert, err = n.askRenewal(ctx, m.Addr, key); err == nil {
			break
		}
		refusals = append(refusals, fmt.Errorf("%s at %s: %w", m.Name, m.Addr, err))
	}
	if cert == nil {
		authority, err := n.localAuthority()
		if err != nil {
			return errors.Join(append(refusals, err)...)
		}
		if cert, err = authority.IssueNode(key.Public(), id.SiteID, id.NodeID, now); err != nil {
			return err
		}
	}
	id.Cert = cert
	parsed, err := id.Certificate()
	if err != nil {
		return err
	}
	if err := id.save(n.cfg.Dir); err != nil {
		return err
	}
	n.mu.Lock()
	n.identity, n.cert = id, parsed
	n.mu.Unlock()
	n.log.Info("renewed this node's certificate", "expires", parsed.Leaf.NotAfter)
	return nil
}

// clockRow is the site's clock: the newest time on which its nodes have agreed.
// It moves forward only.
type clockRow struct {
	At int64 `cbor:"at"` // Unix seconds
}

const (
	theClock = "site"
	// clockEvery is how often the leader writes the site's clock.
	clockEvery = 6 * time.Hour
	// believable is how far a node's clock may be ahead of the site's before it is
	// taken for wrong; a site that was switched off for longer needs a majority of
	// three that agree.
	believable = 400 * 24 * time.Hour
	// clocksAgree is the difference up to which two clocks are taken for equal.
	clocksAgree = time.Minute
)

// Now is the time by which certificates are judged and made: this node's clock
// unless it cannot be right. One that is behind what the site has committed
// (1970, after a flat battery) or absurdly far ahead (2038) is not believed, and
// the newest committed time stands in for it, so that such a node goes on.
func (n *Node) Now() time.Time { return judged(n.cfg.Clock(), n.newestTime()) }

func judged(clock, newest time.Time) time.Time {
	if clock.Before(newest) || clock.Sub(newest) > believable {
		return newest
	}
	return clock
}

// newestTime is the newest time that this node knows to be past: the site's
// clock, and the moment at which its own certificate was made.
func (n *Node) newestTime() time.Time {
	newest := issuedAt(n.Certificate().Leaf)
	if at := n.siteClock(); at.After(newest) {
		return at
	}
	return newest
}

func (n *Node) siteClock() (at time.Time) {
	err := n.db.View(func(v *table.View) error {
		row, _, ok, err := n.rows.clock.Get(v, theClock)
		if ok {
			at = time.Unix(row.At, 0)
		}
		return err
	})
	if err != nil {
		n.log.Debug("reading the site's clock", "error", err)
	}
	return at
}

// keepClock writes the site's clock when it is old, as the leader, and only when
// a majority of the voters is of the same opinion. A lone voter has nobody to
// ask; it is believed within reason.
func (n *Node) keepClock(ctx context.Context, in *instance) error {
	now, was := n.cfg.Clock(), n.siteClock()
	if now.Sub(was) < clockEvery {
		return nil
	}
	voters, agree := 0, 0
	for _, s := range in.servers() {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		seen := n.peers.of(string(s.ID))
		if s.ID == in.self || seen.clocked && n.live(string(s.ID)) && seen.skew.Abs() < clocksAgree {
			agree++
		}
	}
	alone := voters < 3 && now.Sub(n.newestTime()) > believable
	if agree <= voters/2 || alone || now.Before(n.newestTime()) {
		return nil
	}
	_, err := n.db.Update(ctx, func(tx *table.Tx) error {
		row, _, _, err := n.rows.clock.Get(tx, theClock)
		if err != nil || row.At >= now.Unix() {
			return err
		}
		return n.rows.clock.Put(tx, clockRow{At: now.Unix()}, theClock)
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
