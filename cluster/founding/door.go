package founding

import (
	"context"
	"time"

	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
)

// Site is what a Door needs of the node.
type Site interface {
	Identity() member.Identity
	OpenToFounders(ctx context.Context, f member.Founders) error
	GrantFounder(ctx context.Context, f member.Founders, mint func(pin []byte) (pki.Token, error)) (string, error)
}

// Door lets machines that hold the token into the site of a node that was started
// with it.
type Door struct {
	Config // without Join
	Site   Site
	// Places is how many machines may come in by the token, this one among them.
	Places int

	promise promise
}

// Run answers the machines until ctx ends.
func (d *Door) Run(ctx context.Context) (err error) {
	if d.promise, err = load(d.Dir, d.Pairing.ID(), true); err != nil {
		return err
	}
	server := joining.Server(bounds(), map[string]joining.Handler{pathHello: d.hear, pathPledge: d.pledge, pathGrant: d.grant}, d.Log, nil)
	served := make(chan error, 1)
	go func() { served <- server.Serve(d.Network.ListenFounding()) }()
	defer func() {
		server.Close()
		<-served
	}()
	open := false
	for {
		if !open {
			err := d.Site.OpenToFounders(ctx, d.founders(Machine{ID: d.promise.Machine, Name: d.Name, Addr: d.Advertise}))
			if open = err == nil; !open && ctx.Err() == nil {
				d.Log.Info("the site is not open to machines with the founding token yet", "error", err)
			}
		}
		pause := time.NewTimer(time.Second)
		tick := pause.C
		if open {
			tick = nil
		}
		select {
		case <-tick:
		case err := <-served:
			served <- nil
			pause.Stop()
			return err
		case <-ctx.Done():
			pause.Stop()
			return nil
		}
		pause.Stop()
	}
}

func (d *Door) founders(m Machine) member.Founders {
	return member.Founders{Token: d.Pairing.ID(), Places: d.Places, Machine: m.ID, Name: m.Name, Addr: m.Addr}
}

func (d *Door) hear(_ context.Context, body []byte) (any, error) {
	var h hello
	if err := joining.Decode(body, &h); err != nil {
		return nil, err
	}
	return standing{
		Machine: Machine{ID: d.promise.Machine, Name: d.Name, Addr: d.Advertise}, Expect: d.Expect,
		Site: d.Site.Identity().SiteID, Origin: d.promise.Origin, Knows: d.Addrs,
	}, nil
}

func (d *Door) pledge(context.Context, []byte) (any, error) {
	return nil, joining.Refuse(joining.CodeLater, "this machine is a node of the site %s: join that", d.Site.Identity().SiteID)
}

func (d *Door) grant(ctx context.Context, body []byte) (any, error) {
	var ask grantRequest
	if err := joining.Decode(body, &ask); err != nil {
		return nil, err
	}
	if len(ask.Machine.ID) != 32 || !pki.ValidID(ask.Machine.ID) || len(ask.Machine.Name) > 63 || len(ask.Machine.Addr) > 261 {
		return nil, joining.Refuse(joining.CodeMalformed, "the machine's id, name or address is malformed")
	}
	site := d.Site.Identity().SiteID
	token, err := d.Site.GrantFounder(ctx, d.founders(ask.Machine), func(pin []byte) (pki.Token, error) {
		return d.Pairing.Grant(site, ask.Machine.ID, pin)
	})
	if err != nil {
		return nil, err
	}
	d.Log.Info("a machine with the founding token may join", "name", ask.Machine.Name, "address", ask.Machine.Addr)
	return grantAnswer{Token: token}, nil
}
