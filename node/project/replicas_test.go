package project_test

import (
	"strings"
	"testing"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/project"
)

func TestParseReplicas(t *testing.T) {
	for text, want := range map[string]int{"1": 1, "99": 99, "all": project.Everywhere} {
		if got, err := project.ParseReplicas(text); err != nil || got != want {
			t.Errorf("%s is %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "0", "100", "-1", "ALL", "2.5"} {
		if got, err := project.ParseReplicas(text); err == nil {
			t.Errorf("%q is taken as %d", text, got)
		}
	}
}

// What a project wants is this site's alone: it is in no log, and a mirror may
// have it.
func TestReplicas(t *testing.T) {
	f := open(t)
	const path = "/api/atoll/v1/projects/app/replicas"
	if _, err := f.projects.Create(t.Context(), project.Draft{Name: "app", Actor: "admin"}); err != nil {
		t.Fatal(err)
	}
	before, _ := f.kinds("app")
	show := func(want string) {
		t.Helper()
		if got := f.do(200, "admin", "GET "+path, "").Body.String(); !strings.Contains(got, `"replicas":"`+want+`"`) {
			t.Errorf("the answer is %s, want %s", got, want)
		}
	}
	show("default")
	for _, want := range []string{"5", "all", "1", "default"} {
		f.do(200, "admin", "PUT "+path, `{"replicas":"`+want+`"}`)
		show(want)
	}
	for _, wrong := range []string{"0", "100", "many"} {
		f.do(400, "admin", "PUT "+path, `{"replicas":"`+wrong+`"}`)
	}
	f.do(404, "admin", "PUT /api/atoll/v1/projects/nothing/replicas", `{"replicas":"2"}`)
	f.must(f.projects.SetReplicas(t.Context(), "app", project.Everywhere))
	if after, _ := f.kinds("app"); len(after) != len(before) {
		t.Errorf("the project's log has %v, had %v", after, before)
	}
	if err := f.db.View(func(v *table.View) error {
		all, err := f.projects.AllReplicas(v)
		if len(all) != 1 || all["app"] != project.Everywhere {
			t.Errorf("projects want %v", all)
		}
		for name, want := range map[string]bool{"app": true, "library": false, "nothing": false} {
			n, ok, rerr := f.projects.Replicas(v, name)
			if rerr != nil || ok != want || ok && n != project.Everywhere {
				t.Errorf("%s wants %d, %v, %v", name, n, ok, rerr)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	// A project of the same name that comes later has what the site has.
	f.must(f.projects.Delete(t.Context(), "app"))
	if _, err := f.projects.Create(t.Context(), project.Draft{Name: "app", Actor: "admin"}); err != nil {
		t.Fatal(err)
	}
	show("default")
}
