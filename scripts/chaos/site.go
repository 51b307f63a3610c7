package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// Plan is what a run is to be.
type Plan struct {
	Binary, Dir    string
	Nodes, Clients int
	Seed           uint64
	Length         time.Duration
	// Often names the faults that are made most of the time.
	Often []string
	// Say tells what is done, line by line; it may be called from everywhere.
	Say func(format string, args ...any)
}

// diskBytes is the size of each node's disk, a tmpfs; a run pushes much less.
const diskBytes = 768 << 20

// site is the nodes and what is known of each.
type site struct {
	lab   *lab.Lab
	nodes []*box
}

// box is one machine of the site.
type box struct {
	*lab.Node
	disk string // where its tmpfs is mounted

	mu sync.Mutex
	// wounds counts the faults that are made to it at present, harmed the moments
	// at which one began: a request is judged only when neither changed.
	wounds, harmed int
}

// hurt notes that a fault begins, heal that it has ended.
func (b *box) hurt() { b.mu.Lock(); b.wounds++; b.harmed++; b.mu.Unlock() }
func (b *box) heal() { b.mu.Lock(); b.wounds--; b.harmed++; b.mu.Unlock() }

// health gives a mark that stays equal while nothing is done to the box; ok is
// false while something is.
func (b *box) health() (mark int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.harmed, b.wounds == 0
}

// newSite makes the machines and founds the site on them.
func newSite(ctx context.Context, p Plan) (s *site, err error) {
	s = &site{lab: lab.New()}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close(context.WithoutCancel(ctx)))
		}
	}()
	for i := range p.Nodes {
		host, err := s.lab.Host(ctx, fmt.Sprintf("c%d", i+1), "chaos", fmt.Sprintf("10.77.0.%d/24", i+1))
		if err != nil {
			return s, err
		}
		b := &box{disk: filepath.Join(p.Dir, host.Name)}
		if err := os.Mkdir(b.disk, 0o700); err != nil {
			return s, err
		}
		if out, err := exec.CommandContext(ctx, "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d", diskBytes), "atoll-chaos", b.disk).CombinedOutput(); err != nil {
			return s, fmt.Errorf("mounting a small disk: %w: %s", err, out)
		}
		b.Node = lab.NewNode(host, p.Binary, filepath.Join(b.disk, "data"))
		s.nodes = append(s.nodes, b)
		if i == 0 {
			err = b.Found(ctx)
		} else {
			err = b.Join(ctx, s.nodes[0].Node)
		}
		if err != nil {
			return s, err
		}
	}
	// The disks are small, and pushes must be refused before they are full.
	if _, err := s.nodes[0].Atoll(ctx, "settings", "set", "storage.min-free", "32MiB"); err != nil {
		return s, err
	}
	return s, s.settled(ctx)
}

// settled waits until all nodes are up, a leader is confirmed, the voters are
// all there and nothing lacks copies. What is lost may be a blob of a push that was never
// acknowledged; whether any other is, the end of the run finds out.
func (s *site) settled(ctx context.Context) error {
	voters := len(s.nodes) - (len(s.nodes)+1)%2
	for _, b := range s.nodes {
		if err := b.WaitStatus(ctx, "all to be up, to vote and to hold their copies", func(st lab.Status) bool {
			up, vote := 0, 0
			for _, n := range st.Nodes {
				if n.Up {
					up++
				}
				if n.Voter {
					vote++
				}
			}
			return st.Quorum && up == len(st.Nodes) && up == len(s.nodes) && vote == voters && !st.Counting && st.UnderReplicated == 0
		}); err != nil {
			return err
		}
	}
	return nil
}

func (s *site) close(ctx context.Context) error {
	var errs []error
	for _, b := range s.nodes {
		if run := b.Process(); run != nil {
			_ = run.Thaw() // it may have ended
			b.Kill()
		}
	}
	errs = append(errs, s.lab.Close(ctx))
	for _, b := range s.nodes {
		if out, err := exec.CommandContext(ctx, "umount", b.disk).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("umount: %w: %s", err, out))
		}
	}
	return errors.Join(errs...)
}
