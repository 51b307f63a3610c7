package journal

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

const self = "self"

// siteRow is who this site is. Every own append is guarded by it.
type siteRow struct {
	ID          string      `cbor:"id"`
	Incarnation string      `cbor:"incarnation"`
	Name        string      `cbor:"name"`
	Root        entry.Key   `cbor:"root"`
	Online      []entry.Key `cbor:"online"` // the last one signs
	Chain       []byte      `cbor:"chain"`  // entry.KeyChain
	At          int64       `cbor:"at"`
}

// keyRow is a private key under the sealer, keyed by the public key.
type keyRow struct {
	Sealed []byte `cbor:"sealed"`
}

type signer = ed25519.PrivateKey

// Site is the public identity of this site.
type Site struct {
	ID          string
	Incarnation string // this life of the site
	Name        string // a label for people
	Root        entry.Key
	Online      entry.Key // signs now
	Chain       entry.KeyChain
	Founded     time.Time
}

// Site reads the identity. Before EnsureSite it is a fault Unavailable.
func (j *Journal) Site(r table.Reader) (Site, error) {
	// Every push asks three times, and it hardly ever changes.
	at, ok, err := j.sites.Meta(r, self)
	if known := j.site.Load(); err == nil && ok && known != nil && at.Revision != 0 && known.revision == at.Revision {
		return known.Site, nil
	}
	row, at, ok, err := j.sites.Get(r, self)
	if err != nil {
		return Site{}, fmt.Errorf("read the site's identity: %w", err)
	}
	if !ok || len(row.Online) == 0 {
		return Site{}, fault.New(fault.Unavailable, "the site's identity is not there yet; try again in a few seconds")
	}
	site := Site{ID: row.ID, Incarnation: row.Incarnation, Name: row.Name, Root: row.Root,
		Online: row.Online[len(row.Online)-1], Chain: row.Chain, Founded: time.Unix(row.At, 0).UTC()}
	if at.Revision != 0 { // else the Tx wrote it itself, and may not commit
		j.site.Store(&siteAt{site, at.Revision})
	}
	return site, nil
}

// siteAt is the identity as of the revision of its row.
type siteAt struct {
	Site
	revision uint64
}

// EnsureSite creates the identity once: a random incarnation, a root key and an
// online key that the root certifies, both private keys sealed. Afterwards it
// returns what is there. It fails when the rows belong to another site.
func (j *Journal) EnsureSite(ctx context.Context, siteID, name string) (Site, error) {
	if !entry.ValidID(siteID) {
		return Site{}, fmt.Errorf("site id %q: want 1-64 characters of a-z, 0-9, _ and -", siteID)
	}
	var site Site
	_, err := j.db.Update(ctx, func(tx *table.Tx) error {
		var err error
		if site, err = j.Site(tx); err == nil {
			if site.ID != siteID {
				return fmt.Errorf("the tables belong to site %s, this node to site %s", site.ID, siteID)
			}
			return nil
		}
		if !fault.Is(err, fault.Unavailable) {
			return err
		}
		if err := j.found(tx, siteID, name); err != nil {
			return err
		}
		site, err = j.Site(tx)
		return err
	})
	if err != nil {
		return Site{}, fmt.Errorf("ensure the site's identity: %w", err)
	}
	return site, nil
}

// NewLife begins a new life of the site, for a state that may be older than what
// the site has told others: what it writes from now on goes to new logs, so that no
// number of the old ones is ever used for something else. It is called while
// nothing else writes. A site that has no identity yet needs no new life.
func (j *Journal) NewLife(tx *table.Tx) error {
	row, _, ok, err := j.sites.Get(tx, self)
	if err != nil || !ok {
		return err
	}
	row.Incarnation = table.NewID()
	return j.sites.Put(tx, row, self)
}

func (j *Journal) found(tx *table.Tx, siteID, name string) error {
	now := time.Now()
	root, err := j.newKey(tx, siteID)
	if err != nil {
		return err
	}
	online, err := j.newKey(tx, siteID)
	if err != nil {
		return err
	}
	rootKey, err := entry.KeyOf(root)
	if err != nil {
		return err
	}
	onlineKey, err := entry.KeyOf(online)
	if err != nil {
		return err
	}
	document := entry.KeyDocument{
		Site: siteID, Serial: 1, Issued: now.Unix(), Threshold: 1, Root: []entry.Key{rootKey},
		Online: []entry.OnlineKey{{Key: onlineKey, State: entry.KeyActive}},
	}
	signed, err := document.Sign(root)
	if err != nil {
		return err
	}
	return j.sites.Put(tx, siteRow{
		ID: siteID, Incarnation: table.NewID(), Name: name, Root: rootKey, Online: []entry.Key{onlineKey},
		Chain: entry.KeyChain(nil).Add(signed), At: now.Unix(),
	}, self)
}

// newKey makes a key pair and stores its private half.
func (j *Journal) newKey(tx *table.Tx, siteID string) (ed25519.PrivateKey, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	public, err := entry.KeyOf(private)
	if err != nil {
		return nil, err
	}
	sealed, err := j.sealer.Seal(sealName(siteID, public), private.Seed())
	if err != nil {
		return nil, fmt.Errorf("seal a key of the site: %w", err)
	}
	return private, j.keys.Put(tx, keyRow{Sealed: sealed}, string(public))
}

