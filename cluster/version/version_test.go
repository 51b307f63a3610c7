package version

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

func TestSurvey(t *testing.T) {
	for _, c := range []struct {
		site          int
		levels        []int
		next          int
		behind, ahead []string
		advice        string
	}{
		{1, []int{1, 1, 1}, 1, nil, nil, ""},
		{1, []int{1, 2, 1}, 1, []string{"a", "c"}, []string{"b"}, "the older version still runs on a and c; upgrade one node after the other, or put the older version back on b"},
		{1, []int{2, 2, 2}, 2, nil, []string{"a", "b", "c"}, "run atoll cluster upgrade --finish"},
		{2, []int{2, 2, 2}, 2, nil, nil, ""},
		{2, []int{4, 4, 4}, 3, nil, []string{"a", "b", "c"}, "feature level 3 and the site is at level 2"}, // one step at a time
	} {
		var nodes []Runner
		for i, level := range c.levels {
			nodes = append(nodes, Runner{string(rune('a' + i)), level})
		}
		u := Survey(c.site, nodes)
		advice := strings.Join(u.Advice(), "\n")
		if u.Next != c.next || !slices.Equal(u.Behind, c.behind) || !slices.Equal(u.Ahead, c.ahead) || !strings.Contains(advice, c.advice) || (c.advice == "") != (advice == "") {
			t.Errorf("a site of level %d with nodes of %v: %+v, %q", c.site, c.levels, u, advice)
		}
	}
}

// TestGate takes one database through an upgrade, with a gate for each program.
func TestGate(t *testing.T) {
	db := tabletest.Open(t)
	one := NewGate(db, 1, "v0.1")
	two, three := *one, *one // one table, other programs
	two.level, two.program, three.level, three.program = 2, "v0.2", 3, "v0.3"
	tabletest.Start(t, db)
	read := func(what string, ok bool, ask func(table.Reader) error) {
		t.Helper()
		err := db.View(func(v *table.View) error { return ask(v) })
		if ok && err != nil || !ok && !errors.Is(err, ErrMismatch) {
			t.Errorf("%s: %v", what, err)
		}
	}
	raise := func(g *Gate, levels ...int) error {
		_, err := db.Update(t.Context(), func(tx *table.Tx) error {
			var nodes []Runner
			for i, level := range levels {
				nodes = append(nodes, Runner{string(rune('a' + i)), level})
			}
			return g.Raise(tx, nodes, time.Unix(1, 0))
		})
		return err
	}
	// A site that has written nothing down is at the first level.
	read("level 1 at 1", true, one.Fits)
	read("level 2 at 1", true, two.Fits)
	read("level 3 at 1", false, three.Fits)
	read("level 3 need not know yet", true, three.Outdated)
	read("level 3 joins at 1", false, func(r table.Reader) error { return one.Admit(r, 3) })
	read("level 2 joins at 1", true, func(r table.Reader) error { return one.Admit(r, 2) })
	if err := raise(&two, 2, 1, 2); !errors.Is(err, ErrNotYet) || !strings.Contains(err.Error(), "upgrade b first") {
		t.Errorf("raised with one node behind: %v", err)
	}
	read("level 1 after a refusal", true, one.Fits)
	for range 2 { // the second time changes nothing
		if err := raise(&two, 2, 2); err != nil {
			t.Fatal(err)
		}
		read("level 1 at 2", false, one.Outdated)
		read("level 1 joins at 2", false, func(r table.Reader) error { return two.Admit(r, 1) })
		read("level 2 at 2", true, two.Fits)
		read("level 3 at 2", true, three.Fits)
	}
	// The text names what to start.
	err := db.View(func(v *table.View) error { return one.Outdated(v) })
	if err == nil || !strings.Contains(err.Error(), "start atoll v0.2 or a newer version here") {
		t.Errorf("a program that is too old is told %v", err)
	}
}

