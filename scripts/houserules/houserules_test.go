package houserules

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"
)

// check runs the rules on a small tree, files by name, and gives what they found
// as "file:line rule".
func check(t *testing.T, files map[string]string) []string {
	t.Helper()
	tree := Tree{FS: fstest.MapFS{}, Module: "example.org/m"}
	for name, content := range files {
		tree.FS.(fstest.MapFS)[name] = &fstest.MapFile{Data: []byte(content)}
		tree.Files = append(tree.Files, name)
	}
	found, err := Check(tree)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, v := range found {
		t.Log(v)
		out = append(out, fmt.Sprintf("%s:%d %s", v.File, v.Line, v.Rule))
	}
	return out
}

// code is a Go file of a package that is in order but for the body.
func code(name, body string) string {
	return "// Package " + name + " is a fixture.\npackage " + name + "\n" + body
}

const faultFile = "node/fault/fault.go"

func TestRules(t *testing.T) {
	imports := func(name, what string) string { return code(name, "import _ \"example.org/m/"+what+"\"\n") }
	for _, test := range []struct {
		name  string
		files map[string]string
		want  string // joined by ", "
	}{
		{"in order", map[string]string{faultFile: code("fault", "func F() {}\n")}, ""},
		{"folder without a row", map[string]string{"node/misplaced/a.go": code("misplaced", "")}, "node/misplaced:0 layers"},
		{"down", map[string]string{"node/rest/a.go": imports("rest", "node/fault"), "node/fault/a.go": code("fault", "")}, ""},
		{"up", map[string]string{"node/fault/a.go": imports("fault", "node/rest")}, "node/fault/a.go:3 layers"},
		{"same floor", map[string]string{"node/project/a.go": imports("project", "node/identity")}, "node/project/a.go:3 layers"},
		{"same floor, feature rooms", map[string]string{"node/scan/a.go": imports("scan", "node/quota")}, "node/scan/a.go:3 layers"},
		{"same floor in a test", map[string]string{"node/project/a_test.go": imports("project", "node/identity")}, ""},
		{"up in a test", map[string]string{"node/project/a_test.go": imports("project", "node/registry")}, "node/project/a_test.go:3 layers"},
		{"families", map[string]string{"transfer/a.go": imports("transfer", "cluster/kv")}, "transfer/a.go:3 layers"},
		{"families in a test", map[string]string{"transfer/a_test.go": imports("transfer", "cluster/kv")}, "transfer/a_test.go:3 layers"},
		{"ground under a low room", map[string]string{"node/rest/a.go": imports("rest", "transfer")}, "node/rest/a.go:3 layers"},
		{"one room in two folders", map[string]string{"node/rest/resttest/a.go": imports("resttest", "node/rest"), "node/rest/a.go": code("rest", "")}, ""},
		{"test package in code", map[string]string{
			"node/rest/resttest/a.go": code("resttest", ""), "node/rest/a.go": imports("rest", "node/rest/resttest"),
		}, "node/rest/a.go:3 layers"},
		{"command", map[string]string{"node/a.go": imports("node", "cmd/atoll"), "cmd/atoll/main.go": "// Atoll is a fixture.\npackage main\n"}, "node/a.go:3 layers"},
		{"other module on the lowest floor", map[string]string{"node/fault/a.go": code("fault", "import _ \"example.com/x\"\n")}, "node/fault/a.go:3 layers"},
		{"metrics in telemetry", map[string]string{"node/telemetry/a.go": code("telemetry", "import _ \"github.com/prometheus/client_golang/prometheus\"\n")}, ""},
		{"no package comment", map[string]string{faultFile: "package fault\n"}, "node/fault:0 package comment"},
		{"comment of another form", map[string]string{faultFile: "// This does things.\npackage fault\n"}, "node/fault:0 package comment"},
		{"banned package", map[string]string{"scripts/utils/a.go": code("utils", "")}, "scripts/utils:0 names"},
		{"name differs", map[string]string{faultFile: code("faults", "")}, "node/fault:0 names"},
		{"banned ending", map[string]string{faultFile: code("fault", "type ErrorManager struct{}\ntype taskManager struct{}\n")}, "node/fault/fault.go:3 names"},
		{"init", map[string]string{faultFile: code("fault", "func init() {}\n\ntype x struct{}\n\nfunc (x) init() {}\n")}, "node/fault/fault.go:3 no init"},
		{"parameters", map[string]string{faultFile: code("fault", "func F(a, b, c int, d, e, f string) {}\nvar g = func(a, b, c, d, e, f int) {}\n")},
			"node/fault/fault.go:3 parameters, node/fault/fault.go:4 parameters"},
		{"long file", map[string]string{faultFile: code("fault", strings.Repeat("\n", 600))}, "node/fault/fault.go:2 file size"},
		{"long function", map[string]string{faultFile: code("fault", "func F() {"+strings.Repeat("\n", 100)+"}\n")}, "node/fault/fault.go:3 function size"},
		{"long test", map[string]string{faultFile: code("fault", ""), "node/fault/a_test.go": "package fault\nfunc F() {" + strings.Repeat("\n", 120) + "}\n"}, ""},
		{"context out of nowhere", map[string]string{faultFile: code("fault", "import \"context\"\nvar c = context.Background()\nfunc f() { _ = context.TODO() }\n")},
			"node/fault/fault.go:4 no context out of nowhere, node/fault/fault.go:5 no context out of nowhere"},
		{"context in main and tests", map[string]string{
			"cmd/atoll/main.go": "// Atoll is a fixture.\npackage main\nimport \"context\"\nfunc main() { _ = context.Background() }\n",
			faultFile:           code("fault", ""), "node/fault/a_test.go": "package fault\nimport \"context\"\nfunc f() { _ = context.Background() }\n",
		}, ""},
		{"context in a struct", map[string]string{faultFile: code("fault", "import \"context\"\ntype T struct {\n\tctx context.Context\n}\n")}, "node/fault/fault.go:5 no context in structs"},
		{"sleep", map[string]string{
			faultFile: code("fault", "import \"time\"\nfunc f() { time.Sleep(1) }\n"), "node/fault/a_test.go": "package fault\nimport \"time\"\nfunc g() { time.Sleep(1) }\n",
		}, "node/fault/a_test.go:3 no sleep in tests"},
		{"sleep in a bubble", map[string]string{
			faultFile: code("fault", ""), "node/fault/a_test.go": "package fault\nimport (\"testing/synctest\"; \"time\")\nfunc g() { synctest.Test(nil, func() { time.Sleep(1) }) }\n",
		}, ""},
		{"panics", map[string]string{faultFile: code("fault", `import "net/http"
func f() { panic("x") }
func RegisterThing() { panic("x") }
func mustBe() { panic("x") }
func Mustard() { panic("x") }
func g() { panic(http.ErrAbortHandler) }
func h() { defer func() { if p := recover(); p != nil { panic(p) } }() }
`)}, "node/fault/fault.go:4 no panic, node/fault/fault.go:7 no panic"},
		{"package sources", map[string]string{
			"docs/a.md": "one\nset GOPROXY" + "=https://modules.example\n", "bin.dat": "\x00GOPROXY" + "=https://modules.example",
			"ui/package-lock.json": "{\n\"resolved" + "\": \"https://packages.example/a.tgz\"}", "apt": "deb" + " [trusted=yes] http://packages.example stable main\n",
			"docs/b.md": "the registry at https://atoll.example, GOPROXY=off\n",
		}, "apt:1 no package sources, docs/a.md:2 no package sources, ui/package-lock.json:2 no package sources"},
		{"fixtures of rules are not code", map[string]string{"node/fault/testdata/x.go": "package broken("}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := strings.Join(check(t, test.files), ", "); got != test.want {
				t.Errorf("found %q, want %q", got, test.want)
			}
		})
	}
}

