// Package sites says who this site is to others and which other sites may write
// what here.
//
// Invariants:
//   - A site is trusted by its root key, which a person confirmed; naming the
//     same site with another root key is refused until the old one is distrusted.
//   - Trust without accepted projects lets a site write nothing.
//   - The newest key document seen of a site is remembered with the trust, so
//     that an older one, which may hold a revoked key, is refused.
package sites

import (
	"context"
	"net/http"
	"path"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/rest"
)

// Sites keeps the trusted sites. It is safe for concurrent use.
type Sites struct {
	db      *table.DB
	journal *journal.Journal
	trusts  *table.Table[trustRow]
}

type trustRow struct {
	Incarnation string    `cbor:"incarnation"`
	Name        string    `cbor:"name"`
	Root        entry.Key `cbor:"root"`
	Accept      []string  `cbor:"accept"`
	Serial      uint64    `cbor:"serial"`
	Chain       []byte    `cbor:"chain,omitempty"` // entry.KeyChain with that serial
}

func (r trustRow) trust(id string) airgap.Trust {
	return airgap.Trust{
		Site:   airgap.Site{ID: id, Incarnation: r.Incarnation, Name: r.Name, RootKey: r.Root, Fingerprint: r.Root.Fingerprint()},
		Accept: r.Accept,
		Serial: r.Serial,
	}
}

// New defines the table of trusted sites.
func New(db *table.DB, j *journal.Journal) *Sites {
	return &Sites{db: db, journal: j, trusts: table.Define[trustRow](db, "trust")}
}

// Self is this site's public identity.
func (s *Sites) Self() (site airgap.Site, err error) {
	err = s.db.View(func(v *table.View) error {
		self, err := s.journal.Site(v)
		if err != nil {
			return err
		}
		site = airgap.Site{ID: self.ID, Incarnation: self.Incarnation, Name: self.Name, RootKey: self.Root, Fingerprint: self.Root.Fingerprint()}
		return nil
	})
	return site, err
}

// Trust remembers what a site may write here; repeating it changes what is
// accepted.
func (s *Sites) Trust(ctx context.Context, t airgap.Trust) (airgap.Trust, error) {
	if err := t.Site.Validate(); err != nil {
		return t, fault.Wrap(err, fault.Invalid, "%v", err)
	}
	for _, pattern := range t.Accept {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			return t, fault.New(fault.Invalid, "%q is no project name or pattern; write names, or '*' for all", pattern)
		}
	}
	_, err := s.db.Update(ctx, func(tx *table.Tx) error {
		self, err := s.journal.Site(tx)
		if err != nil {
			return err
		}
		if t.Site.ID == self.ID {
			return fault.New(fault.Invalid, "%s is this site itself: trust is for other sites", t.Site.ID)
		}
		old, _, known, err := s.trusts.Get(tx, t.Site.ID)
		if err != nil {
			return err
		}
		if known && old.Root != t.Site.RootKey {
			return fault.New(fault.Conflict, "site %s is trusted with the key %s, the file has %s; if its people confirm the new key, run atoll site distrust %s first",
				t.Site.ID, old.Root.Fingerprint(), t.Site.Fingerprint, t.Site.ID)
		}
		t.Serial = old.Serial
		return s.trusts.Put(tx, trustRow{
			Incarnation: t.Site.Incarnation, Name: t.Site.Name, Root: t.Site.RootKey,
			Accept: t.Accept, Serial: old.Serial, Chain: old.Chain,
		}, t.Site.ID)
	})
	return t, err
}

// Distrust forgets a site; fault.NotFound when it was not trusted.
func (s *Sites) Distrust(ctx context.Context, id string) error {
	_, err := s.db.Update(ctx, func(tx *table.Tx) error {
		if _, _, known, err := s.trusts.Get(tx, id); err != nil || !known {
			if err == nil {
				err = fault.New(fault.NotFound, "site %s is not trusted here; atoll site show lists those that are", id)
			}
			return err
		}
		return s.trusts.Delete(tx, id)
	})
	return err
}

// Saw remembers the newest key document of a site and the chain that ends in it.
// A site that is trusted no longer is left alone.
func (s *Sites) Saw(tx *table.Tx, id string, serial uint64, chain entry.KeyChain) error {
	row, _, known, err := s.trusts.Get(tx, id)
	if err != nil || !known || row.Serial > serial || row.Serial == serial && len(row.Chain) > 0 {
		return err
	}
	row.Serial, row.Chain = serial, chain
	return s.trusts.Put(tx, row, id)
}

// KeyChain is the newest chain seen of a trusted site.
func (s *Sites) KeyChain(r table.Reader, id string) (entry.KeyChain, error) {
	row, _, known, err := s.trusts.Get(r, id)
	if err == nil && (!known || len(row.Chain) == 0) {
		err = fault.New(fault.NotFound, "no keys of site %s are known here; import a bundle of it first", id)
	}
	return row.Chain, err
}

// All lists the trusted sites.
func (s *Sites) All(ctx context.Context) ([]airgap.Trust, error) {
	trusts := []airgap.Trust{}
	_, err := s.db.Confirmed(ctx, func(v *table.View) error {
		trusts = trusts[:0]
		for row, err := range s.trusts.Scan(v, table.Range{}) {
			if err != nil {
				return err
			}
			trusts = append(trusts, row.Value.trust(row.Key[0]))
		}
		return nil
	})
	return trusts, err
}

// Operations adds the room's operations to the API.
func (s *Sites) Operations(k *rest.Kernel) {
	rest.Register(k, rest.Operation[struct{}, airgap.Site]{
		ID: "getSite", Method: http.MethodGet, Path: "/api/atoll/v1/site", Tag: "sites",
		Summary: "This site's public identity, for other sites to trust", Permission: access.SiteRead,
		Do: func(context.Context, *struct{}) (airgap.Site, error) { return s.Self() },
	})
	rest.Register(k, rest.Operation[struct{}, []airgap.Trust]{
		ID: "listTrusts", Method: http.MethodGet, Path: "/api/atoll/v1/site/trusts", Tag: "sites",
		Summary: "The sites that are trusted here", Permission: access.SiteRead,
		Do: func(ctx context.Context, _ *struct{}) ([]airgap.Trust, error) { return s.All(ctx) },
	})
	type trustIn struct{ Body airgap.Trust }
	rest.Register(k, rest.Operation[trustIn, airgap.Trust]{
		ID: "trustSite", Method: http.MethodPost, Path: "/api/atoll/v1/site/trusts", Tag: "sites",
		Summary: "Trust a site, or change what it may write", Permission: access.SiteManage,
		Do: func(ctx context.Context, in *trustIn) (airgap.Trust, error) { return s.Trust(ctx, in.Body) },
	})
	type siteIn struct {
		Site string `path:"site"`
	}
	rest.Register(k, rest.Operation[siteIn, rest.None]{
		ID: "distrustSite", Method: http.MethodDelete, Path: "/api/atoll/v1/site/trusts/{site}", Tag: "sites",
		Summary: "Stop accepting anything from a site", Permission: access.SiteManage,
		Do: func(ctx context.Context, in *siteIn) (rest.None, error) {
			return rest.None{}, s.Distrust(ctx, in.Site)
		},
	})
}
