package member

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
)

// Limits of a join token.
const (
	MaxTokenUses = 1000
	MaxTokenTTL  = 366 * 24 * time.Hour
)

// signer is the authority that signs now, with what goes out with its
// certificates.
type signer struct {
	*pki.Authority
	trusted  []byte // PEM of all that are trusted, its own certificate first
	links    []byte // PEM: see authorityRow
	renewals int
}

// signer reads the site's authority out of its sealed row.
func (n *Node) signer(r table.Reader) (signer, error) {
	rows, err := n.authorities(r)
	if err != nil {
		return signer{}, err
	}
	row, ok := rows[theAuthority]
	if !ok {
		return signer{}, errNoAuthority
	}
	keyPEM, err := n.unseal(caKeyName, row.SealedKey)
	if err != nil {
		return signer{}, err
	}
	s := signer{trusted: trusted(rows), links: row.Links, renewals: row.Renewals}
	s.Authority, err = pki.LoadAuthority(row.Cert, keyPEM)
	return s, err
}

// authorities are the rows of the authority by their keys.
func (n *Node) authorities(r table.Reader) (map[string]authorityRow, error) {
	rows := make(map[string]authorityRow)
	for _, key := range []string{theAuthority, nextAuthority, formerAuthority} {
		row, _, ok, err := n.rows.authority.Get(r, key)
		if err != nil {
			return nil, fmt.Errorf("reading the site's authority: %w", err)
		}
		if ok {
			rows[key] = row
		}
	}
	return rows, nil
}

// trusted are the certificates of the authorities in rows, that which signs first.
func trusted(rows map[string]authorityRow) []byte {
	return bytes.Join([][]byte{rows[theAuthority].Cert, rows[nextAuthority].Cert, rows[formerAuthority].Cert}, nil)
}

// failure is one that passes: a client may try again.
type failure string

func (f failure) Error() string     { return string(f) }
func (f failure) Unavailable() bool { return true }

const errNoAuthority = failure("the site's authority is not known to this node yet: try again in a few seconds")

// localSigner reads the authority from the newest local state.
func (n *Node) localSigner() (s signer, err error) {
	err = n.db.View(func(v *table.View) error {
		s, err = n.signer(v)
		return err
	})
	return s, err
}

// serverAsk and serverAnswer are the duty of a certificate for the public listener.
type serverAsk struct {
	CSR  []byte   `json:"csr"`
	SANs []string `json:"sans"`
}

type serverAnswer struct {
	Chain []byte `json:"chain"` // PEM: the certificate, its authority's, links
}

func (n *Node) issueServer(_ context.Context, body []byte) (any, error) {
	var ask serverAsk
	if err := joining.Decode(body, &ask); err != nil {
		return nil, err
	}
	request, err := pki.ParseCSR(ask.CSR)
	if err != nil {
		return nil, joining.Refuse(joining.CodeMalformed, "%v", err)
	}
	authority, err := n.localSigner()
	if err != nil {
		return nil, err
	}
	cert, err := authority.IssueServer(request.PublicKey, ask.SANs, n.Now())
	if err != nil {
		return nil, err
	}
	return serverAnswer{Chain: bytes.Join([][]byte{cert, authority.CertPEM(), authority.links}, nil)}, nil
}

// serverFile is the newest certificate of the public listener and its key: what a node
// serves with that has no vote and finds nobody who has one.
const serverFile = "server.json"

type serverJSON struct {
	Chain []byte `json:"chain"`
	Key   []byte `json:"key"` // PEM, PKCS #8
}

