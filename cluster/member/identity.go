package member

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// Files of the data directory, all 0600. The cluster key has a file of its own,
// so that it can be kept elsewhere; it is in no snapshot and in no backup.
const (
	identityFile   = "identity.json"
	ClusterKeyFile = "cluster.key"
	foundingFile   = "founding.json" // until the site's first rows are committed
	joiningFile    = "joining.json"  // until the node that joined has begun its log
)

// MachineFile is the name of the file in which a machine that founds a site with
// others keeps what it has promised: see cluster/founding.
const MachineFile = "machine.json"

// Files are the names of the files that make a directory that of a node, the
// identity first.
func Files() []string {
	return []string{identityFile, ClusterKeyFile, serverFile, foundingFile, joiningFile, keyring.RekeyFile, MachineFile, version.StampFile}
}

// Secrets are the names of the files that hold keys, which a keyring.Ring seals.
func Secrets() []string {
	return []string{identityFile, ClusterKeyFile, serverFile, foundingFile, joiningFile}
}

// identityFormat is the version of identity.json.
const identityFormat = 1

// Identity is who a node is, kept in its data directory.
type Identity struct {
	SiteID, NodeID, Name string
	Cert                 []byte // PEM
	// CA are the certificates of the site's authorities that are trusted, in PEM:
	// first the one that signed Cert; more than one while the authority changes.
	CA []byte
	// Links are further certificates, in PEM, by which those accept Cert that know
	// an earlier authority only.
	Links []byte
	// Renewal is the count of the site's renewals up to which Cert is new.
	Renewal int
	Key     []byte // PEM, PKCS #8
	// TokenKey is the seed of the Ed25519 key that the node signs its registry tokens
	// with: see Node.TokenKey.
	TokenKey []byte
	// ClusterKey are the keys that seal the site's secrets, of pki.ClusterKeySize
	// bytes each, one after the other: more than one while the site changes its key,
	// none in a node that has no vote.
	ClusterKey []byte
}

// identityJSON is the content of identity.json.
type identityJSON struct {
	Format  int    `json:"format"`
	Site    string `json:"site"`
	Node    string `json:"node"`
	Name    string `json:"name"`
	CA      string `json:"ca"`
	Links   string `json:"links,omitempty"`
	Renewal int    `json:"renewal,omitempty"`
	Cert    string `json:"cert"`
	Key     string `json:"key"`
	Token   []byte `json:"token_key,omitempty"`
}

// foundingJSON is the content of founding.json: what becomes the site's first
// rows as soon as its founder leads.
type foundingJSON struct {
	CAKey string `json:"ca_key"`
}

