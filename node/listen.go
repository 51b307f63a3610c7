package node

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// listen takes a TCP address, with errors that say what to do.
func listen(flag, addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fault.Wrap(err, fault.Conflict, "another program uses %s; stop it, or choose another address with %s", addr, flag)
	case errors.Is(err, syscall.EACCES):
		return nil, fault.Wrap(err, fault.Denied, "this user may not listen on %s; choose a port above 1023 with %s", addr, flag)
	}
	return nil, fault.Wrap(err, fault.Invalid, "cannot listen on %s (%s)", addr, flag)
}

// listenPackets takes the peer port's number for UDP too. TCP carries all where that
// cannot be had, unless QUIC is all that is wanted.
func (n *Node) listenPackets() error {
	mode := n.config.transport()
	if mode == peernet.OnlyTCP {
		return nil
	}
	tcp, ok := n.peerListener.Addr().(*net.TCPAddr)
	if !ok {
		return nil
	}
	packets, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(tcp.AddrPort()))
	switch {
	case err == nil:
		n.peerPackets = packets
	case mode == peernet.OnlyQUIC:
		return fault.Wrap(err, fault.Conflict, "cannot listen on %s over UDP (--peer-listen), which --peer-transport quic needs", tcp)
	default:
		n.log.Warn("peer port is not open over UDP: TCP carries all between nodes", "address", tcp.String(), "err", err)
	}
	return nil
}

// packets is the UDP side of the peer port as the port takes it.
func (n *Node) packets() net.PacketConn {
	if n.peerPackets == nil {
		return nil
	}
	return n.peerPackets
}

// lentPackets is the UDP side for one who closes it: the socket stays.
func (n *Node) lentPackets() (net.PacketConn, error) {
	if n.peerPackets == nil {
		return nil, nil
	}
	file, err := n.peerPackets.File()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return net.FilePacketConn(file)
}

// fellows are the nodes of the site as the peer port wants them. One that has joined and
// has no state yet knows those that it joined by.
func (n *Node) fellows() (out []peernet.Peer, err error) {
	err = n.db.View(func(v *table.View) error {
		all, err := n.member.Members(v)
		for _, m := range all {
			out = append(out, peernet.Peer{ID: m.ID, Addr: m.Addr})
		}
		return err
	})
	if len(out) == 0 {
		for _, addr := range n.config.Join {
			if addr != n.config.Advertise {
				out = append(out, peernet.Peer{Addr: addr})
			}
		}
	}
	return out, err
}

// transport of connections to other nodes, as the configuration says.
func (c Config) transport() peernet.Transport {
	t, err := peernet.ParseTransport(c.PeerTransport)
	if err != nil {
		return peernet.Auto // complete has refused it
	}
	return t
}

// listenSocket makes the Unix socket of the data directory, which this process
// has locked, so one that lies there is a dead node's.
func listenSocket(ctx context.Context, dir string) (net.Listener, error) {
	name := filepath.Join(dir, SocketName)
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// The mode is set before the socket has its name (Linux takes it from there),
	// so that nobody can connect in between; Chmod is for other systems.
	c := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(ownerOnly)
	}}
	l, err := c.Listen(ctx, "unix", name)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "cannot make the socket %s", name)
	}
	return l, os.Chmod(name, 0o600)
}

