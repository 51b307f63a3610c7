// Package houserules holds the tree to the rules of the house: which folder may
// import which, what packages are called, how large things get, and what keeps
// a program testable (no hidden state, no context out of nowhere). It is a test:
//
//	go test ./scripts/houserules
//
// Every violation is reported with its place and the rule. A rule is changed
// here, with a reason beside it, or the code is.
package houserules

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Violation is one place where the tree breaks a rule.
type Violation struct {
	File string // slash-separated, from the root
	Line int    // 0: the whole file or folder
	Rule string
	Text string // what is wrong and what to do
}

func (v Violation) String() string {
	if v.Line == 0 {
		return fmt.Sprintf("%s: %s: %s", v.File, v.Rule, v.Text)
	}
	return fmt.Sprintf("%s:%d: %s: %s", v.File, v.Line, v.Rule, v.Text)
}

// Tree is what is checked.
type Tree struct {
	FS     fs.FS
	Module string   // module path
	Files  []string // slash-separated, from the root; folders and ignored files left out
}

// file is a parsed Go file.
type file struct {
	name  string
	test  bool // *_test.go
	ast   *ast.File
	lines int
}

// pkg is a folder with Go files.
type pkg struct {
	folder string
	name   string
	files  []*file
}

// forTests reports whether the package exists for tests only: its name says so.
func (p *pkg) forTests() bool { return strings.HasSuffix(p.name, "test") }

// main reports whether the package is a command.
func (p *pkg) main() bool { return p.name == "main" }

// checker collects violations.
type checker struct {
	module string
	fset   *token.FileSet
	pkgs   map[string]*pkg // by folder
	found  []Violation
}

func (c *checker) add(f *file, at token.Pos, rule, format string, args ...any) {
	c.found = append(c.found, Violation{f.name, c.fset.Position(at).Line, rule, fmt.Sprintf(format, args...)})
}

func (c *checker) addFolder(folder, rule, format string, args ...any) {
	c.found = append(c.found, Violation{folder, 0, rule, fmt.Sprintf(format, args...)})
}

// Check holds a tree to all rules and lists what breaks them, in order of place.
func Check(t Tree) ([]Violation, error) {
	c := &checker{module: t.Module, fset: token.NewFileSet(), pkgs: make(map[string]*pkg)}
	for _, name := range t.Files {
		content, err := fs.ReadFile(t.FS, name)
		if err != nil {
			return nil, err
		}
		c.text(name, content)
		if path.Ext(name) != ".go" || strings.Contains("/"+name, "/testdata/") {
			continue
		}
		if err := c.parse(name, content); err != nil {
			return nil, err
		}
	}
	for _, folder := range c.folders() {
		p := c.pkgs[folder]
		c.names(p)
		c.sizes(p)
		c.imports(p)
		c.state(p)
		c.calls(p)
	}
	c.depth()
	slices.SortFunc(c.found, func(a, b Violation) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Text, b.Text))
	})
	return slices.DeleteFunc(c.found, excepted), nil
}

func (c *checker) parse(name string, content []byte) error {
	parsed, err := parser.ParseFile(c.fset, name, content, parser.ParseComments)
	if err != nil {
		return err
	}
	folder := path.Dir(name)
	p := c.pkgs[folder]
	if p == nil {
		p = &pkg{folder: folder}
		c.pkgs[folder] = p
	}
	f := &file{name: name, test: strings.HasSuffix(name, "_test.go"), ast: parsed, lines: strings.Count(string(content), "\n")}
	if !f.test {
		p.name = parsed.Name.Name
	} else if p.name == "" {
		p.name = strings.TrimSuffix(parsed.Name.Name, "_test")
	}
	p.files = append(p.files, f)
	return nil
}

func (c *checker) folders() []string {
	folders := make([]string, 0, len(c.pkgs))
	for folder := range c.pkgs {
		folders = append(folders, folder)
	}
	slices.Sort(folders)
	return folders
}

// exception lets one place break one rule.
type exception struct{ file, rule, reason string }

func excepted(v Violation) bool {
	return slices.ContainsFunc(exceptions[:], func(e exception) bool { return e.file == v.File && e.rule == v.Rule })
}
