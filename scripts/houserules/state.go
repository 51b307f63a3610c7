package houserules

import (
	"go/ast"
	"go/token"
	"slices"
	"strings"
)

// state finds package variables that can change, init functions and contexts
// kept in structs.
func (c *checker) state(p *pkg) {
	vars := c.variables(p)
	for _, f := range p.files {
		unresolved := map[*ast.Ident]bool{}
		for _, ident := range f.ast.Unresolved {
			unresolved[ident] = true
		}
		// global gives the package variable at the root of an expression such as
		// table[key].field.
		global := func(e ast.Expr) (*ast.Ident, bool) {
			ident := root(e)
			if ident == nil {
				return nil, false
			}
			spec, ok := vars[ident.Name]
			if !ok {
				return nil, false
			}
			if ident.Obj != nil {
				return ident, ident.Obj.Decl == spec
			}
			return ident, unresolved[ident]
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Recv == nil && n.Name.Name == "init" {
					c.add(f, n.Pos(), "no init", "an init function runs unseen: construct it where it is used")
				}
			case *ast.StructType:
				c.contextFields(f, n)
			case *ast.AssignStmt:
				for _, left := range n.Lhs {
					if ident, ok := global(left); ok && n.Tok != token.DEFINE {
						c.changed(f, n, ident)
					}
				}
			case *ast.IncDecStmt:
				if ident, ok := global(n.X); ok {
					c.changed(f, n, ident)
				}
			case *ast.UnaryExpr:
				if ident, ok := global(n.X); ok && n.Op == token.AND {
					c.changed(f, n, ident)
				}
			case *ast.CallExpr:
				if called, ok := n.Fun.(*ast.Ident); ok && len(n.Args) > 0 && slices.Contains([]string{"delete", "clear", "copy"}, called.Name) {
					if ident, ok := global(n.Args[0]); ok {
						c.changed(f, n, ident)
					}
				}
			}
			return true
		})
	}
}

func (c *checker) changed(f *file, n ast.Node, ident *ast.Ident) {
	c.add(f, n.Pos(), "no mutable package variables", "%s is a package variable that is changed here, or can be through its address: keep state in a value that a constructor makes", ident.Name)
}

// variables lists the package's variables, and reports those whose type says
// that they are there to change.
func (c *checker) variables(p *pkg) map[string]*ast.ValueSpec {
	vars := map[string]*ast.ValueSpec{}
	for _, f := range p.files {
		if f.test {
			continue
		}
		for _, d := range f.ast.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, s := range g.Specs {
				spec := s.(*ast.ValueSpec)
				embedded := embeds(g.Doc) || embeds(spec.Doc)
				for i, name := range spec.Names {
					if name.Name == "_" {
						continue
					}
					vars[name.Name] = spec
					if why := mutable(spec, i); why != "" && !embedded {
						c.add(f, name.Pos(), "no mutable package variables", "%s %s: keep state in a value that a constructor makes", name.Name, why)
					}
				}
			}
		}
	}
	return vars
}

func embeds(doc *ast.CommentGroup) bool {
	return doc != nil && slices.ContainsFunc(doc.List, func(c *ast.Comment) bool { return strings.HasPrefix(c.Text, "//go:embed ") })
}

// mutable says why a variable can only be there to change; "" when it may be a
// constant in all but name.
func mutable(spec *ast.ValueSpec, i int) string {
	typ := spec.Type
	if len(spec.Values) == 0 {
		if !lock(typ) {
			return "has no value yet, so something will set it"
		}
	} else if i < len(spec.Values) {
		switch v := spec.Values[i].(type) {
		case *ast.CompositeLit:
			typ = v.Type
		case *ast.CallExpr:
			if called, ok := v.Fun.(*ast.Ident); ok && called.Name == "make" && len(v.Args) > 0 {
				typ = v.Args[0]
			}
			if called, ok := v.Fun.(*ast.Ident); ok && called.Name == "new" {
				return "is a pointer to something that will change"
			}
		case *ast.UnaryExpr:
			if lit, ok := v.X.(*ast.CompositeLit); ok {
				typ = lit.Type
			}
		}
	}
	if lock(typ) {
		return "is of a type that is made to change"
	}
	if _, ok := typ.(*ast.ChanType); ok {
		return "is a channel"
	}
	return ""
}

// lock reports whether a type comes from sync or sync/atomic.
func lock(t ast.Expr) bool {
	switch e := t.(type) {
	case *ast.IndexExpr:
		t = e.X
	case *ast.StarExpr:
		t = e.X
	}
	if e, ok := t.(*ast.IndexExpr); ok {
		t = e.X
	}
	s, ok := t.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	from, ok := s.X.(*ast.Ident)
	return ok && (from.Name == "sync" || from.Name == "atomic")
}

// root is the identifier that an expression starts with.
func root(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.IndexExpr:
			e = x.X
		case *ast.SelectorExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		default:
			return nil
		}
	}
}

func (c *checker) contextFields(f *file, s *ast.StructType) {
	for _, field := range s.Fields.List {
		if selects(field.Type, "context", "Context") {
			c.add(f, field.Pos(), "no context in structs", "a context belongs to a call: pass it as the first parameter")
		}
	}
}

// selects reports whether an expression is from.name.
func selects(e ast.Expr, from, name string) bool {
	s, ok := e.(*ast.SelectorExpr)
	if !ok || s.Sel.Name != name {
		return false
	}
	ident, ok := s.X.(*ast.Ident)
	return ok && ident.Name == from && ident.Obj == nil
}
