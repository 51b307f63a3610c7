package rest_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
	"github.com/atoll-registry/atoll/node/rest/resttest"
)

type thing struct {
	Name  string    `json:"name" required:"true" max:"10" pattern:"[a-z]+"`
	Size  int64     `json:"size" min:"1" max:"100"`
	Kind  string    `json:"kind,omitempty" enum:"one,two"`
	Parts []part    `json:"parts,omitempty" max:"3"`
	Made  time.Time `json:"made,omitzero"`
	Inner *part     `json:"inner,omitempty"`
}

type part struct {
	Label string `json:"label" required:"true"`
	Below []part `json:"below,omitempty"`
}

type thingInput struct {
	rest.ProjectRef
	Repository string        `path:"repository_name"`
	Limit      int           `query:"limit" default:"7" min:"1" max:"9"`
	Wait       time.Duration `query:"wait"`
	Deep       *bool         `query:"deep"`
	IDs        []int64       `query:"ids"`
	Trace      string        `header:"X-Trace" max:"5"`
	Origin     string        `from:"origin"`
	Body       thing
}

type echo struct {
	Project, Repository, Trace, Origin, User string
	Limit                                    int
	Wait                                     time.Duration
	Deep                                     *bool
	IDs                                      []int64
	Body                                     thing
}

func server(t *testing.T) *resttest.Server {
	t.Helper()
	s := resttest.New(t)
	rest.Register(s.Kernel, rest.Operation[thingInput, echo]{
		ID: "putThing", Method: "PUT", Path: "/api/v2.0/projects/{project_name_or_id}/things/{repository_name}", Tag: "thing", Summary: "Put a thing",
		Permission: access.RepositoryPush, Project: func(in *thingInput) string { return in.Ref() },
		Do: func(ctx context.Context, in *thingInput) (echo, error) {
			return echo{in.Ref(), in.Repository, in.Trace, in.Origin, rest.PrincipalFrom(ctx).Name, in.Limit, in.Wait, in.Deep, in.IDs, in.Body}, nil
		},
	})
	type list struct {
		rest.Paging
		rest.Filter
	}
	rest.Register(s.Kernel, rest.Operation[list, rest.Page[string]]{
		ID: "listThings", Method: "GET", Path: "/api/v2.0/things", Tag: "thing", Summary: "List things", Permission: access.ProjectList,
		Do: func(_ context.Context, in *list) (rest.Page[string], error) {
			var found []string
			for _, name := range []string{"a", "b", "c", "d", "e"} {
				if in.Q.Holds("name", name) {
					found = append(found, name)
				}
			}
			return rest.PageOf(found, in.Paging), nil
		},
	})
	rest.Register(s.Kernel, rest.Operation[struct{}, rest.Created]{
		ID: "makeThing", Method: "POST", Path: "/api/v2.0/things", Tag: "thing", Summary: "Make a thing", Permission: access.NodeManage,
		Do: func(context.Context, *struct{}) (rest.Created, error) {
			return rest.Created{Location: "/api/v2.0/things/4"}, nil
		},
	})
	rest.Register(s.Kernel, rest.Operation[struct{}, rest.None]{
		ID: "dropThing", Method: "DELETE", Path: "/api/v2.0/things/last", Tag: "thing", Summary: "Drop a thing", Permission: access.NodeManage,
		Do: func(context.Context, *struct{}) (rest.None, error) { return rest.None{}, nil },
	})
	return s
}

