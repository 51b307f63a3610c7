package identity

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
	"github.com/atoll-registry/atoll/node/telemetry"
)

// TokenPath is where registry clients get their tokens.
const TokenPath = "/service/token"

// tokenAnswer is what a token request is answered with. Some clients read one of
// the first two, some the other.
type tokenAnswer struct {
	Token       string `json:"token"`
	AccessToken string `json:"access_token"`
	ExpiresIn   int    `json:"expires_in"` // seconds
	IssuedAt    string `json:"issued_at"`  // RFC 3339
}

// TokenService serves TokenPath: GET gives a token for what the asker wants and
// may have, with or without name and password.
func (id *Identity) TokenService() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = telemetry.Begin(w, r)
		telemetry.SetRoute(r.Context(), TokenPath)
		if r.Method != http.MethodGet {
			// containerd tries POST first and falls back to GET on exactly this.
			w.Header().Set("Allow", http.MethodGet)
			http.Error(w, "ask for a token with GET", http.StatusMethodNotAllowed)
			return
		}
		query := r.URL.Query()
		if service := query.Get("service"); service != Service {
			http.Error(w, fmt.Sprintf("there is no service %q here: the service is %s", clipName(service), Service), http.StatusBadRequest)
			return
		}
		answer, err := id.answer(r, query["scope"])
		if err != nil {
			id.refuse(w, r, err)
			return
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		// A failed write means that the client is gone.
		_ = json.NewEncoder(w).Encode(answer)
	})
}

func (id *Identity) answer(r *http.Request, params []string) (tokenAnswer, error) {
	ctx := r.Context()
	p, err := id.Authenticate(r)
	if err != nil {
		return tokenAnswer{}, err
	}
	if p.Grants != nil {
		return tokenAnswer{}, fault.New(fault.Unauthenticated, "a token does not give another token: use the name and password")
	}
	telemetry.SetUser(ctx, p.Name)
	asked, ok := parseScopes(params)
	if !ok {
		return tokenAnswer{}, fault.New(fault.Invalid, "more than %d scopes are asked for at once", maxScopes)
	}
	granted := make([]scope, 0, len(asked))
	for _, s := range asked {
		if s.Actions, err = id.allowed(ctx, p, s); err != nil {
			return tokenAnswer{}, err
		}
		granted = append(granted, s)
	}
	t, err := id.issue(p, granted)
	if err != nil {
		return tokenAnswer{}, err
	}
	return tokenAnswer{
		Token: t.token, AccessToken: t.token, ExpiresIn: int(tokenLife / time.Second),
		IssuedAt: t.at.UTC().Format(time.RFC3339),
	}, nil
}

// allowed narrows the actions of a scope to those that the principal may do.
func (id *Identity) allowed(ctx context.Context, p access.Principal, s scope) ([]string, error) {
	actions := []string{}
	switch {
	case s.Type == typeRegistry && s.Name == "catalog":
		if access.InSystem(p, access.CatalogRead) {
			actions = append(actions, "*")
		}
	case s.Type == typeRepository:
		name, _, _ := strings.Cut(repositoryName(s.Name), "/")
		project, ok, err := id.config.Projects.Lookup(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("look up project %s: %w", name, err)
		}
		for _, action := range withoutStar(s.Actions) {
			want, known := access.RepositoryAction(action)
			switch {
			case !known:
			case ok && access.InProject(p, want, project):
				actions = append(actions, action)
			case !ok && access.InSystem(p, access.ProjectCreate):
				// The push that follows creates the project.
				actions = append(actions, action)
			}
		}
	}
	return actions, nil
}

// withoutStar spells out what * stands for.
func withoutStar(actions []string) []string {
	for _, a := range actions {
		if a == "*" {
			return []string{"pull", "push", "delete"}
		}
	}
	return actions
}

// refuse answers a token request with an error. This handler is beside the
// kernel of rest, so it logs its own.
func (id *Identity) refuse(w http.ResponseWriter, r *http.Request, err error) {
	level := slog.LevelDebug
	switch fault.KindOf(err) {
	case fault.Internal:
		level = slog.LevelError
	case fault.Unavailable:
		level = slog.LevelWarn
	case fault.Unauthenticated:
		w.Header().Set("WWW-Authenticate", basicChallenge)
	}
	id.config.Log.LogAttrs(r.Context(), level, "token refused",
		slog.String("id", telemetry.RequestID(r.Context())), slog.Any("error", err))
	rest.WriteError(w, err)
}

const basicChallenge = `Basic realm="harbor"`

// Challenge sets the header of a 401 that tells a registry client how to
// continue. Without credentials it names the token service and the scopes, each
// as in "repository:library/app:pull". Wrong name and password are told by a
// Basic challenge, as Harbor does. A token that has expired or does not reach
// far enough gets the way to a better one: an anonymous client could not follow
// a Basic challenge in the middle of a long pull.
func (id *Identity) Challenge(w http.ResponseWriter, r *http.Request, scopes ...string) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	bearer := strings.EqualFold(scheme, "bearer")
	if scheme != "" && !bearer {
		w.Header().Set("WWW-Authenticate", basicChallenge)
		return
	}
	challenge := fmt.Sprintf(`Bearer realm="%s%s",service="%s"`, quotable(id.origin(r)), TokenPath, Service)
	if len(scopes) > 0 {
		challenge += fmt.Sprintf(`,scope="%s"`, quotable(strings.Join(scopes, " ")))
	}
	if bearer {
		reason := "invalid_token"
		if _, err := id.Verify(r.Context(), strings.TrimSpace(token)); err == nil {
			reason = "insufficient_scope"
		}
		challenge += fmt.Sprintf(`,error="%s"`, reason)
	}
	w.Header().Set("WWW-Authenticate", challenge)
}

// origin is the scheme and host by which the client found the node.
func (id *Identity) origin(r *http.Request) string {
	if r.TLS != nil {
		return "https://" + r.Host
	}
	if u, err := url.Parse(id.config.ExternalURL); err == nil && u.Host == r.Host && u.Scheme != "" {
		return u.Scheme + "://" + r.Host
	}
	return "http://" + r.Host
}

// quotable drops what would end a quoted string early.
func quotable(s string) string {
	return strings.Map(func(c rune) rune {
		if c == '"' || c == '\\' || c < ' ' || c == 0x7f {
			return -1
		}
		return c
	}, s)
}
