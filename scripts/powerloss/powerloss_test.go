package main

import (
	"context"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestPowerLoss is a short run of make powerloss; then the same recording on a
// disk that answers syncs without doing them, which the judge has to find out.
func TestPowerLoss(t *testing.T) {
	dir := t.TempDir()
	p := Plan{Binary: filepath.Join(dir, "atoll"), Dir: dir, Clients: 2, Pushes: 4, Seed: uint64(time.Now().UnixNano()), Samples: 40, InSite: 5, Workers: 4, Say: t.Logf}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", p.Binary, "./cmd/atoll")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	rec, err := run(ctx, p)
	if err != nil {
		t.Fatalf("seed %d: %v", p.Seed, err)
	}

	// The log is cut behind snapshots, which must not depend on names that nobody synced.
	d := newDisk()
	if err := rec.play(d, visitor{}); err != nil {
		t.Fatal(err)
	}
	live, bare, snapshots := d.after(killed, nil), d.after(bare, nil), 0
	for path := range live {
		dir, name := filepath.Split(path)
		if name != "meta.json" || !strings.HasPrefix(dir, "raft/snapshots/") || strings.HasSuffix(dir, ".tmp/") {
			continue
		}
		snapshots++
		for _, name := range []string{"meta.json", "state.bin"} {
			if got := bare[dir+name]; got == nil || text(got) != text(live[dir+name]) {
				t.Errorf("a power cut may take %s of a snapshot that is kept", name)
			}
		}
	}
	if snapshots == 0 {
		t.Error("the recording has no snapshot in the end")
	}

	liar, answered, lies := newDisk(), map[string]bool{}, len(rec.deeds)/2
	if err := rec.play(liar, visitor{answered: func(id string) error {
		answered[id] = true
		liar.deaf = len(answered) >= lies
		return nil
	}}); err != nil {
		t.Fatal(err)
	}
	s := scene{0, cut, liar.after(cut, nil), holding(rec.deeds, answered)}
	if err := s.judge(ctx, p.Binary, dir, rec.boot); err == nil {
		t.Error("half of the pushes were never synced, and nothing is missed")
	} else if !strings.Contains(err.Error(), "acknowledged") && !strings.Contains(err.Error(), "may be") {
		t.Errorf("half of the pushes were never synced, and what is missed is: %v", err)
	}
}

// lines plays a trace on a disk.
func lines(t *testing.T, trace string) *disk {
	t.Helper()
	d := newDisk()
	p := newPlayer(d, "/data")
	p.moved = func(string) error { return nil }
	p.answered = p.moved
	open := map[string]string{}
	for line := range strings.Lines(trace) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if err := readLine(line, open, p.play); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
	return d
}

func text(c *content) string { return string(c.bytes()) }

// hexed writes strings as strace -xx does.
func hexed(trace string) string {
	var b strings.Builder
	for i, part := range strings.Split(trace, `"`) {
		if i%2 == 0 {
			b.WriteString(part)
			continue
		}
		b.WriteByte('"')
		for _, c := range []byte(part) {
			b.WriteString(`\x` + string("0123456789abcdef"[c>>4]) + string("0123456789abcdef"[c&15]))
		}
		b.WriteByte('"')
	}
	return b.String()
}

func TestWhatIsDurable(t *testing.T) {
	d := lines(t, hexed(`1 openat(AT_FDCWD, "/data/a.tmp", O_RDWR|O_CREAT, 0600) = 5
		1 write(5, "first", 5) = 5
		1 fsync(5) = 0
		1 renameat(AT_FDCWD, "/data/a.tmp", AT_FDCWD, "/data/a") = 0
		1 openat(AT_FDCWD, "/data", O_RDONLY) = 6
		1 fsync(6 <unfinished ...>
		2 openat(AT_FDCWD, "/data/late", O_RDWR|O_CREAT, 0600) = 7
		2 pwrite64(7, "late", 4, 0) = 4
		2 fsync(7) = 0
		1 <... fsync resumed>) = 0
		1 pwrite64(5, "TAIL", 4, 1000 <unfinished ...>
		2 fdatasync(5 <unfinished ...>
		1 <... pwrite64 resumed>) = 4
		2 <... fdatasync resumed>) = 0
		2 openat(AT_FDCWD, "/elsewhere", O_RDWR|O_CREAT, 0600) = 8
		2 write(8, "HTTP", 4) = 4
		1 close(5) = 0
		2 openat(AT_FDCWD, "/data/b", O_RDWR|O_CREAT, 0600) = 5
		2 write(5, "not synced", 10) = 10
		2 ftruncate(5, 3) = 0
		1 unlinkat(AT_FDCWD, "/data/none", 0) = -1 ENOENT (No such file or directory)
	`))
	dice := rand.New(rand.NewPCG(1, 1))
	if got := d.after(cut, dice); len(got) != 1 || text(got["a"]) != "first" {
		t.Errorf("after a cut: %v", got)
	}
	live := d.after(killed, dice)
	if len(live) != 3 || live["a"].size != 1004 || text(live["late"]) != "late" || text(live["b"]) != "not" {
		t.Errorf("after a kill: %v", live)
	}
	unordered, tornApart := false, false
	for range 300 {
		for _, l := range []loss{torn, reordered} {
			got := d.after(l, dice)
			if !strings.HasPrefix(text(got["a"]), "first") {
				t.Fatalf("%s took what was synced: %q", l, text(got["a"]))
			}
			_, late := got["late"]
			_, b := got["b"]
			if l == torn && b && !late {
				t.Fatal("torn took a name from before one that it left")
			}
			if late && text(got["late"]) != "late" {
				t.Fatalf("%s took bytes that were synced: %q", l, text(got["late"]))
			}
			unordered = unordered || b && !late
			tornApart = tornApart || b && text(got["b"]) != text(live["b"])
		}
	}
	if !unordered || !tornApart {
		t.Errorf("never: names out of order (%v), bytes torn (%v)", unordered, tornApart)
	}
}

// A trace that does not tell everything is no trace to judge by.
func TestWhatIsNotFollowed(t *testing.T) {
	for _, line := range []string{
		`1 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 5, 0) = 0x7f0000000000`,
		`1 copy_file_range(9, NULL, 5, NULL, 10, 0) = 10`,
		`1 pwritev(5, [{iov_base="x", iov_len=1}], 1, 0) = 1`,
		`1 write(5, "abc"..., 10) = 10`,
		`1 syncfs(5) = 0`,
	} {
		d := newDisk()
		p := newPlayer(d, "/data")
		p.moved = func(string) error { return nil }
		open := map[string]string{}
		if err := readLine(hexed(`1 openat(AT_FDCWD, "/data/a", O_RDWR|O_CREAT, 0600) = 5`), open, p.play); err != nil {
			t.Fatal(err)
		}
		if err := readLine(hexed(line), open, p.play); err == nil {
			t.Errorf("passes: %s", line)
		}
	}
}

func TestWhatMustBeHeld(t *testing.T) {
	deeds := []deed{{id: "1", blob: "x"}, {id: "2", tag: "t", to: "m1"}, {id: "3", tag: "t", to: "m2"}, {id: "4", tag: "t", to: "m3"}, {id: "5", tag: "u", to: "m4"}}
	h := holding(deeds, map[string]bool{"1": true, "2": true})
	if len(h.blobs) != 1 || len(h.manifests) != 1 || len(h.tags["t"]) != 2 || h.tags["t"][0] != "m1" || h.tags["t"][1] != "m2" || len(h.tags["u"]) != 2 || h.tags["u"][0] != "" {
		t.Errorf("%+v", h)
	}
}
