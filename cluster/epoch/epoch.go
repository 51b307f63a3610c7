// Package epoch keeps old members of a site out after one survivor, or a
// backup, was made the whole site: each such recovery begins a new epoch, and
// nodes of different epochs do not work together.
//
// What always holds:
//   - Epochs are ordered by their number. Only who holds the key of the site's
//     authority can make one, so a stolen node cannot fence the others off.
//   - A node has one epoch from start to stop: it changes while the node is
//     stopped only.
//   - A node that meets a later epoch is fenced from then on, across restarts:
//     it takes part in no consensus, and its directory has to be wiped. A node
//     that meets an earlier one refuses it.
//   - Two epochs of one number are two recoveries that know nothing of each
//     other. Both sides refuse, neither is fenced: a person has to choose.
//
// See docs/adr/0009-recovery-epochs.md.
package epoch

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Epoch is one recovery of a site. The zero Epoch is that of a site which never
// needed one.
type Epoch struct {
	Number uint64
	ID     string // random
	Parent string // ID of the epoch before it as far as its maker knew; "" for none
	At     int64  // Unix seconds by the maker's clock: shown, never compared
	// Index and Term are of the last entry that the survivor's log held: what
	// others hold beyond it is not in the recovered site. Zero after a restore.
	Index, Term uint64
	signature   []byte
}

// MaxWire is the length of an Epoch on the wire at most, in bytes.
const MaxWire = 255

var errMalformed = errors.New("a malformed recovery epoch")

// Next begins the epoch after e.
func (e Epoch) Next(id string, now time.Time) Epoch {
	return Epoch{Number: e.Number + 1, ID: id, Parent: e.ID, At: now.Unix()}
}

// Zero reports whether the site was never recovered.
func (e Epoch) Zero() bool { return e.Number == 0 }

// String is for people.
func (e Epoch) String() string {
	if e.Zero() {
		return "0"
	}
	return fmt.Sprintf("%d (%.8s, of %s)", e.Number, e.ID, time.Unix(e.At, 0).UTC().Format("2006-01-02 15:04 UTC"))
}

func (e Epoch) text() string {
	return fmt.Sprintf("%d.%s.%s.%d.%d.%d", e.Number, e.ID, e.Parent, e.At, e.Index, e.Term)
}

// digest is what is signed: the site is in it, so that an epoch is of no use
// elsewhere.
func (e Epoch) digest(site string) []byte {
	sum := sha256.Sum256([]byte("atoll recovery epoch 1\x00" + site + "\x00" + e.text()))
	return sum[:]
}

// Sign makes the epoch one of the site, by the key of the site's authority.
func (e Epoch) Sign(site string, authority crypto.Signer) (Epoch, error) {
	signature, err := authority.Sign(rand.Reader, e.digest(site), crypto.SHA256)
	if err != nil {
		return Epoch{}, fmt.Errorf("signing the recovery epoch: %w", err)
	}
	e.signature = signature
	return e, nil
}

// Wire is the epoch as nodes tell it to each other; "" for the zero Epoch.
func (e Epoch) Wire() string {
	if e.Zero() {
		return ""
	}
	return e.text() + "." + base64.RawURLEncoding.EncodeToString(e.signature)
}

// Parse reads what Wire wrote. It does not check the signature.
func Parse(wire string) (Epoch, error) {
	if wire == "" {
		return Epoch{}, nil
	}
	parts := strings.Split(wire, ".")
	if len(wire) > MaxWire || len(parts) != 7 {
		return Epoch{}, errMalformed
	}
	e := Epoch{ID: parts[1], Parent: parts[2]}
	var errs [5]error
	e.Number, errs[0] = strconv.ParseUint(parts[0], 10, 64)
	e.At, errs[1] = strconv.ParseInt(parts[3], 10, 64)
	e.Index, errs[2] = strconv.ParseUint(parts[4], 10, 64)
	e.Term, errs[3] = strconv.ParseUint(parts[5], 10, 64)
	e.signature, errs[4] = base64.RawURLEncoding.DecodeString(parts[6])
	if err := errors.Join(errs[:]...); err != nil || e.Number == 0 || !validID(e.ID) || e.Parent != "" && !validID(e.Parent) || e.Wire() != wire {
		return Epoch{}, errMalformed
	}
	return e, nil
}

func validID(id string) bool {
	return len(id) > 0 && len(id) <= 32 && strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyz") == ""
}

// Verify checks that an authority of the site made the epoch. The zero Epoch
// needs nobody.
func (e Epoch) Verify(site string, authorities []byte) error {
	if e.Zero() {
		return nil
	}
	for rest := bytes.TrimSpace(authorities); len(rest) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			continue
		}
		if key, ok := cert.PublicKey.(*ecdsa.PublicKey); ok && ecdsa.VerifyASN1(key, e.digest(site), e.signature) {
			return nil
		}
	}
	return errors.New("the recovery epoch is not signed by the site's authority")
}

// Relation of a peer's epoch to one's own.
type Relation uint8

const (
	Same  Relation = iota
	Older          // the peer has data from before a recovery that this node knows
	Newer          // this node has data from before a recovery that the peer knows
	Apart          // two recoveries that know nothing of each other
)

// Compare says how a peer's epoch stands to this one.
func (e Epoch) Compare(peer Epoch) Relation {
	switch {
	case e.Number == peer.Number && e.ID == peer.ID:
		return Same
	case e.Number == peer.Number:
		return Apart
	case peer.Number < e.Number && (peer.Number+1 < e.Number || e.Parent == peer.ID):
		return Older
	case peer.Number > e.Number && (e.Number+1 < peer.Number || peer.Parent == e.ID):
		return Newer
	}
	return Apart
}