func TestPackageVariables(t *testing.T) {
	const rule = "no mutable package variables"
	for _, test := range []struct{ name, body, lines string }{
		{"sentinel", "import \"errors\"\nvar ErrX = errors.New(\"x\")\n", ""},
		{"table", "var table = map[string]int{\"a\": 1}\nfunc f() int { return table[\"a\"] }\n", ""},
		{"array", "var names = [...]string{\"a\"}\nfunc f() string { return names[0] }\n", ""},
		{"embedded", "import _ \"embed\"\n//go:embed x.txt\nvar x string\n", ""},
		{"interface check", "type T struct{}\nvar _ error = (*T)(nil)\nfunc (*T) Error() string { return \"\" }\n", ""},
		{"assigned", "var n = 1\nfunc f() { n = 2 }\n", "4"},
		{"counted", "var n = 1\nfunc f() { n++ }\n", "4"},
		{"entry", "var table = map[string]int{}\nfunc f() { table[\"a\"] = 1 }\n", "4"},
		{"deleted", "var table = map[string]int{}\nfunc f() { delete(table, \"a\") }\n", "4"},
		{"field", "type T struct{ n int }\nvar v = T{1}\nfunc f() { v.n = 2 }\n", "5"},
		{"address", "var n = 1\nfunc f() *int { return &n }\n", "4"},
		{"no value", "var n int\n", "3"},
		{"lock", "import \"sync\"\nvar mu sync.Mutex\n", "4"},
		{"atomic", "import \"sync/atomic\"\nvar p = atomic.Pointer[int]{}\n", "4"},
		{"pointer to lock", "import \"sync\"\nvar p = &sync.Map{}\n", "4"},
		{"channel", "var c = make(chan int)\n", "3"},
		{"shadowed", "var n = 1\nfunc f() { n := 2; n = 3; n++; _ = &n }\n", ""},
		{"parameter of the same name", "var n = 1\nfunc f(n int) { n = 2 }\n", ""},
		{"field of the same name", "var n = 1\ntype T struct{ n int }\nfunc f(t *T) { t.n = 2 }\n", ""},
		{"two in one block", "var (\n\ta = 1\n\tb = 2\n)\nfunc f() { b = a }\n", "7"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := check(t, map[string]string{faultFile: code("fault", test.body)})
			want := ""
			if test.lines != "" {
				want = faultFile + ":" + test.lines + " " + rule
			}
			if strings.Join(got, ", ") != want {
				t.Errorf("found %q, want %q", got, want)
			}
		})
	}
	// A variable that another file of the package, or its test, changes.
	for _, other := range []string{"node/fault/b.go", "node/fault/b_test.go"} {
		got := check(t, map[string]string{faultFile: code("fault", "var n = 1\n"), other: "package fault\nfunc f() { n = 2 }\n"})
		if want := other + ":2 " + rule; strings.Join(got, ", ") != want {
			t.Errorf("found %q, want %q", got, want)
		}
	}
}

