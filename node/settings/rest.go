package settings

import (
	"context"
	"net/http"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/rest"
)

// Change is the new value of a setting.
type Change struct {
	Value string `json:"value"`
}

// Operations adds the room's operations to the API.
func (s *Settings) Operations(k *rest.Kernel) {
	type nameIn struct {
		Name string `path:"name"`
	}
	type changeIn struct {
		Name string `path:"name"`
		Body Change
	}
	rest.Register(k, rest.Operation[struct{}, []Entry]{
		ID: "listSettings", Method: http.MethodGet, Path: "/api/atoll/v1/settings", Tag: "settings",
		Summary: "The settings of the site", Permission: access.ConfigurationRead,
		Do: func(ctx context.Context, _ *struct{}) ([]Entry, error) { return s.All(ctx) },
	})
	rest.Register(k, rest.Operation[nameIn, Entry]{
		ID: "getSetting", Method: http.MethodGet, Path: "/api/atoll/v1/settings/{name}", Tag: "settings",
		Summary: "One setting", Permission: access.ConfigurationRead,
		Do: func(ctx context.Context, in *nameIn) (Entry, error) { return s.Get(ctx, in.Name) },
	})
	rest.Register(k, rest.Operation[changeIn, Entry]{
		ID: "changeSetting", Method: http.MethodPut, Path: "/api/atoll/v1/settings/{name}", Tag: "settings",
		Summary: "Change a setting of the site; it is obeyed at once, on every node", Permission: access.ConfigurationUpdate,
		Do: func(ctx context.Context, in *changeIn) (Entry, error) {
			return s.Set(ctx, in.Name, in.Body.Value, access.From(ctx).Name)
		},
	})
	rest.Register(k, rest.Operation[nameIn, rest.None]{
		ID: "resetSetting", Method: http.MethodDelete, Path: "/api/atoll/v1/settings/{name}", Tag: "settings",
		Summary: "Give a setting its default back", Permission: access.ConfigurationUpdate,
		Do: func(ctx context.Context, in *nameIn) (rest.None, error) { return rest.None{}, s.Reset(ctx, in.Name) },
	})
}