func TestDecode(t *testing.T) {
	s := server(t)
	var got echo
	s.Do("PUT", "/api/v2.0/projects/web/things/a%252Fb?wait=90s&deep=false&ids=1,2&ids=3&limit=9",
		thing{Name: "abc", Size: 3, Kind: "two", Parts: []part{{Label: "x"}}}, "X-Trace", "t1").Want(200).Decode(&got)
	no := false
	want := echo{
		Project: "web", Repository: "a/b", Trace: "t1", Origin: "http://example.com", User: "admin", Limit: 9, Wait: 90 * time.Second,
		Deep: &no, IDs: []int64{1, 2, 3}, Body: thing{Name: "abc", Size: 3, Kind: "two", Parts: []part{{Label: "x"}}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if want := (resttest.Asked{Want: access.RepositoryPush, Project: "web"}); s.Asked != want {
		t.Errorf("guard was asked %v, want %v", s.Asked, want)
	}
}

func TestRepositoryNameEscapes(t *testing.T) {
	s := server(t)
	for _, path := range []string{"a%2Fb%2Fc", "a%252Fb%252Fc"} {
		var got echo
		s.Do("PUT", "/api/v2.0/projects/web/things/"+path, thing{Name: "abc", Size: 1}).Want(200).Decode(&got)
		if got.Repository != "a/b/c" {
			t.Errorf("%s: repository %q", path, got.Repository)
		}
	}
}

func TestProjectNames(t *testing.T) {
	s := server(t)
	for _, test := range []struct {
		path, header, name string
		id                 int64
	}{
		{"web", "", "web", 0},
		{"17", "", "", 17},
		{"17", "true", "17", 0},
		{"17", "false", "", 17},
		{"99999999999999999999", "", "99999999999999999999", 0},
	} {
		s.Do("PUT", "/api/v2.0/projects/"+test.path+"/things/a", thing{Name: "abc", Size: 1}, "X-Is-Resource-Name", test.header).Want(200)
		if name, id := rest.ParseProject(s.Asked.Project); name != test.name || id != test.id {
			t.Errorf("%s with header %q: name %q id %d", test.path, test.header, name, id)
		}
	}
	if name, id := rest.ParseProject(rest.ProjectName{Name: "17"}.Ref()); name != "17" || id != 0 {
		t.Errorf("a project's name that is a number became %q, %d", name, id)
	}
}

func TestRefusals(t *testing.T) {
	good := `{"name":"abc","size":1}`
	for _, test := range []struct {
		name, method, path string
		body               any
		headers            []string
		status             int
		code, says         string
	}{
		{"no route", "GET", "/api/v2.0/nothing", nil, nil, 404, "NOT_FOUND", "/api/v2.0/nothing"},
		{"unclean path", "GET", "/api/v2.0//things", nil, nil, 404, "NOT_FOUND", ""},
		{"dots", "GET", "/api/v2.0/x/../things", nil, nil, 404, "NOT_FOUND", ""},
		{"method", "PATCH", "/api/v2.0/things", nil, nil, 405, "METHOD_NOT_ALLOWED", "GET"},
		{"page size", "GET", "/api/v2.0/things?page_size=101", nil, nil, 422, "UNPROCESSABLE_ENTITY", "page_size"},
		{"negative page", "GET", "/api/v2.0/things?page=-1", nil, nil, 422, "UNPROCESSABLE_ENTITY", "page"},
		{"no number", "GET", "/api/v2.0/things?page=x", nil, nil, 422, "UNPROCESSABLE_ENTITY", "whole number"},
		{"query", "GET", "/api/v2.0/things?q=name", nil, nil, 400, "BAD_REQUEST", "key=value"},
		{"sort", "GET", "/api/v2.0/things?sort=-", nil, nil, 400, "BAD_REQUEST", "sort"},
		{"escape in query", "GET", "/api/v2.0/things?page=%zz", nil, nil, 400, "BAD_REQUEST", "escaped"},
		{"header", "PUT", "/api/v2.0/projects/1/things/a", good, []string{"X-Trace", "toolong"}, 422, "UNPROCESSABLE_ENTITY", "X-Trace"},
		{"boolean", "PUT", "/api/v2.0/projects/1/things/a?deep=maybe", good, nil, 422, "UNPROCESSABLE_ENTITY", "deep"},
		{"no body", "PUT", "/api/v2.0/projects/1/things/a", nil, nil, 400, "BAD_REQUEST", "no body"},
		{"media type", "PUT", "/api/v2.0/projects/1/things/a", good, []string{"Content-Type", "text/plain"}, 415, "UNSUPPORTED_MEDIA_TYPE", "application/json"},
		{"syntax", "PUT", "/api/v2.0/projects/1/things/a", `{"name":}`, nil, 400, "BAD_REQUEST", "byte 9"},
		{"cut off", "PUT", "/api/v2.0/projects/1/things/a", `{"name":"a`, nil, 400, "BAD_REQUEST", "ends in the middle"},
		{"two values", "PUT", "/api/v2.0/projects/1/things/a", good + good, nil, 400, "BAD_REQUEST", "more than one"},
		{"wrong type", "PUT", "/api/v2.0/projects/1/things/a", `{"name":7}`, nil, 400, "BAD_REQUEST", "a string is wanted"},
		{"required", "PUT", "/api/v2.0/projects/1/things/a", `{"size":1}`, nil, 422, "UNPROCESSABLE_ENTITY", "name is required"},
		{"pattern", "PUT", "/api/v2.0/projects/1/things/a", `{"name":"ABC","size":1}`, nil, 422, "UNPROCESSABLE_ENTITY", "does not match"},
		{"long", "PUT", "/api/v2.0/projects/1/things/a", `{"name":"abcdefghijk","size":1}`, nil, 422, "UNPROCESSABLE_ENTITY", "at most 10"},
		{"large number", "PUT", "/api/v2.0/projects/1/things/a", `{"name":"abc","size":101}`, nil, 422, "UNPROCESSABLE_ENTITY", "size is 101"},
		{"enum", "PUT", "/api/v2.0/projects/1/things/a", `{"name":"abc","size":1,"kind":"three"}`, nil, 422, "UNPROCESSABLE_ENTITY", "one, two"},
		{"nested", "PUT", "/api/v2.0/projects/1/things/a", `{"name":"abc","parts":[{"label":"a"},{}]}`, nil, 422, "UNPROCESSABLE_ENTITY", "parts[1].label is required"},
		{"deep", "PUT", "/api/v2.0/projects/1/things/a", `{"name":"abc","inner":{"label":"a","below":[{}]}}`, nil, 422, "UNPROCESSABLE_ENTITY", "inner.below[0].label is required"},
		{"many", "PUT", "/api/v2.0/projects/1/things/a", `{"name":"abc","parts":[{"label":"a"},{"label":"a"},{"label":"a"},{"label":"a"}]}`, nil, 422, "UNPROCESSABLE_ENTITY", "at most 3"},
		{"huge", "PUT", "/api/v2.0/projects/1/things/a", `{"name":"` + strings.Repeat("a", rest.DefaultMaxBody) + `"}`, nil, 413, "REQUEST_ENTITY_TOO_LARGE", "1048576"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := server(t)
			a := s.Do(test.method, test.path, test.body, test.headers...).Want(test.status)
			if a.Code() != test.code || !strings.Contains(string(a.Body), test.says) {
				t.Errorf("answer %s: want code %s and %q", a.Body, test.code, test.says)
			}
			if a.Header.Get("X-Request-Id") == "" {
				t.Error("no X-Request-Id")
			}
		})
	}
}

func TestGuard(t *testing.T) {
	s := server(t)
	s.Projects["open"] = access.Project{Name: "open", Public: true}
	put := func(project string) resttest.Answer {
		return s.Do("PUT", "/api/v2.0/projects/"+project+"/things/a", thing{Name: "abc", Size: 1})
	}
	s.As = access.Principal{}
	if a := put("open").Want(401); a.Code() != "UNAUTHORIZED" {
		t.Errorf("anonymous: %s", a.Body)
	}
	// A guarded operation does not tell a stranger what it wants.
	if a := s.Do("PUT", "/api/v2.0/projects/open/things/a?limit=x", nil).Want(401); a.Code() != "UNAUTHORIZED" {
		t.Errorf("anonymous with bad input: %s", a.Body)
	}
	s.Do("GET", "/api/v2.0/things", nil).Want(200)
	s.As = access.Principal{Kind: access.User, Name: "u"}
	if a := put("open").Want(403); a.Code() != "FORBIDDEN" {
		t.Errorf("user: %s", a.Body)
	}
	s.As = access.Principal{Kind: access.User, Name: "admin", Admin: true, Grants: []access.Grant{}}
	if a := put("open").Want(401); a.Code() != "UNAUTHORIZED" {
		t.Errorf("registry token: %s", a.Body)
	}
	s.As = access.Principal{Kind: access.System}
	put("open").Want(200)
}

func TestAnswers(t *testing.T) {
	s := server(t)
	a := s.Do("POST", "/api/v2.0/things", nil).Want(201)
	if got := a.Header.Get("Location"); got != "/api/v2.0/things/4" || len(a.Body) != 0 {
		t.Errorf("created: Location %q, body %q", got, a.Body)
	}
	if a := s.Do("DELETE", "/api/v2.0/things/last", nil).Want(200); len(a.Body) != 0 {
		t.Errorf("none: %q", a.Body)
	}
	if a := s.Do("GET", "/api/v2.0/things", nil, "X-Request-Id", "mine-1"); a.Header.Get("X-Request-Id") != "mine-1" {
		t.Errorf("request id %q", a.Header.Get("X-Request-Id"))
	}
}

func TestPages(t *testing.T) {
	s := server(t)
	for _, test := range []struct{ query, body, total, link string }{
		{"", `["a","b","c","d","e"]`, "5", ""},
		{"?page_size=2", `["a","b"]`, "5", `</api/v2.0/things?page=2&page_size=2>; rel="next"`},
		{"?page=2&page_size=2", `["c","d"]`, "5", `</api/v2.0/things?page=1&page_size=2>; rel="prev" , </api/v2.0/things?page=3&page_size=2>; rel="next"`},
		{"?page=3&page_size=2", `["e"]`, "5", `</api/v2.0/things?page=2&page_size=2>; rel="prev"`},
		{"?page=9&page_size=2", `[]`, "5", ""},
		{"?page_size=0", `["a","b","c","d","e"]`, "5", ""},
		{"?page=99999999999&page_size=100", `[]`, "5", ""},
		{"?q=name%3Dz", `[]`, "0", ""},
		{"?page_size=1&q=name%3D%7B'a'%20b%7D", `["a"]`, "2", `</api/v2.0/things?page=2&page_size=1&q=name={'a'%20b}>; rel="next"`},
		{"?page_size=1&x=%3E%0d%0a%22", `["a"]`, "5", `</api/v2.0/things?page=2&page_size=1&x=%3E%0D%0A%22>; rel="next"`},
	} {
		a := s.Do("GET", "/api/v2.0/things"+test.query, nil).Want(200)
		if got := strings.TrimSpace(string(a.Body)); got != test.body {
			t.Errorf("%s: %s, want %s", test.query, got, test.body)
		}
		if got := a.Header.Get("X-Total-Count"); got != test.total {
			t.Errorf("%s: total %s, want %s", test.query, got, test.total)
		}
		if got := a.Header.Get("Link"); got != test.link {
			t.Errorf("%s: link %s, want %s", test.query, got, test.link)
		}
	}
}

type leaderless struct{}

func (leaderless) Error() string     { return "raft says no" }
func (leaderless) Unavailable() bool { return true }

func TestFailures(t *testing.T) {
	for _, test := range []struct {
		err    error
		status int
		body   string
	}{
		{errors.New("secret path /x"), 500, `{"errors":[{"code":"UNKNOWN","message":"internal error; the server's log has the cause under this request's id"}]}`},
		{fault.Wrap(errors.New("secret"), fault.Conflict, "project web exists"), 409, `{"errors":[{"code":"CONFLICT","message":"project web exists"}]}`},
		{fault.New(fault.Precondition, "no"), 412, `{"errors":[{"code":"PRECONDITION","message":"no"}]}`},
		{fault.New(fault.Precondition, "no").WithCode(rest.CodePolicyViolation), 412, `{"errors":[{"code":"PROJECTPOLICYVIOLATION","message":"no"}]}`},
		{fault.New(fault.Denied, "no").WithCode("DENIED"), 403, `{"errors":[{"code":"DENIED","message":"no"}]}`},
		{fault.New(fault.Limit, "slow down").WithCode(rest.CodeTooManyRequests), 429, `{"errors":[{"code":"TOO_MANY_REQUEST","message":"slow down"}]}`},
		{fault.New(fault.Limit, "full").WithCode(rest.CodeNoSpace), 507, `{"errors":[{"code":"NO_SPACE","message":"full"}]}`},
		{fault.New(fault.NotFound, "no blob").WithCode("BLOB_UNKNOWN").WithDetail([]string{"sha256:a"}), 404, `{"errors":[{"code":"BLOB_UNKNOWN","message":"no blob","detail":["sha256:a"]}]}`},
		{leaderless{}, 503, ""},
	} {
		s := resttest.New(t)
		rest.Register(s.Kernel, rest.Operation[struct{}, rest.None]{
			ID: "fail", Method: "GET", Path: "/fail", Tag: "t", Summary: "Fail", Anonymous: true,
			Do: func(context.Context, *struct{}) (rest.None, error) { return rest.None{}, test.err },
		})
		a := s.Do("GET", "/fail", nil).Want(test.status)
		if test.body != "" && string(a.Body) != test.body {
			t.Errorf("%v: %s, want %s", test.err, a.Body, test.body)
		}
		if (a.Header.Get("Retry-After") != "") != (test.status == 503) {
			t.Errorf("%v: Retry-After %q", test.err, a.Header.Get("Retry-After"))
		}
	}
}

func TestPanicIsAnswered(t *testing.T) {
	s := resttest.New(t)
	rest.Register(s.Kernel, rest.Operation[struct{}, rest.None]{
		ID: "panic", Method: "GET", Path: "/panic", Tag: "t", Summary: "Panic", Anonymous: true,
		Do: func(context.Context, *struct{}) (rest.None, error) {
			var m map[string]int
			m["x"] = 1
			return rest.None{}, nil
		},
	})
	if a := s.Do("GET", "/panic", nil).Want(500); a.Code() != "UNKNOWN" || strings.Contains(string(a.Body), "nil map") {
		t.Errorf("answer %s", a.Body)
	}
}

func TestStreams(t *testing.T) {
	s := resttest.New(t)
	type input struct {
		How string `query:"how"`
	}
	rest.RegisterStream(s.Kernel, rest.StreamOperation[input]{
		ID: "stream", Method: "POST", Path: "/stream", Tag: "t", Summary: "Stream", Permission: access.BundleExport,
		MaxBody: 4, Consumes: "application/octet-stream", Produces: "application/octet-stream",
		Do: func(_ context.Context, in *input, w http.ResponseWriter, r *http.Request) error {
			switch in.How {
			case "early":
				return fault.New(fault.Precondition, "not now")
			case "read":
				_, err := io.ReadAll(r.Body)
				return err
			}
			if _, err := io.Copy(w, r.Body); err != nil {
				return err
			}
			if in.How == "late" {
				return errors.New("disk broke")
			}
			return nil
		},
	})
	if a := s.Do("POST", "/stream", "abc").Want(200); string(a.Body) != "abc" {
		t.Errorf("stream: %q", a.Body)
	}
	if a := s.Do("POST", "/stream?how=early", "abc").Want(412); a.Code() != "PRECONDITION" {
		t.Errorf("early: %s", a.Body)
	}
	real := httptest.NewServer(s.Kernel.Handler())
	for _, test := range []struct{ how, body string }{{"late", "abc"}, {"", "too long"}} {
		resp, err := http.Post(real.URL+"/stream?how="+test.how, "application/octet-stream", strings.NewReader(test.body))
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if err == nil {
			t.Errorf("%q: the client took a part for the whole", test.how)
		}
	}
	real.Close() // and with it whoever still asks who asks
	if a := s.Do("POST", "/stream?how=read", "too long").Want(413); a.Code() != "REQUEST_ENTITY_TOO_LARGE" {
		t.Errorf("too long: %s", a.Body)
	}
	s.As = access.Principal{}
	s.Do("POST", "/stream", "abc").Want(401)
}

// A file that a streaming operation serves must reach the connection's
// ReadFrom, which is where sendfile is.
func TestStreamKeepsReaderFrom(t *testing.T) {
	s := resttest.New(t)
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	io.WriteString(f, "content")
	rest.RegisterStream(s.Kernel, rest.StreamOperation[struct{}]{
		ID: "file", Method: "GET", Path: "/file", Tag: "t", Summary: "File", Anonymous: true,
		Do: func(_ context.Context, _ *struct{}, w http.ResponseWriter, r *http.Request) error {
			http.ServeContent(w, r, "", time.Time{}, f)
			return nil
		},
	})
	w := &readerFrom{ResponseRecorder: httptest.NewRecorder()}
	s.Kernel.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/file", nil))
	if !w.used || w.Body.String() != "content" {
		t.Errorf("ReadFrom used: %v, body %q", w.used, w.Body)
	}
}

type readerFrom struct {
	*httptest.ResponseRecorder
	used bool
}

func (w *readerFrom) ReadFrom(src io.Reader) (int64, error) {
	w.used = true
	return io.Copy(w.Body, src)
}

func TestRegisterPanics(t *testing.T) {
	type input struct {
		Name string `path:"name"`
	}
	do := func(context.Context, *input) (rest.None, error) { return rest.None{}, nil }
	good := rest.Operation[input, rest.None]{
		ID: "x", Method: "GET", Path: "/x/{name}", Tag: "t", Summary: "s", Permission: access.NodeRead, Do: do,
	}
	for name, change := range map[string]func(*rest.Operation[input, rest.None]){
		"no permission":   func(o *rest.Operation[input, rest.None]) { o.Permission = access.Permission{} },
		"half permission": func(o *rest.Operation[input, rest.None]) { o.Permission.Action = "" },
		"no id":           func(o *rest.Operation[input, rest.None]) { o.ID = "" },
		"no summary":      func(o *rest.Operation[input, rest.None]) { o.Summary = "" },
		"id taken":        func(o *rest.Operation[input, rest.None]) { o.ID = "getOpenAPI" },
		"path":            func(o *rest.Operation[input, rest.None]) { o.Path = "/x/{other}" },
		"nothing to do":   func(o *rest.Operation[input, rest.None]) { o.Do = nil },
	} {
		t.Run(name, func(t *testing.T) {
			s := resttest.New(t)
			op := good
			change(&op)
			wantPanic(t, func() { rest.Register(s.Kernel, op) })
		})
	}
	s := resttest.New(t)
	rest.Register(s.Kernel, good)
	wantPanic(t, func() { rest.Register(s.Kernel, good) })

	wantPanic(t, func() { registerInput[struct{ X string }](t) })
	wantPanic(t, func() {
		registerInput[struct {
			X int `query:"x" pattern:"a"`
		}](t)
	})
	wantPanic(t, func() {
		registerInput[struct {
			X string `query:"x" pattern:"("`
		}](t)
	})
	wantPanic(t, func() {
		registerInput[struct {
			X string `query:"x" min:"a"`
		}](t)
	})
	wantPanic(t, func() {
		registerInput[struct {
			X int `query:"x" default:"a"`
		}](t)
	})
	wantPanic(t, func() {
		registerInput[struct {
			X chan int `query:"x"`
		}](t)
	})
	wantPanic(t, func() {
		registerInput[struct {
			Body struct {
				A bool `json:"a" min:"1"`
			}
		}](t)
	})
}

func registerInput[In any](t *testing.T) {
	rest.Register(resttest.New(t).Kernel, rest.Operation[In, rest.None]{
		ID: "y", Method: "GET", Path: "/y", Tag: "t", Summary: "s", Permission: access.NodeRead,
		Do: func(context.Context, *In) (rest.None, error) { return rest.None{}, nil },
	})
}

func wantPanic(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	f()
}
