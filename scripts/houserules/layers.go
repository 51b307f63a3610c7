package houserules

import (
	"go/ast"
	"slices"
	"strconv"
	"strings"
)

// layer is a row of the table of who may import whom. Arrows point down only.
type layer struct {
	folder string // "x/..." means x and everything below it
	// may lists the folders of this module that its code may import besides its
	// own folder and what is below it.
	may []string
	// tests lists what its tests may import besides.
	tests []string
	// outside lists which modules it may import besides the standard library;
	// nil: any.
	outside []string
}

var (
	stdOnly = []string{}

	floor0 = []string{"node/fault", "node/access", "node/telemetry", "node/events"}
	floor1 = []string{"node/rest", "node/blobs/...", "node/journal", "node/jobs", "node/settings"}
	floor2 = []string{"node/identity", "node/project", "node/catalog"}
	ground = []string{"bundle/...", "transfer/...", "cluster/..."}

	// under1 is what the rooms of floor 1 stand on. The journal's vocabulary is
	// the file format's own (ADR 4).
	under1 = slices.Concat(floor0, []string{"cluster/table", "bundle/entry"})
	under2 = slices.Concat(under1, floor1)
	under3 = slices.Concat(under2, floor2, ground, []string{"airgap"})

	// helpers are what tests of rooms may use whatever their floor.
	helpers = []string{"cluster/kv", "cluster/table/tabletest", "node/rest/resttest", "node/blobs/blobstest", "node/blobs/faultfs"}
)

