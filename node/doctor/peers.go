package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

const (
	// try bounds one connection, answer a peer's whole answer.
	try    = 5 * time.Second
	answer = 12 * time.Second
	// atOnce is how many peers are examined at the same time.
	atOnce = 8
	// examine is what the one who asks says first. Who only tries whether a connection
	// gets through says nothing, so that two doctors do not call each other for ever.
	examine byte = 'e'
	// errorText bounds what is passed on of an error.
	errorText = 300
)

var carriers = [...]peernet.Carrier{peernet.TCP, peernet.QUIC}

// clockSaid is the first half of a peer's answer, at once; backSaid the second, once
// it has tried to dial back: what failed, by carrier, "" where nothing did.
type clockSaid struct {
	NowMS int64 `json:"now_ms"`
}

type backSaid map[peernet.Carrier]string

// Run answers other nodes until ctx ends.
func (d *Doctor) Run(ctx context.Context) error {
	ln := d.Network.Listen(peernet.ServiceDoctor)
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("answer the doctors of other nodes: %w", err)
		}
		select {
		case d.answering <- struct{}{}:
			wg.Go(func() {
				defer func() { <-d.answering }()
				defer c.Close()
				d.help(ctx, c)
			})
		default: // one at a time is what a doctor needs
			c.Close()
		}
	}
}

// help tells another node the time and dials it back, at the address that the site
// knows of it: nobody can have others dialled.
func (d *Doctor) help(ctx context.Context, c net.Conn) {
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	_ = c.SetDeadline(time.Now().Add(answer))
	var said [1]byte
	if _, err := io.ReadFull(c, said[:]); err != nil || said[0] != examine {
		return
	}
	out := json.NewEncoder(c)
	if out.Encode(clockSaid{d.Clock().UnixMilli()}) != nil {
		return
	}
	who, ok := c.(interface{ PeerID() string })
	if !ok {
		return
	}
	members, err := d.others()
	if err != nil {
		return
	}
	for _, m := range members {
		if m.ID == who.PeerID() {
			back := backSaid{}
			for by, err := range d.reach(ctx, m.Addr) {
				back[by] = ""
				if err != nil {
					back[by] = err.Error()[:min(errorText, len(err.Error()))]
				}
			}
			_ = out.Encode(back) // who asked has left
		}
	}
}

// reach tries each carrier.
func (d *Doctor) reach(ctx context.Context, addr string) map[peernet.Carrier]error {
	ctx, cancel := context.WithTimeout(ctx, try)
	defer cancel()
	var errs [len(carriers)]error
	var wg sync.WaitGroup
	for i, by := range carriers {
		wg.Go(func() {
			c, err := d.Network.DialOver(ctx, addr, peernet.ServiceDoctor, by)
			if errs[i] = err; err == nil {
				c.Close()
			}
		})
	}
	wg.Wait()
	out := map[peernet.Carrier]error{}
	for i, by := range carriers {
		out[by] = errs[i]
	}
	return out
}

func (d *Doctor) others() (out []member.Member, err error) {
	err = d.DB.View(func(v *table.View) error {
		all, err := d.Roster.Members(v)
		for _, m := range all {
			if m.ID != d.Roster.Self() {
				out = append(out, m)
			}
		}
		return err
	})
	return out, err
}

// peers examines the ways to all other nodes.
func (d *Doctor) peers(ctx context.Context) ([]Finding, error) {
	members, err := d.others()
	if err != nil {
		return nil, err
	}
	found := make([][]Finding, len(members))
	var group errgroup.Group
	group.SetLimit(atOnce)
	for i, m := range members {
		group.Go(func() error {
			found[i] = d.peer(ctx, m)
			for j := range found[i] {
				found[i][j].Peer = m.Name
			}
			return nil
		})
	}
	err = group.Wait()
	var all []Finding
	for _, some := range found {
		all = append(all, some...)
	}
	return all, err
}

// peer examines the ways to one node and back.
func (d *Doctor) peer(ctx context.Context, m member.Member) []Finding {
	there := d.reach(ctx, m.Addr)
	found := []Finding{d.ways("reach", "reaching "+m.Name+" at "+m.Addr, there, "open the port for %s on the way to "+m.Addr)}
	by := peernet.TCP
	if there[by] != nil {
		by = peernet.QUIC
	}
	if there[by] != nil {
		how := "all goes over connections that it opens"
		if through := d.Network.Through(m.Addr); through != "" {
			how = "nor can it dial this node; all goes through the node at " + through
		} else if !d.Network.CalledBack(m.Addr) {
			return found
		}
		by = "" // whatever gets through
		found[0].State, found[0].Text = Warn, fmt.Sprintf("%s cannot be dialled at %s; %s. TCP: %v. UDP: %v", m.Name, m.Addr, how, there[peernet.TCP], there[peernet.QUIC])
	}
	clock, back, path, err := d.ask(ctx, m.Addr, by)
	if err != nil {
		return append(found, Finding{Check: "answer", State: Warn, Text: fmt.Sprintf("%s did not answer all questions: %v", m.Name, err), Remedy: "if it runs an older version, upgrade it"})
	}
	reached := d.ways("reached", m.Name+" reaching this node at "+d.Advertise, back, "open the port for %s on the way to "+d.Advertise+", or set --advertise")
	if reached.State == Bad && d.Network.Parked(m.Addr) {
		reached.State, reached.Text = Warn, fmt.Sprintf("%s cannot dial this node at %s, and is served over connections that this node opens. TCP: %v. UDP: %v", m.Name, d.Advertise, back[peernet.TCP], back[peernet.QUIC])
	}
	if through := d.Network.Through(m.Addr); reached.State == Bad && through != "" {
		reached.State, reached.Text = Warn, fmt.Sprintf("%s cannot dial this node at %s; all goes through the node at %s. TCP: %v. UDP: %v", m.Name, d.Advertise, through, back[peernet.TCP], back[peernet.QUIC])
	}
	found = append(found, reached)
	found = append(found, clock)
	if path.MTU > 0 {
		f := Finding{Check: "mtu", State: OK, Text: fmt.Sprintf("packets of %d bytes get through", path.MTU)}
		if path.MTU < 1280 {
			f.State, f.Remedy = Warn, "QUIC needs 1,280 bytes, and small packets cost much: look at the tunnel on the way"
		}
		found = append(found, f)
	}
	return append(found, d.route(m, path))
}

