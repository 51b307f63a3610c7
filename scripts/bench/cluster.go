package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/node/telemetry"
)

const (
	kills = 50 // of the leader
	// commits are measured in each turn, by one client and by manyClients.
	commits     = 200
	manyCommits = 2000
	manyClients = 32
	// preparedCommits are those of a turn whose transactions were made before.
	preparedCommits = 500
)

// site is nodes of Atoll on loopback ports.
type site struct {
	nodes  []*server
	client *http.Client
	binary string
}

// launchSite starts a site of so many nodes and waits until all of them vote.
func (b *bench) launchSite(ctx context.Context, count int) (s *site, err error) {
	dir, err := os.MkdirTemp(b.dir, "site")
	if err != nil {
		return nil, err
	}
	p := place{dir: dir, atoll: b.atoll}
	s = &site{client: newClient(p), binary: b.atoll}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	how, first := []string{"--init"}, ""
	for i := range count {
		n, peers, err := b.startNode(ctx, s.client, filepath.Join(p.dir, fmt.Sprint(i)), how)
		if err != nil {
			return s, err
		}
		s.nodes = append(s.nodes, n)
		if err := n.registry.login(ctx); err != nil {
			return s, err
		}
		if i == 0 {
			first = peers
		}
		if how, err = b.invite(ctx, s.nodes[0].dir, first); err != nil {
			return s, err
		}
	}
	if err := s.nodes[0].registry.config(ctx, large); err != nil {
		return s, err
	}
	return s, s.settled(ctx)
}

// startNode starts a node as a process; how says how it comes to its site. peers is its
// address for other nodes.
func (b *bench) startNode(ctx context.Context, client *http.Client, dir string, how []string) (n *server, peers string, err error) {
	addr, err := freeAddr()
	if err == nil {
		peers, err = freeAddr()
	}
	if err != nil {
		return nil, "", err
	}
	name := "node" + filepath.Base(dir)
	prog := &program{
		path: b.atoll, env: []string{"ATOLL_ADMIN_PASSWORD=" + password}, url: "http://" + addr + "/v2/", dir: dir,
		args: append([]string{"serve", "--data", dir, "--listen", addr, "--peer-listen", peers, "--name", name, "--log-level", "warn"}, how...),
	}
	run, err := prog.start(ctx, client)
	if err != nil {
		return nil, "", err
	}
	user := &registry{base: "http://" + addr, http: client}
	return &server{run, prog, user, name, user}, peers, nil
}

// invite gives the way into the site of the node that has its data in dir.
func (b *bench) invite(ctx context.Context, dir, peers string) (how []string, err error) {
	token, err := exec.CommandContext(ctx, b.atoll, "token", "create", "--data", dir).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil, fmt.Errorf("a join token: %w: %s", err, exit.Stderr)
	}
	if err != nil {
		return nil, fmt.Errorf("a join token: %w", err)
	}
	return []string{"--join", peers, "--token", strings.TrimSpace(string(token))}, nil
}

func (s *site) stop() {
	for _, n := range s.nodes {
		n.stop()
	}
}

// state is what a node says of its site.
type state struct {
	Leader string
	Quorum bool
	Nodes  []struct {
		ID, Name  string
		Voter, Up bool
	}
}

func (s *site) state(ctx context.Context, via *server) (st state, err error) {
	out, err := exec.CommandContext(ctx, s.binary, "cluster", "status", "--format", "json", "--data", via.dir).Output()
	if err != nil {
		return st, err
	}
	return st, json.Unmarshal(out, &st)
}