// layers is the table. A new folder gets a row here, on the floor where it
// belongs; design comes first, the row second.
var layers = [...]layer{
	// The ground floor: three families that know nothing of each other.
	{folder: "bundle/entry"},
	{folder: "bundle", may: []string{"bundle/entry"}},
	{folder: "transfer"},
	{folder: "transfer/peernet", may: []string{"transfer"}, tests: []string{"transfer/..."}},
	{folder: "transfer/plan", may: []string{"transfer"}, outside: stdOnly},
	{folder: "transfer/plan/plantest", may: []string{"transfer", "transfer/plan"}},
	{folder: "transfer/stream", may: []string{"transfer", "transfer/plan"}, tests: []string{"transfer/..."}},
	{folder: "transfer/swarm", may: []string{"transfer", "transfer/plan"}, tests: []string{"transfer/..."}},
	{folder: "transfer/swarm/swarmtest"},
	// Modules of their own that stand in for two that the BitTorrent library names.
	{folder: "transfer/swarm/without/...", outside: stdOnly},
	{folder: "transfer/transfertest", may: []string{"transfer/..."}},
	{folder: "cluster/atomicfile", outside: stdOnly},
	{folder: "cluster/kv", may: []string{"cluster/kv/treap"}},
	{folder: "cluster/kv/treap", outside: stdOnly},
	{folder: "cluster/pki"},
	{folder: "cluster/keyring", may: []string{"cluster/atomicfile", "cluster/pki"}},
	{folder: "cluster/gossip", tests: []string{"cluster/clustertest"}},
	{folder: "cluster/epoch", may: []string{"cluster/atomicfile"}, tests: []string{"cluster/pki"}},
	{folder: "cluster/recovery", may: []string{"cluster/atomicfile", "cluster/keyring", "cluster/raftnet", "cluster/kv", "cluster/table", "cluster/pki", "cluster/epoch", "cluster/member", "cluster/version"}, tests: []string{"cluster/..."}},
	{folder: "cluster/table", may: []string{"cluster/kv"}},
	{folder: "cluster/table/tabletest", may: []string{"cluster/kv", "cluster/table"}},
	{folder: "cluster/version", may: []string{"cluster/atomicfile", "cluster/table"}, tests: []string{"cluster/..."}},
	{folder: "cluster/raftnet", may: []string{"cluster/atomicfile", "cluster/kv"}},
	{folder: "cluster/reserve", may: []string{"cluster/kv"}},
	{folder: "cluster/joining", may: []string{"cluster/pki", "cluster/version"}},
	{folder: "cluster/member", may: []string{"cluster/atomicfile", "cluster/keyring", "cluster/joining", "cluster/kv", "cluster/table", "cluster/pki", "cluster/epoch", "cluster/gossip", "cluster/raftnet", "cluster/version"}, tests: []string{"cluster/..."}},
	{folder: "cluster/founding", may: []string{"cluster/atomicfile", "cluster/keyring", "cluster/joining", "cluster/table", "cluster/pki", "cluster/member"}, tests: []string{"cluster/..."}},
	{folder: "cluster/clustertest", may: []string{"cluster/..."}},
	{folder: "airgap", may: []string{"bundle", "bundle/entry"}},
	{folder: "airgap/airgaptest", may: []string{"airgap", "bundle", "bundle/entry"}},

	// The node's floors. Rooms of one floor never import each other: a room that
	// needs another declares a small interface, and package node connects them.
	{folder: "node/fault", outside: stdOnly},
	{folder: "node/access", outside: stdOnly},
	{folder: "node/events", outside: stdOnly},
	{folder: "node/telemetry", outside: []string{"github.com/prometheus/client_golang"}},

	{folder: "node/rest/...", may: under1, tests: helpers},
	{folder: "node/blobs/...", may: under1, tests: helpers},
	{folder: "node/journal", may: under1, tests: helpers},
	{folder: "node/jobs", may: under1, tests: helpers},
	// rest knows no room, and the settings have operations like the rooms above.
	{folder: "node/settings", may: slices.Concat(under1, []string{"node/rest"}), tests: helpers},

	{folder: "node/identity", may: under2, tests: helpers},
	{folder: "node/project", may: under2, tests: helpers},
	{folder: "node/catalog", may: under2, tests: helpers},

	{folder: "node/registry", may: under3, tests: helpers},
	{folder: "node/scan", may: under3, tests: helpers},
	{folder: "node/trust", may: under3, tests: helpers},
	{folder: "node/replicate", may: under3, tests: helpers},
	{folder: "node/proxycache", may: under3, tests: helpers},
	{folder: "node/collect", may: under3, tests: helpers},
	{folder: "node/retain", may: under3, tests: helpers},
	{folder: "node/quota", may: under3, tests: helpers},
	{folder: "node/webhook", may: under3, tests: helpers},
	{folder: "node/audit", may: under3, tests: helpers},
	{folder: "node/offline", may: under3, tests: helpers},
	{folder: "node/sites", may: under3, tests: helpers},
	{folder: "node/peers", may: under3, tests: helpers},
	{folder: "node/traffic", may: under3, tests: helpers},
	{folder: "node/prefetch", may: under3, tests: helpers},
	{folder: "node/scrub", may: under3, tests: helpers},
	{folder: "node/doctor", may: under3, tests: helpers},
	{folder: "node/watch", may: under3, tests: helpers},
	{folder: "node/search", may: under3, tests: helpers},
	{folder: "node/adopt", may: under3, tests: helpers},
	{folder: "node/backup", may: under3, tests: helpers},
	{folder: "node/ledger", may: under3, tests: helpers},
	{folder: "node/storage", may: under3, tests: helpers},
	{folder: "node/upgrade", may: under3, tests: helpers},
	{folder: "node/console", may: under3, tests: helpers},

	{folder: "node", may: []string{"node/...", "airgap", "bundle/...", "transfer/...", "cluster/..."}},
	{folder: "cmd/atoll", may: []string{"..."}},
	{folder: "cmd/atoll/engines"},

	// What builds and tests the tree from outside.
	{folder: "scripts/...", may: []string{"..."}},
}

// covers reports whether a pattern of the table names the folder.
func covers(pattern, folder string) bool {
	if pattern == "..." {
		return true
	}
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		return folder == below || strings.HasPrefix(folder, below+"/")
	}
	return pattern == folder
}

func anyCovers(patterns []string, folder string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return covers(p, folder) })
}

// layerOf finds the folder's row.
func layerOf(folder string) (layer, bool) {
	for _, l := range layers {
		if covers(l.folder, folder) {
			return l, true
		}
	}
	return layer{}, false
}