func TestCounts(t *testing.T) {
	files := map[string]string{}
	for i := range maxFiles + 1 {
		files[fmt.Sprintf("node/fault/f%d.go", i)] = code("fault", "")
		files[fmt.Sprintf("node/fault/f%d_test.go", i)] = "package fault\n"
	}
	if got := strings.Join(check(t, files), ", "); got != "node/fault:0 package size" {
		t.Errorf("found %q", got)
	}
	imports := "import (\n"
	for i := range maxImports + 1 {
		imports += fmt.Sprintf("\t_ \"example.org/m/scripts/s%d\"\n", i)
	}
	for folder, want := range map[string]string{"scripts/big": "scripts/big:0 fan-out", "cmd/atoll": ""} {
		name := folder[strings.LastIndex(folder, "/")+1:]
		content := code(name, imports+")\n")
		if name == "atoll" {
			content = "// Atoll is a fixture.\npackage main\n" + imports + ")\n"
		}
		if got := strings.Join(check(t, map[string]string{folder + "/a.go": content}), ", "); got != want {
			t.Errorf("found %q, want %q", got, want)
		}
	}
	chain := map[string]string{}
	for i := range maxDepth + 2 {
		chain[fmt.Sprintf("scripts/s%d/a.go", i)] = code(fmt.Sprintf("s%d", i), fmt.Sprintf("import _ \"example.org/m/scripts/s%d\"\n", i+1))
	}
	if got := check(t, chain); len(got) == 0 || !strings.HasSuffix(got[0], " depth") {
		t.Errorf("found %q", got)
	}
}

// Every row of the table can be reached: an earlier row does not hide it.
func TestTableHasNoHiddenRows(t *testing.T) {
	for _, l := range layers {
		folder := strings.TrimSuffix(l.folder, "/...")
		if first, _ := layerOf(folder); first.folder != l.folder {
			t.Errorf("the row of %s is hidden by that of %s", l.folder, first.folder)
		}
	}
}
