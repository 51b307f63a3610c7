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
	sees     []string         // as in standing
	heard    map[string]heard // who has said hello, by id
	awaited  map[string]chan struct{}
	end      context.CancelCauseFunc

	said  string // what was logged last, and when
	since time.Time
	odd   map[string]string // what was logged of addresses

	view          string // who founds it from among whom; see stands
	stood, viewed time.Time
}

// heard is a hello that came in.
type heard struct {
	hello
	at time.Time
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
	m := &machine{Config: c, id: p.Machine, promise: p, addrs: make(map[string]bool), sees: []string{}, heard: make(map[string]heard), end: end, odd: make(map[string]string)}
	m.learn(c.Addrs...)
	server := joining.Server(bounds(), map[string]joining.Handler{pathHello: m.hear, pathPledge: m.pledge, pathPromise: m.promised}, quiet(c.Log), nil)
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
	if _, known := m.heard[h.Machine.ID]; h.Machine.ID != m.id && (known || len(m.heard) < 4*MostExpected) {
		m.heard[h.Machine.ID] = heard{h, time.Now()}
	}
	s := standing{Machine: m.self(), Expect: m.Expect, Site: m.site, Origin: m.promise.Origin, Joins: m.promise.Site, Pledge: m.promise.Pledge, Sees: m.sees, Knows: slices.Sorted(maps.Keys(m.addrs))}
	if m.proposal != nil {
		s.Proposal = m.proposal.ID
		if m.proposal.has(h.Machine.ID) {
			s.Offer = m.proposal
		}
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
	if ask.Expect != m.Expect {
		return nil, joining.Refuse(codeExpect, "this machine expects %d machines and that one %d: start all with one --bootstrap-expect", m.Expect, ask.Expect)
	}
	return struct{}{}, m.pledgeTo(ask.Proposal)
}

func (m *machine) pledgeTo(proposal Proposal) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := proposal.check(m.id, m.Expect); err != nil {
		return joining.Refuse(joining.CodeMalformed, "%v", err)
	}
	switch mine := m.promise.Pledge; {
	case m.site != "" || m.promise.Site != "":
		return joining.Refuse(joining.CodeLater, "this machine joins a site that is there already")
	case m.proposal != nil:
		return joining.Refuse(joining.CodeLater, "this machine proposes to found the site itself")
	case mine != nil && mine.ID == proposal.ID:
		return nil
	case mine != nil:
		return joining.Refuse(joining.CodeLater, "this machine has promised to found the site with %s", mine.Founder)
	}
	return m.save("pledged", func(p *promise) { p.Pledge = &proposal })
}

// promised hears that a machine which this one cannot dial has pledged.
func (m *machine) promised(_ context.Context, body []byte) (any, error) {
	var ask promiseRequest
	if err := joining.Decode(body, &ask); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.proposal == nil || m.proposal.ID != ask.Proposal {
		return nil, joining.Refuse(joining.CodeLater, "this machine does not propose that")
	}
	if came := m.awaited[ask.Machine]; came != nil {
		close(came)
		delete(m.awaited, ask.Machine)
	}
	return struct{}{}, nil
}

// bring tells a founder that cannot dial this machine of its pledge. One that did not
// get through is told again in the next round.
func (m *machine) bring(ctx context.Context, founder standing) {
	if slices.Contains(founder.Sees, m.id) {
		return // it asks by itself
	}
	var none struct{}
	if err := m.post(ctx, founder.Machine.Addr, pathPromise, promiseRequest{Machine: m.id, Proposal: founder.Offer.ID}, &none); err != nil {
		m.Log.Debug("the founder was not told of this machine's promise", "founder", founder.Machine.Name, "error", err)
	}
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
	said := hello{Machine: self, Expect: m.Expect, Sees: m.sees, Engaged: m.promise.Pledge != nil || m.promise.Site != "" || m.proposal != nil}
	walled := map[string]bool{}
	for _, h := range m.heard {
		walled[h.Machine.Addr] = time.Since(h.at) < heardFor
	}
	m.mu.Unlock()
	answers := make([]standing, len(addrs))
	fails := make([]error, len(addrs))
	var asked sync.WaitGroup
	for i, addr := range addrs {
		asked.Go(func() {
			fails[i] = m.post(ctx, addr, pathHello, said, &answers[i])
		})
	}
	asked.Wait()
	seen := make(map[string]standing)
	for i, addr := range addrs {
		s := answers[i]
		switch {
		case fails[i] != nil:
			if ctx.Err() == nil && walled[addr] {
				m.strange(addr, "this address cannot be dialled from here: its machine takes part by what it dials", fails[i])
			} else if ctx.Err() == nil {
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
	if ctx.Err() == nil {
		m.mu.Lock()
		m.sees = slices.AppendSeq([]string{}, maps.Keys(seen))
		m.mu.Unlock()
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
		if founder.Offer != nil {
			m.bring(ctx, founder)
		}
		m.waits("the founder has not the promise of all machines yet", "founder", p.Founder.Name, "address", p.Founder.Addr)
	default: // it has not founded that site, and never will
		m.mu.Lock()
		defer m.mu.Unlock()
		return id, false, m.save("released", func(kept *promise) { kept.Pledge = nil })
	}
	return id, false, nil
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