// loopback reports whether an address is reached from this machine only.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// tlsConfig says how the registry's address is served; nil is plain HTTP.
func (n *Node) tlsConfig() (*tls.Config, error) {
	c := n.config
	if (c.CertFile == "") != (c.KeyFile == "") {
		return nil, fault.New(fault.Invalid, "--tls-cert and --tls-key go together")
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	switch {
	case c.CertFile != "":
		files := &fileCertificate{cert: c.CertFile, key: c.KeyFile}
		if _, err := files.get(nil); err != nil {
			return nil, fault.Wrap(err, fault.Invalid, "the certificate %s with the key %s cannot be used", c.CertFile, c.KeyFile)
		}
		config.GetCertificate, n.files = files.get, files
	case c.TLS == TLSOff, c.TLS == TLSDefault && loopback(c.Listen):
		return nil, nil
	case c.TLS == TLSAuto || c.TLS == TLSDefault:
		n.own = newSiteCertificate(serverNames(c))
		config.GetCertificate = n.own.get
	default:
		return nil, fault.New(fault.Invalid, "--tls is off or auto, not %q", c.TLS)
	}
	return config, nil
}

// serverNames are what clients may call this node.
func serverNames(c Config) []string {
	names := append([]string{}, c.SANs...)
	for _, addr := range []string{c.Listen, c.Advertise} {
		if host, _, err := net.SplitHostPort(addr); err == nil && host != "" {
			if ip, err := netip.ParseAddr(host); err != nil || !ip.IsUnspecified() {
				names = append(names, host)
			}
		}
	}
	if host, err := os.Hostname(); err == nil {
		names = append(names, host)
	}
	if _, host, ok := strings.Cut(c.ExternalURL, "://"); ok {
		host, _, _ = strings.Cut(host, "/")
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		names = append(names, host)
	}
	addrs, err := net.InterfaceAddrs()
	if err == nil {
		for _, a := range addrs {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil && !prefix.Addr().IsLinkLocalUnicast() {
				names = append(names, prefix.Addr().String())
			}
		}
	}
	return append(names, "localhost", "127.0.0.1", "::1")
}

// siteCertificate is a server certificate of the site's CA, made anew when two
// thirds of its life are over, and whenever the node's own for its peers was. One
// goroutine makes it; clients get what there is.
type siteCertificate struct {
	from  issuer // set before keep runs
	names []string
	wish  chan struct{} // a client found it due

	mu      sync.Mutex
	current *tls.Certificate
	renew   time.Time
	renewal int           // of the node's identity when it was made
	tried   chan struct{} // closed when the next attempt is over
	failed  time.Time     // when the last attempt was, if in vain
	err     error         // of it
}

// issuer is the member of the site that the certificate is got by.
type issuer interface {
	ServerCertificate(ctx context.Context, names []string) (tls.Certificate, error)
	KeptServerCertificate() (tls.Certificate, bool)
	Identity() member.Identity
	Now() time.Time
}

const (
	certificateTry      = 10 * time.Second // for one attempt
	certificatePause    = 250 * time.Millisecond
	certificateMaxPause = 5 * time.Second
	// How long a handshake waits for a certificate: for a newer one than there is, and
	// for the first.
	newerPatience = time.Second
	firstPatience = 5 * time.Second
)

func newSiteCertificate(names []string) *siteCertificate {
	return &siteCertificate{names: names, wish: make(chan struct{}, 1), tried: make(chan struct{})}
}

// keep has a certificate made before any client asks for it, because when the first
// one does nobody may be there any more who could make it; and then whenever it is due.
func (s *siteCertificate) keep(ctx context.Context) error {
	if s == nil {
		<-ctx.Done()
		return nil
	}
	if kept, ok := s.from.KeptServerCertificate(); ok {
		s.mu.Lock()
		s.current = &kept // due at once: it may be of other names
		s.mu.Unlock()
	}
	pause := certificatePause
	for {
		if s.make(ctx) == nil {
			pause = certificatePause
			if !s.wished(ctx) {
				return nil
			}
			continue
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		pause = min(2*pause, certificateMaxPause)
	}
}

// wished waits until the certificate is due, as a client finds or a look every now and
// then: when the first client does, nobody may be there any more who could make another.
// It is false when ctx ends.
func (s *siteCertificate) wished(ctx context.Context) bool {
	look := time.NewTicker(certificateMaxPause)
	defer look.Stop()
	for {
		select {
		case <-s.wish:
		case <-look.C:
		case <-ctx.Done():
			return false
		}
		s.mu.Lock()
		due := s.due()
		s.mu.Unlock()
		if due {
			return true
		}
	}
}

// make makes one attempt.
func (s *siteCertificate) make(ctx context.Context) error {
	renewal := s.from.Identity().Renewal
	try, cancel := context.WithTimeout(ctx, certificateTry)
	defer cancel()
	cert, err := s.from.ServerCertificate(try, s.names)

	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.tried)
	s.tried = make(chan struct{})
	if s.err = err; err != nil {
		s.failed = time.Now()
		return err
	}
	life := cert.Leaf.NotAfter.Sub(cert.Leaf.NotBefore)
	s.current, s.renewal, s.renew = &cert, renewal, cert.Leaf.NotBefore.Add(life*2/3)
	return nil
}

// first waits until there is a certificate.
func (s *siteCertificate) first(ctx context.Context) error {
	if s == nil {
		return nil
	}
	for {
		s.mu.Lock()
		there, tried, err := s.current != nil, s.tried, s.err
		s.mu.Unlock()
		if there {
			return nil
		}
		select {
		case <-tried:
		case <-ctx.Done():
			return fmt.Errorf("certificate of the registry's address: %w", cmp.Or(err, context.Cause(ctx)))
		}
	}
}

// shown is the certificate that clients get now; nil when there is none.
func (s *siteCertificate) shown() *x509.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil {
		return nil
	}
	return s.current.Leaf
}

