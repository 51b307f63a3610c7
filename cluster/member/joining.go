package member

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// JoinConfig is what a new node needs to join a site.
type JoinConfig struct {
	Dir       string        // data directory without an identity
	Keys      *keyring.Ring // seals the files of Dir that hold keys; nil: they are plain
	Name      string
	Advertise string // host:port of this node's peer port
	APIURL    string // where clients will reach this node; "" when not known yet
	Token     string
	Addrs     []string // peer ports of nodes of the site, any of them
	// Dial reaches the join service of the node at addr: Network.DialJoin.
	Dial func(ctx context.Context, addr string, caPin []byte) (net.Conn, error)
	Log  *slog.Logger
	// Retry is for how long nodes that do not answer are asked again; 0 means 30 s.
	Retry time.Duration
	Level int // of the program: version.Level when 0
}

const (
	pathJoin     = "/v1/join"
	pathRenew    = "/v1/renew"
	pathStanding = "/v1/standing"
)

// joinRequest asks for membership.
type joinRequest struct {
	Token   string `json:"token"`
	Node    string `json:"node"`
	Name    string `json:"name"`
	Addr    string `json:"addr"`
	API     string `json:"api,omitempty"`
	CSR     []byte `json:"csr"`
	Feature int    `json:"feature"`
}

// joinAnswer makes the asker a member.
type joinAnswer struct {
	Site    string `json:"site"`
	CA      []byte `json:"ca"`
	Cert    []byte `json:"cert"`
	Epoch   string `json:"epoch,omitempty"` // of the last recovery
	Links   []byte `json:"links,omitempty"`
	Renewal int    `json:"renewal,omitempty"`
}

// renewRequest asks for a new certificate of the key that the row names.
type renewRequest struct {
	Node string `json:"node"`
	CSR  []byte `json:"csr"`
}

type renewAnswer struct {
	Cert    []byte `json:"cert"`
	CA      []byte `json:"ca,omitempty"`
	Links   []byte `json:"links,omitempty"`
	Renewal int    `json:"renewal,omitempty"`
}

// joiningJSON is the content of joining.json: an application under way. When
// its answer was lost, the same key asks again and gets it. It stays until the
// node has begun its log: see CheckLog.
type joiningJSON struct {
	TokenID string `json:"token_id"`
	Node    string `json:"node"`
	Key     string `json:"key"`
}

// Join makes cfg.Dir the data directory of a new member of an existing site.
// Errors: ErrFounded, pki.ErrMalformed, ErrOtherSite, ErrTokenExpired,
// ErrTokenUsed, ErrTokenUnknown, ErrNameTaken, ErrUnreachable, version.ErrMismatch.
func Join(ctx context.Context, cfg JoinConfig) (Identity, error) {
	token, err := pki.ParseToken(cfg.Token)
	if err != nil {
		return Identity{}, fmt.Errorf("the join token: %w", err)
	}
	if token.Kind != pki.KindJoin {
		return Identity{}, fmt.Errorf("the join token: %w: it is a token for %q; make one with: atoll token create", pki.ErrMalformed, token.Kind)
	}
	if err := checkName(cfg.Name); err != nil {
		return Identity{}, err
	}
	if err := checkAddr(cfg.Advertise); err != nil {
		return Identity{}, fmt.Errorf("the address to advertise: %w", err)
	}
	if len(cfg.Addrs) == 0 {
		return Identity{}, errors.New("joining takes the address of at least one node of the site")
	}
	if err := prepareDir(cfg.Dir); err != nil {
		return Identity{}, err
	}
	// What is left of a founding that was cut short would found when the node starts.
	if err := atomicfile.Remove(filepath.Join(cfg.Dir, foundingFile)); err != nil {
		return Identity{}, err
	}
	pending, key, err := application(cfg.Dir, token.ID, cfg.Keys)
	if err != nil {
		return Identity{}, err
	}
	csr, err := pki.NewCSR(key)
	if err != nil {
		return Identity{}, err
	}
	ask := joinRequest{
		Token: token.String(), Node: pending.Node, Name: cfg.Name, Addr: cfg.Advertise, API: cfg.APIURL,
		CSR: csr, Feature: cmp.Or(cfg.Level, version.Level),
	}
	var answer joinAnswer
	if err := cfg.apply(ctx, token.Pin, ask, &answer); err != nil {
		return Identity{}, err
	}
	id := Identity{
		SiteID: answer.Site, NodeID: pending.Node, Name: cfg.Name, CA: answer.CA, Links: answer.Links, Renewal: answer.Renewal, Cert: answer.Cert,
		Key: []byte(pending.Key),
	}
	if err := id.check(token.Pin); err != nil {
		return Identity{}, fmt.Errorf("the site's answer: %w", err)
	}
	// The site proved itself by the pin; an authority of before may have signed.
	recovered, err := epoch.Parse(answer.Epoch)
	if err != nil {
		return Identity{}, fmt.Errorf("the site's answer: %w", err)
	}
	if err := epoch.Save(cfg.Dir, recovered); err != nil {
		return Identity{}, err
	}
	return id, id.save(cfg.Dir, cfg.Keys)
}

