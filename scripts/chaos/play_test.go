package main

import (
	"context"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TestChaos is a short run of make chaos.
func TestChaos(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, "atoll")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "./cmd/atoll")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	seed := uint64(time.Now().UnixNano())
	r, err := play(ctx, Plan{Binary: binary, Dir: dir, Nodes: 3, Clients: 4, Seed: seed, Length: 40 * time.Second, Say: t.Logf})
	if err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	t.Logf("\n%s", r)
	if missed := r.Missed(); len(missed) > 0 {
		t.Errorf("seed %d: missed %v", seed, missed)
	}
}
