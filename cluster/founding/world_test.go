package founding

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
)

// world is machines on a network in memory. Their disks outlive them.
type world struct {
	t        *testing.T
	mu       sync.Mutex
	boxes    []*box
	cut      map[[2]string]bool
	walled   map[[2]string]bool        // as cut, and stays
	sites    map[string]*pki.Authority // of sites that somebody has joined
	admitted map[string]string         // node ids by join tokens
	fault    func(b *box, step string) error
}

// box is one machine; run counts its lives.
type box struct {
	w       *world
	config  Config
	places  int
	pairing *pki.Pairing

	mu       sync.Mutex
	listener *line
	cancel   context.CancelFunc
	ended    chan error
	log      *lines
}

func newWorld(t *testing.T) *world {
	return &world{t: t, cut: map[[2]string]bool{}, walled: map[[2]string]bool{}, sites: map[string]*pki.Authority{}, admitted: map[string]string{}}
}

func newPairing(t *testing.T) *pki.Pairing {
	t.Helper()
	token, err := pki.NewSiteToken()
	if err != nil {
		t.Fatal(err)
	}
	p, err := pki.NewPairing(token)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func addr(i int) string { return fmt.Sprintf("10.0.0.%d:5001", i+1) }

// add puts machines with one command line into the world.
func (w *world) add(n, expect int, p *pki.Pairing) []*box {
	var addrs []string
	for i := range n {
		addrs = append(addrs, addr(len(w.boxes)+i))
	}
	for range n {
		i := len(w.boxes)
		b := &box{w: w, pairing: p, places: max(n, expect), log: &lines{t: w.t}}
		b.config = Config{
			Dir: filepath.Join(w.t.TempDir(), "data"), Name: fmt.Sprint("box", i+1), Advertise: addr(i), Addrs: addrs, Expect: expect,
			Pairing: p, Network: b, Join: b.join, Log: slog.New(slog.NewTextHandler(b.log, nil)),
			Step: func(name string) error {
				w.mu.Lock()
				fault := w.fault
				w.mu.Unlock()
				if fault == nil {
					return nil
				}
				return fault(b, name)
			},
		}
		w.boxes = append(w.boxes, b)
	}
	return w.boxes[len(w.boxes)-n:]
}

// start runs the machine on what its disk holds, until it is killed or ends.
func (b *box) start() {
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.w.t.Context()))
	b.cancel, b.ended = cancel, make(chan error, 1)
	go func() {
		err := b.live(ctx)
		b.mu.Lock()
		if b.listener != nil {
			b.listener.Close()
		}
		b.mu.Unlock()
		b.ended <- err
	}()
}

