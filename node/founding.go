package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/atoll-registry/atoll/cluster/founding"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// checkFounding completes what has to do with founding a site by one token.
func (c *Config) checkFounding() error {
	if c.Expect == 0 {
		return nil
	}
	const example = "--join A:5001,B:5001,C:5001 --bootstrap-expect 3 --token-file FILE"
	switch {
	case c.Init:
		return fault.New(fault.Invalid, "--init founds a site alone and --bootstrap-expect with others: choose one")
	case len(c.Join) == 0:
		return fault.New(fault.Invalid, "--bootstrap-expect needs the peer addresses of the machines that found the site: %s", example)
	case c.Token == "":
		return fault.New(fault.Invalid, "--bootstrap-expect needs the token that all of the machines hold (%s); make one anywhere with: atoll token create --bootstrap -o FILE", example)
	}
	if err := founding.CheckExpect(c.Expect, c.Join); err != nil {
		return fault.New(fault.Invalid, "--bootstrap-expect %d: %v", c.Expect, err)
	}
	token, err := pki.ParseToken(c.Token)
	if err == nil {
		c.pairing, err = pki.NewPairing(token)
	}
	if err != nil {
		return fault.Wrap(err, fault.Invalid, "the token for --bootstrap-expect")
	}
	return nil
}

// paired is how this machine proves to hold the token; nil without one.
func (c Config) paired() (*peernet.Founding, error) {
	if c.pairing == nil {
		return nil, nil
	}
	cert, err := c.pairing.Certificate()
	return &peernet.Founding{Cert: cert, Verify: c.pairing.Verify}, err
}

// foundTogether waits until this machine has founded a site or joined it.
func (n *Node) foundTogether(ctx context.Context) (who member.Identity, err error) {
	if err := checkFirstPassword(n.config.AdminPassword); err != nil {
		return who, err
	}
	paired, err := n.config.paired()
	if err != nil {
		return who, err
	}
	network, err := peernet.New(peernet.Config{Log: n.log, Founding: paired, Transport: n.config.transport})
	if err != nil {
		return who, err
	}
	tcp, ok := n.peerListener.(*net.TCPListener)
	if !ok {
		return who, fmt.Errorf("a peer port of type %T cannot be lent", n.peerListener)
	}
	packets, err := n.lentPackets()
	if err != nil {
		return who, err
	}
	serving, stop := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- network.ServeBoth(serving, lent{tcp}, packets) }()
	c := n.founders(network)
	c.Join = n.joinWith
	who, n.founded, err = founding.Run(ctx, c)
	stop()
	err = errors.Join(err, <-served, tcp.SetDeadline(time.Time{}))
	if errors.Is(err, founding.ErrPromised) {
		err = fault.Wrap(err, fault.Conflict, "this node did not start")
	}
	return who, notJoined(err)
}

func (n *Node) founders(network founding.Network) founding.Config {
	c := n.config
	return founding.Config{
		Dir: c.Data, Keys: n.keys, Name: c.Name, Advertise: c.Advertise, Addrs: c.Join, Expect: c.Expect,
		Pairing: c.pairing, Network: network, Log: n.log,
	}
}

// welcome lets machines in that hold the token by which the site was founded.
func (n *Node) welcome(ctx context.Context) error {
	if n.config.pairing == nil {
		<-ctx.Done()
		return nil
	}
	d := founding.Door{Config: n.founders(n.network), Site: n.member, Places: max(n.config.Expect, len(n.config.Join))}
	return d.Run(ctx)
}

// lent is a listener that is closed without being closed: the next one to serve
// it has it without a gap in which another could take the port.
type lent struct{ *net.TCPListener }

func (l lent) Close() error { return l.SetDeadline(time.Unix(1, 0)) }
