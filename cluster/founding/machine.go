package founding

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
)

// promise is the content of member.MachineFile. Nothing in it is said to anybody
// before it is on the disk.
type promise struct {
	Machine string `json:"machine"` // its id
	Token   string `json:"token"`   // id of the token
	// Pledge is the proposal that this machine takes part in, and in no other: until
	// its founder has said that it is dead.
	Pledge *Proposal `json:"pledge,omitempty"`
	// Site is the site that this machine has seen: it joins that or none.
	Site string `json:"site,omitempty"`
	// Origin is the proposal by which the site was founded.
	Origin string `json:"origin,omitempty"`
}

// load reads the promise of a directory, or makes a machine of it. What a machine
// promised binds it until it is a member of a site.
func load(dir, token string, joined bool) (p promise, err error) {
	path := filepath.Join(dir, member.MachineFile)
	err = atomicfile.ReadJSON(path, &p)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return p, err
	case err == nil && p.Token == token:
		return p, nil
	case err == nil && p.Pledge != nil && !joined:
		return p, fmt.Errorf("%w: with another token this machine has promised to found a site with %s: start it with that token, or clear %s with atoll node wipe", ErrPromised, p.Pledge.Founder, dir)
	}
	p = promise{Machine: table.NewID(), Token: token}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return p, fmt.Errorf("making the data directory: %w", err)
	}
	return p, atomicfile.WriteJSON(path, p)
}

// ErrPromised: the machine has promised to take part in another founding.
var ErrPromised = errors.New("the machine waits for another founding")

// machine is one without a site.
type machine struct {
	Config
	id       string // of the promise; it stays
	mu       sync.Mutex
	promise  promise
	proposal *Proposal // alive; nil when this machine proposes nothing
	site     string    // once it has founded or joined
	addrs    map[string]bool
	end      context.CancelCauseFunc

	said  string // what was logged last, and when
	since time.Time
	odd   map[string]string // what was logged of addresses
}

// remindEvery is how often a machine that waits says so again.
const remindEvery = 30 * time.Second

