package node

import (
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/node/storage"
	"github.com/atoll-registry/atoll/node/watch"
)

// SocketName is the name of the node's Unix socket in its data directory. Who may
// open it has the rights of the system.
const SocketName = "atoll.sock"

// PasswordName is the name of the file in the data directory that holds the
// generated password of the admin.
const PasswordName = "admin-password"

// TLS modes of the registry's address.
const (
	TLSDefault = ""     // off on a loopback address, else auto
	TLSOff     = "off"  // plain HTTP
	TLSAuto    = "auto" // a certificate of the site's CA
)

// Config of a node.
type Config struct {
	// Data is the directory of all that the node keeps.
	Data string
	// Keys opens and seals the files of Data that hold keys. The start overwrites the
	// passphrase.
	Keys Keys
	// Listen is the address of the registry and the API, host:port.
	Listen string
	// PeerListen is the address of the port between nodes; "" is Listen's host
	// with the port 5001.
	PeerListen string
	// Advertise is the address at which other nodes reach PeerListen; "" is
	// PeerListen, or this machine's address when that names no host.
	Advertise string
	// PeerTransport is how this node reaches others: auto, tcp or quic, or "" for auto
	// and what the site's setting says for blobs. With tcp it takes nothing over UDP
	// either.
	PeerTransport string
	// Name is the node's name for people; "" is the machine's.
	Name string
	// Labels say where the node stands (rack, zone): see member.Member.
	Labels map[string]string
	// Cache makes the node one: it serves and takes everything, keeps nothing for the
	// site, and lets go of what was not read for longest above CacheSize bytes; 0: so
	// that a tenth of the disk stays free.
	Cache     bool
	CacheSize int64
	// ExternalURL is where clients find the site, if not where they asked.
	ExternalURL string

	TLS               string
	CertFile, KeyFile string   // a certificate of one's own; wins over TLSAuto
	SANs              []string // further names and addresses in TLSAuto's certificate

	// An empty data directory needs one of these.
	Init  bool     // found a site
	Join  []string // peer addresses of nodes of a site
	Token string   // of atoll token create, for Join
	// Expect makes so many machines that hold one token of kind site, and are told
	// each other's addresses by Join, found a site together; 0: they do not.
	Expect int

	// AdminPassword of a new site; "" generates one into PasswordName.
	AdminPassword string

	// Storage is where blobs are kept; with no kind, where they were, or on the
	// disk.
	Storage storage.Choice
	// Redirect sends clients to the object store for blobs instead of passing
	// them through.
	Redirect bool

	// Snapshots is when the consensus takes them; the zero value is what suits a
	// site.
	Snapshots member.Snapshots

	Version string
	Log     *slog.Logger
	// Started is called once, when the node serves.
	Started func(Started)

	pairing *pki.Pairing // of Token, with Expect

	rebuilding bool // by Rebuild; else a node does not start on half a rebuild

	timings member.Timings   // of the consensus; tests shrink them
	clock   func() time.Time // of the machine; tests set it wrong
	disk    watch.Disk       // that the watch writes to; tests let it hang
}

// Started says where a node that has started can be found.
type Started struct {
	URL          string // of the registry and the API
	PeerAddr     string
	Data         string
	PasswordFile string // "" when the password was given
	Founded      bool   // a new site began with this start
}

// DefaultDataDir is /var/lib/atoll for root, else atoll in the XDG data directory.
func DefaultDataDir() string {
	if os.Geteuid() == 0 {
		return "/var/lib/atoll"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); dir != "" {
		return filepath.Join(dir, "atoll")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "atoll-data"
	}
	return filepath.Join(home, ".local", "share", "atoll")
}
