package prefetch

import (
	"context"
	"encoding/json"
	"net/http"
	"time"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/jobs"
	"github.com/atoll-registry/atoll/node/rest"
)

// View is a prefetch as the API shows it.
type View struct {
	ID        string     `json:"id"`
	State     jobs.State `json:"state"`
	Spec      Spec       `json:"spec"`
	By        string     `json:"by"`
	CreatedAt time.Time  `json:"created_at"`
	// Next is when a prefetch that waits is looked at; its start follows then.
	Next    *time.Time `json:"next,omitempty"`
	Leader  string     `json:"leader,omitempty"` // id of the node that leads it
	Runs    int        `json:"runs"`
	LastRun jobs.State `json:"last_run,omitempty"`
	// Failure is why the last run failed, with what is missing where.
	Failure  string    `json:"failure,omitempty"`
	Progress *Progress `json:"progress,omitempty"`
	Log      []string  `json:"log"`
}

func viewOf(j jobs.Job) (View, error) {
	v := View{ID: j.ID, State: j.State, By: j.By, CreatedAt: j.CreatedAt, Leader: j.Node, Runs: j.Runs, LastRun: j.LastRun, Failure: j.Failure, Log: j.Log}
	if !j.State.Final() && j.State != jobs.Running {
		v.Next = &j.DueAt
	}
	if len(j.Progress) > 0 {
		v.Progress = &Progress{}
		if err := json.Unmarshal(j.Progress, v.Progress); err != nil {
			return v, err
		}
	}
	return v, json.Unmarshal(j.Payload, &v.Spec)
}

// Operations adds the room's operations to the API.
func (p *Prefetch) Operations(k *rest.Kernel) {
	const base = "/api/atoll/v1/prefetch"
	type createIn struct{ Body Spec }
	type idIn struct {
		ID string `path:"id" max:"64"`
	}
	rest.Register(k, rest.Operation[createIn, View]{
		ID: "createPrefetch", Method: http.MethodPost, Path: base, Tag: "prefetch", Status: http.StatusCreated,
		Summary: "Bring tags to nodes before a time of the day", Permission: access.NodeManage,
		Do: func(ctx context.Context, in *createIn) (View, error) {
			j, err := p.Create(ctx, in.Body, access.From(ctx).Name)
			if err != nil {
				return View{}, err
			}
			return viewOf(j)
		},
	})
	rest.Register(k, rest.Operation[struct{}, []View]{
		ID: "listPrefetches", Method: http.MethodGet, Path: base, Tag: "prefetch",
		Summary: "The prefetches of this site, the newest first", Permission: access.NodeRead,
		Do: func(context.Context, *struct{}) ([]View, error) {
			all, err := p.Jobs.List(Kind)
			out := make([]View, 0, len(all))
			for _, j := range all {
				v, err := viewOf(j)
				if err != nil {
					return nil, err
				}
				v.Log = []string{} // one by one: they are long
				out = append(out, v)
			}
			return out, err
		},
	})
	rest.Register(k, rest.Operation[idIn, View]{
		ID: "getPrefetch", Method: http.MethodGet, Path: base + "/{id}", Tag: "prefetch",
		Summary: "One prefetch: how far it is on each node, and its log", Permission: access.NodeRead,
		Do: func(ctx context.Context, in *idIn) (View, error) {
			j, err := p.Jobs.Get(ctx, Kind, in.ID)
			if err != nil {
				return View{}, err
			}
			return viewOf(j)
		},
	})
	rest.Register(k, rest.Operation[idIn, View]{
		ID: "cancelPrefetch", Method: http.MethodDelete, Path: base + "/{id}", Tag: "prefetch",
		Summary: "End a prefetch; what it brought is not kept for it any more", Permission: access.NodeManage,
		Do: func(ctx context.Context, in *idIn) (View, error) {
			by := access.From(ctx).Name
			j, err := p.Jobs.Cancel(ctx, Kind, in.ID, by)
			if err != nil {
				return View{}, err
			}
			p.Log.Info("prefetch cancelled", "id", in.ID, "by", by)
			return viewOf(j)
		},
	})
}
