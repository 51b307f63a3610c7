package project_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/rest"
)

type plainSealer struct{}

func (plainSealer) Seal(_ string, plain []byte) ([]byte, error)    { return plain, nil }
func (plainSealer) Unseal(_ string, sealed []byte) ([]byte, error) { return sealed, nil }

// contents says which projects have a repository.
type contents map[string]bool

func (c contents) Any(_ table.Reader, name string) (bool, error) { return c[name], nil }
func (contents) Forget(context.Context, string) error            { return nil }
func (c contents) Bytes(*table.View, string) (int64, error)      { return 42, nil }
func (c contents) Count(_ *table.View, name string) (int, error) {
	if c[name] {
		return 1, nil
	}
	return 0, nil
}

type fixture struct {
	t        *testing.T
	db       *table.DB
	backend  *tabletest.Backend
	journal  *journal.Journal
	projects *project.Projects
	contents contents
	handler  http.Handler
}

type byHeader struct{}

func (byHeader) Authenticate(r *http.Request) (access.Principal, error) {
	if name := r.Header.Get("As"); name != "" {
		return access.Principal{Kind: access.User, Name: name, Admin: name == "admin"}, nil
	}
	return access.Principal{}, nil
}

func open(t *testing.T) *fixture {
	t.Helper()
	db := tabletest.Open(t)
	f := &fixture{t: t, db: db, contents: contents{}}
	f.journal = journal.New(db, plainSealer{})
	f.projects = project.New(db, f.journal)
	f.projects.Attach(f.contents)
	f.backend = tabletest.Start(t, db)
	_, err := f.journal.EnsureSite(t.Context(), "site-a", "a")
	f.must(err)
	f.must(f.projects.EnsureLibrary(t.Context(), "admin"))
	f.must(f.projects.EnsureLibrary(t.Context(), "admin"))
	k, err := rest.New(rest.Config{
		Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), Authenticator: byHeader{}, Guard: f.projects, Version: "test",
	})
	f.must(err)
	f.projects.Operations(k)
	f.handler = k.Handler()
	return f
}

func (f *fixture) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) wantKind(err error, kind fault.Kind) {
	f.t.Helper()
	if !fault.Is(err, kind) {
		f.t.Fatalf("error is %v, want %s", err, kind)
	}
}

func (f *fixture) do(status int, as, request, body string, headers ...string) *httptest.ResponseRecorder {
	f.t.Helper()
	method, path, _ := strings.Cut(request, " ")
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.Header.Set("As", as)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	f.handler.ServeHTTP(w, r)
	if w.Code != status {
		f.t.Fatalf("%s as %q: status %d, want %d: %s", request, as, w.Code, status, w.Body)
	}
	return w
}

func (f *fixture) kinds(name string) (kinds []string, last entry.Entry) {
	f.t.Helper()
	f.must(f.db.View(func(v *table.View) error {
		p, _, err := f.projects.Get(v, name)
		if err != nil {
			return err
		}
		for e, err := range f.journal.Entries(v, p.Log, 0, 0) {
			if err != nil {
				return err
			}
			if last, err = entry.Decode(e.Value); err != nil {
				return err
			}
			kinds = append(kinds, last.Kind)
		}
		return nil
	}))
	return kinds, last
}