// Run returns when the machine has founded the site, or joined it, with its
// identity on the disk; else it waits, and says in the log for what. Errors are
// those of member.Join that do not pass, and ErrPromised.
func Run(ctx context.Context, c Config) (who member.Identity, founded bool, err error) {
	if c.Pause == 0 {
		c.Pause = time.Second
	}
	p, err := load(c.Dir, c.Pairing.ID(), false)
	if err != nil {
		return who, false, err
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	m := &machine{Config: c, id: p.Machine, promise: p, addrs: make(map[string]bool), end: end, odd: make(map[string]string)}
	m.learn(c.Addrs...)
	server := joining.Server(bounds(), map[string]joining.Handler{pathHello: m.hear, pathPledge: m.pledge}, quiet(c.Log), nil)
	served := make(chan error, 1)
	go func() { served <- server.Serve(c.Network.ListenFounding()) }()
	defer func() {
		server.Close()
		<-served
	}()
	if err := c.step("began"); err != nil {
		return who, false, err
	}
	for {
		id, done, err := m.round(ctx)
		if cause := context.Cause(ctx); cause != nil {
			return who, false, cause
		}
		if err != nil || done {
			return id, m.proposal != nil, err
		}
		pause := time.NewTimer(c.Pause)
		select {
		case <-pause.C:
		case err := <-served:
			served <- nil
			return who, false, fmt.Errorf("answering the other machines: %w", err)
		case <-ctx.Done():
		}
		pause.Stop()
	}
}

// quiet keeps refusals, which are the daily talk of machines that wait, out of the
// log; what matters of them is said once.
func quiet(log *slog.Logger) *slog.Logger { return slog.New(levelled{log.Handler()}) }

type levelled struct{ slog.Handler }

func (l levelled) Enabled(ctx context.Context, level slog.Level) bool {
	return level > slog.LevelInfo && l.Handler.Enabled(ctx, level)
}

func (m *machine) self() Machine {
	return Machine{ID: m.id, Name: m.Name, Addr: m.Advertise}
}

// learn remembers addresses, within bounds.
func (m *machine) learn(addrs ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range addrs {
		if len(m.addrs) < 4*MostExpected && len(a) <= 261 && a != m.Advertise {
			m.addrs[a] = true
		}
	}
}

// save changes what this machine has promised, on the disk first. It is called
// under mu. What cannot be kept ends the machine: it must not be said.
func (m *machine) save(step string, change func(p *promise)) error {
	p := m.promise
	change(&p)
	err := atomicfile.WriteJSON(filepath.Join(m.Dir, member.MachineFile), p)
	if err == nil {
		m.promise = p
		err = m.step(step)
	}
	if err != nil {
		m.end(err)
	}
	return err
}

// hear tells another machine how this one stands.
func (m *machine) hear(_ context.Context, body []byte) (any, error) {
	var h hello
	if err := joining.Decode(body, &h); err != nil {
		return nil, err
	}
	m.learn(h.Machine.Addr)
	m.mu.Lock()
	defer m.mu.Unlock()
	s := standing{Machine: m.self(), Expect: m.Expect, Site: m.site, Origin: m.promise.Origin, Joins: m.promise.Site, Pledge: m.promise.Pledge, Knows: slices.Sorted(maps.Keys(m.addrs))}
	if m.proposal != nil {
		s.Proposal = m.proposal.ID
	}
	if m.site == "" {
		s.Origin = "" // of a founding that may not have come about
	}
	return s, nil
}

// pledge promises to take part in a proposal, and in no other.
func (m *machine) pledge(_ context.Context, body []byte) (any, error) {
	var ask pledgeRequest
	if err := joining.Decode(body, &ask); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if ask.Expect != m.Expect {
		return nil, joining.Refuse(codeExpect, "this machine expects %d machines and that one %d: start all with one --bootstrap-expect", m.Expect, ask.Expect)
	}
	if err := ask.Proposal.check(m.id, m.Expect); err != nil {
		return nil, joining.Refuse(joining.CodeMalformed, "%v", err)
	}
	switch mine := m.promise.Pledge; {
	case m.site != "" || m.promise.Site != "":
		return nil, joining.Refuse(joining.CodeLater, "this machine joins a site that is there already")
	case m.proposal != nil:
		return nil, joining.Refuse(joining.CodeLater, "this machine proposes to found the site itself")
	case mine != nil && mine.ID == ask.Proposal.ID:
		return struct{}{}, nil
	case mine != nil:
		return nil, joining.Refuse(joining.CodeLater, "this machine has promised to found the site with %s", mine.Founder)
	}
	if err := m.save("pledged", func(p *promise) { p.Pledge = &ask.Proposal }); err != nil {
		return nil, err
	}
	return struct{}{}, nil
}

// codeExpect refuses a machine that waits for another number of machines.
const codeExpect = "other_expect"

// round asks everybody how they stand and takes the step that follows.
func (m *machine) round(ctx context.Context) (id member.Identity, done bool, err error) {
	m.mu.Lock()
	before := m.promise // an answer tells of a proposal only if it was pledged to before
	m.mu.Unlock()
	seen := m.ask(ctx)
	if ctx.Err() != nil {
		return id, false, nil
	}
	m.mu.Lock()
	changed := m.promise.Pledge != before.Pledge
	m.mu.Unlock()
	if changed {
		return id, false, nil
	}
	var there []standing // nodes of sites
	for _, s := range seen {
		if s.Site != "" {
			there = append(there, s)
		}
	}
	switch {
	case before.Site != "":
		there = slices.DeleteFunc(there, func(s standing) bool { return s.Site != before.Site })
		if len(there) == 0 {
			m.waits("no node of the site answers that this machine is joining", "site", before.Site)
			return id, false, nil
		}
		return m.enter(ctx, before.Pledge, there)
	case before.Pledge != nil:
		return m.honour(ctx, before.Pledge, seen, there)
	case len(there) > 0:
		return m.enter(ctx, nil, there)
	}
	return m.gather(ctx, seen)
}

// ask says hello to every address, and gives the answers, one a machine.
func (m *machine) ask(ctx context.Context) map[string]standing {
	m.mu.Lock()
	addrs, self := slices.Sorted(maps.Keys(m.addrs)), m.self()
	m.mu.Unlock()
	answers := make([]standing, len(addrs))
	fails := make([]error, len(addrs))
	var asked sync.WaitGroup
	for i, addr := range addrs {
		asked.Go(func() {
			fails[i] = m.post(ctx, addr, pathHello, hello{Machine: self, Expect: m.Expect}, &answers[i])
		})
	}
	asked.Wait()
	seen := make(map[string]standing)
	for i, addr := range addrs {
		s := answers[i]
		switch {
		case fails[i] != nil:
			if ctx.Err() == nil {
				m.strange(addr, "this address does not answer with the token, and is left out", fails[i])
			}
			continue
		case s.Machine.ID == self.ID && s.Machine.Addr != self.Addr:
			m.strange(addr, "this machine is left out: clear the directory of one of the two with atoll node wipe", errors.New("its disk is a copy of this one's"))
			continue
		case s.Machine.ID == self.ID:
			continue // an address of this machine
		case s.Expect != m.Expect && s.Site == "":
			m.strange(addr, "this machine is left out: start all with one --bootstrap-expect", fmt.Errorf("it expects %d machines, this one %d", s.Expect, m.Expect))
		default:
			delete(m.odd, addr)
		}
		seen[s.Machine.ID] = s
		m.learn(append(s.Knows, s.Machine.Addr)...)
	}
	return seen
}

// strange logs what is the matter with an address when that changes.
func (m *machine) strange(addr, text string, err error) {
	reason := err.Error()
	if m.odd[addr] == reason {
		return
	}
	m.odd[addr] = reason
	m.Log.Warn(text, "address", addr, "error", err)
}

// waits logs for what the machine waits when that changes, and now and then.
func (m *machine) waits(text string, args ...any) {
	now := fmt.Sprint(append([]any{text}, args...)...)
	if now == m.said && time.Since(m.since) < remindEvery {
		return
	}
	m.said, m.since = now, time.Now()
	m.Log.Info("waiting for a site: "+text, args...)
}

// honour waits for the founder of what this machine has promised. Only the founder,
// or a node of the site that came of it, says what became of it.
func (m *machine) honour(ctx context.Context, p *Proposal, seen map[string]standing, there []standing) (id member.Identity, done bool, err error) {
	born := slices.DeleteFunc(slices.Clone(there), func(s standing) bool { return s.Origin != p.ID })
	if len(born) > 0 {
		return m.enter(ctx, p, born)
	}
	founder, ok := seen[p.Founder.ID]
	switch {
	case !ok:
		m.waits("the founder does not answer and may have founded the site: start it again; if its disk is lost, clear the others with atoll node wipe", "founder", p.Founder.Name, "address", p.Founder.Addr)
	case founder.Site == "" && founder.Proposal == p.ID:
		m.waits("the founder has not the promise of all machines yet", "founder", p.Founder.Name, "address", p.Founder.Addr)
	default: // it has not founded that site, and never will
		m.mu.Lock()
		defer m.mu.Unlock()
		return id, false, m.save("released", func(kept *promise) { kept.Pledge = nil })
	}
	return id, false, nil
}

// gather proposes a site once enough machines are there that have promised nothing
// to anybody, and this one is the first of them.
func (m *machine) gather(ctx context.Context, seen map[string]standing) (id member.Identity, done bool, err error) {
	free := []Machine{m.self()}
	var names, engaged []string
	for _, s := range seen {
		names = append(names, s.Machine.String())
		if s.Expect != m.Expect {
			continue
		}
		if s.Pledge != nil || s.Proposal != "" || s.Joins != "" {
			engaged = append(engaged, s.Machine.String())
			continue
		}
		free = append(free, s.Machine)
	}
	slices.Sort(names)
	slices.Sort(engaged)
	slices.SortFunc(free, func(a, b Machine) int { return strings.Compare(a.ID, b.ID) })
	switch {
	case len(free) < m.Expect && len(engaged) > 0:
		m.waits("machines that are there take part in another founding", "expected", m.Expect, "engaged", engaged)
		return id, false, nil
	case len(free) < m.Expect:
		m.waits("not all machines are there", "expected", m.Expect, "seen_besides_this_one", names)
		return id, false, nil
	case free[0].ID != m.id:
		m.waits("another machine founds it", "founder", free[0].Name, "address", free[0].Addr)
		return id, false, nil
	}
	p := Proposal{ID: table.NewID(), Founder: free[0], Machines: free[:m.Expect]}
	if err := p.check(m.id, m.Expect); err != nil {
		m.waits("two machines are called the same: give each its own --name", "machines", free)
		return id, false, nil
	}
	return m.propose(ctx, p)
}

// propose founds the site if all machines promise to take part in it.
func (m *machine) propose(ctx context.Context, p Proposal) (id member.Identity, done bool, err error) {
	m.mu.Lock()
	if m.promise.Pledge != nil || m.promise.Site != "" {
		m.mu.Unlock()
		return id, false, nil
	}
	m.proposal = &p
	m.mu.Unlock()
	fails := make([]error, len(p.Machines))
	var asked sync.WaitGroup
	for i, other := range p.Machines {
		if other.ID == p.Founder.ID {
			continue
		}
		asked.Go(func() {
			var none struct{}
			fails[i] = m.post(ctx, other.Addr, pathPledge, pledgeRequest{Proposal: p, Expect: m.Expect}, &none)
		})
	}
	asked.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := errors.Join(append(fails, ctx.Err())...); err != nil {
		m.proposal = nil // from here on it is dead, whoever promised what
		m.waits("a machine has not promised to take part", "error", err)
		return id, false, nil
	}
	if err := m.save("agreed", func(kept *promise) { kept.Origin = p.ID }); err != nil {
		return id, false, err
	}
	// Until this returns the others hear nothing. When it fails the machine ends: the
	// next start sees whether there is an identity.
	if id, err = member.Found(m.Dir, m.Name, m.Advertise, m.Keys); err != nil {
		return id, false, err
	}
	if err := m.step("founded"); err != nil {
		return id, false, err
	}
	m.site = id.SiteID
	m.Log.Info("founded the site; the other machines join it", "site", id.SiteID)
	return id, true, nil
}

// enter joins the site that the nodes are of, unless this machine has promised
// something else since it asked them: that founding may count on it.
func (m *machine) enter(ctx context.Context, pledged *Proposal, there []standing) (id member.Identity, done bool, err error) {
	slices.SortFunc(there, func(a, b standing) int { return strings.Compare(a.Machine.ID, b.Machine.ID) })
	addrs := make([]string, len(there))
	for i, s := range there {
		addrs[i] = s.Machine.Addr
		if s.Site != there[0].Site {
			m.waits("nodes of two sites answer with this token: take the token from one of them", "one", there[0].Machine.String(), "other", s.Machine.String())
			return id, false, nil
		}
	}
	m.mu.Lock()
	if m.promise.Pledge != pledged {
		m.mu.Unlock()
		return id, false, nil
	}
	if m.promise.Site != there[0].Site {
		err = m.save("saw the site", func(p *promise) { p.Site, p.Origin = there[0].Site, there[0].Origin })
	}
	self := m.self()
	m.mu.Unlock()
	if err != nil {
		return id, false, err
	}
	var silent []error
	for i, addr := range addrs {
		var grant grantAnswer
		err := m.post(ctx, addr, pathGrant, grantRequest{Machine: self}, &grant)
		var no *joining.Refusal
		if errors.As(err, &no) && no.Code != joining.CodeLater {
			return id, false, fmt.Errorf("joining the site at %s: %w", addr, err)
		}
		if err == nil {
			if err = m.step("granted"); err != nil {
				return id, false, err
			}
			id, err = m.Join(ctx, grant.Token, append([]string{addr}, slices.Delete(slices.Clone(addrs), i, i+1)...))
			if err == nil {
				return id, true, m.step("joined")
			}
			if !errors.Is(err, member.ErrUnreachable) {
				return id, false, err
			}
		}
		silent = append(silent, err)
	}
	m.waits("the site does not take this machine in yet", "error", errors.Join(silent...))
	return id, false, nil
}
