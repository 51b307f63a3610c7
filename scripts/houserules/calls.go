package houserules

import (
	"bytes"
	"go/ast"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// mayPanic lists where, besides functions called Register, Define or Must, a
// panic is the right answer.
var mayPanic = [...]struct{ folder, function, reason string }{
	{"node/rest", "add", "part of Register: a mistake in an operation stops the start"},
	{"node/rest", "compileInput", "part of Register"},
	{"node/rest", "compile", "part of Register"},
	{"node/rest", "compileWithin", "part of Register"},
	{"node/rest", "openAPI", "the document is made of maps and strings, which always encode"},
	{"cluster/table", "newCodec", "the options are constants"},
	{"cluster/table", "shapeOf", "part of Define: a row that an older version would damage stops the start"},
	{"cluster/table", "field", "part of Define"},
	{"cluster/table", "checkName", "part of Define"},
}

// calls finds calls that take a program's tests or its callers the control.
func (c *checker) calls(p *pkg) {
	for _, f := range p.files {
		c.sleeps(p, f)
		for _, d := range f.ast.Decls {
			name := ""
			if fn, ok := d.(*ast.FuncDecl); ok {
				name = fn.Name.Name
			}
			ast.Inspect(d, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok {
					c.call(p, f, call, name)
				}
				return true
			})
		}
	}
}

func (c *checker) call(p *pkg, f *file, call *ast.CallExpr, within string) {
	testing := f.test || p.forTests()
	for _, name := range [...]string{"Background", "TODO"} {
		if selects(call.Fun, "context", name) && !testing && !p.main() {
			c.add(f, call.Pos(), "no context out of nowhere", "context.%s cuts the caller off: take a context as the first parameter", name)
		}
	}
	if ident, ok := call.Fun.(*ast.Ident); ok && ident.Name == "panic" && ident.Obj == nil && !testing && !panicAllowed(p, call, within) {
		c.add(f, call.Pos(), "no panic", "return an error; only a mistake in the program that shows at start may panic (list in scripts/houserules/calls.go)")
	}
}

// sleeps finds tests that wait for the wall clock. Inside a bubble of
// testing/synctest a sleep costs nothing and is how time is moved on.
func (c *checker) sleeps(p *pkg, f *file) {
	if !f.test && !p.forTests() {
		return
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		if selects(call.Fun, "time", "Sleep") {
			c.add(f, call.Pos(), "no sleep in tests", "wait for what is to happen, or sleep inside synctest.Test")
		}
		return !selects(call.Fun, "synctest", "Test")
	})
}

func panicAllowed(p *pkg, call *ast.CallExpr, within string) bool {
	if startsLike(within, "Register", "Define", "Must") {
		return true
	}
	// The one way to cut an HTTP answer short, and passing a panic on.
	if len(call.Args) == 1 && (selects(call.Args[0], "http", "ErrAbortHandler") || recovered(call.Args[0])) {
		return true
	}
	for _, row := range mayPanic {
		if row.folder == p.folder && row.function == within {
			return true
		}
	}
	return false
}

// startsLike reports whether a function's name begins with one of the words, in
// either case.
func startsLike(name string, words ...string) bool {
	for _, word := range words {
		after, ok := strings.CutPrefix(name, word)
		if !ok {
			after, ok = strings.CutPrefix(name, strings.ToLower(word[:1])+word[1:])
		}
		if ok && (after == "" || !unicode.IsLower(rune(after[0]))) {
			return true
		}
	}
	return false
}

// recovered reports whether an expression is a variable that came from recover.
func recovered(e ast.Expr) bool {
	ident, ok := e.(*ast.Ident)
	if !ok || ident.Obj == nil {
		return false
	}
	assign, ok := ident.Obj.Decl.(*ast.AssignStmt)
	if !ok || len(assign.Rhs) != 1 {
		return false
	}
	call, ok := assign.Rhs[0].(*ast.CallExpr)
	if !ok {
		return false
	}
	fn, ok := call.Fun.(*ast.Ident)
	return ok && fn.Name == "recover"
}

// sources is how build files say where packages come from. No file of the tree
// does: a checkout must build wherever the builder gets modules from.
var sources = regexp.MustCompile(`(?i)(\b(goproxy|gosumdb|registry|index-url|replace-with)\b["']?\s*[:=]\s*["']?https?://|"resolved"\s*:\s*"https?://|^deb(-src)? (\[[^]]*\] )?https?://)[^\s"']+`)

// text holds any text file to what must not be in it.
func (c *checker) text(name string, content []byte) {
	if !utf8.Valid(content) || bytes.IndexByte(content, 0) >= 0 {
		return
	}
	for n, line := range bytes.Split(content, []byte("\n")) {
		if found := sources.Find(line); found != nil {
			c.found = append(c.found, Violation{name, n + 1, "no package sources",
				"says " + string(found) + ": where modules and packages come from is the builder's setting"})
		}
	}
}