// ways judges which carriers get through. With one of them all goes well.
func (d *Doctor) ways(check, what string, errs map[peernet.Carrier]error, remedy string) Finding {
	f := Finding{Check: check, State: OK, Text: what + ": TCP and UDP get through"}
	tcp, udp := errs[peernet.TCP], errs[peernet.QUIC]
	switch {
	case tcp != nil && udp != nil:
		f.State, f.Text = Bad, fmt.Sprintf("%s fails. TCP: %v. UDP: %v", what, tcp, udp)
		f.Remedy = fmt.Sprintf("see that the node runs, and "+remedy, "TCP and UDP")
	case tcp != nil:
		f.State, f.Text = Warn, fmt.Sprintf("%s: TCP does not get through, QUIC carries all: %v", what, tcp)
		f.Remedy = fmt.Sprintf(remedy, "TCP")
	case udp != nil && d.Transport == peernet.OnlyTCP:
		f.Text = what + ": TCP gets through, UDP is not used"
	case udp != nil:
		f.State, f.Text = Warn, fmt.Sprintf("%s: UDP does not get through, TCP carries all: %v", what, udp)
		f.Remedy = fmt.Sprintf(remedy, "UDP") + ", or start the nodes with --peer-transport tcp"
	}
	return f
}

const (
	clockWarn = time.Second
	clockBad  = time.Minute
)

// ask has a peer tell its time and dial back. The carrier "" is any.
func (d *Doctor) ask(ctx context.Context, addr string, by peernet.Carrier) (clock Finding, back map[peernet.Carrier]error, path peernet.Path, err error) {
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	var c net.Conn
	if by == "" {
		c, err = d.Network.Dial(ctx, addr, peernet.ServiceDoctor)
	} else {
		c, err = d.Network.DialOver(ctx, addr, peernet.ServiceDoctor, by)
	}
	if err != nil {
		return clock, nil, path, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	asked := time.Now()
	wall := d.Clock()
	if _, err := c.Write([]byte{examine}); err != nil {
		return clock, nil, path, err
	}
	in := json.NewDecoder(io.LimitReader(c, 4<<10))
	var now clockSaid
	if err := in.Decode(&now); err != nil {
		return clock, nil, path, err
	}
	clock = difference(time.UnixMilli(now.NowMS).Sub(wall), time.Since(asked))
	var said backSaid
	if err := in.Decode(&said); err != nil {
		return clock, nil, path, err
	}
	back = map[peernet.Carrier]error{}
	for _, by := range carriers {
		text, told := said[by]
		switch {
		case !told:
			back[by] = errors.New("it did not try")
		case text != "":
			back[by] = fmt.Errorf("%.*q", errorText, text)
		}
	}
	if c, ok := c.(*peernet.Conn); ok {
		path, _ = c.Path()
	}
	return clock, back, path, nil
}

// difference judges the clocks: the peer's was read at some moment of the round trip,
// so the difference is known to half of that.
func difference(ahead, roundTrip time.Duration) Finding {
	off, bound := ahead-roundTrip/2, roundTrip/2
	f := Finding{Check: "clock", State: OK, Text: fmt.Sprintf("the clocks differ by %v, give or take %v", off.Round(time.Millisecond), bound.Round(time.Millisecond))}
	switch least := off.Abs() - bound; {
	case least > clockBad:
		f.State = Bad
	case least > clockWarn:
		f.State = Warn
	}
	if f.State != OK {
		f.Remedy = "run a time service (chrony, systemd-timesyncd) on both machines"
	}
	return f
}

// route says which carrier connections take and how congestion is controlled.
func (d *Doctor) route(m member.Member, path peernet.Path) Finding {
	f := Finding{Check: "transport", State: OK, Text: "no connection has been needed yet"}
	for _, r := range d.Network.Routes() {
		if r.Addr == m.Addr {
			f.Text = fmt.Sprintf("connections go over %s: %s", r.Carrier, r.Why)
		}
	}
	if path.Congestion != "" {
		f.Text += fmt.Sprintf("; congestion control %s, round trip %v, %d of %d packets sent again", path.Congestion, path.RTT.Round(10*time.Microsecond), path.Again, path.Packets)
	}
	return f
}
