package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/node"
	"github.com/atoll-registry/atoll/node/catalog"
)

// inside is a site of Atoll whose first node runs in the process that asks it, and
// leads, as those of raw raft do: what it is asked is not sent, but all else is as it is
// in production.
type inside struct {
	lead   *node.Node
	ended  chan error
	cancel context.CancelFunc
	all    *site // the first one's process is nil
	pushed int   // by rate
}

// startInside starts a site of so many nodes, all of which vote.
func (b *bench) startInside(ctx context.Context, dir string, count int) (s *inside, err error) {
	run, cancel := context.WithCancel(ctx)
	s = &inside{cancel: cancel, ended: make(chan error, 1), all: &site{client: newClient(place{dir: dir, atoll: b.atoll}), binary: b.atoll}}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	home, serves := filepath.Join(dir, "0"), make(chan node.Started, 1)
	if s.lead, err = node.New(ctx, node.Config{
		Data: home, Listen: "127.0.0.1:0", PeerListen: "127.0.0.1:0", Name: "node0", Init: true, AdminPassword: password,
		Log: slog.New(slog.DiscardHandler), Started: func(st node.Started) { serves <- st },
	}); err != nil {
		s.ended <- nil
		return s, err
	}
	go func() { s.ended <- s.lead.Run(run) }()
	var first node.Started
	select {
	case first = <-serves:
	case err := <-s.ended:
		s.ended <- nil
		return s, fmt.Errorf("the first node ended: %w", err)
	}
	user := &registry{base: strings.TrimSuffix(first.URL, "/"), http: s.all.client}
	s.all.nodes = append(s.all.nodes, &server{nil, &program{dir: home}, user, "node0", user})
	if err := errors.Join(user.login(ctx), user.config(ctx, large)); err != nil {
		return s, err
	}
	for i := 1; i < count; i++ {
		how, err := b.invite(ctx, home, first.PeerAddr)
		if err != nil {
			return s, err
		}
		n, _, err := b.startNode(ctx, s.all.client, filepath.Join(dir, fmt.Sprint(i)), how)
		if err != nil {
			return s, err
		}
		s.all.nodes = append(s.all.nodes, n)
	}
	return s, s.settled(ctx)
}

// settled waits until all nodes vote and the first one leads.
func (s *inside) settled(ctx context.Context) error {
	limit, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		st, err := s.all.state(limit, s.all.nodes[0])
		voters, leads := 0, false
		for _, m := range st.Nodes {
			if m.Voter && m.Up {
				voters++
			}
			leads = leads || m.ID == st.Leader && m.Name == "node0"
		}
		if err == nil && voters == len(s.all.nodes) && st.Quorum {
			if leads {
				return nil
			}
			_, err = tool(s.all.binary, "cluster", "lead", "node0", "--data", s.all.nodes[0].dir)
		}
		if again := pause(limit, 50*time.Millisecond); again != nil {
			return fmt.Errorf("%d of %d nodes vote: %w", voters, len(s.all.nodes), errors.Join(err, again))
		}
	}
}

// prepare makes the push of a manifest that no other is like, with a tag of its own.
func (s *inside) prepare(number int) (catalog.Push, error) {
	data, err := manifest(number)
	project, repository, _ := strings.Cut(large, "/")
	return catalog.Push{
		Project: project, Repository: repository, Tag: tagOf(number), MediaType: v1.MediaTypeImageManifest, Bytes: data,
		Carrier: catalog.Client, Actor: "admin", At: time.Now(), Copies: len(s.all.nodes),
	}, err
}

// rate commits so many manifests by so many clients on the node that leads, where raw
// raft's entries are committed. What clients do before they ask is no work of a node's:
// raw raft's entries are made before, too.
func (s *inside) rate(ctx context.Context, clients, n int) (perSecond float64, took []float64, err error) {
	pushes := make([]catalog.Push, n)
	for i := range pushes {
		if pushes[i], err = s.prepare(s.pushed + i); err != nil {
			return 0, nil, err
		}
	}
	s.pushed += n
	return rate(clients, n, func(i int) error { return s.lead.Push(ctx, pushes[i]) })
}

func (s *inside) stop() {
	for _, n := range s.all.nodes {
		if n.process != nil {
			n.stop()
		}
	}
	s.cancel()
	<-s.ended // why is of no interest any more
}

