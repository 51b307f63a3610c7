package access

import "testing"

func TestMatrix(t *testing.T) {
	admin := Principal{Kind: User, Name: "admin", Admin: true}
	user := Principal{Kind: User, Name: "u"}
	system := Principal{Kind: System}
	token := func(p Principal, grants ...Grant) Principal {
		p.Grants = append([]Grant{}, grants...)
		return p
	}
	public, private := Project{Name: "open", Public: true}, Project{Name: "shut"}
	for _, test := range []struct {
		name    string
		p       Principal
		want    Permission
		project *Project
		allowed bool
	}{
		{"admin in the system", admin, NodeManage, nil, true},
		{"socket in the system", system, NodeManage, nil, true},
		{"user in the system", user, NodeManage, nil, false},
		{"anonymous lists projects", Principal{}, ProjectList, nil, true},
		{"anonymous creates", Principal{}, ProjectCreate, nil, false},
		{"admin in a project", admin, ProjectDelete, &private, true},
		{"anonymous pulls public", Principal{}, RepositoryPull, &public, true},
		{"anonymous pulls private", Principal{}, RepositoryPull, &private, false},
		{"anonymous pushes public", Principal{}, RepositoryPush, &public, false},
		{"user pushes public", user, RepositoryPush, &public, false},
		{"token in the system", token(admin), NodeManage, nil, false},
		{"token lists projects", token(admin), ProjectList, nil, false},
		{"socket's token in the system", token(system), SiteManage, nil, false},
		{"token without the catalog", token(admin), CatalogRead, nil, false},
		{"token for the catalog", token(admin, Grant{Catalog, []string{"*"}}), CatalogRead, nil, true},
		{"token for the catalog of a user who may not", token(user, Grant{Catalog, []string{"*"}}), CatalogRead, nil, false},
		{"pushing token creates its project", token(admin, Grant{"new/app", []string{"push"}}), ProjectCreate, nil, true},
		{"pulling token creates no project", token(admin, Grant{"new/app", []string{"pull"}}), ProjectCreate, nil, false},
		{"pushing token of a user creates no project", token(user, Grant{"new/app", []string{"push"}}), ProjectCreate, nil, false},
		{"token pushes", token(admin), RepositoryPush, &private, true}, // of which repository is Granted's to say
		{"token deletes a project", token(admin), ProjectDelete, &private, false},
	} {
		got := InSystem(test.p, test.want)
		if test.project != nil {
			got = InProject(test.p, test.want, *test.project)
		}
		if got != test.allowed {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}

func TestGranted(t *testing.T) {
	p := Principal{Admin: true, Grants: []Grant{{"a/b", []string{"pull"}}, {"c/d", []string{"*"}}}}
	for _, test := range []struct {
		p                  Principal
		repository, action string
		granted            bool
	}{
		{p, "a/b", "pull", true},
		{p, "a/b", "push", false},
		{p, "a/bc", "pull", false},
		{p, "c/d", "delete", true},
		{Principal{}, "x/y", "push", true}, // not narrowed
		{Principal{Grants: []Grant{}}, "x/y", "pull", false},
	} {
		if got := Granted(test.p, test.repository, test.action); got != test.granted {
			t.Errorf("%s of %s: %v", test.action, test.repository, got)
		}
	}
}

func TestContext(t *testing.T) {
	if p := From(t.Context()); p.Kind != Anonymous || p.Admin {
		t.Errorf("an empty context carries %v", p)
	}
	want := Principal{Kind: System, Name: "node"}
	if got := From(WithPrincipal(t.Context(), want)); got.Kind != want.Kind || got.Name != want.Name {
		t.Errorf("got %v", got)
	}
}

func TestRepositoryAction(t *testing.T) {
	for action, want := range map[string]Permission{"pull": RepositoryPull, "push": RepositoryPush, "delete": RepositoryDelete} {
		if got, ok := RepositoryAction(action); !ok || got != want {
			t.Errorf("%s: %v", action, got)
		}
	}
	if p, ok := RepositoryAction("*"); ok {
		t.Errorf("*: %v", p)
	}
}
