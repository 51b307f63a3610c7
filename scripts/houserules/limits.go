package houserules

import (
	"go/ast"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strings"
)

// The sizes that good trees stay under nine times out of ten.
const (
	maxFileLines     = 600
	maxFunctionLines = 100
	// A test may be a long table of cases, which is data and reads like it.
	maxTestLines  = 160
	maxParameters = 5
	maxFiles      = 14 // of a package, tests not counted
	maxImports    = 15 // folders of this module
	maxDepth      = 12
)

// exceptions are the places that may break a rule, each with its reason.
var exceptions = [...]exception{
	{"cluster/raftnet/snapshots.go", "parameters", "the signature is that of raft.SnapshotStore"},
}

// fanOut is how many folders of this module a package may import.
func fanOut(p *pkg) int {
	if p.folder == "node" || strings.HasPrefix(p.folder, "cmd/") {
		return 1 << 30 // connecting everything is what they are for
	}
	return maxImports
}

// bannedPackages say nothing about what is in them.
var bannedPackages = []string{
	"types", "models", "model", "util", "utils", "common", "helper", "helpers", "lib", "libs", "pkg", "base", "misc", "shared", "core",
}

// bannedEndings of exported type names say nothing that the rest does not.
var bannedEndings = []string{"Manager", "Controller", "Impl", "Helper", "Util", "Utils", "DAO"}

var packageName = regexp.MustCompile(`^[a-z][a-z0-9]*$`)

// names holds a package to what names and comments should be.
func (c *checker) names(p *pkg) {
	base := path.Base(p.folder)
	if p.folder == "." {
		base = p.name
	}
	for _, name := range []string{base, p.name} {
		if slices.Contains(bannedPackages, name) {
			c.addFolder(p.folder, "names", "%q says nothing about what is in it: put each thing in the room that owns its noun", name)
			break
		}
	}
	if !packageName.MatchString(p.name) {
		c.addFolder(p.folder, "names", "package %s: a package's name is one lower-case word", p.name)
	}
	if !p.main() && p.name != base {
		c.addFolder(p.folder, "names", "package %s is in a folder called %s", p.name, base)
	}
	documented, code := false, false
	for _, f := range p.files {
		if f.test {
			continue
		}
		code = true
		if f.ast.Doc != nil {
			text := f.ast.Doc.Text()
			documented = documented || p.main() || strings.HasPrefix(text, "Package "+p.name+" ")
		}
		c.typeNames(f)
	}
	if code && !documented {
		c.addFolder(p.folder, "package comment", "no file begins with a comment \"Package %s ...\" that says what the package is for and what it promises", p.name)
	}
}

func (c *checker) typeNames(f *file) {
	for _, d := range f.ast.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.TYPE {
			continue
		}
		for _, spec := range g.Specs {
			t := spec.(*ast.TypeSpec)
			for _, ending := range bannedEndings {
				if t.Name.IsExported() && strings.HasSuffix(t.Name.Name, ending) {
					c.add(f, t.Pos(), "names", "type %s: a name that ends in %s hides what the thing is", t.Name.Name, ending)
				}
			}
		}
	}
}

// sizes holds files and functions to their limits.
func (c *checker) sizes(p *pkg) {
	files := 0
	for _, f := range p.files {
		if !f.test {
			files++
		}
		if f.lines > maxFileLines {
			c.add(f, f.ast.Package, "file size", "%d lines, %d are the limit: split it by nouns", f.lines, maxFileLines)
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				c.function(f, n, n.Name.Name, n.Type)
			case *ast.FuncLit:
				c.function(f, n, "function literal", n.Type)
			}
			return true
		})
	}
	// A command has a file for each subcommand: their number is the product's.
	if files > maxFiles && !strings.HasPrefix(p.folder, "cmd/") {
		c.addFolder(p.folder, "package size", "%d files, %d are the limit: is there a second noun in it?", files, maxFiles)
	}
}

func (c *checker) function(f *file, n ast.Node, name string, t *ast.FuncType) {
	lines := c.fset.Position(n.End()).Line - c.fset.Position(n.Pos()).Line + 1
	limit := maxFunctionLines
	if f.test {
		limit = maxTestLines
	}
	if lines > limit {
		c.add(f, n.Pos(), "function size", "%s has %d lines, %d are the limit", name, lines, limit)
	}
	if count := t.Params.NumFields(); count > maxParameters {
		c.add(f, n.Pos(), "parameters", "%s takes %d, %d are the limit: make a struct of those that belong together", name, count, maxParameters)
	}
}