// apart is such a site in another process, which pushes when it is told to.
type apart struct {
	process *exec.Cmd
	orders  io.WriteCloser
	answers *json.Decoder
}

// order is so many pushes by so many clients; pushed is what came of it, or that the
// site is there.
type (
	order  struct{ Clients, Pushes int }
	pushed struct {
		PerSecond float64
		Took      []float64 // ms
		Error     string
	}
)

func (b *bench) startApart(ctx context.Context, count int, dir string) (*apart, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	a := &apart{process: exec.CommandContext(ctx, self, "inside", dir, fmt.Sprint(count), b.atoll)}
	a.process.Stderr = os.Stderr
	if a.orders, err = a.process.StdinPipe(); err != nil {
		return nil, err
	}
	answers, err := a.process.StdoutPipe()
	if err != nil {
		return nil, err
	}
	a.answers = json.NewDecoder(answers)
	if err := a.process.Start(); err != nil {
		return nil, err
	}
	if _, err := a.answer(); err != nil {
		a.stop()
		return nil, err
	}
	return a, nil
}

func (a *apart) answer() (p pushed, err error) {
	if err := a.answers.Decode(&p); err != nil {
		return p, fmt.Errorf("the process of the site: %w", err)
	}
	if p.Error != "" {
		return p, errors.New(p.Error)
	}
	return p, nil
}

// rate is the function of this name, in the other process.
func (a *apart) rate(clients, n int) (perSecond float64, took []float64, err error) {
	if err := json.NewEncoder(a.orders).Encode(order{clients, n}); err != nil {
		return 0, nil, err
	}
	p, err := a.answer()
	return p.PerSecond, p.Took, err
}

// stop ends the process, which stops its site.
func (a *apart) stop() {
	a.orders.Close()
	if err := a.process.Wait(); err != nil {
		fmt.Fprintln(os.Stderr, "bench: the process of the site:", err)
	}
}

// serveInside is that process: args are a directory, how many nodes, and the program.
func serveInside(ctx context.Context, args []string) error {
	count, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	answers, b := json.NewEncoder(os.Stdout), &bench{atoll: args[2]}
	s, err := b.startInside(ctx, args[0], count)
	if err != nil {
		return answers.Encode(pushed{Error: err.Error()})
	}
	defer s.stop()
	if err := answers.Encode(pushed{}); err != nil {
		return err
	}
	for orders := json.NewDecoder(os.Stdin); ; {
		var o order
		if err := orders.Decode(&o); err != nil {
			return nil // no more of them
		}
		var p pushed
		if p.PerSecond, p.Took, err = s.rate(ctx, o.Clients, o.Pushes); err != nil {
			p.Error = err.Error()
		}
		if err := answers.Encode(p); err != nil {
			return err
		}
	}
}

// transactions are the log of a node that was founded and then had so many pushes, one
// after the other: what is before the pushes, from the third entry on, and the pushes.
func (b *bench) transactions(ctx context.Context, n int) (before, pushes [][]byte, err error) {
	dir := filepath.Join(b.dir, "transactions")
	s, err := b.startInside(ctx, dir, 1)
	if err != nil {
		return nil, nil, err
	}
	_, _, err = s.rate(ctx, 1, n)
	s.stop()
	if err != nil {
		return nil, nil, err
	}
	log, err := kv.OpenLog(filepath.Join(dir, "0", "raft", "log.db"))
	if err != nil {
		return nil, nil, err
	}
	defer log.Close()
	last, err := log.LastIndex()
	// The first two are raft's own, in this log as in any.
	for at := uint64(3); err == nil && at <= last; at++ {
		var l raft.Log
		if err = log.GetLog(at, &l); err != nil {
			break
		}
		switch {
		case l.Type == raft.LogCommand && strings.Contains(string(l.Data), "org.example.number"):
			pushes = append(pushes, l.Data)
		case len(pushes) > 0:
		case l.Type == raft.LogCommand:
			before = append(before, l.Data)
		default: // what rests on a revision must find it where it was
			var nothing []byte
			nothing, err = (&kv.Txn{ID: kv.NewID()}).Encode()
			before = append(before, nothing)
		}
	}
	if err == nil && len(pushes) != n {
		err = fmt.Errorf("%d of %d pushes are in the log", len(pushes), n)
	}
	return before, pushes, err
}

