// Package upgrade is the room for replacing the program of a site's nodes by
// another version: it says how far that is, and ends it.
package upgrade

import (
	"context"
	"errors"
	"net/http"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// Cluster knows the levels of the site and of its nodes; member.Node is one.
type Cluster interface {
	// Upgrade compares them at the moment of r.
	Upgrade(r table.Reader) (version.Upgrade, error)
	// FinishUpgrade raises the site's level; version.ErrNotYet when a node runs
	// the older version. A second time changes nothing.
	FinishUpgrade(ctx context.Context) error
}

// Config of the room.
type Config struct {
	DB      *table.DB
	Cluster Cluster
	Version string // of this node's program, for people
}

// State of an upgrade.
type State struct {
	Version      string `json:"version"`       // of the program of the node that answers
	ProgramLevel int    `json:"program_level"` // its feature level
	Level        int    `json:"level"`         // the site's
	// Ready: all nodes run the newer version, and the upgrade can be finished.
	Ready  bool     `json:"ready"`
	Behind []string `json:"behind"` // nodes that run the older version while others do not
	Ahead  []string `json:"ahead"`  // those others
	Advice []string `json:"advice"`
}

// Operations adds the room's operations to the API.
func Operations(k *rest.Kernel, c Config) {
	const path = "/api/atoll/v1/cluster/upgrade"
	rest.Register(k, rest.Operation[struct{}, State]{
		ID: "getUpgrade", Method: http.MethodGet, Path: path, Tag: "cluster",
		Summary: "How far this site is with an upgrade", Permission: access.NodeRead,
		Do: func(ctx context.Context, _ *struct{}) (State, error) { return c.state(ctx) },
	})
	rest.Register(k, rest.Operation[struct{}, State]{
		ID: "finishUpgrade", Method: http.MethodPost, Path: path, Tag: "cluster",
		Summary: "Let all nodes use what the newer version brings; the older one cannot be put back after it", Permission: access.NodeManage,
		Do: func(ctx context.Context, _ *struct{}) (State, error) { return c.finish(ctx) },
	})
}

func (c Config) state(ctx context.Context) (State, error) {
	var u version.Upgrade
	_, err := c.DB.Confirmed(ctx, func(v *table.View) (err error) {
		u, err = c.Cluster.Upgrade(v)
		return err
	})
	// A client reads lists, and not null.
	some := func(list []string) []string { return append([]string{}, list...) }
	return State{
		Version: c.Version, ProgramLevel: version.Level, Level: u.Site, Ready: u.Next > u.Site,
		Behind: some(u.Behind), Ahead: some(u.Ahead), Advice: some(u.Advice()),
	}, err
}

func (c Config) finish(ctx context.Context) (State, error) {
	if err := c.Cluster.FinishUpgrade(ctx); errors.Is(err, version.ErrNotYet) {
		return State{}, fault.New(fault.Precondition, "the upgrade cannot be finished: %v", err)
	} else if err != nil {
		return State{}, err
	}
	return c.state(ctx)
}