// check makes sure of what a site answered before it is stored.
func (id Identity) check(pin []byte) error {
	if known, err := id.knows(pin); err != nil {
		return err
	} else if !known {
		return ErrOtherSite
	}
	cert, err := id.Certificate()
	if err != nil {
		return err
	}
	return pki.VerifyPinned(cert.Leaf, id.Authorities(), pin)
}

// application gives the key and the id under which the node applies with a
// token: those of an earlier try with the same token, else new ones, which are
// on disk before they are sent.
func application(dir, tokenID string, keys *keyring.Ring) (joiningJSON, crypto.Signer, error) {
	path := filepath.Join(dir, joiningFile)
	var pending joiningJSON
	err := keys.ReadJSON(path, &pending)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return pending, nil, err
	}
	if err == nil && pending.TokenID == tokenID {
		key, err := pki.ParseKey([]byte(pending.Key))
		if err != nil {
			return pending, nil, fmt.Errorf("%s is damaged, remove it: %w", path, err)
		}
		return pending, key, nil
	}
	key, err := pki.NewKey()
	if err != nil {
		return pending, nil, err
	}
	keyPEM, err := pki.MarshalKey(key)
	if err != nil {
		return pending, nil, err
	}
	pending = joiningJSON{TokenID: tokenID, Node: table.NewID(), Key: string(keyPEM)}
	return pending, key, keys.WriteJSON(path, pending)
}

// apply asks one node after the other. A refusal is final, unless it says to
// try again; silence is not.
func (cfg JoinConfig) apply(ctx context.Context, pin []byte, ask joinRequest, answer *joinAnswer) error {
	retry := cfg.Retry
	if retry == 0 {
		retry = 30 * time.Second
	}
	patient, cancel := context.WithTimeout(ctx, retry)
	defer cancel()
	for {
		var silent []error
		for _, addr := range cfg.Addrs {
			err := joining.Post(patient, at(cfg.Dial, addr, pin), pathJoin, ask, answer)
			var no *joining.Refusal
			switch {
			case err == nil:
				return nil
			case errors.As(err, &no) && no.Code != joining.CodeLater, errors.Is(err, ErrOtherSite):
				return fmt.Errorf("joining at %s: %w", addr, err)
			}
			silent = append(silent, fmt.Errorf("%s: %w", addr, err))
			if cfg.Log != nil {
				cfg.Log.Info("a node of the site did not take this node in; trying on", "address", addr, "error", err)
			}
		}
		if !sleep(patient, time.Second) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("%w: %w", ErrUnreachable, errors.Join(silent...))
		}
	}
}

// at dials the join service of the node at addr.
func at(dial func(ctx context.Context, addr string, caPin []byte) (net.Conn, error), addr string, pin []byte) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) { return dial(ctx, addr, pin) }
}

// askRenewal asks the member at addr for a new certificate. It takes the join
// service, because a certificate that has expired opens no other.
func (n *Node) askRenewal(ctx context.Context, addr string, key crypto.Signer) (answer renewAnswer, err error) {
	csr, err := pki.NewCSR(key)
	if err != nil {
		return answer, err
	}
	pin, err := pki.PinPEM(n.CA())
	if err != nil {
		return answer, err
	}
	err = joining.Post(ctx, at(n.cfg.Network.DialJoin, addr, pin), pathRenew, renewRequest{Node: n.Self(), CSR: csr}, &answer)
	return answer, err
}

// askStanding asks the member at addr how the site sees this node, over the join
// service, which refuses nobody.
func (n *Node) askStanding(ctx context.Context, addr string) (answer standingAnswer, err error) {
	pin, err := pki.PinPEM(n.CA())
	if err != nil {
		return answer, err
	}
	ask := standingRequest{Node: n.Self(), Issuer: fmt.Sprintf("%x", pin)}
	err = joining.Post(ctx, at(n.cfg.Network.DialJoin, addr, pin), pathStanding, ask, &answer)
	return answer, err
}