// Reseal seals the site's private keys anew, with the cluster key that the site has
// changed to. The keys themselves stay: other sites know them.
func (j *Journal) Reseal(ctx context.Context) error {
	_, err := j.db.Update(ctx, func(tx *table.Tx) error {
		site, err := j.Site(tx)
		if fault.Is(err, fault.Unavailable) {
			return nil // there are none yet
		} else if err != nil {
			return err
		}
		again := map[entry.Key]keyRow{}
		for row, err := range j.keys.Scan(tx, table.Range{Limit: 100}) {
			if err != nil {
				return err
			}
			again[entry.Key(row.Key[0])] = row.Value
		}
		for public, row := range again {
			seed, err := j.sealer.Unseal(sealName(site.ID, public), row.Sealed)
			if err != nil {
				return err
			}
			if row.Sealed, err = j.sealer.Seal(sealName(site.ID, public), seed); err != nil {
				return err
			}
			if err := j.keys.Put(tx, row, string(public)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("seal the site's keys anew: %w", err)
	}
	return nil
}

func sealName(siteID string, public entry.Key) string {
	return "site-key/" + siteID + "/" + public.Fingerprint()
}

// KeyChain is the public documents that say which keys sign for this site.
func (j *Journal) KeyChain(r table.Reader) (entry.KeyChain, error) {
	site, err := j.Site(r)
	return site.Chain, err
}

// SignDuty is the name of what SignFor does where this node cannot.
const SignDuty = "site-signature"

// signAsk asks for a signature of the site.
type signAsk struct {
	Key     entry.Key `json:"key"` // the online key that is to sign
	Payload []byte    `json:"payload"`
}

type signAnswer struct {
	Signature []byte `json:"signature"`
}

// Delegate gives a way to nodes that can open the site's keys, for when this one
// cannot: ask has SignFor done there. It must be called before anything is signed.
func (j *Journal) Delegate(ask func(ctx context.Context, duty string, ask, answer any) error) {
	j.delegate = ask
}

// SignFor signs, with the site's online key, for a node that cannot open it.
func (j *Journal) SignFor(_ context.Context, body []byte) (any, error) {
	var ask signAsk
	if err := json.Unmarshal(body, &ask); err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "the request for a signature is malformed")
	}
	var key crypto.Signer
	err := j.db.View(func(v *table.View) error {
		site, err := j.Site(v)
		if err == nil && site.Online != ask.Key {
			err = fault.New(fault.Unavailable, "the site signs with another key now; try again in a few seconds")
		}
		if err == nil {
			key, err = j.open(v, site)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	signature, err := key.Sign(rand.Reader, ask.Payload, crypto.Hash(0))
	return signAnswer{Signature: signature}, err
}

// Signer is the online key that signs checkpoints and bundles now. A node that cannot
// open it has those that can sign, while ctx lasts.
func (j *Journal) Signer(ctx context.Context, r table.Reader) (crypto.Signer, error) {
	site, err := j.Site(r)
	if err != nil {
		return nil, err
	}
	key, err := j.open(r, site)
	var passes interface{ Unavailable() bool }
	if err == nil || j.delegate == nil || !errors.As(err, &passes) {
		return key, err
	}
	public, err := site.Online.Ed25519()
	if err != nil {
		return nil, err
	}
	return remote{public, func(payload []byte) ([]byte, error) {
		var answer signAnswer
		if err := j.delegate(ctx, SignDuty, signAsk{site.Online, payload}, &answer); err != nil {
			return nil, err
		}
		if !ed25519.Verify(public, payload, answer.Signature) {
			return nil, errors.New("the signature that another node made does not hold")
		}
		return answer.Signature, nil
	}}, nil
}

// remote is a key that another node holds.
type remote struct {
	public ed25519.PublicKey
	sign   func(payload []byte) ([]byte, error)
}

func (k remote) Public() crypto.PublicKey { return k.public }

func (k remote) Sign(_ io.Reader, payload []byte, _ crypto.SignerOpts) ([]byte, error) {
	return k.sign(payload)
}

// open gives the online key, if this node can open it.
func (j *Journal) open(r table.Reader, site Site) (crypto.Signer, error) {
	j.mu.Lock()
	opened, ok := j.signers[site.Online]
	j.mu.Unlock()
	if ok {
		return opened, nil
	}
	row, _, ok, err := j.keys.Get(r, string(site.Online))
	if err != nil {
		return nil, fmt.Errorf("read the site's signing key: %w", err)
	}
	if !ok {
		return nil, fmt.Errorf("the site's signing key %s is not kept here", site.Online.Fingerprint())
	}
	seed, err := j.sealer.Unseal(sealName(site.ID, site.Online), row.Sealed)
	if err != nil {
		return nil, fmt.Errorf("open the site's signing key: %w", err)
	}
	if len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("the site's signing key has %d bytes, want %d", len(seed), ed25519.SeedSize)
	}
	opened = ed25519.NewKeyFromSeed(seed)
	if public, err := entry.KeyOf(opened); err != nil || public != site.Online {
		return nil, fmt.Errorf("the site's signing key does not match its public half %s", site.Online.Fingerprint())
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	clear(j.signers) // a rotated key is not kept open
	j.signers[site.Online] = opened
	return opened, nil
}