func (s *siteCertificate) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	return s.certificate(hello.Context())
}

// certificate is the one for a client. While a newer one cannot be had it gets the old
// one, which is better than none.
func (s *siteCertificate) certificate(ctx context.Context) (*tls.Certificate, error) {
	s.mu.Lock()
	current, due, tried := s.current, s.due(), s.tried
	s.mu.Unlock()
	if !due {
		return current, nil
	}
	select {
	case s.wish <- struct{}{}:
	default:
	}
	patience := firstPatience
	if current != nil {
		patience = newerPatience
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case <-tried:
	case <-ctx.Done():
	}
	if current == nil {
		if err := s.first(ctx); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current, nil
}

// due reports whether a newer certificate is worth waiting for: there is none, or it
// is to be made anew and that has not just failed. The caller holds mu.
func (s *siteCertificate) due() bool {
	if s.current == nil {
		return true
	}
	// The clock may have been set back to the truth since the certificate was made.
	now := s.from.Now()
	fresh := now.Before(s.renew) && now.After(s.current.Leaf.NotBefore) && s.renewal == s.from.Identity().Renewal
	return !fresh && time.Since(s.failed) >= certificateMaxPause
}

// fileCertificate is a certificate in files, read again when they change.
type fileCertificate struct {
	cert, key string

	mu      sync.Mutex
	current *tls.Certificate
	changed time.Time
}

func (f *fileCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.cert)
	if err == nil && f.current != nil && info.ModTime().Equal(f.changed) {
		return f.current, nil
	}
	pair, loadErr := tls.LoadX509KeyPair(f.cert, f.key)
	if err = errors.Join(err, loadErr); err != nil {
		if f.current != nil { // the files are being replaced
			return f.current, nil
		}
		return nil, err
	}
	f.current, f.changed = &pair, info.ModTime()
	return f.current, nil
}

// drain bounds how long requests under way may take once the node stops.
const drain = 20 * time.Second

// serve serves the registry and the API on the address and the socket until ctx
// ends, then lets requests under way finish.
func (n *Node) serve(ctx context.Context) error {
	asSystem := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = r.WithContext(access.WithPrincipal(r.Context(), access.Principal{Kind: access.System, Name: "system", Admin: true}))
		n.rooms.http.ServeHTTP(w, r)
	})
	var open sync.RWMutex // each request reads, the end writes
	counted := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !open.TryRLock() {
				rest.WriteError(w, fault.New(fault.Unavailable, "this node is stopping"))
				return
			}
			defer open.RUnlock()
			h.ServeHTTP(w, r)
		})
	}
	servers := []*http.Server{n.newServer(counted(n.rooms.http)), n.newServer(counted(asSystem))}
	ended := make(chan error, len(servers))
	go func() { ended <- serveOn(servers[0], n.public, n.publicTLS) }()
	go func() { ended <- serveOn(servers[1], n.socket, nil) }()
	var err error
	running := len(servers)
	select {
	case <-ctx.Done():
	case err = <-ended:
		running--
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
	defer cancel()
	var stopping sync.WaitGroup
	for _, s := range servers {
		stopping.Go(func() {
			if s.Shutdown(stop) != nil {
				s.Close() // which also ends the context of its requests
			}
		})
	}
	stopping.Wait()
	for range running {
		<-ended
	}
	open.Lock() // nobody uses the rooms any more
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the registry: %w", err)
	}
	return nil
}

func serveOn(s *http.Server, l net.Listener, config *tls.Config) error {
	if config == nil {
		return s.Serve(l)
	}
	s.TLSConfig = config
	return s.ServeTLS(l, "", "")
}

// newServer makes a server whose requests may take long: uploads and downloads
// are bounded by their progress, in the registry.
func (n *Node) newServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(n.log.Handler(), slog.LevelDebug),
	}
}
