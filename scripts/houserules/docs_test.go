package houserules

import (
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestDocuments holds what the documents point at to the tree: every relative
// link resolves, and every path of the tree that stands in backticks exists.
func TestDocuments(t *testing.T) {
	root, _ := findRoot(t)
	files := listFiles(t, root)
	for _, name := range files {
		if path.Ext(name) != ".md" || strings.Contains("/"+name, "/testdata/") {
			continue
		}
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, problem := range deadPointers(name, string(content), files) {
			t.Error(problem)
		}
	}
}

var (
	link   = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	scheme = regexp.MustCompile(`^[a-z]+:`)
	ticked = regexp.MustCompile("`([^`\n]+)`")
	// A path of the tree: words with slashes, no place holders.
	treePath = regexp.MustCompile(`^[a-z][a-zA-Z0-9_.-]*(/[a-zA-Z0-9_.-]+)+/?$`)
)

// deadPointers lists what a document names and the tree does not have.
func deadPointers(name, content string, files []string) (problems []string) {
	exists := func(p string) bool {
		p = strings.TrimSuffix(p, "/")
		return p == "." || slices.ContainsFunc(files, func(f string) bool { return f == p || strings.HasPrefix(f, p+"/") })
	}
	tops := map[string]bool{}
	for _, f := range files {
		top, _, below := strings.Cut(f, "/")
		tops[top] = below
	}
	fenced := false
	for i, line := range strings.Split(content, "\n") {
		at := name + ":" + strconv.Itoa(i+1) + ": "
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			fenced = !fenced
		}
		if fenced {
			continue
		}
		for _, m := range link.FindAllStringSubmatch(line, -1) {
			target, _, _ := strings.Cut(m[1], "#")
			if target == "" || scheme.MatchString(target) {
				continue
			}
			if p := path.Join(path.Dir(name), target); !exists(p) {
				problems = append(problems, at+"the link "+m[1]+" leads to "+p+", which is not in the tree")
			}
		}
		for _, m := range ticked.FindAllStringSubmatch(line, -1) {
			top, _, _ := strings.Cut(m[1], "/")
			if !treePath.MatchString(m[1]) || strings.HasSuffix(m[1], "...") || !tops[top] {
				continue // a URL, a media type, a command, another program's file
			}
			if !exists(m[1]) {
				problems = append(problems, at+m[1]+" is not in the tree")
			}
		}
	}
	return problems
}

func TestDeadPointers(t *testing.T) {
	files := []string{"README.md", "docs/a.md", "node/rest/rest.go"}
	text := "[good](../README.md#top) [bad](b.md) [web](https://example.org/x) `node/rest` `node/rest/rest.go`\n" +
		"`node/gone.go` `application/json` `/v2/` `node/NAME/...`\n```\n[code](none.md)\n```\n"
	got := deadPointers("docs/a.md", text, files)
	want := []string{
		"docs/a.md:1: the link b.md leads to docs/b.md, which is not in the tree",
		"docs/a.md:2: node/gone.go is not in the tree",
	}
	if !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}
}
