package project

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// Everywhere is the number of replicas that stands for all nodes.
const Everywhere = 1 << 20

// mostReplicas bounds a number of copies: more nodes than a site has.
const mostReplicas = 99

// ParseReplicas reads a number of replicas: 1 to 99, or all.
func ParseReplicas(text string) (int, error) {
	if text == "all" {
		return Everywhere, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > mostReplicas {
		return 0, fmt.Errorf("a whole number between 1 and %d is wanted, or all", mostReplicas)
	}
	return n, nil
}

// formatReplicas writes what ParseReplicas reads, and default for none.
func formatReplicas(n int) string {
	switch n {
	case 0:
		return siteDefault
	case Everywhere:
		return "all"
	}
	return strconv.Itoa(n)
}

// siteDefault is how a project wants what the site does.
const siteDefault = "default"

// SetReplicas says on how many nodes of this site what a project links is kept; 0:
// as many as the site's setting says. It is this site's business and travels
// nowhere, so a mirror has it too.
func (p *Projects) SetReplicas(ctx context.Context, name string, n int) error {
	_, err := p.db.Update(ctx, func(tx *table.Tx) error {
		r, _, err := p.need(tx, name)
		if err != nil || r.Replicas == n {
			return err
		}
		r.Replicas, r.UpdatedAt = n, time.Now().Unix()
		return p.rows.Put(tx, r, name)
	})
	if err != nil {
		return fmt.Errorf("set the replicas of project %s: %w", name, err)
	}
	return nil
}

// Replicas is on how many nodes a project wants what it links; ok is false when it
// wants what the site does, and when there is no such project.
func (p *Projects) Replicas(r table.Reader, name string) (n int, ok bool, err error) {
	found, _, _, err := p.rows.Get(r, name)
	return found.Replicas, found.Replicas != 0, err
}

// AllReplicas are the projects that want other than the site does, by name.
func (p *Projects) AllReplicas(v *table.View) (map[string]int, error) {
	all := map[string]int{}
	for r, err := range p.rows.Scan(v, table.Range{}) {
		if err != nil {
			return nil, err
		}
		if r.Value.Replicas != 0 {
			all[r.Key[0]] = r.Value.Replicas
		}
	}
	return all, nil
}

// Wanted is on how many nodes a project's content is kept.
type Wanted struct {
	// Replicas is a number, all, or default for the site's setting.
	Replicas string `json:"replicas" required:"true" max:"8"`
}

type wantedInput struct {
	rest.ProjectRef
	Body Wanted
}

// replicaOperations adds what Harbor does not have.
func (p *Projects) replicaOperations(k *rest.Kernel) {
	const path = "/api/atoll/v1/projects/{project_name_or_id}/replicas"
	rest.Register(k, rest.Operation[rest.ProjectRef, Wanted]{
		ID: "getProjectReplicas", Method: "GET", Path: path, Tag: "project", Summary: "Show on how many nodes a project's content is kept",
		Permission: access.ProjectRead, Project: func(in *rest.ProjectRef) string { return in.Ref() }, Do: p.showReplicas,
	})
	rest.Register(k, rest.Operation[wantedInput, Wanted]{
		ID: "setProjectReplicas", Method: "PUT", Path: path, Tag: "project", Summary: "Say on how many nodes a project's content is kept",
		Permission: access.ProjectUpdate, Project: func(in *wantedInput) string { return in.Ref() }, Do: p.changeReplicas,
	})
}

func (p *Projects) showReplicas(ctx context.Context, in *rest.ProjectRef) (out Wanted, err error) {
	x, err := p.named(ctx, in.Ref())
	if err != nil {
		return out, err
	}
	_, err = p.db.Confirmed(ctx, func(v *table.View) error {
		n, _, err := p.Replicas(v, x.Name)
		out.Replicas = formatReplicas(n)
		return err
	})
	return out, err
}

func (p *Projects) changeReplicas(ctx context.Context, in *wantedInput) (Wanted, error) {
	n := 0
	if in.Body.Replicas != siteDefault {
		var err error
		if n, err = ParseReplicas(in.Body.Replicas); err != nil {
			return Wanted{}, fault.New(fault.Invalid, "%.20q replicas: %v, or %s for the site's setting", in.Body.Replicas, err, siteDefault)
		}
	}
	x, err := p.named(ctx, in.Ref())
	if err != nil {
		return Wanted{}, err
	}
	return Wanted{formatReplicas(n)}, p.SetReplicas(ctx, x.Name, n)
}