func TestStamp(t *testing.T) {
	dir := t.TempDir()
	if err := Check(dir, "v0.5"); err != nil {
		t.Errorf("an empty directory: %v", err)
	}
	if err := Check(filepath.Join(dir, "none"), "v0.5"); err != nil {
		t.Errorf("no directory: %v", err)
	}
	early := t.TempDir()
	if err := os.WriteFile(filepath.Join(early, "meta.db"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Check(early, "v0.5"); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "format 1, written by an early version") {
		t.Errorf("a node's directory without the file: %v", err)
	}
	path := filepath.Join(dir, StampFile)
	for _, step := range []struct {
		program string
		level   int
		want    string
	}{
		{"", 0, `{"format":2,"level":1,"program":""}`},
		{"v0.5", 2, `{"format":2,"level":2,"program":"v0.5"}`},
		{"", 0, `{"format":2,"level":2,"program":"v0.5"}`},
		{"v0.6", 1, `{"format":2,"level":2,"program":"v0.6"}`}, // a level never goes down
	} {
		if err := Mark(dir, step.program, step.level); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || strings.TrimSpace(string(got)) != step.want {
			t.Errorf("marked by %q at %d: %s, %v", step.program, step.level, got, err)
		}
	}
	if left, err := filepath.Glob(path + ".*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	for name, text := range map[string]string{"cut short": `{"form`, "empty": "", "of format 0": `{"format":0}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Check(dir, "v0.5"); err == nil || !strings.Contains(err.Error(), "is damaged") {
			t.Errorf("a file that is %s: %v", name, err)
		}
		if err := Mark(dir, "v0.5", 1); err == nil {
			t.Errorf("a file that is %s was replaced", name)
		}
	}
}

// What each refusal says: the directory, both versions, what to do.
func TestStampRefusals(t *testing.T) {
	can := reads{oldest: 2, newest: 3, level: 5}
	for _, c := range []struct {
		stamp Stamp
		want  []string // of the error; none: it passes
	}{
		{Stamp{2, 1, "v0.4"}, nil},
		{Stamp{3, 5, "v0.6"}, nil},
		{Stamp{4, 5, "v0.7"}, []string{"/data", "format 4, written by atoll v0.7", "this is atoll v0.5", "up to 3", "start atoll v0.7 or a newer version"}},
		{Stamp{1, 1, ""}, []string{"/data", "format 1, written by an early version", "this is atoll v0.5", "from 2 on", "start a version in between on it first"}},
		{Stamp{3, 6, "v0.7"}, []string{"/data", "feature level 6", "last used by atoll v0.7", "this is atoll v0.5", "levels up to 5", "start atoll v0.7"}},
	} {
		err := c.stamp.check("/data", "v0.5", can)
		if c.want == nil && err != nil || c.want != nil && !errors.Is(err, ErrMismatch) {
			t.Errorf("%+v: %v", c.stamp, err)
			continue
		}
		for _, part := range c.want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%+v: %q does not say %q", c.stamp, err, part)
			}
		}
	}
}

// A program with a new format leaves a directory as the program before can read it
// until the site has reached the level that the format belongs to.
func TestFormatWaitsForItsLevel(t *testing.T) {
	before, after := reads{oldest: 2, newest: 3, level: 5}, reads{oldest: 3, newest: 4, level: 6}
	s := Stamp{Format: 3, Level: 5, Program: "v0.5"}
	for _, step := range []struct {
		level, format int // of the site; then of the directory
		back          bool
	}{
		{0, 3, true}, {5, 3, true}, {6, 4, false},
		{5, 4, false}, // an old state: levels never go down
	} {
		s = s.next(after, 6, "v0.6", step.level)
		if s.Format != step.format {
			t.Errorf("at level %d the newer program leaves %+v", step.level, s)
		}
		if err := s.check("/data", "v0.5", before); (err == nil) != step.back {
			t.Errorf("back at level %d: %v", step.level, err)
		}
		if err := s.check("/data", "v0.6", after); err != nil {
			t.Errorf("forth at level %d: %v", step.level, err)
		}
	}
	// This program's own numbers keep the rule: going back one level needs a format
	// that the one before reads, so a newer one belongs to this level at the earliest.
	if FormatLevel > Level || OldestFormat > Format {
		t.Errorf("format %d (from %d on) belongs to level %d, the program has level %d", Format, OldestFormat, FormatLevel, Level)
	}
	// Formats that were written by levels so far. A row is added with a level, never
	// changed: when Format grows, Level has to, and the format belongs to it.
	written := map[int]int{1: 2, 2: 2}
	if last, ok := written[Level]; !ok || last != Format {
		t.Errorf("level %d writes format %d; the table of this test has %v", Level, Format, written)
	}
	if last, ok := written[Level-1]; ok && last < Format && (FormatLevel != Level || OldestFormat > last) {
		t.Errorf("format %d is new with level %d: FormatLevel has to be that, and OldestFormat at most %d", Format, Level, last)
	}
}
