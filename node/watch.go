package node

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/peers"
	"github.com/atoll-registry/atoll/node/rest"
	"github.com/atoll-registry/atoll/node/watch"
)

const (
	// renewLate is how long before its end a certificate that the site renews by
	// itself, at 80 % of its life at the latest, is spoken of: that has not worked.
	renewLate = 14 * 24 * time.Hour
	// ownWarning is how long before its end a certificate of the user's is.
	ownWarning = 30 * 24 * time.Hour
	// authorityWarning is the same for the site's authority, which takes planning.
	authorityWarning = 365 * 24 * time.Hour
)

// newWatch builds the room that looks at what the node stands on.
func newWatch(g ground, r *rooms, lowWater func() int64) (*watch.Watch, error) {
	disk := g.config.disk
	if disk == nil {
		disk = blobs.Disk(g.config.Data)
	}
	return watch.New(watch.Config{
		Cluster: g.member, Disk: disk, Ballast: g.reserve, LowWater: lowWater, Certificates: certificates(g),
		Backup:   func() (last, founded time.Time) { return r.backedUp(g) },
		Further:  r.further,
		Settings: r.settings, Log: g.log, Registerer: g.metrics, Clock: g.config.clock,
	})
}

// backedUp is when the site was last backed up and when it was founded; zero where
// that is not known.
func (r *rooms) backedUp(g ground) (last, founded time.Time) {
	err := g.db.View(func(v *table.View) error {
		record, ok, err := r.backup.Last(v)
		if err == nil && ok {
			last = time.Unix(record.At, 0)
		}
		site, unfounded := r.journal.Site(v)
		if unfounded == nil { // else the site is being founded
			founded = site.Founded
		}
		return err
	})
	if err != nil {
		g.log.Debug("reading the last backup", "err", err)
	}
	return last, founded
}

// lastBackup is the same for the cluster's status.
func (r *rooms) lastBackup(v *table.View) (*peers.LastBackup, error) {
	record, ok, err := r.backup.Last(v)
	if err != nil || !ok {
		return nil, err
	}
	return &peers.LastBackup{
		At: time.Unix(record.At, 0).UTC(), Node: record.Node, Revision: record.Revision,
		Recipients: append([]string{}, record.Recipients...), Blobs: record.Blobs, Missing: record.Missing,
	}, nil
}

// further are the conditions that rooms have found which know nothing of the watch.
func (r *rooms) further() []watch.Condition {
	var out []watch.Condition
	for _, n := range r.traffic.Notices() {
		out = append(out, watch.Condition{Code: n.Code, Subject: n.Subject, Severity: watch.Warning, Text: n.Text, Remedy: n.Remedy})
	}
	for _, n := range r.prefetch.Notices() {
		out = append(out, watch.Condition{Code: n.Code, Subject: n.Subject, Severity: watch.Warning, Text: n.Text, Remedy: n.Remedy})
	}
	return out
}

// certificates lists those whose end would be noticed.
func certificates(g ground) func() []watch.Certificate {
	return func() []watch.Certificate {
		authority := parseFirst(g.member.CA()) // it may have been replaced
		all := []watch.Certificate{{
			Code: "node-certificate-expiring", Of: "the certificate by which other nodes know this one", Leaf: g.member.Certificate().Leaf, Within: renewLate,
			Renew: "it renews itself through any other node of the site: see to it that this node reaches one, then look for \"renewing\" in its log",
		}, {
			Code: "ca-expiring", Of: "the certificate of the site's own authority", Leaf: authority, Within: authorityWarning,
			Renew: "replace it while the nodes are up: atoll cluster rotate ca",
		}}
		if g.files != nil {
			if pair, err := g.files.get(nil); err == nil {
				all = append(all, watch.Certificate{
					Code: "tls-certificate-expiring", Of: "the certificate " + g.files.cert + " that clients see", Leaf: pair.Leaf, Within: ownWarning, Public: true,
					Renew: "put a new certificate and key in place of the files; they are read again without a restart",
				})
			}
		}
		if g.own != nil {
			all = append(all, watch.Certificate{
				Code: "tls-certificate-expiring", Of: "the certificate of the site's own authority that clients see", Leaf: g.own.shown(), Within: renewLate, Public: true,
				Renew: "it renews itself through any node that votes: see to it that this node reaches one (atoll cluster status)",
			})
		}
		return all
	}
}

// parseFirst reads the first certificate of a PEM text; nil when there is none.
func parseFirst(text []byte) *x509.Certificate {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return cert
}

// checks are what the health says of each part, under the names that Harbor has
// for its own.
func (r *rooms) checks(g ground) []rest.Check {
	return append(r.watch.Checks(),
		rest.Check{Name: "core", Run: func(context.Context) error { return nil }},
		r.watch.Check("database", func(ctx context.Context) error { return g.db.ReadIndex(ctx) }),
		r.watch.Check("registry", func(context.Context) error { _, _, err := r.store.Free(); return err }),
	)
}