// disk is a file system on a device of its own, so that what is written to it is
// written by nobody else.
type disk struct {
	dir  string
	stat string // of the device
	free func()
}

const diskBytes = 2 << 30

func (b *bench) newDisk() (*disk, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("bytes and flushes on a device need root: a loop device is made and mounted")
	}
	file, dir := filepath.Join(b.dir, "device.img"), filepath.Join(b.dir, "device")
	f, err := os.Create(file)
	if err == nil {
		err = errors.Join(f.Truncate(diskBytes), f.Close(), os.Mkdir(dir, 0o700))
	}
	if err == nil {
		_, err = tool("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", file)
	}
	if err != nil {
		return nil, err
	}
	loop, err := tool("losetup", "--find", "--show", file)
	if err != nil {
		return nil, err
	}
	if err := syscall.Mount(loop, dir, "ext4", syscall.MS_NOATIME, ""); err != nil {
		_, detached := tool("losetup", "-d", loop)
		return nil, errors.Join(fmt.Errorf("mount %s: %w", loop, err), detached)
	}
	return &disk{dir, filepath.Join("/sys/block", filepath.Base(loop), "stat"), func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			fmt.Fprintln(os.Stderr, "bench: unmount", dir+":", err)
		}
		if _, err := tool("losetup", "-d", loop); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
	}}, nil
}

func tool(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// written gives the bytes and the flushes that the device has had so far.
func (d *disk) written() (bytes, flushes float64, err error) {
	data, err := os.ReadFile(d.stat)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, fmt.Errorf("the kernel does not count what is written to a loop device: %w", err)
	}
	fields := strings.Fields(string(data))
	if err == nil && len(fields) < 16 {
		err = fmt.Errorf("the kernel counts no flushes in %s", d.stat)
	}
	if err != nil {
		return 0, 0, err
	}
	var sectors float64
	_, err = fmt.Sscan(fields[6]+" "+fields[15], &sectors, &flushes)
	return 512 * sectors, flushes, err
}

// device counts what one commit writes: transactions of one row, then pushes.
func (b *bench) device(ctx context.Context, payloads [][]byte) error {
	d, err := b.newDisk()
	if err != nil {
		return err
	}
	defer d.free()
	one, err := startRaw(filepath.Join(d.dir, "one-row"), 1, stateMachine)
	if err != nil {
		return err
	}
	oneRow := func(i int) error {
		t := kv.Txn{ID: kv.NewID(), Base: one.leader.AppliedIndex(), Ops: []kv.Op{{
			Kind: kv.Put, Key: fmt.Appendf(nil, "row\x00%08d", i*7919%1000003), Value: payloads[0][:200],
		}}}
		data, err := t.Encode()
		if err != nil {
			return err
		}
		return one.commit(data)
	}
	err = b.wear("txn_of_one_row", d, oneRow, map[int][2]float64{1: {46e3, 4.2}, manyClients: {10e3, 0.35}})
	one.stop()
	if err != nil {
		return err
	}
	s, err := b.startInside(ctx, filepath.Join(d.dir, "site"), 1)
	if err != nil {
		return err
	}
	defer s.stop()
	push := func(i int) error {
		p, err := s.prepare(i)
		if err != nil {
			return err
		}
		return s.lead.Push(ctx, p)
	}
	return b.wear("push", d, push, nil)
}

// wear prints what each piece of work writes to the device, by one client and by
// many.
func (b *bench) wear(name string, d *disk, work func(i int) error, goals map[int][2]float64) error {
	at := 0
	for _, clients := range []int{1, manyClients} {
		n := 2 * commitsOf(clients)
		for turn := range 2 {
			bytes, flushes, err := d.written()
			if err != nil {
				return err
			}
			from := at
			if err := together(clients, n, func(i int) error { return work(from + i) }); err != nil {
				return err
			}
			at += n
			if turn == 0 {
				continue // the files have some size now
			}
			after, flushed, err := d.written()
			if err != nil {
				return err
			}
			perBytes, perFlush := (after-bytes)/float64(n), (flushed-flushes)/float64(n)
			label := fmt.Sprintf("%s_%d_clients", name, clients)
			if goal, ok := goals[clients]; ok {
				b.judge(line{"device_bytes_" + label, perBytes, "bytes"}, "<=", goal[0])
				b.judge(line{"device_flushes_" + label, perFlush, "flushes"}, "<=", goal[1])
			} else {
				b.print("device_bytes_"+label, perBytes, "bytes")
				b.print("device_flushes_"+label, perFlush, "flushes")
			}
		}
	}
	return nil
}

