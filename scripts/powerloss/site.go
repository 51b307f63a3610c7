package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
)

// site is three nodes on one machine; the last of them is the one that loses its
// power.
type site struct {
	binary string
	seats  []seat
	nodes  []*node
	deeds  []deed // acknowledged by any of them
}

const victim = 2

// runInSite records one node of three, and starts it again and again on what a power
// cut would have left at some moment, while the two others have gone on and go on.
func runInSite(ctx context.Context, p Plan) error {
	var s *site
	var rec *recording
	for try := range tries {
		var err error
		dir := filepath.Join(p.Dir, fmt.Sprint("site", try))
		if s, err = newSite(p, dir); err != nil {
			return err
		}
		rec, err = s.record(ctx, p, dir)
		if err == nil {
			break
		}
		s.stop()
		if s = nil; !errors.Is(err, errReplay) {
			return err
		}
		p.Say("recording again: %v", err)
	}
	if s == nil {
		return fmt.Errorf("%d recordings do not give the directory that was there", tries)
	}
	defer s.stop()
	return s.cutAll(ctx, p, rec)
}

// errReplay: the trace does not give the directory.
var errReplay = errors.New("the replay differs")

func newSite(p Plan, dir string) (*site, error) {
	s := &site{binary: p.Binary, nodes: make([]*node, victim+1)}
	for i := range s.nodes {
		// The port is free until the node takes it, as good as certainly.
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		s.seats = append(s.seats, seat{name: fmt.Sprint("power", i), peers: l.Addr().String()})
		if err := errors.Join(l.Close(), os.MkdirAll(s.data(dir, i), 0o700)); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *site) data(dir string, i int) string { return filepath.Join(dir, s.seats[i].name, "data") }

func (s *site) stop() {
	for _, n := range s.nodes {
		if n != nil {
			n.kill()
		}
	}
}

// record makes the site, has clients push to all its nodes, and kills the victim.
// The others run on.
func (s *site) record(ctx context.Context, p Plan, dir string) (*recording, error) {
	rec := &recording{root: s.data(dir, victim), traces: []string{filepath.Join(dir, "trace")}}
	pid := 0
	for i := range s.nodes {
		var err error
		seat := s.seats[i]
		if seat.how = []string{"--init"}; i > 0 {
			token, err := exec.CommandContext(ctx, s.binary, "token", "create", "--data", s.data(dir, 0)).Output()
			if err != nil {
				return nil, fmt.Errorf("a join token: %w", err)
			}
			seat.how = []string{"--join", s.seats[0].peers, "--token", strings.TrimSpace(string(token))}
		}
		if i == victim {
			s.nodes[i], pid, err = startTraced(ctx, seat, s.data(dir, i), rec.traces[0], s.binary)
		} else {
			s.nodes[i], err = start(ctx, seat, s.data(dir, i), s.binary)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := s.settled(ctx); err != nil {
		return nil, err
	}
	dice := rand.New(rand.NewPCG(p.Seed, 3))
	parts := make([]*client, len(s.nodes)*p.Clients)
	for i := range parts {
		parts[i] = &client{node: s.nodes[i%len(s.nodes)], name: fmt.Sprintf("s%d", i), dice: rand.New(rand.NewPCG(dice.Uint64(), 0))}
	}
	var clients sync.WaitGroup
	for _, c := range parts {
		clients.Go(func() { c.work(ctx, p.Pushes) })
	}
	clients.Wait()
	if err := s.nodes[victim].awaitSnapshot(ctx); err != nil {
		return nil, err
	}
	last := &client{node: s.nodes[victim], name: "last", dice: rand.New(rand.NewPCG(dice.Uint64(), 0))}
	last.work(ctx, 1)
	parts = append(parts, last)
	_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
	<-s.nodes[victim].done
	for _, c := range parts {
		if c.err != nil {
			return nil, fmt.Errorf("%w\n%s", c.err, c.node.log)
		}
		s.deeds = append(s.deeds, c.deeds...)
	}
	if err := rec.end(); err != nil {
		return nil, err
	}
	d := newDisk()
	if err := rec.play(d, visitor{}); err != nil {
		return nil, err
	}
	if err := same(d.after(killed, nil), rec.root); err != nil {
		return nil, fmt.Errorf("%w: %w", errReplay, err)
	}
	return rec, nil
}

// cutAll judges some moments after the victim had first answered a client. The
// moments are spread over the recording.
func (s *site) cutAll(ctx context.Context, p Plan, rec *recording) error {
	moments, first, at := 0, 0, 0
	if err := rec.play(newDisk(), visitor{
		func(string) error { moments++; return nil },
		func(string) error {
			if first == 0 {
				first = moments
			}
			return nil
		},
	}); err != nil {
		return err
	}
	dice := rand.New(rand.NewPCG(p.Seed, 4))
	chosen := map[int]loss{}
	for i := range p.InSite {
		part := (moments - first) / p.InSite
		chosen[first+1+i*part+dice.IntN(max(1, part))] = losses()[i%len(losses())]
	}
	p.Say("recorded one of three nodes: %d changes of its disk, %d acknowledgements of the site", moments, len(s.deeds))
	begun, judged := time.Now(), 0
	d := newDisk()
	err := rec.play(d, visitor{moved: func(string) error {
		at++
		l, yes := chosen[at]
		if !yes {
			return nil
		}
		judged++
		if err := s.judge(ctx, scene{moment: at, loss: l, image: d.after(l, dice)}, rec, judged); err != nil {
			return fmt.Errorf("one of three nodes, after change %d, %s: %w", at, l, err)
		}
		return nil
	}})
	if err == nil {
		p.Say("one of three nodes lost its power at %d moments, judged in %v", judged, time.Since(begun).Round(time.Second))
	}
	if err == nil && judged == 0 {
		err = errors.New("nothing was judged")
	}
	return err
}

// judge starts the victim on what a loss has left, while the site is pushed to, and
// asks all nodes for everything.
func (s *site) judge(ctx context.Context, sc scene, rec *recording, number int) error {
	if err := os.RemoveAll(rec.root); err != nil {
		return err
	}
	if err := os.MkdirAll(rec.root, 0o700); err != nil {
		return err
	}
	if err := sc.lay(rec.root, rec.boot); err != nil {
		return err
	}
	goOn := func(node int, when string) *client {
		c := &client{node: s.nodes[node], name: fmt.Sprint("on", number, when), dice: rand.New(rand.NewPCG(uint64(number), uint64(node)))}
		c.work(ctx, 2)
		return c
	}
	before := goOn(0, "before") // the two others decide without it
	var meanwhile *client
	var pushing sync.WaitGroup
	pushing.Go(func() { meanwhile = goOn(1, "meanwhile") })
	n, err := start(ctx, s.seats[victim], rec.root, s.binary)
	pushing.Wait()
	if err != nil {
		return err
	}
	s.nodes[victim] = n
	defer n.kill()
	after := goOn(victim, "after")
	for _, c := range []*client{before, meanwhile, after} {
		if c.err != nil {
			return fmt.Errorf("%w\n%s", c.err, c.node.log)
		}
		s.deeds = append(s.deeds, c.deeds...)
	}
	if err := s.settled(ctx); err != nil {
		return fmt.Errorf("%w\n%s", err, n.log)
	}
	answered := map[string]bool{}
	for _, d := range s.deeds {
		answered[d.id] = true
	}
	h := holding(s.deeds, answered)
	first := ""
	for i, n := range s.nodes {
		if i == victim { // the others never went
			if err := h.ask(ctx, n); err != nil {
				return fmt.Errorf("%w\n%s", err, n.log)
			}
		}
		list, err := tagsOf(ctx, n, h)
		if err != nil {
			return err
		}
		if i == 0 {
			first = list
		} else if list != first {
			return fmt.Errorf("%s has other tags than %s:\n%s\n%s", s.seats[i].name, s.seats[0].name, list, first)
		}
	}
	return verified(filepath.Join(rec.root, "content/blobs"))
}

// tagsOf gives what every tag is on a node.
func tagsOf(ctx context.Context, n *node, h held) (string, error) {
	var b strings.Builder
	for _, tag := range slices.Sorted(maps.Keys(h.tags)) {
		a, err := n.read(ctx, "/manifests/"+tag)
		switch {
		case err != nil:
			return "", err
		case a.status == http.StatusOK:
			fmt.Fprintln(&b, tag, digest.FromBytes(a.body))
		default:
			fmt.Fprintln(&b, tag, a.status)
		}
	}
	return b.String(), nil
}

// settled waits until each node sees all three up, voting and on one revision, with
// no copy missing.
func (s *site) settled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for i := range s.nodes {
		for {
			err := s.atRest(ctx, i)
			if err == nil {
				break
			}
			pause := time.NewTimer(100 * time.Millisecond)
			select {
			case <-pause.C:
			case <-ctx.Done():
				pause.Stop()
				return fmt.Errorf("%s: %w", s.seats[i].name, err)
			}
		}
	}
	return nil
}

func (s *site) atRest(ctx context.Context, i int) error {
	out, err := exec.CommandContext(ctx, s.binary, "cluster", "status", "--format", "json", "--data", s.nodes[i].data).Output()
	if err != nil {
		return err
	}
	var st struct {
		Quorum, Counting bool
		UnderReplicated  int `json:"under_replicated"`
		Lost             int
		Nodes            []struct {
			Up, Voter bool
			Lag       uint64
		}
	}
	if err := json.Unmarshal(out, &st); err != nil {
		return err
	}
	well := 0
	for _, n := range st.Nodes {
		if n.Up && n.Voter && n.Lag == 0 {
			well++
		}
	}
	if !st.Quorum || st.Counting || st.UnderReplicated > 0 || st.Lost > 0 || well != len(s.nodes) {
		return fmt.Errorf("not at rest: %s", out)
	}
	return nil
}