// LoadIdentity reads the identity in dir, which keys opens; ErrEmpty when there is
// none, version.ErrMismatch when another version of the program has to be used on it,
// keyring.ErrLocked when keys are not those that it was sealed with.
func LoadIdentity(dir string, keys *keyring.Ring) (Identity, error) {
	if err := version.Check(dir, ""); err != nil {
		return Identity{}, err
	}
	var stored identityJSON
	if err := keys.ReadJSON(filepath.Join(dir, identityFile), &stored); errors.Is(err, fs.ErrNotExist) {
		return Identity{}, fmt.Errorf("%s: %w", dir, ErrEmpty)
	} else if err != nil {
		return Identity{}, fmt.Errorf("reading the node's identity: %w", err)
	}
	if stored.Format != identityFormat {
		return Identity{}, fmt.Errorf("%s has format %d, this version of Atoll reads %d: run the version that wrote it, or a newer one", filepath.Join(dir, identityFile), stored.Format, identityFormat)
	}
	key, err := keys.Read(filepath.Join(dir, ClusterKeyFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Identity{}, fmt.Errorf("reading the cluster key: %w", err)
	}
	if bytes.Count(key, []byte{0}) == len(key) {
		key = nil // it was being forgotten
	}
	if len(key)%pki.ClusterKeySize != 0 {
		return Identity{}, fmt.Errorf("%s has %d bytes instead of %d or a multiple: restore it from another node of the site", filepath.Join(dir, ClusterKeyFile), len(key), pki.ClusterKeySize)
	}
	id := Identity{
		SiteID: stored.Site, NodeID: stored.Node, Name: stored.Name,
		CA: []byte(stored.CA), Links: []byte(stored.Links), Renewal: stored.Renewal, Cert: []byte(stored.Cert), Key: []byte(stored.Key), TokenKey: stored.Token, ClusterKey: key,
	}
	if _, err := id.Certificate(); err != nil {
		return Identity{}, fmt.Errorf("%s: %w", filepath.Join(dir, identityFile), err)
	}
	return id, nil
}

// Certificate is the node's certificate for its peers, the authority's behind
// it: a node that joins finds the pinned authority there.
func (id Identity) Certificate() (tls.Certificate, error) {
	cert, err := tls.X509KeyPair(bytes.Join([][]byte{id.Cert, id.CA, id.Links}, nil), id.Key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("the node's certificate: %w", err)
	}
	site, node, err := pki.NodeOf(cert.Leaf)
	if err != nil {
		return tls.Certificate{}, err
	}
	if site != id.SiteID || node != id.NodeID {
		return tls.Certificate{}, fmt.Errorf("the node's certificate is of node %s of site %s, the identity is node %s of site %s", node, site, id.NodeID, id.SiteID)
	}
	return cert, nil
}

// Pool holds the site's authorities.
func (id Identity) Pool() (*x509.CertPool, error) { return pki.Pool(id.CA) }

// Save writes the identity of a node that was made outside of Found and Join:
// by a restore.
func (id Identity) Save(dir string, keys *keyring.Ring) error { return id.save(dir, keys) }

// save writes the identity; the identity file comes last, because its
// existence says that the directory belongs to a site.
func (id Identity) save(dir string, keys *keyring.Ring) error {
	if err := version.Mark(dir, "", 0); err != nil {
		return err
	}
	path := filepath.Join(dir, ClusterKeyFile)
	if len(id.ClusterKey) == 0 {
		if err := atomicfile.Erase(path); err != nil {
			return err
		}
	} else if err := keys.WriteSecret(path, id.ClusterKey); err != nil {
		return err
	}
	return keys.WriteJSON(filepath.Join(dir, identityFile), identityJSON{
		Format: identityFormat, Site: id.SiteID, Node: id.NodeID, Name: id.Name,
		CA: string(id.CA), Links: string(id.Links), Renewal: id.Renewal, Cert: string(id.Cert), Key: string(id.Key), Token: id.TokenKey,
	})
}

// Found makes dir the data directory of a new site's first node. The site's
// first rows are committed when the node runs.
func Found(dir, name, advertise string, keys *keyring.Ring) (Identity, error) {
	if err := checkName(name); err != nil {
		return Identity{}, err
	}
	if err := checkAddr(advertise); err != nil {
		return Identity{}, fmt.Errorf("the address to advertise: %w", err)
	}
	if err := prepareDir(dir); err != nil {
		return Identity{}, err
	}
	now := time.Now()
	id := Identity{SiteID: table.NewID(), NodeID: table.NewID(), Name: name}
	authority, err := pki.NewAuthority(id.SiteID, now)
	if err != nil {
		return Identity{}, err
	}
	caKey, err := authority.KeyPEM()
	if err != nil {
		return Identity{}, err
	}
	key, err := pki.NewKey()
	if err != nil {
		return Identity{}, err
	}
	if id.Key, err = pki.MarshalKey(key); err != nil {
		return Identity{}, err
	}
	if id.ClusterKey, err = pki.NewClusterKey(); err != nil {
		return Identity{}, err
	}
	id.CA = authority.CertPEM()
	if id.Cert, err = authority.IssueNode(key.Public(), id.SiteID, id.NodeID, now); err != nil {
		return Identity{}, err
	}
	if err := keys.WriteJSON(filepath.Join(dir, foundingFile), foundingJSON{CAKey: string(caKey)}); err != nil {
		return Identity{}, err
	}
	return id, id.save(dir, keys)
}

// prepareDir makes the directory of a node that has no identity yet.
func prepareDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the data directory: %w", err)
	}
	if _, err := os.Stat(filepath.Join(dir, identityFile)); err == nil {
		return fmt.Errorf("%s: %w", dir, ErrFounded)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("looking into the data directory: %w", err)
	}
	for _, state := range []string{"raft", "meta.db"} {
		if _, err := os.Stat(filepath.Join(dir, state)); err == nil {
			return fmt.Errorf("%s holds the state of a node (%s) but no %s: restore that file, or clear the directory with atoll node wipe", dir, state, identityFile)
		}
	}
	return nil
}