// rawRaft is the floor of the cluster's rows: raft with the log store of a node and
// the transactions of its pushes, over plain TCP, and a state machine that does
// nothing. Its nodes share a process, as those that it is compared with do.
type rawRaft struct {
	nodes  []*raft.Raft
	stores []io.Closer
	leader *raft.Raft
}

// machineIn makes the state machine of a raft in a directory.
type machineIn func(home string) (raft.FSM, io.Closer, error)

// idleMachine does nothing.
func idleMachine(string) (raft.FSM, io.Closer, error) { return nothing{}, nil, nil }

// stateMachine is that of a node.
func stateMachine(home string) (raft.FSM, io.Closer, error) {
	bolt, err := kv.OpenBolt(filepath.Join(home, "meta.db"))
	if err != nil {
		return nil, nil, err
	}
	engine := kv.WriteBehind(bolt)
	machine, err := kv.NewMachine(engine, kv.Hooks{})
	return machine, engine, err
}

// nothing is the state machine.
type nothing struct{}

func (nothing) Apply(*raft.Log) any { return nil }
func (nothing) Snapshot() (raft.FSMSnapshot, error) {
	return nil, errors.New("there is nothing to keep")
}
func (nothing) Restore(r io.ReadCloser) error     { return r.Close() }
func (nothing) ApplyBatch(logs []*raft.Log) []any { return make([]any, len(logs)) }
func (r *rawRaft) commit(payload []byte) error    { return r.leader.Apply(payload, time.Minute).Error() }

// change is commit for a state machine that is one: the transaction has to take effect.
func (r *rawRaft) change(txn []byte) error {
	applied := r.leader.Apply(txn, time.Minute)
	if err := applied.Error(); err != nil {
		return err
	}
	if result, ok := applied.Response().(kv.Result); !ok || result.Code != kv.OK {
		return fmt.Errorf("the state machine answers %v", applied.Response())
	}
	return nil
}

// startRaw starts so many nodes and waits for their leader.
func startRaw(dir string, count int, machine machineIn) (r *rawRaft, err error) {
	r = &rawRaft{}
	defer func() {
		if err != nil {
			r.stop()
		}
	}()
	var servers []raft.Server
	for i := range count {
		home := filepath.Join(dir, fmt.Sprintf("raw%d-%d", count, i))
		if err := os.MkdirAll(home, 0o700); err != nil {
			return r, err
		}
		log := hclog.NewNullLogger()
		store, err := kv.OpenLog(filepath.Join(home, "log.db"))
		if err != nil {
			return r, err
		}
		r.stores = append(r.stores, store)
		fsm, state, err := machine(home)
		if state != nil {
			r.stores = append(r.stores, state)
		}
		if err != nil {
			return r, err
		}
		transport, err := raft.NewTCPTransportWithLogger("127.0.0.1:0", nil, 3, 10*time.Second, log)
		if err != nil {
			return r, err
		}
		cfg := raft.DefaultConfig()
		cfg.LocalID, cfg.Logger, cfg.BatchApplyCh = raft.ServerID(fmt.Sprint(i)), log, true
		cached, err := raft.NewLogCache(128, store)
		if err != nil {
			return r, err
		}
		node, err := raft.NewRaft(cfg, fsm, cached, store, raft.NewDiscardSnapshotStore(), transport)
		if err != nil {
			return r, err
		}
		r.nodes = append(r.nodes, node)
		servers = append(servers, raft.Server{ID: cfg.LocalID, Address: transport.LocalAddr()})
	}
	if err := r.nodes[0].BootstrapCluster(raft.Configuration{Servers: servers}).Error(); err != nil {
		return r, err
	}
	for range 300 {
		for _, node := range r.nodes {
			if node.State() == raft.Leader {
				r.leader = node
				return r, nil
			}
		}
		<-time.After(100 * time.Millisecond)
	}
	return r, errors.New("raw raft elects no leader")
}

func (r *rawRaft) stop() {
	for _, node := range r.nodes {
		_ = node.Shutdown().Error() // the run is over
	}
	for _, store := range r.stores {
		store.Close()
	}
}
