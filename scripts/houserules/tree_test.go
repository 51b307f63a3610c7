package houserules

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestTree holds the tree that this file is part of to the rules.
func TestTree(t *testing.T) {
	root, module := findRoot(t)
	found, err := Check(Tree{FS: os.DirFS(root), Module: module, Files: listFiles(t, root)})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range found {
		t.Error(v)
	}
}

var moduleLine = regexp.MustCompile(`(?m)^module (\S+)$`)

func findRoot(t *testing.T) (root, module string) {
	t.Helper()
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		content, err := os.ReadFile(filepath.Join(root, "go.mod"))
		if err == nil {
			return root, moduleLine.FindStringSubmatch(string(content))[1]
		}
		parent := filepath.Dir(root)
		if parent == root {
			t.Fatal("no go.mod above this folder")
		}
		root = parent
	}
}

// listFiles lists what git would, or, in a tree without git, every file outside
// the folders that builds and runs make.
func listFiles(t *testing.T, root string) []string {
	t.Helper()
	out, err := exec.Command("git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	var files []string
	if err == nil {
		for name := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
			// A file that is deleted and not yet committed is still listed.
			if info, err := os.Stat(filepath.Join(root, name)); err == nil && info.Mode().IsRegular() {
				files = append(files, name)
			}
		}
		return files
	}
	err = fs.WalkDir(os.DirFS(root), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (name == ".git" || name == ".cache" || name == "bin" || name == "atoll-data" || d.Name() == "node_modules"):
			return fs.SkipDir
		case d.Type().IsRegular():
			files = append(files, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}
