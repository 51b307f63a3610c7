// Package doctor examines a node and its ways to the others, and says in one line
// each what is well, what is not and what to change.
//
// It changes nothing. Everything it tries is bounded: the file that it writes to
// measure the disk, the time that a peer has, the peers that it asks at once.
package doctor

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/rest"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// States of a finding, from good to bad.
const (
	OK   = "ok"
	Warn = "warn" // works, but worse than it could
	Bad  = "bad"  // something does not work, or soon will not
)

// Finding is what one check found.
type Finding struct {
	Check string `json:"check"`
	State string `json:"state"` // ok, warn or bad
	Peer  string `json:"peer"`  // name of the node that it is about; "" for this one alone
	Text  string `json:"text"`
	// Remedy is what to change; "" when nothing is to be changed.
	Remedy string `json:"remedy"`
}

// Report of an examination.
type Report struct {
	Node     string    `json:"node"`    // id; "" of one that does not run
	Running  bool      `json:"running"` // else only the machine was looked at
	Findings []Finding `json:"findings"`
}

// Worst is the worst state among the findings.
func (r Report) Worst() string {
	worst := OK
	for _, f := range r.Findings {
		if f.State == Bad || f.State == Warn && worst == OK {
			worst = f.State
		}
	}
	return worst
}

// Network is the peer port.
type Network interface {
	Listen(service byte) net.Listener
	DialOver(ctx context.Context, addr string, service byte, by peernet.Carrier) (*peernet.Conn, error)
	// Dial takes any way, also a call to a node that cannot be dialled.
	Dial(ctx context.Context, addr string, service byte) (net.Conn, error)
	Routes() []peernet.Route
	// CalledBack says that the node at the address cannot be dialled and is called over
	// a connection that it keeps here; Parked that this node keeps one there.
	CalledBack(addr string) bool
	Parked(addr string) bool
	// Through is the address of the node through which the one at the address is reached.
	Through(addr string) string
}

// Roster knows the nodes of the site.
type Roster interface {
	Self() string
	Members(r table.Reader) ([]member.Member, error)
}

// Config of the room.
type Config struct {
	Data      string
	Advertise string // the node's peer address as others have it
	DB        *table.DB
	Roster    Roster
	Network   Network
	// Transport that connections are configured to take.
	Transport peernet.Transport
	Clock     func() time.Time // of the machine; nil is time.Now
}

// Doctor examines the node that it belongs to.
type Doctor struct {
	Config
	answering chan struct{} // a place for each answer that is given at once
}

// New makes the room.
func New(c Config) *Doctor {
	if c.Clock == nil {
		c.Clock = time.Now
	}
	return &Doctor{Config: c, answering: make(chan struct{}, 4)}
}

// Operations adds the room's operations to the API.
func (d *Doctor) Operations(k *rest.Kernel) {
	rest.Register(k, rest.Operation[struct{}, Report]{
		ID: "examineNode", Method: http.MethodGet, Path: "/api/atoll/v1/doctor", Tag: "doctor",
		Summary: "Examine this node, its machine and its ways to the others, and say what to change", Permission: access.NodeRead,
		Do: func(ctx context.Context, _ *struct{}) (Report, error) { return d.Examine(ctx) },
	})
}

// patience bounds an examination.
const patience = 25 * time.Second

// Examine looks at the machine and at all peers.
func (d *Doctor) Examine(ctx context.Context) (Report, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r := Report{Node: d.Roster.Self(), Running: true, Findings: Local(ctx, d.Data)}
	r.Findings = append(r.Findings, address(ctx, d.Advertise))
	found, err := d.peers(ctx)
	r.Findings = append(r.Findings, found...)
	return r, err
}

// address looks whether others can find the name by which this node is known.
func address(ctx context.Context, advertise string) Finding {
	f := Finding{Check: "address", State: OK}
	host, _, err := net.SplitHostPort(advertise)
	if err != nil {
		f.State, f.Text, f.Remedy = Bad, fmt.Sprintf("%q is no address", advertise), "start the node with --advertise HOST:PORT"
		return f
	}
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		f.State = Bad
		f.Text = fmt.Sprintf("the name %s, by which others know this node, is not found: %v", host, err)
		f.Remedy = "put it into DNS, or start the node with --advertise and an address"
		return f
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		f.State, f.Text = Warn, fmt.Sprintf("the addresses of this machine cannot be read: %v", err)
		return f
	}
	for _, a := range own {
		ip, _, _ := strings.Cut(a.String(), "/")
		if slices.ContainsFunc(found, func(n netip.Addr) bool { return n.Unmap().String() == ip }) {
			f.Text = fmt.Sprintf("others reach this node at %s, which is this machine's", advertise)
			return f
		}
	}
	f.Text = fmt.Sprintf("others reach this node at %s, which is not this machine's own address: something must pass it on", advertise)
	return f
}