// imports holds the package's imports to its row of the table.
func (c *checker) imports(p *pkg) {
	row, ok := layerOf(p.folder)
	if !ok {
		c.addFolder(p.folder, "layers", "this folder has no row in the table of scripts/houserules/layers.go: add it on the floor where it belongs, or put the code where its noun lives")
		return
	}
	inside := map[string]bool{}
	for _, f := range p.files {
		for _, spec := range f.ast.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				continue
			}
			folder, ours := c.inModule(name)
			if !ours {
				c.outside(row, f, spec, name)
				continue
			}
			if !f.test {
				inside[folder] = true
			}
			if why := c.refusal(p, row, f, folder); why != "" {
				c.add(f, spec.Pos(), "layers", "%s may not import %s: %s", p.folder, folder, why)
			}
		}
	}
	if limit := fanOut(p); len(inside) > limit {
		c.addFolder(p.folder, "fan-out", "imports %d folders of this module, %d are the limit: it knows too much", len(inside), limit)
	}
}

// inModule gives the folder behind an import path of this module.
func (c *checker) inModule(name string) (folder string, ours bool) {
	if name == c.module {
		return ".", true
	}
	return strings.CutPrefix(name, c.module+"/")
}

// refusal says why the import is not allowed; "" when it is.
func (c *checker) refusal(p *pkg, row layer, f *file, folder string) string {
	target := c.pkgs[folder]
	testing := f.test || p.forTests()
	if target != nil && target.main() {
		return "it is a command"
	}
	if target != nil && target.forTests() && !testing && !strings.HasPrefix(p.folder, "scripts/") {
		return "it is for tests only"
	}
	switch {
	case folder == p.folder, strings.HasPrefix(folder, p.folder+"/") && p.folder != "node", anyCovers(row.may, folder):
		return ""
	case strings.HasSuffix(row.folder, "/...") && covers(row.folder, folder):
		return "" // one room in several folders
	case testing && anyCovers(row.tests, folder):
		return ""
	case testing && sameFloor(p.folder, folder):
		return "" // a test may see how neighbours work together
	}
	if sameFloor(p.folder, folder) {
		return "rooms of one floor do not import each other; declare a small interface and let package node connect them"
	}
	return "it is not below it in the table of scripts/houserules/layers.go"
}

// sameFloor reports whether both are rooms of one floor of the node.
func sameFloor(a, b string) bool {
	for _, floor := range [...][]string{floor0, floor1, floor2} {
		if anyCovers(floor, a) || anyCovers(floor, b) {
			return anyCovers(floor, a) && anyCovers(floor, b)
		}
	}
	return strings.HasPrefix(a, "node/") && strings.HasPrefix(b, "node/")
}

// outside holds imports of other modules to the row.
func (c *checker) outside(row layer, f *file, spec *ast.ImportSpec, name string) {
	if row.outside == nil || f.test {
		return
	}
	first, _, _ := strings.Cut(name, "/")
	if !strings.Contains(first, ".") {
		return // the standard library
	}
	for _, module := range row.outside {
		if name == module || strings.HasPrefix(name, module+"/") {
			return
		}
	}
	c.add(f, spec.Pos(), "layers", "%s is on the lowest floor and may import %s only, not %s", row.folder, outsideText(row.outside), name)
}

func outsideText(modules []string) string {
	if len(modules) == 0 {
		return "the standard library"
	}
	return "the standard library and " + strings.Join(modules, ", ")
}

// depth holds the longest chain of imports to its limit, and finds circles that
// only tests could close.
func (c *checker) depth() {
	known := map[string]int{}
	var measure func(folder string) int
	measure = func(folder string) int {
		if n, ok := known[folder]; ok {
			return n
		}
		known[folder] = 0 // closes a circle, which the compiler reports anyway
		deepest := 0
		if p := c.pkgs[folder]; p != nil {
			for _, f := range p.files {
				for _, spec := range f.ast.Imports {
					name, _ := strconv.Unquote(spec.Path.Value)
					if below, ours := c.inModule(name); ours && !f.test && below != folder {
						deepest = max(deepest, measure(below)+1)
					}
				}
			}
		}
		known[folder] = deepest
		return deepest
	}
	for _, folder := range c.folders() {
		if n := measure(folder); n > maxDepth {
			c.addFolder(folder, "depth", "stands on a chain of %d imports, %d are the limit", n, maxDepth)
		}
	}
}