// CheckLog refuses, with ErrLogLost, a directory that has an identity and has lost
// its consensus log: the node would have forgotten for whom it voted and what it
// acknowledged, and could do both a second time in another way. A node that has
// just founded or joined has no log yet, and a file that says so.
func CheckLog(dir string) error {
	for _, name := range []string{filepath.Join("raft", logFile), foundingFile, joiningFile} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("looking for the log of the node: %w", err)
		}
	}
	return fmt.Errorf("%w: %s has %s and no raft/%s. %s", ErrLogLost, dir, identityFile, logFile, wayBack(dir))
}

// wayBack says what to do with a directory whose log is lost, whole or in part.
func wayBack(dir string) string {
	return fmt.Sprintf("Put the whole directory back as it was; or clear it with atoll node wipe --data %s and let it join again under its name, with --join, --name and a new token; or, if it was the only node of its site, move meta.db away and make a site of its blobs with atoll rebuild --data %s", dir, dir)
}

func pinsOf(bundle []byte) (pins []string, err error) {
	certs, err := pki.ParseCerts(bundle)
	for _, c := range certs {
		pins = append(pins, hex.EncodeToString(pki.PinOf(c)))
	}
	return pins, err
}

// issuer is the certificate in PEM of the authority that signed Cert.
func (id Identity) issuer() ([]byte, error) {
	leaf, err := pki.ParseCert(id.Cert)
	if err != nil {
		return nil, err
	}
	certs, err := pki.ParseCerts(id.CA)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		if leaf.CheckSignatureFrom(c) == nil {
			return pki.EncodeCert(c), nil
		}
	}
	return nil, errors.New("the authority that signed this node's certificate is not known here")
}

// Authorities are all that the node knows of the site's authorities, present and
// past, in PEM.
func (id Identity) Authorities() []byte { return bytes.Join([][]byte{id.CA, id.Links}, nil) }

// knows reports whether a pin is that of one of the site's authorities, present or
// past.
func (id Identity) knows(pin []byte) (bool, error) {
	certs, err := pki.ParseCerts(id.Authorities())
	for _, c := range certs {
		if pki.PinMatches(pki.PinOf(c), pin) {
			return true, nil
		}
	}
	return false, err
}

// keyID names a cluster key without telling it.
func keyID(key []byte) string {
	sum := sha256.Sum256(append([]byte("atoll cluster key id\x00"), key...))
	return hex.EncodeToString(sum[:16])
}

func (id Identity) keyIDs() (ids []string) {
	for key := range slices.Chunk(id.ClusterKey, pki.ClusterKeySize) {
		ids = append(ids, keyID(key))
	}
	return ids
}

// sealing is the key that secrets are sealed with now, by the site's row; nil when the
// node does not hold it.
func (id Identity) sealing(row secretRow) []byte {
	if row.Seals == "" && len(id.ClusterKey) > 0 { // the site is being founded
		return id.ClusterKey[:pki.ClusterKeySize]
	}
	return id.key(row.Seals)
}

// key finds a key by its id; nil when the node does not hold it.
func (id Identity) key(name string) []byte {
	for key := range slices.Chunk(id.ClusterKey, pki.ClusterKeySize) {
		if keyID(key) == name {
			return key
		}
	}
	return nil
}

// checkName allows what people call machines: 1 to 63 letters, digits, dots,
// dashes and underscores, beginning with a letter or digit.
func checkName(name string) error {
	if !isWord(name) {
		return fmt.Errorf("%q is no node name: take 1 to 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit", name)
	}
	return nil
}

func isWord(s string) bool {
	ok := len(s) >= 1 && len(s) <= 63
	for i, c := range s {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && (i == 0 || c != '.' && c != '-' && c != '_') {
			ok = false
		}
	}
	return ok
}

// maxLabels bounds what every node's row carries to every other node.
const maxLabels = 16

// checkLabels allows keys and values that look like names.
func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fmt.Errorf("%d labels: a node has at most %d", len(labels), maxLabels)
	}
	for key, value := range labels {
		if !isWord(key) || !isWord(value) {
			return fmt.Errorf("the label %s=%s: key and value are 1 to 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit", key, value)
		}
	}
	return nil
}

// checkAddr allows host:port with a host that other nodes can dial.
func checkAddr(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not host:port: %w", addr, err)
	}
	if len(addr) > 261 {
		return fmt.Errorf("%q is too long for host:port", addr)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return fmt.Errorf("%q names no host that other nodes could reach: give one with --advertise", addr)
	}
	if p, err := strconv.ParseUint(port, 10, 16); err != nil || p == 0 {
		return fmt.Errorf("%q has no port from 1 to 65535", addr)
	}
	return nil
}
