package peers

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/rest"
)

// announceEvery is how long a node waits before it tries again to tell the
// others where clients find it.
const announceEvery = 5 * time.Second

// Endpoints knows where clients find the registry of each node, so that a client
// can be told of all of them (atoll mirror-config).
type Endpoints struct {
	db     *table.DB
	roster Roster
	self   string // this node's URL
	shared bool   // others can reach it
	log    *slog.Logger
	rows   *table.Table[endpointRow]
}

type endpointRow struct {
	URL string `cbor:"url"`
}

// Endpoint is where clients find a node.
type Endpoint struct {
	Node string `json:"node"`
	Name string `json:"name"`
	URL  string `json:"url"`
	Self bool   `json:"self"` // the node that answers
}

// NewEndpoints defines the table of endpoints. The URL of this node is told to the
// others only when shared.
func NewEndpoints(db *table.DB, roster Roster, url string, shared bool, log *slog.Logger) *Endpoints {
	return &Endpoints{db: db, roster: roster, self: url, shared: shared, log: log, rows: table.Define[endpointRow](db, "endpoint")}
}

// Run tells the other nodes where this one is, once it can, and returns when ctx
// ends.
func (e *Endpoints) Run(ctx context.Context) error {
	for {
		err := e.announce(ctx)
		if err == nil {
			<-ctx.Done()
			return ctx.Err()
		}
		e.log.Debug("the other nodes are not told where clients find this one; trying again", "err", err)
		timer := time.NewTimer(announceEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

func (e *Endpoints) announce(ctx context.Context) error {
	id := e.roster.Self()
	_, err := e.db.Update(ctx, func(tx *table.Tx) error {
		row, _, there, err := e.rows.Get(tx, id)
		switch {
		case err != nil:
			return err
		case !e.shared && there:
			return e.rows.Delete(tx, id)
		case !e.shared, there && row.URL == e.self:
			return nil
		}
		return e.rows.Put(tx, endpointRow{e.self}, id)
	})
	return err
}

// All gives this node first, then the others in the order of their ids, as far as
// clients can reach them.
func (e *Endpoints) All(ctx context.Context) (all []Endpoint, err error) {
	_, err = e.db.Confirmed(ctx, func(v *table.View) error {
		all = all[:0]
		members, err := e.roster.Members(v)
		if err != nil {
			return err
		}
		self := Endpoint{Node: e.roster.Self(), URL: e.self, Self: true}
		others := []Endpoint{}
		for _, m := range members {
			if m.ID == self.Node {
				self.Name = m.Name
				continue
			}
			row, _, there, err := e.rows.Get(v, m.ID)
			if err != nil {
				return err
			}
			if there {
				others = append(others, Endpoint{Node: m.ID, Name: m.Name, URL: row.URL})
			}
		}
		all = append([]Endpoint{self}, others...)
		return nil
	})
	return all, err
}

// Operations adds the operations to the API.
func (e *Endpoints) Operations(k *rest.Kernel) {
	rest.Register(k, rest.Operation[struct{}, []Endpoint]{
		ID: "listEndpoints", Method: http.MethodGet, Path: "/api/atoll/v1/endpoints", Tag: "cluster",
		Summary: "Where clients find the nodes of this site, the one that answers first", Permission: access.NodeRead,
		Do: func(ctx context.Context, _ *struct{}) ([]Endpoint, error) { return e.All(ctx) },
	})
}

// Conditions are what else is wrong with the node that answers, or its site.
type Conditions interface {
	// Advice says each in a line, with what to do.
	Advice() []string
}

// Heed makes the status show what else is wrong.
func (p *Peers) Heed(c Conditions) { p.conditions = c }

// Archive makes the status show the site's last backup; last gives nil before the
// first.
func (p *Peers) Archive(last func(v *table.View) (*LastBackup, error)) { p.archive = last }

// further is what the status advises besides what it sees itself.
func (p *Peers) further() []string {
	if p.conditions == nil {
		return nil
	}
	return p.conditions.Advice()
}
