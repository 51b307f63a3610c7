// Package peernet is the one port between the nodes of a site: mutually
// authenticated TLS 1.3, one byte that names the service, then the service's own
// protocol. Over TCP a connection is a TLS connection, over UDP it is a stream of a
// QUIC connection; services and their callers see no difference.
//
// Invariants. A connection that a service accepts or that Dial returns has a peer
// whose certificate was signed by the site's CA, names this site and a node, and
// whom Authorize allowed that service at that moment (sessions are never resumed,
// and the certificate of a QUIC connection is looked at again for each stream). A stranger gets a goroutine, a file
// descriptor and a bounded time; how many strangers there are at once, in all and
// per address, is bounded too. The one door for nodes without a certificate is the
// ALPN atoll-join/1, where only the server proves itself. Machines that found a site
// together have none either: by atoll-found/1 both ends prove to hold one token.
package peernet

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// Services known by their first byte. Others may be added by whoever listens.
const (
	ServiceRaft    byte = 1
	ServiceControl byte = 2  // cluster control, HTTP/1.1
	ServiceAPI     byte = 4  // the public API between nodes, HTTP/1.1
	ServiceGossip  byte = 5  // who is there, packets in frames
	ServiceDoctor  byte = 8  // nodes help each other to see what is wrong
	ServiceBlob    byte = 7  // blobs and pieces, in the frames of package stream; 3 was HTTP
	ServiceSwarm   byte = 6  // blobs by BitTorrent
	ServiceBack    byte = 9  // calls to nodes that cannot be dialled; see Config.Peers
	ServiceRelay   byte = 10 // from one node that cannot be dialled to another
	ServicePassing byte = 11 // the same for blobs, whose bytes say what they are for
)

// ALPN protocol names.
const (
	ProtoNode = "atoll/1"
	ProtoJoin = "atoll-join/1"
	// ProtoFound is between machines that found a site together: see Founding.
	ProtoFound = "atoll-found/1"
	// ProtoEpoch is ProtoNode between nodes that tell each other their recovery
	// epochs: after the service byte the caller sends one byte and so many of its
	// epoch, after the status byte the answerer does. A version that speaks only
	// ProtoNode knows no epoch but the first.
	ProtoEpoch = "atoll/1+epoch"
)

var (
	// ErrOtherSite: the peer is a node of another site than the one expected.
	ErrOtherSite = errors.New("this node belongs to another site")
	// ErrRefused: the peer does not let this node use the service.
	ErrRefused = errors.New("the peer refuses this node; is it still a member of the site?")
	// ErrNoService: nobody at the peer listens for the service.
	ErrNoService = errors.New("the peer does not offer the service at the moment")
	// ErrOtherEpoch: the peer, or this node, has data from before a recovery of
	// the site.
	ErrOtherEpoch = errors.New("the peer is of another recovery epoch of the site")
	// ErrOtherToken: the peer does not hold the token by which this machine founds a
	// site with others.
	ErrOtherToken = errors.New("the machine at this address holds another token")
	// ErrNoCertificate: this node has not joined a site yet.
	ErrNoCertificate = errors.New("this node has no certificate of a site yet")
)

// Founding is how machines prove to each other, before there is a site, that they
// hold one token. Both ends of a connection do.
type Founding struct {
	Cert   tls.Certificate
	Verify func(leaf *x509.Certificate) error
}