func (b *box) live(ctx context.Context) error {
	if _, err := member.LoadIdentity(b.config.Dir, b.config.Keys); errors.Is(err, member.ErrEmpty) {
		if _, _, err := Run(ctx, b.config); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	d := Door{Config: b.config, Site: b, Places: b.places}
	return d.Run(ctx)
}

// kill ends the machine; what it was about to say is not said.
func (b *box) kill() {
	if b.cancel == nil {
		return
	}
	b.mu.Lock()
	if b.listener != nil {
		b.listener.Close()
	}
	b.mu.Unlock()
	b.cancel()
	<-b.ended
	b.cancel = nil
}

// site is that of the machine's disk; "" for none.
func (b *box) site() string {
	id, err := member.LoadIdentity(b.config.Dir, b.config.Keys)
	if err != nil && !errors.Is(err, member.ErrEmpty) {
		b.w.t.Errorf("%s: %v", b.config.Name, err)
	}
	return id.SiteID
}

// The machine as its node, which grants by the rules of cluster/member.
func (b *box) Identity() member.Identity {
	id, err := member.LoadIdentity(b.config.Dir, b.config.Keys)
	if err != nil {
		b.w.t.Error(err)
	}
	return id
}

func (b *box) OpenToFounders(context.Context, member.Founders) error { return nil }

func (b *box) GrantFounder(_ context.Context, f member.Founders, mint func([]byte) (pki.Token, error)) (string, error) {
	token, err := mint(make([]byte, pki.PinSize))
	return token.String() + " " + b.site(), err
}

// join makes the machine a node of the site of the first address, as member.Join does.
func (b *box) join(ctx context.Context, grant string, addrs []string) (id member.Identity, err error) {
	var token, site string
	if _, err := fmt.Sscan(grant, &token, &site); err != nil {
		return id, err
	}
	c, err := b.DialFounding(ctx, addrs[0]) // is it up
	if err != nil {
		return id, fmt.Errorf("%w: %w", member.ErrUnreachable, err)
	}
	c.Close()
	b.w.mu.Lock()
	defer b.w.mu.Unlock()
	if b.w.sites[site] == nil {
		if b.w.sites[site], err = pki.NewAuthority(site, time.Now()); err != nil {
			return id, err
		}
	}
	if b.w.admitted[token] == "" {
		b.w.admitted[token] = table.NewID()
	}
	key, err := pki.NewKey()
	if err != nil {
		return id, err
	}
	id = member.Identity{SiteID: site, NodeID: b.w.admitted[token], Name: b.config.Name, CA: b.w.sites[site].CertPEM()}
	if id.Key, err = pki.MarshalKey(key); err != nil {
		return id, err
	}
	if id.ClusterKey, err = pki.NewClusterKey(); err != nil {
		return id, err
	}
	if id.Cert, err = b.w.sites[site].IssueNode(key.Public(), site, id.NodeID, time.Now()); err != nil {
		return id, err
	}
	return id, id.Save(b.config.Dir, b.config.Keys)
}

// line is a listener that pipes come through.
type line struct {
	calls  chan net.Conn
	closed chan struct{}
	once   sync.Once
	mu     sync.Mutex
	conns  []net.Conn
}

func (l *line) Accept() (net.Conn, error) {
	select {
	case c := <-l.calls:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *line) Close() error {
	l.once.Do(func() { close(l.closed) })
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		c.Close()
	}
	return nil
}

func (l *line) Addr() net.Addr { return &net.UnixAddr{Name: "line"} }

func (b *box) ListenFounding() net.Listener {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.listener != nil {
		b.listener.Close()
	}
	b.listener = &line{calls: make(chan net.Conn), closed: make(chan struct{})}
	return b.listener
}

var errOtherToken = errors.New("the machine at this address holds another token")

func (b *box) DialFounding(ctx context.Context, to string) (net.Conn, error) {
	b.w.mu.Lock()
	lost := b.w.cut[[2]string{b.config.Advertise, to}] || b.w.walled[[2]string{b.config.Advertise, to}]
	var other *box
	var theirs *pki.Pairing
	for _, o := range b.w.boxes {
		if o.config.Advertise == to {
			other, theirs = o, o.pairing
		}
	}
	ours := b.pairing
	b.w.mu.Unlock()
	if lost {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if other == nil {
		return nil, syscall.ECONNREFUSED
	}
	cert, err := theirs.Certificate()
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nil, err
	}
	if ours.Verify(leaf) != nil {
		return nil, errOtherToken
	}
	other.mu.Lock()
	l := other.listener
	other.mu.Unlock()
	if l == nil {
		return nil, syscall.ECONNREFUSED
	}
	near, far := net.Pipe()
	select {
	case l.calls <- far:
		l.mu.Lock()
		l.conns = append(l.conns, far)
		l.mu.Unlock()
		return near, nil
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// part cuts or heals the links between two machines.
func (w *world) part(a, b *box, cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut[[2]string{a.config.Advertise, b.config.Advertise}] = cut
	w.cut[[2]string{b.config.Advertise, a.config.Advertise}] = cut
}

// settled waits until all of the machines are of one site, restarting those that
// have ended, and fails when they never are.
func (w *world) settled(boxes ...*box) {
	w.t.Helper()
	for range 600 {
		<-time.After(time.Second) // of the bubble's time
		for _, b := range boxes {
			if b.cancel == nil {
				b.start()
			}
			select {
			case err := <-b.ended:
				b.ended <- err
				b.kill()
			default:
			}
		}
		if w.one(boxes...) {
			return
		}
	}
	for _, b := range boxes {
		w.t.Errorf("%s is of the site %q; its log ends: %s", b.config.Name, b.site(), b.log.last())
	}
	w.t.FailNow()
}

// one reports whether all of the machines are of one site; it fails when there are two.
func (w *world) one(boxes ...*box) bool {
	w.t.Helper()
	w.exists(1)
	for _, b := range boxes {
		if b.site() == "" {
			return false
		}
	}
	return true
}

// exists fails when there are more sites than that.
func (w *world) exists(most int) (sites int) {
	w.t.Helper()
	seen := map[string]bool{}
	for _, b := range w.boxes {
		if s := b.site(); s != "" {
			seen[s] = true
		}
	}
	if len(seen) > most {
		w.t.Fatalf("there are %d sites", len(seen))
	}
	return len(seen)
}

// faults sets what happens at each step of a machine.
func (w *world) faults(fault func(b *box, step string) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = fault
}

// hold gives a machine that does not run another token.
func (b *box) hold(p *pki.Pairing) {
	b.w.mu.Lock()
	defer b.w.mu.Unlock()
	b.pairing, b.config.Pairing = p, p
}

func (w *world) end() {
	w.faults(nil)
	for _, b := range w.boxes {
		b.kill()
	}
}

// lines keeps a log.
type lines struct {
	t    *testing.T
	mu   sync.Mutex
	text []string
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, string(p))
	return len(p), nil
}

func (l *lines) last() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.text) == 0 {
		return ""
	}
	return l.text[len(l.text)-1]
}

func (l *lines) all() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.text, "")
}
