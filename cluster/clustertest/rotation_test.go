package clustertest

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
)

// rotated waits until the nodes that run have finished changing the authority,
// trust exactly one, and it is not the old one.
func (c *Cluster) rotated(old []byte) {
	c.t.Helper()
	c.Await("the authority has changed", func() bool {
		for _, n := range c.nodes {
			if !n.Up() {
				continue
			}
			s, err := n.Status(c.t.Context())
			certs, cerr := pki.ParseCerts(n.CA())
			if err != nil || cerr != nil || !s.Quorum || s.Rotation.Phase != "" || len(certs) != 1 || bytes.Equal(n.CA(), old) {
				return false
			}
			stored, err := member.LoadIdentity(n.Dir, nil)
			if err != nil || !bytes.Equal(stored.CA, n.CA()) {
				return false
			}
		}
		return true
	})
}

func (n *Node) token() string {
	n.cluster.t.Helper()
	token, err := n.CreateToken(n.cluster.t.Context(), time.Hour, 1)
	if err != nil {
		n.cluster.t.Fatal(err)
	}
	return token
}

func TestRotateTheAuthority(t *testing.T) {
	for _, size := range []int{1, 2, 3} {
		synctest.Test(t, func(t *testing.T) {
			c := New(t, Options{Define: withNotes})
			nodes := c.Grow(size)
			old, before := nodes[0].CA(), nodes[0].token()
			for range 2 { // the second joins the first
				if _, err := c.Others()[0].RotateAuthority(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			c.rotated(old)
			if issued := nodes[0].Certificate().Leaf.CheckSignatureFrom(first(t, nodes[0].CA())); issued != nil {
				t.Error(issued)
			}
			pool, err := pki.Pool(old)
			if err != nil {
				t.Fatal(err)
			}
			if pool.Equal(nodes[0].Pool()) {
				t.Error("the old authority is trusted")
			}
			// Tokens of both days are good; what joins is of the new authority.
			for _, token := range []string{before, nodes[0].token()} {
				n := c.NewNode()
				if err := n.JoinWith(token, nodes[0].Addr); err != nil {
					t.Fatal(err)
				}
				n.Start()
				if err := n.write(t.Context(), "a", n.Name); err != nil {
					t.Error(err)
				}
				nodes[0].want("a", n.Name)
			}
			c.rotated(old)
			// Everything is as before after a restart, too.
			for _, n := range c.Others() {
				n.Stop()
			}
			for _, n := range c.nodes {
				n.Start()
			}
			nodes[0].want("a", c.nodes[len(c.nodes)-1].Name)
			c.rotated(old)
		})
	}
}

func first(t *testing.T, bundle []byte) *x509.Certificate {
	t.Helper()
	cert, err := pki.ParseCert(bundle)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestRotateWithANodeAway: a node that missed the change, or two, finds back.
func TestRotateWithANodeAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.Grow(3)
		old := nodes[0].CA()
		away := nodes[2]
		away.Kill()
		for i := range 2 {
			was := nodes[0].CA()
			if _, err := nodes[0].RotateAuthority(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.rotated(was)
			if err := nodes[1].write(t.Context(), "a", fmt.Sprint(i)); err != nil {
				t.Fatal(err)
			}
		}
		away.Start()
		away.want("a", "1")
		c.rotated(old)
		if !bytes.Equal(away.CA(), nodes[0].CA()) {
			t.Error("the node that was away has another authority")
		}
		nodes[0].Kill() // its vote counts
		c.Await("a write", func() bool { return away.write(t.Context(), "a", "2") == nil })
	})
}

// TestRotateThroughCrashes: whoever leads goes on, at whatever step the last one
// died.
func TestRotateThroughCrashes(t *testing.T) {
	for i := range 8 {
		synctest.Test(t, func(t *testing.T) {
			c := New(t, Options{Define: withNotes})
			nodes := c.Grow(3)
			old := nodes[0].CA()
			if _, err := nodes[0].RotateAuthority(t.Context()); err != nil {
				t.Fatal(err)
			}
			<-time.After(time.Duration(i) * 400 * time.Millisecond)
			leader := c.Leader()
			leader.Kill()
			c.Leader()
			<-time.After(time.Duration(i) * 700 * time.Millisecond)
			leader.Start()
			c.rotated(old)
			for _, n := range nodes {
				if !bytes.Equal(n.CA(), nodes[0].CA()) {
					t.Errorf("%s has another authority", n.Name)
				}
				if err := n.write(t.Context(), "a", n.Name); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestRenewAll(t *testing.T) {
	for _, size := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			c := New(t, Options{})
			nodes := c.Grow(size)
			var before []string
			for _, n := range nodes {
				before = append(before, n.Certificate().Leaf.SerialNumber.String())
			}
			if _, err := nodes[0].RenewAll(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.Await("every node has renewed", func() bool {
				for i, n := range nodes {
					if s, err := n.Status(t.Context()); err != nil || s.Rotation.Phase != "" || n.Certificate().Leaf.SerialNumber.String() == before[i] {
						return false
					}
				}
				return true
			})
			serial := nodes[0].Certificate().Leaf.SerialNumber
			<-time.After(time.Hour)
			if nodes[0].Certificate().Leaf.SerialNumber.Cmp(serial) != 0 {
				t.Error("it goes on renewing")
			}
		})
	}
}

// TestRotationsRepeated: a rotation that is asked for again and again while it is under
// way, by several nodes at once, is one rotation; asked for when it is over it is another.
func TestRotationsRepeated(t *testing.T) {
	certificates, ca := (*member.Node).RenewAll, (*member.Node).RotateAuthority
	for _, row := range []struct {
		name          string
		begins, again func(*member.Node, context.Context) (underWay bool, err error)
	}{
		{"certificates", certificates, certificates},
		{"the CA", ca, ca},
		{"certificates while the CA is", ca, certificates},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := New(t, Options{Define: withNotes})
			c.Grow(3)
			for round := 1; round <= 2; round++ {
				old := c.nodes[0].CA()
				leader := c.Leader()
				others := c.Others(leader)
				asked, slow := others[0], others[1]
				// While this follower is up, as the other one says, and does not hear of
				// it from the leader, the rotation goes on.
				c.Network.Cut(leader.Addr, slow.Addr)
				var begun atomic.Int32
				for i := range 20 {
					rotate := row.again
					if i == 0 {
						rotate = row.begins
					}
					var all sync.WaitGroup
					for _, n := range []*Node{leader, asked} {
						all.Go(func() {
							underWay, err := rotate(n.Node, t.Context())
							if err != nil {
								t.Errorf("%s: %v", row.name, err)
							}
							if !underWay {
								begun.Add(1)
							}
						})
					}
					all.Wait()
					<-time.After(300 * time.Millisecond)
				}
				if got := begun.Load(); got != 1 {
					t.Errorf("%s: %d of those who asked were told that it begins", row.name, got)
				}
				if s, err := asked.Status(t.Context()); err != nil || s.Rotation.Phase == "" {
					t.Fatalf("%s: it was over before the slow node had heard of it: %+v, %v", row.name, s.Rotation, err)
				}
				c.Network.Heal(leader.Addr, slow.Addr)
				c.Await("all nodes to be done", func() bool {
					for _, n := range c.nodes {
						s, err := n.Status(t.Context())
						if err != nil || !s.Quorum || s.Rotation.Phase != "" || n.Identity().Renewal < round {
							return false
						}
					}
					return true
				})
				<-time.After(time.Minute) // nothing more comes of it
				for _, n := range c.nodes {
					if got := n.Identity().Renewal; got != round {
						t.Errorf("%s: %s has renewed %d times, and was told %d times", row.name, n.Name, got, round)
					}
					if same := bytes.Equal(n.CA(), old); same != (row.name == "certificates") || !bytes.Equal(n.CA(), leader.CA()) {
						t.Errorf("%s: the authority of %s is the old one: %v", row.name, n.Name, same)
					}
					if err := n.write(t.Context(), "a", n.Name); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
}

// TestRenewAllBesideASilentNode: a node that has not reached another since it started does
// not take that one, which is up, for renewing.
func TestRenewAllBesideASilentNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{})
		nodes := c.Grow(3)
		others := c.Others(c.Leader())
		asked, silent := others[0], others[1]
		for round := 1; round <= 2; round++ {
			if underWay, err := asked.RenewAll(t.Context()); err != nil || underWay {
				t.Errorf("round %d: it is under way already: %v, %v", round, underWay, err)
			}
			c.Await("all nodes have renewed", func() bool {
				return !slices.ContainsFunc(nodes, func(n *Node) bool { return n.Identity().Renewal != round })
			})
			asked.Stop()
			c.Network.Cut(asked.Addr, silent.Addr)
			asked.Start()
			c.Await("the silent one is up", func() bool { return len(asked.Live()) == 3 })
		}
	})
}

// TestStolen: what a stolen node held opens nothing any more, and the site runs on.
func TestStolen(t *testing.T) {
	for _, crash := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c := New(t, Options{Define: withNotes})
			nodes := c.Grow(5)
			sealed, err := nodes[0].Seal("x", []byte("secret"))
			if err != nil {
				t.Fatal(err)
			}
			resealed := make(map[*Node][]byte)
			for _, n := range nodes {
				n.Resealers(func(context.Context) error {
					plain, err := n.Unseal("x", sealed)
					if err == nil {
						resealed[n], err = n.Seal("x", plain)
					}
					return err
				})
			}
			old, token := nodes[0].CA(), nodes[0].token()
			leader := c.Leader()
			others := c.Others(leader)
			stolen, away, asked := others[0], others[1], others[2]
			held, id := stolen.Identity(), stolen.Self()
			held.ClusterKey = stolen.ClusterKeys()
			away.Kill()
			c.Await("it is missed", func() bool { return len(asked.Live()) == 4 })
			for range 2 { // safe to repeat
				if err := asked.Betray(t.Context(), id); err != nil {
					t.Fatal(err)
				}
			}
			if err := stolen.ends(); !errors.Is(err, member.ErrRemoved) {
				t.Errorf("the stolen node ended with %v", err)
			}
			if crash {
				leader.Kill()
				c.Leader()
				leader.Start()
			}
			c.rotated(old)
			away.Start()
			c.Await("the voters hold the new key and no other, and nobody else has any", func() bool {
				votes := c.voting(asked)
				for _, n := range c.Others() {
					s, err := n.Status(t.Context())
					key := n.ClusterKeys()
					if err != nil || s.Rekeying || bytes.Equal(key, held.ClusterKey) || slices.Contains(votes, n.Name) != (len(key) == pki.ClusterKeySize) {
						return false
					}
				}
				return true
			})
			c.rotated(old)
			if _, err := asked.Unseal("x", sealed); err == nil {
				t.Error("the old key opens secrets still")
			}
			if !crash { // a node that starts anew has none
				found := false
				for _, again := range resealed {
					plain, err := asked.Unseal("x", again)
					found = found || err == nil && string(plain) == "secret"
				}
				if !found {
					t.Error("what was sealed anew does not open")
				}
			}
			if _, err := away.ServerCertificate(t.Context(), []string{"x"}); err != nil {
				t.Errorf("the authority's key was not sealed anew: %v", err)
			}
			if err := c.NewNode().JoinWith(token, asked.Addr); !errors.Is(err, member.ErrTokenUnknown) {
				t.Errorf("a token from before: %v", err)
			}
			joined := c.Join(asked)
			if err := joined.write(t.Context(), "a", "1"); err != nil {
				t.Error(err)
			}
			// The thief has the node's key and certificate.
			if err := pki.VerifyPinned(stolenCert(t, held), held.CA, mustPin(t, asked.CA())); err == nil {
				t.Error("the stolen certificate is accepted")
			}
		})
	}
}

func stolenCert(t *testing.T, id member.Identity) *x509.Certificate { return first(t, id.Cert) }

func mustPin(t *testing.T, ca []byte) []byte {
	t.Helper()
	pin, err := pki.PinPEM(ca)
	if err != nil {
		t.Fatal(err)
	}
	return pin
}
