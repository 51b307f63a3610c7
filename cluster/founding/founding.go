// Package founding makes one site of machines that hold one token and are told
// nothing else apart: the same command line on each. Run is a machine without a
// site, until it has founded one or joined; a Door is a node of the site that lets
// the others in.
//
// Invariant: from the machines that hold a token at most one site is founded by it,
// whatever is killed, restarted or cut off, as long as no disk is cleared. DESIGN.md
// beside it says why.
package founding

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
)

// Network carries talks between those who hold one token. Both ends of each
// connection have proved that they do.
type Network interface {
	ListenFounding() net.Listener
	DialFounding(ctx context.Context, addr string) (net.Conn, error)
}

// Config of a machine that holds the token.
type Config struct {
	Dir             string        // data directory
	Keys            *keyring.Ring // as in member.JoinConfig
	Name, Advertise string        // as in member.JoinConfig
	Addrs           []string
	Expect          int // so many machines found the site
	Pairing         *pki.Pairing
	Network         Network
	// Join joins a site with a join token, at nodes of these addresses.
	Join func(ctx context.Context, token string, addrs []string) (member.Identity, error)
	Log  *slog.Logger
	// Pause between two rounds of questions; 0 means 1 s.
	Pause time.Duration

	// Step is called after each thing that was made durable; its error ends the
	// machine there, as a crash would. For tests; nil otherwise.
	Step func(name string) error
}

// MostExpected bounds Config.Expect, and with it what machines tell each other.
const MostExpected = 32

// CheckExpect says, before anything is done, whether so many of the machines at
// these addresses may found a site. Fewer than a majority of them could do so twice,
// each half without the other.
func CheckExpect(expect int, addrs []string) error {
	distinct := make(map[string]bool)
	for _, a := range addrs {
		distinct[a] = true
	}
	switch {
	case expect < 2:
		return fmt.Errorf("%d machines do not found a site together: expect 2 or more, or found it on one with --init", expect)
	case expect > MostExpected:
		return fmt.Errorf("%d machines are too many to wait for: expect %d at most, the others join when the site is there", expect, MostExpected)
	case 2*expect <= len(distinct):
		return fmt.Errorf("%d of %d addresses could found a site twice, each half without the other: expect %d or more", expect, len(distinct), len(distinct)/2+1)
	}
	return nil
}

// What machines say to each other.
const (
	pathHello  = "/v1/founding/hello"
	pathPledge = "/v1/founding/pledge"
	pathGrant  = "/v1/founding/grant"
	// pathPromise brings the pledge of a machine that the founder cannot dial.
	pathPromise = "/v1/founding/promise"
)

// Machine is one that holds the token.
type Machine struct {
	ID   string `json:"id"` // random, made once for a data directory
	Name string `json:"name"`
	Addr string `json:"addr"`
}

func (m Machine) String() string { return fmt.Sprintf("%s at %s", m.Name, m.Addr) }

// Proposal is what one machine, the founder, wants to found with others. It is
// alive only in the process that made it, and dead when that process says so or
// ends without having founded.
type Proposal struct {
	ID       string    `json:"id"`
	Founder  Machine   `json:"founder"`
	Machines []Machine `json:"machines"` // all of them, the founder too
}

type hello struct {
	Machine Machine `json:"machine"`
	Expect  int     `json:"expect"`
	// Engaged says that the machine takes part in a founding, or joins a site.
	Engaged bool     `json:"engaged,omitempty"`
	Sees    []string `json:"sees"` // as in standing
}

// standing is the answer to a hello.
type standing struct {
	Machine Machine `json:"machine"`
	Expect  int     `json:"expect"`
	// Site is the machine's; "" while it has none. Origin is the proposal by which
	// the site was founded, as far as the machine knows.
	Site   string `json:"site,omitempty"`
	Origin string `json:"origin,omitempty"`
	// Joins is the site that it is about to join.
	Joins string `json:"joins,omitempty"`
	// Pledge is what it has promised; Proposal the id of what it proposes.
	Pledge   *Proposal `json:"pledge,omitempty"`
	Proposal string    `json:"proposal,omitempty"`
	// Offer is what it proposes, if whoever asks is to take part in it.
	Offer *Proposal `json:"offer,omitempty"`
	// Sees are the ids of the machines that answer when it dials them; null, of an older
	// version: it does not say.
	Sees []string `json:"sees"`
	// Knows are addresses of machines that it knows.
	Knows []string `json:"knows,omitempty"`
}

type pledgeRequest struct {
	Proposal Proposal `json:"proposal"`
	Expect   int      `json:"expect"`
}

type promiseRequest struct {
	Machine  string `json:"machine"`
	Proposal string `json:"proposal"`
}

type grantRequest struct {
	Machine Machine `json:"machine"`
}

type grantAnswer struct {
	Token string `json:"token"`
}

// bounds of what holders of the token may ask: they are no strangers, and many.
func bounds() joining.Bounds {
	return joining.Bounds{PerSecond: 200, Burst: 400, AtOnce: 2 * MostExpected}
}

const (
	// talkTime is how long an answer is waited for that needs no site.
	talkTime = 5 * time.Second
	// heardFor is how long a hello counts: who says it may wait for the answers of others.
	heardFor = 3 * talkTime
	// promiseTime is how long a founder waits for machines that it cannot dial to ask.
	promiseTime = 2*talkTime + 2*time.Second
)

func (c Config) post(ctx context.Context, addr, path string, ask, answer any) error {
	if path != pathGrant { // which waits for a leader
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, talkTime)
		defer cancel()
	}
	return joining.Post(ctx, func(ctx context.Context) (net.Conn, error) { return c.Network.DialFounding(ctx, addr) }, path, ask, answer)
}

func (c Config) step(name string) error {
	if c.Step == nil {
		return nil
	}
	return c.Step(name)
}

// has says whether a machine takes part in the proposal.
func (p Proposal) has(id string) bool {
	return slices.ContainsFunc(p.Machines, func(m Machine) bool { return m.ID == id })
}

// check makes sure of a proposal that came from another machine.
func (p Proposal) check(self string, expect int) error {
	if !pki.ValidID(p.ID) || len(p.Machines) != expect {
		return fmt.Errorf("the proposal is of %d machines instead of %d", len(p.Machines), expect)
	}
	names, ids := map[string]bool{}, map[string]bool{}
	for _, m := range p.Machines {
		names[m.Name], ids[m.ID] = true, true
	}
	switch {
	case len(ids) != expect || len(names) != expect:
		return errors.New("a machine or a name is in the proposal twice")
	case !ids[self] || !ids[p.Founder.ID]:
		return errors.New("the proposal lacks its founder, or this machine")
	}
	return nil
}