// settled waits until every node sees all the others up and voting.
func (s *site) settled(ctx context.Context) error {
	for _, n := range s.nodes {
		err := n.await(ctx, func() error {
			st, err := s.state(ctx, n)
			if err != nil {
				return err
			}
			voters := 0
			for _, m := range st.Nodes {
				if m.Voter && m.Up {
					voters++
				}
			}
			if !st.Quorum || voters != len(s.nodes) {
				return fmt.Errorf("%d of %d nodes are up and vote", voters, len(s.nodes))
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// cluster measures what the consensus costs.
func (b *bench) cluster(ctx context.Context) error {
	before, payloads, err := b.transactions(ctx, (b.pairs+1)*preparedCommits+1)
	if err != nil {
		return err
	}
	// The first push makes the repository, whose revision all others rest on.
	before, payloads = append(before, payloads[0]), payloads[1:]
	if err := b.ceiling(ctx, before, payloads); err != nil {
		return err
	}
	for _, nodes := range []int{1, 3} {
		if err := b.shares(ctx, nodes, payloads); err != nil {
			return err
		}
		s, err := b.launchSite(ctx, nodes)
		if err != nil {
			return err
		}
		err = b.rates(ctx, s)
		s.stop()
		if err != nil {
			return err
		}
	}
	return b.device(ctx, payloads)
}

// failover measures how long a dead leader is missed.
func (b *bench) failover(ctx context.Context) error {
	s, err := b.launchSite(ctx, 3)
	if err != nil {
		return err
	}
	defer s.stop()
	return b.failovers(ctx, s)
}

// rate runs n pieces of work by so many clients and gives how many a second and how
// long each took, in ms.
func rate(clients, n int, work func(i int) error) (perSecond float64, took []float64, err error) {
	took = make([]float64, n)
	start := time.Now()
	err = together(clients, n, func(i int) error {
		began := time.Now()
		err := work(i)
		took[i] = time.Since(began).Seconds() * 1e3
		return err
	})
	return float64(n) / time.Since(start).Seconds(), took, err
}

func commitsOf(clients int) int {
	if clients == 1 {
		return commits
	}
	return manyCommits
}

// asNode gives raft alone what the process of a node has: rare collections of garbage and
// a spare processor.
func asNode(ctx context.Context) (end func()) {
	run, stop := context.WithCancel(ctx)
	var process sync.WaitGroup
	process.Go(func() { _ = telemetry.BoundMemory(func() bool { return false })(run) })
	process.Go(func() { _ = telemetry.SpareProcessor(run) })
	return func() {
		stop()
		process.Wait()
	}
}

// sitesMeasured is over how many sites, one after the other, a share is the median: a
// machine that is slow for ten seconds is slow for one of them.
const sitesMeasured = 3

// measured is what came of the turns of both sides.
type measured struct{ ours, floors, shares, took []float64 }

// shares compares the manifests that a node commits in a second with what raft alone
// commits, pair by pair: the same log store, the same transactions, callers in the same
// process as what they call. Each side has a process for itself, since nodes look at
// what theirs has in memory.
func (b *bench) shares(ctx context.Context, nodes int, payloads [][]byte) error {
	defer asNode(ctx)()
	all := map[int]*measured{1: {}, manyClients: {}}
	for number := range sitesMeasured {
		if err := b.turns(ctx, nodes, fmt.Sprint(nodes, "-", number), payloads, all); err != nil {
			return err
		}
	}
	for _, clients := range []int{1, manyClients} {
		m, name := all[clients], fmt.Sprintf("%d_nodes_%d_clients", nodes, clients)
		b.print("commits_"+name, median(m.ours), "manifests/s")
		b.print("commits_raw_raft_"+name, median(m.floors), "entries/s")
		b.judge(line{"commits_share_" + name, median(m.shares), "% of raw raft"}, ">=", 40)
		b.print("commit_p50_"+name, quantile(m.took, 0.5), "ms")
		b.print("commit_p99_"+name, quantile(m.took, 0.99), "ms")
	}
	return nil
}

// turns measures one site and one raft alone, both new.
func (b *bench) turns(ctx context.Context, nodes int, name string, payloads [][]byte, all map[int]*measured) error {
	raw, err := startRaw(filepath.Join(b.dir, "raw"+name), nodes, idleMachine)
	if err != nil {
		return err
	}
	defer raw.stop()
	s, err := b.startApart(ctx, nodes, filepath.Join(b.dir, "inside"+name))
	if err != nil {
		return err
	}
	defer s.stop()
	for _, clients := range []int{1, manyClients} {
		n, m := commitsOf(clients), all[clients]
		for turn := range b.pairs + 1 {
			rateOurs, each, err := s.rate(clients, n)
			if err != nil {
				return err
			}
			rateFloor, _, err := rate(clients, n, func(i int) error { return raw.commit(payloads[i%len(payloads)]) })
			if err != nil {
				return err
			}
			if turn == 0 {
				continue // both are warm now
			}
			m.ours, m.floors, m.took = append(m.ours, rateOurs), append(m.floors, rateFloor), append(m.took, each...)
			m.shares = append(m.shares, 100*rateOurs/rateFloor)
		}
	}
	return nil
}

// ceiling measures what is left of raft alone when all that is added is the state machine
// of a node: its transactions were made before, so that nothing is looked for, checked or
// waited for. More than that no node can commit.
func (b *bench) ceiling(ctx context.Context, before, pushes [][]byte) error {
	raw, err := startRaw(filepath.Join(b.dir, "idle"), 1, idleMachine)
	if err != nil {
		return err
	}
	defer raw.stop()
	ours, err := startRaw(filepath.Join(b.dir, "machine"), 1, stateMachine)
	if err != nil {
		return err
	}
	defer ours.stop()
	if err := together(1, len(before), func(i int) error { return ours.change(before[i]) }); err != nil {
		return err
	}
	defer asNode(ctx)()
	var shares []float64
	for turn := range b.pairs + 1 {
		part := pushes[turn*preparedCommits:][:preparedCommits]
		rateOurs, _, err := rate(manyClients, len(part), func(i int) error { return ours.change(part[i]) })
		if err != nil {
			return err
		}
		rateFloor, _, err := rate(manyClients, len(part), func(i int) error { return raw.commit(part[i]) })
		if err != nil {
			return err
		}
		if turn > 0 {
			shares = append(shares, 100*rateOurs/rateFloor)
		}
	}
	b.print(fmt.Sprintf("commits_machine_share_1_nodes_%d_clients", manyClients), median(shares), "% of raw raft")
	return nil
}

// rates gives what clients over HTTP, of all nodes, get.
func (b *bench) rates(ctx context.Context, s *site) error {
	var number atomic.Int64
	for _, clients := range []int{1, manyClients} {
		var rates, took []float64
		for turn := range b.pairs/2 + 2 {
			perSecond, each, err := rate(clients, commitsOf(clients), func(int) error {
				at := int(number.Add(1))
				data, err := manifest(at)
				if err != nil {
					return err
				}
				return s.nodes[at%len(s.nodes)].putManifest(ctx, large, tagOf(at), data)
			})
			if err != nil {
				return err
			}
			if turn > 0 {
				rates, took = append(rates, perSecond), append(took, each...)
			}
		}
		name := fmt.Sprintf("%d_nodes_%d_clients", len(s.nodes), clients)
		b.print("http_commits_"+name, median(rates), "manifests/s")
		b.print("http_commit_p50_"+name, quantile(took, 0.5), "ms")
		b.print("http_commit_p99_"+name, quantile(took, 0.99), "ms")
	}
	return nil
}

// leader is the place of the node that leads; for a moment there may be none.
func (s *site) leader(ctx context.Context) (lead int, err error) {
	err = s.nodes[0].await(ctx, func() error {
		st, err := s.state(ctx, s.nodes[0])
		if err != nil {
			return err
		}
		for _, m := range st.Nodes {
			lead = slices.IndexFunc(s.nodes, func(n *server) bool { return m.ID == st.Leader && m.Name == n.name })
			if lead >= 0 {
				return nil
			}
		}
		return errors.New("no node of the site leads")
	})
	return lead, err
}

// failovers kills the leader again and again and measures until another node
// acknowledges a push.
func (b *bench) failovers(ctx context.Context, s *site) error {
	var took []float64
	for round := range kills {
		lead, err := s.leader(ctx)
		if err != nil {
			return err
		}
		dead, other := s.nodes[lead], s.nodes[(lead+1)%len(s.nodes)]
		data, err := manifest(round)
		if err != nil {
			return err
		}
		dead.kill()
		start := time.Now()
		for {
			err := other.putManifest(ctx, large, "after-a-kill", data)
			if err == nil {
				break
			}
			if time.Since(start) > time.Minute {
				return fmt.Errorf("a minute after the leader was killed: %w", err)
			}
		}
		took = append(took, time.Since(start).Seconds())
		if dead.process, err = dead.program.start(ctx, s.client); err != nil {
			return err
		}
		if err := s.settled(ctx); err != nil {
			return err
		}
	}
	b.judge(line{"failover_p50", quantile(took, 0.5), "s"}, "<=", 5)
	b.judge(line{"failover_p99", quantile(took, 0.99), "s"}, "<=", 10)
	return nil
}

// quantile is the value below which the share q of the values lies.
func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}