// ServerCertificate gives a certificate for the public listener, good for the DNS
// names and IP addresses given. It lives for pki.ServerLife. While no node can issue
// one, it is the last that this node had, if that is still good. A node that has just
// joined waits here until it has caught up with the site's authority.
func (n *Node) ServerCertificate(ctx context.Context, sans []string) (tls.Certificate, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	row := n.db.Watch(ctx, "site_authority")
	key, err := pki.NewKey()
	if err != nil {
		return tls.Certificate{}, err
	}
	csr, err := pki.NewCSR(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	for {
		var answer serverAnswer
		err := n.Ask(ctx, dutyCertificate, serverAsk{CSR: csr, SANs: sans}, &answer)
		if err == nil {
			keyPEM, err := pki.MarshalKey(key)
			if err != nil {
				return tls.Certificate{}, err
			}
			if err := n.cfg.Keys.WriteJSON(filepath.Join(n.cfg.Dir, serverFile), serverJSON{answer.Chain, keyPEM}); err != nil {
				n.log.Warn("the certificate of the registry's address is not kept for the next start", "error", err)
			}
			return tls.X509KeyPair(answer.Chain, keyPEM)
		}
		if kept, ok := n.KeptServerCertificate(); ok {
			return kept, nil
		}
		if passes := interface{ Unavailable() bool }(nil); !errors.As(err, &passes) {
			return tls.Certificate{}, err
		}
		tick := time.NewTimer(n.cfg.Timings.Ping)
		select {
		case <-row:
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			return tls.Certificate{}, fmt.Errorf("%w (%w)", err, ctx.Err())
		}
		tick.Stop()
	}
}

// KeptServerCertificate is the last certificate that ServerCertificate gave, in this
// run or an earlier one, if it is still good.
func (n *Node) KeptServerCertificate() (tls.Certificate, bool) {
	var kept serverJSON
	if err := n.cfg.Keys.ReadJSON(filepath.Join(n.cfg.Dir, serverFile), &kept); err != nil {
		return tls.Certificate{}, false
	}
	cert, err := tls.X509KeyPair(kept.Chain, kept.Key)
	return cert, err == nil && n.Now().Before(cert.Leaf.NotAfter)
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
	// While the authority changes some nodes cannot prove to be of the new one yet,
	// but those of the new one prove to be of the former.
	pin, err := n.oldestPin()
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

// renew replaces the node's certificate in time, and at once when the site's
// authority changes or all nodes are told to.
func (n *Node) renew(ctx context.Context) error {
	rows := n.db.Watch(ctx, "site_authority")
	for {
		changed := n.changed.wait()
		pause := n.cfg.Timings.Renew
		told, err := n.follow()
		if err != nil {
			n.log.Warn("following the site's authority", "error", err)
		}
		now := n.Now()
		told = told || n.stale.Load()
		if told || now.After(renewAt(n.Certificate().Leaf, n.Self())) {
			pause = min(pause, time.Minute) // when it fails
			if told {
				pause = min(pause, 5*n.cfg.Timings.Ping)
			}
			if err := n.renewOnce(ctx, now); err != nil && ctx.Err() == nil {
				n.log.Warn("renewing this node's certificate", "expires", n.Certificate().Leaf.NotAfter, "error", err)
			}
		}
		tick := time.NewTimer(pause)
		select {
		case <-rows:
		case <-tick.C:
		case <-changed:
		case <-ctx.Done():
			tick.Stop()
			return nil
		}
		tick.Stop()
	}
}

// follow makes this node trust the authorities of the newest local state. told
// says that the authority changed, or all nodes were told to renew, since its
// certificate was made: the count grows with both, and a certificate may be newer
// than the local state.
func (n *Node) follow() (told bool, err error) {
	var rows map[string]authorityRow
	err = n.db.View(func(v *table.View) error {
		rows, err = n.authorities(v)
		return err
	})
	if err != nil || len(rows) == 0 {
		return false, err
	}
	id := n.Identity()
	issuer, err := id.issuer()
	if err != nil {
		return false, err
	}
	signs := rows[theAuthority]
	bundle := trusted(rows)
	told = id.Renewal < signs.Renewals
	// The issuer of the node's own certificate comes first, and stays as long as it
	// has that certificate: its own state may be older than that.
	bundle = append(bytes.Clone(issuer), bytes.ReplaceAll(bundle, issuer, nil)...)
	if bytes.Equal(bundle, id.CA) {
		return told, nil
	}
	return told, n.alter(func(id *Identity) { id.CA = bundle })
}

// alter changes this node's identity, on disk first.
func (n *Node) alter(change func(id *Identity)) error {
	n.altering.Lock()
	defer n.altering.Unlock()
	n.mu.Lock()
	id := n.identity
	n.mu.Unlock()
	former := id.ClusterKey
	change(&id)
	if _, err := id.issuer(); err != nil {
		return err
	}
	if err := id.save(n.cfg.Dir, n.cfg.Keys); err != nil {
		return err
	}
	if err := n.become(id); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if !bytes.Equal(former, id.ClusterKey) {
		clear(former) // all who read it do so under mu
	}
	return nil
}

// become takes an identity for the next handshakes.
func (n *Node) become(id Identity) error {
	cert, err := id.Certificate()
	if err != nil {
		return err
	}
	pool, err := id.Pool()
	if err != nil {
		return err
	}
	pins, err := pinsOf(id.CA)
	if err != nil {
		return err
	}
	n.cfg.Epoch.Trust(id.Authorities())
	n.mu.Lock()
	defer n.mu.Unlock()
	n.identity, n.cert, n.pool, n.pins = id, cert, pool, pins
	return nil
}

// trusts are the pins, in hex, of the authorities that this node trusts, that of
// its own certificate's first.
func (n *Node) trusts() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pins
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
	var answer renewAnswer
	var refusals []error
	for _, m := range members {
		if m.ID == id.NodeID {
			continue
		}
		if answer, err = n.askRenewal(ctx, m.Addr, key); err == nil {
			break
		}
		answer = renewAnswer{}
		refusals = append(refusals, fmt.Errorf("%s at %s: %w", m.Name, m.Addr, err))
	}
	if answer.Cert == nil && n.stale.Load() {
		return errors.Join(refusals...) // what it could sign by itself nobody would take
	}
	if answer.Cert == nil {
		signer, err := n.localSigner()
		if err != nil {
			return errors.Join(append(refusals, err)...)
		}
		answer = renewAnswer{CA: signer.trusted, Links: signer.links, Renewal: signer.renewals}
		if answer.Cert, err = signer.IssueNode(key.Public(), id.SiteID, id.NodeID, now); err != nil {
			return err
		}
	}
	err = n.alter(func(id *Identity) {
		id.Cert = answer.Cert
		if answer.CA != nil { // an older node does not say
			id.CA, id.Links, id.Renewal = answer.CA, answer.Links, answer.Renewal
		}
	})
	if err != nil {
		return err
	}
	n.stale.Store(false)
	n.log.Info("renewed this node's certificate", "expires", n.Certificate().Leaf.NotAfter)
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
		if s.ID == in.self || seen.clocked && n.live(string(s.ID)) && seen.ahead(now).Abs() < clocksAgree {
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

// oldestPin is the pin of the authority that every node can prove to be of.
func (n *Node) oldestPin() (pin []byte, err error) {
	err = n.db.View(func(v *table.View) error {
		rows, err := n.authorities(v)
		if err != nil {
			return err
		}
		oldest, ok := rows[formerAuthority]
		if !ok {
			if oldest, ok = rows[theAuthority]; !ok {
				return errNoAuthority
			}
		}
		pin, err = pki.PinPEM(oldest.Cert)
		return err
	})
	return pin, err
}