func TestNames(t *testing.T) {
	for name, good := range map[string]bool{
		"a": true, "web": true, "web-1.x_y": true, "123": true, strings.Repeat("a", 255): true,
		"": false, "Web": false, "a--b": false, "-a": false, "a-": false, "a/b": false, "a b": false, strings.Repeat("a", 256): false, "ä": false,
	} {
		err := project.CheckName(name)
		if (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
		if err != nil && !strings.Contains(err.Error(), "1-255") {
			t.Errorf("%q: the rule is not in %q", name, err)
		}
	}
}

func TestChangesReachTheLog(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	p, err := f.projects.Create(ctx, project.Draft{Name: "web", Actor: "admin", Metadata: map[string]string{"public": "true", "severity": "high", "retention_id": "3"}})
	f.must(err)
	if !p.Public || p.ID == 0 {
		t.Fatalf("project is %+v", p)
	}
	_, last := f.kinds("web")
	if diff := cmp.Diff(map[string]string{"severity": "high"}, last.Metadata); diff != "" || !last.Public || last.Name != "web" {
		t.Fatalf("entry is %+v: %s", last, diff)
	}
	f.must(f.projects.Update(ctx, "web", project.Change{Metadata: map[string]string{"retention_id": "4"}})) // stays here
	f.must(f.projects.Update(ctx, "web", project.Change{Metadata: map[string]string{"public": "true"}}))    // as it is
	f.must(f.projects.Update(ctx, "web", project.Change{Metadata: map[string]string{"public": "false"}}))
	kinds, last := f.kinds("web")
	if len(kinds) != 2 || last.Public {
		t.Fatalf("log is %v, last %+v", kinds, last)
	}
	_, err = f.projects.Create(ctx, project.Draft{Name: "web"})
	f.wantKind(err, fault.Conflict)
	_, err = f.projects.Create(ctx, project.Draft{Name: "other", Metadata: map[string]string{"colour": "blue"}})
	f.wantKind(err, fault.Invalid)
	_, err = f.projects.Create(ctx, project.Draft{Name: "other", Metadata: map[string]string{"severity": "awful"}})
	f.wantKind(err, fault.Invalid)
}

func TestOneNameForConcurrentCreators(t *testing.T) {
	f := open(t)
	var wait sync.WaitGroup
	var mu sync.Mutex
	made := 0
	for range 8 {
		wait.Go(func() {
			if _, err := f.projects.Create(t.Context(), project.Draft{Name: "web"}); err == nil {
				mu.Lock()
				made++
				mu.Unlock()
			}
		})
	}
	wait.Wait()
	if made != 1 {
		t.Fatalf("made %d times", made)
	}
}

func TestMirror(t *testing.T) {
	f := open(t)
	id := entry.LogID{Site: "site-b", Incarnation: "one", Scope: "two"}
	_, err := f.db.Update(t.Context(), func(tx *table.Tx) error {
		if err := f.projects.CreateMirror(tx, "theirs", id, "admin"); err != nil {
			return err
		}
		return f.projects.ApplyEntry(tx, "theirs", entry.Entry{Kind: entry.ProjectPut, At: 9, Name: "ours", Public: true, Metadata: map[string]string{"later": "yes"}})
	})
	f.must(err)
	f.must(f.db.View(func(v *table.View) error {
		p, ok, err := f.projects.ByScope(v, id)
		if !ok || p.Name != "theirs" || p.OwnerName != "ours" || !p.Public || p.Metadata["later"] != "yes" {
			t.Errorf("mirror is %+v", p)
		}
		return err
	}))
	public := false
	f.wantKind(f.projects.Update(t.Context(), "theirs", project.Change{Public: &public}), fault.Denied)
	f.must(f.projects.Update(t.Context(), "theirs", project.Change{Metadata: map[string]string{"auto_scan": "true"}}))
	_, err = f.db.Update(t.Context(), func(tx *table.Tx) error { _, err := f.projects.Writable(tx, "theirs"); return err })
	f.wantKind(err, fault.Denied)
	if _, text, _ := fault.Public(err); !strings.Contains(text, "site-b") {
		t.Fatalf("the owner is not named: %s", text)
	}
	f.wantKind(f.projects.Delete(t.Context(), "theirs"), fault.Precondition)
}

func TestOperations(t *testing.T) {
	f := open(t)
	w := f.do(201, "admin", "POST /api/v2.0/projects", `{"project_name":"web","metadata":{"public":"false"},"storage_limit":-1}`)
	location := w.Header().Get("Location")
	if !strings.HasPrefix(location, "/api/v2.0/projects/") || w.Body.Len() != 0 {
		t.Fatalf("location %q, body %q", location, w.Body)
	}
	var byID, byName struct {
		ID        int64             `json:"project_id"`
		Name      string            `json:"name"`
		Metadata  map[string]string `json:"metadata"`
		OwnerSite string            `json:"owner_site"`
	}
	f.must(json.Unmarshal(f.do(200, "admin", "GET "+location, "").Body.Bytes(), &byID))
	f.must(json.Unmarshal(f.do(200, "admin", "GET /api/v2.0/projects/web", "").Body.Bytes(), &byName))
	if diff := cmp.Diff(byID, byName); diff != "" || byID.Name != "web" || location != fmt.Sprint("/api/v2.0/projects/", byID.ID) || byID.OwnerSite != "site-a" {
		t.Fatalf("project is %+v, %s", byID, diff)
	}
	w = f.do(201, "admin", "POST /api/v2.0/projects", `{"project_name":"77"}`, "X-Resource-Name-In-Location", "true")
	if got := w.Header().Get("Location"); got != "/api/v2.0/projects/77" {
		t.Fatalf("location is %q", got)
	}
	f.do(404, "admin", "GET /api/v2.0/projects/77", "")
	f.do(200, "admin", "GET /api/v2.0/projects/77", "", "X-Is-Resource-Name", "true")
	f.do(409, "admin", "POST /api/v2.0/projects", `{"project_name":"web"}`)
	f.do(400, "admin", "POST /api/v2.0/projects", `{"project_name":"Web"}`)
	f.do(400, "admin", "POST /api/v2.0/projects", `{"project_name":"w2","metadata":{"colour":"blue"}}`)
	f.do(403, "eve", "POST /api/v2.0/projects", `{"project_name":"w2"}`)
	f.do(200, "admin", "HEAD /api/v2.0/projects?project_name=web", "")
	f.do(404, "eve", "HEAD /api/v2.0/projects?project_name=web", "")
	f.do(404, "admin", "HEAD /api/v2.0/projects?project_name=none", "")
	f.do(200, "admin", "PUT /api/v2.0/projects/web", `{"metadata":{"public":"true"}}`)
	f.do(200, "eve", "GET /api/v2.0/projects/web", "")
	f.contents["web"] = true
	f.do(200, "admin", "GET /api/v2.0/projects/web/summary", "")
	f.do(412, "admin", "DELETE /api/v2.0/projects/web", "")
	f.do(200, "admin", "GET /api/v2.0/projects/web/_deletable", "")
	delete(f.contents, "web")
	f.do(200, "admin", "DELETE /api/v2.0/projects/web", "")
	f.do(404, "admin", "DELETE /api/v2.0/projects/web", "")
	f.do(404, "admin", "GET "+location, "")
}

func TestListShowsWhatOneMaySee(t *testing.T) {
	f := open(t)
	for _, name := range []string{"web", "web-two", "data"} {
		_, err := f.projects.Create(t.Context(), project.Draft{Name: name, Public: name == "data", Actor: "admin"})
		f.must(err)
	}
	for _, c := range []struct{ as, query, want string }{
		{"admin", "", "library web web-two data"},
		{"admin", "?sort=-name", "web-two web library data"},
		{"admin", "?name=web", "web web-two"},
		{"admin", "?q=name%3Dweb", "web"},
		{"admin", "?q=name%3D%7B'web'%20'data'%7D&with_detail=false", "web data"},
		{"admin", "?public=true", "library data"},
		{"admin", "?page=2&page_size=3", "data"},
		{"eve", "", "library data"},
		{"", "", "library data"},
	} {
		var list []struct{ Name string }
		f.must(json.Unmarshal(f.do(200, c.as, "GET /api/v2.0/projects"+c.query, "").Body.Bytes(), &list))
		var names []string
		for _, p := range list {
			names = append(names, p.Name)
		}
		if got := strings.Join(names, " "); got != c.want {
			t.Errorf("%s as %q: %q, want %q", c.query, c.as, got, c.want)
		}
	}
	f.do(422, "admin", "GET /api/v2.0/projects?page_size=101", "")
}

// Whoever may not see a project cannot tell whether it exists.
func TestGuard(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	_, err := f.projects.Create(ctx, project.Draft{Name: "secret"})
	f.must(err)
	anonymous, eve := access.Principal{}, access.Principal{Kind: access.User, Name: "eve"}
	admin := access.Principal{Kind: access.User, Name: "admin", Admin: true}
	for _, ref := range []string{"secret", "none", "999999", "=12", "No/Such"} {
		f.wantKind(f.projects.Allow(ctx, anonymous, access.RepositoryPull, ref), fault.Unauthenticated)
		f.wantKind(f.projects.Allow(ctx, eve, access.RepositoryPull, ref), fault.Denied)
	}
	f.must(f.projects.Allow(ctx, admin, access.RepositoryPush, "secret"))
	f.wantKind(f.projects.Allow(ctx, admin, access.RepositoryPush, "none"), fault.NotFound)
	f.must(f.projects.Allow(ctx, anonymous, access.RepositoryPull, "library"))
	f.wantKind(f.projects.Allow(ctx, anonymous, access.RepositoryPush, "library"), fault.Unauthenticated)
	f.must(f.projects.Allow(ctx, anonymous, access.ProjectList, ""))
	f.wantKind(f.projects.Allow(ctx, eve, access.NodeManage, ""), fault.Denied)

	f.backend.SetLeader(false)
	f.must(f.projects.Allow(ctx, anonymous, access.RepositoryPull, "library"))
	f.wantKind(f.projects.Allow(ctx, admin, access.RepositoryPull, "none"), fault.Unavailable)
	_, _, err = f.projects.Lookup(ctx, "none")
	f.wantKind(err, fault.Unavailable)
}