// Config of a Net. The functions are called for each handshake, so that a renewed
// certificate or a changed membership needs no restart.
type Config struct {
	// SiteID that peers' certificates must name.
	SiteID string
	// Cert of this node, the site's CA certificate last in its chain (joiners pin
	// it). May be nil for a Net that is only used for DialJoin.
	Cert func() tls.Certificate
	// CA pool that peers' certificates must chain to.
	CA func() *x509.CertPool
	// Authorize decides whether a node may use a service of this one; its error is
	// logged. Nil allows every node of the site.
	Authorize func(peerID string, service byte) error
	// Epoch is the site's recovery epoch as this node tells it, at most 255 bytes
	// of which peernet knows no meaning; Meet judges that of a peer before
	// Authorize is asked, on both ends of a connection, and its error refuses it.
	// Both are nil, or neither.
	Epoch func() string
	Meet  func(peerID, epoch string) error
	// Peers are the nodes of the site, this one among them; one that knows none yet gives
	// where to find some. With it, where one of two nodes cannot be
	// dialled by the other, it keeps a connection open there while the port is served,
	// over which Dial calls it; between two that cannot dial each other it passes
	// connections on. Nil: Dial only dials. Its error changes nothing.
	Peers func() ([]Peer, error)
	// Founding opens the port, and DialFounding, to who holds the same token; nil: not.
	Founding *Founding
	// Now for certificates' validity; nil means time.Now. A node whose clock may be
	// wrong gives the newest time that it knows to be committed.
	Now func() time.Time
	// Log; nil discards. Registry of metrics; may be nil.
	Log      *slog.Logger
	Registry prometheus.Registerer

	// HandshakeTimeout for a connection from accept (or dial) to the service; 0 means 10 s.
	HandshakeTimeout time.Duration
	// Transport of connections that are dialled; it is asked for each. Nil means Auto.
	Transport func() Transport
	// LongPath is the round trip above which a path is a long one; 0 means 20 ms. There
	// the usual congestion control takes minutes to come back from a loss.
	LongPath time.Duration
	// NoBBR leaves the congestion control of every path to the system.
	NoBBR bool
	// Secret of this node that outlives a restart, known to nobody else: by it peers
	// learn at once, over QUIC, that a restarted node has forgotten them.
	Secret []byte
	// MaxStrangers that may be in a handshake at once; 0 means 256.
	MaxStrangers int
	// MaxPerAddress of those from one IP address; 0 means 32. Open join connections
	// count here, because those who join stay strangers.
	MaxPerAddress int
	// JoinTimeout after which a join connection is closed; 0 means 60 s.
	JoinTimeout time.Duration
}

// Net is the port. Make it with New, listen on services, Serve, Dial.
type Net struct {
	cfg Config
	log *slog.Logger
	// refused counts connections by reason; said bounds what the log says of them:
	// a stranger can make as many as it likes.
	refused *prometheus.CounterVec
	relayed prometheus.Counter
	said    rate.Sometimes
	slow    sync.Once // says that there is no BBR

	mu        sync.Mutex
	closed    bool
	services  map[byte]*listener
	join      *listener
	found     *listener
	conns     map[io.Closer]string // accepted, any state: the peer, "" for a stranger
	served    *served              // nil: not now
	sessions  map[sessionKey][]*session
	routes    map[string]*route
	strangers int
	addresses map[netip.Addr]int
	back      callbacks
	passing   Passing
}

// New makes a Net; nothing runs yet.
func New(cfg Config) (*Net, error) {
	if cfg.Cert != nil && (cfg.SiteID == "" || cfg.CA == nil) {
		return nil, errors.New("peernet: a node certificate needs the site id and the CA pool beside it")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if (cfg.Epoch == nil) != (cfg.Meet == nil) {
		return nil, errors.New("peernet: Epoch and Meet belong together")
	}
	if cfg.Transport == nil {
		cfg.Transport = func() Transport { return Auto }
	}
	if cfg.Authorize == nil {
		cfg.Authorize = func(string, byte) error { return nil }
	}
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&cfg.HandshakeTimeout, 10 * time.Second}, {&cfg.JoinTimeout, time.Minute}, {&cfg.LongPath, longPath}} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
	if cfg.MaxStrangers <= 0 {
		cfg.MaxStrangers = 256
	}
	if cfg.MaxPerAddress <= 0 {
		cfg.MaxPerAddress = 32
	}
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "atoll_peernet_refused_total", Help: "Connections to the peer port that were refused, by reason.",
	}, []string{"reason"})
	relayed := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "atoll_peernet_relayed_bytes_total", Help: "Bytes that this node has passed on between nodes that cannot dial each other.",
	})
	if cfg.Registry != nil {
		if err := errors.Join(cfg.Registry.Register(refused), cfg.Registry.Register(relayed)); err != nil {
			return nil, fmt.Errorf("peernet: %w", err)
		}
	}
	return &Net{
		cfg:       cfg,
		log:       cfg.Log,
		refused:   refused,
		relayed:   relayed,
		said:      rate.Sometimes{First: 20, Interval: 10 * time.Second},
		services:  make(map[byte]*listener),
		conns:     make(map[io.Closer]string),
		sessions:  make(map[sessionKey][]*session),
		routes:    make(map[string]*route),
		addresses: make(map[netip.Addr]int),
		back:      newCallbacks(),
	}, nil
}
