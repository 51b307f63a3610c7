package clustertest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
)

// holding are the names of the nodes that have a key, in memory or anywhere in their
// directories.
func (c *Cluster) holding(key []byte) (names []string) {
	c.t.Helper()
	for _, n := range c.nodes {
		found := n.Up() && bytes.Contains(n.ClusterKeys(), key)
		err := filepath.WalkDir(n.Dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			b, err := os.ReadFile(path)
			found = found || bytes.Contains(b, key)
			return err
		})
		if err != nil {
			c.t.Fatal(err)
		}
		if found {
			names = append(names, n.Name)
		}
	}
	return names
}

func (c *Cluster) voting(via *Node) (names []string) {
	c.t.Helper()
	s, err := via.Status(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	for _, m := range s.Members {
		if m.Voter {
			names = append(names, m.Name)
		}
	}
	slices.Sort(names)
	return names
}

// TestVotersHoldTheKey: while a site grows to five voters and seven nodes, those that
// vote have the cluster key and nobody else ever does; one that is drained erases it.
func TestVotersHoldTheKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		first := c.Found()
		key := first.ClusterKeys()
		for _, want := range []int{1, 3, 3, 5, 5, 5} {
			joined := c.Join(first)
			c.AwaitVoters(want)
			<-time.After(3 * time.Second)
			held, votes := c.holding(key), c.voting(first)
			if !slices.Equal(held, votes) {
				t.Errorf("with %d nodes %v hold the key and %v vote", len(c.nodes), held, votes)
			}
			// What takes the key works everywhere.
			if err := joined.write(t.Context(), "a", joined.Name); err != nil {
				t.Error(err)
			}
			if _, err := joined.ServerCertificate(t.Context(), []string{"x"}); err != nil {
				t.Errorf("%s: %v", joined.Name, err)
			}
		}
		through := c.nodes[6] // has no vote
		c.Join(through)
		drained := c.Others(c.Leader())[0]
		if err := first.Drain(t.Context(), drained.Self(), false); err != nil {
			t.Fatal(err)
		}
		c.Await("another votes in its place and it has erased the key", func() bool {
			votes := c.voting(first)
			// Looking through all files is dear, and so comes last.
			return !slices.Contains(votes, drained.Name) && len(votes) == 5 &&
				!bytes.Equal(drained.Identity().ClusterKey, key) && slices.Equal(c.holding(key), votes)
		})
		s, err := first.Status(t.Context())
		if err != nil || !slices.Equal(s.Exposed, []string{drained.Name}) {
			t.Errorf("exposed: %v, %v", s.Exposed, err)
		}
		// It is told nothing more, until it may vote again.
		drained.Stop()
		drained.Start()
		<-time.After(5 * time.Second)
		if held := c.holding(key); slices.Contains(held, drained.Name) {
			t.Error("it got the key again")
		}
		if _, err := first.RotateKey(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.Await("the key has changed and nobody is exposed", func() bool {
			s, err := first.Status(t.Context())
			return err == nil && !s.Rekeying && len(s.Exposed) == 0 && !bytes.Equal(first.ClusterKeys(), key)
		})
		c.Await("nobody has the former key", func() bool {
			for _, n := range c.nodes {
				if bytes.Equal(n.Identity().ClusterKey, key) {
					return false
				}
			}
			return len(c.holding(key)) == 0
		})
		if held, votes := c.holding(first.ClusterKeys()), c.voting(first); !slices.Equal(held, votes) {
			t.Errorf("%v hold the new key and %v vote", held, votes)
		}
	})
}

// TestRotateKeyRepeated: a change of the key that is asked for again and again while it
// is under way, by several nodes and at each of its steps, is one change; asked for when
// it is over it is another.
func TestRotateKeyRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.Grow(3)
		leader := c.Leader()
		others := c.Others(leader)
		asked, slow := others[0], others[1]
		ask := func(n *Node, want bool) {
			t.Helper()
			if underWay, err := n.RotateKey(t.Context()); err != nil || underWay != want {
				t.Errorf("%s says that it is under way already: %v, %v", n.Name, underWay, err)
			}
		}
		again := func() {
			t.Helper()
			for range 10 {
				ask(leader, true)
				ask(asked, true)
				<-time.After(300 * time.Millisecond)
			}
		}
		sealing, sealed := make(chan struct{}, 1), make(chan struct{})
		for _, n := range nodes {
			n.Resealers(func(context.Context) error {
				select {
				case sealing <- struct{}{}:
				default:
				}
				<-sealed
				return nil
			})
		}
		key := leader.ClusterKeys()
		// This follower is up, as the other one says, and cannot get the next key from
		// the leader, which waits for it.
		c.Network.Cut(leader.Addr, slow.Addr)
		ask(asked, false)
		again()
		next := bytes.TrimPrefix(leader.ClusterKeys(), key)
		if len(next) != pki.ClusterKeySize {
			t.Fatalf("the leader holds %d bytes of next keys", len(next))
		}
		c.Network.Heal(leader.Addr, slow.Addr)
		<-sealing
		again()
		close(sealed)
		over := func(key []byte) func() bool {
			return func() bool {
				for _, n := range nodes {
					if s, err := n.Status(t.Context()); err != nil || s.Rekeying || bytes.Equal(n.ClusterKeys(), key) {
						return false
					}
				}
				return true
			}
		}
		c.Await("the key has changed", over(key))
		<-time.After(time.Minute) // nothing more comes of it
		for _, n := range nodes {
			if !bytes.Equal(n.ClusterKeys(), next) {
				t.Errorf("%s does not hold the first next key alone", n.Name)
			}
		}
		ask(asked, false)
		c.Await("the key has changed once more", over(next))
	})
}

// TestNoVoteWithoutTheKey: a node that cannot get the key gets no vote, and the site
// goes on; then it gets both.
func TestNoVoteWithoutTheKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		first := c.Found()
		second := c.Join(first)
		c.AwaitVoters(1)
		// The key can be neither written nor replaced there.
		wall := filepath.Join(second.Dir, "cluster.key")
		if err := os.MkdirAll(filepath.Join(wall, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
		c.Join(first)
		<-time.After(20 * time.Second)
		if votes := c.voting(first); len(votes) != 1 {
			t.Errorf("%v vote though one of them has no key", votes)
		}
		if err := first.write(t.Context(), "a", "1"); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(wall); err != nil {
			t.Fatal(err)
		}
		c.AwaitVoters(3)
		if held := c.holding(first.ClusterKeys()); len(held) != 3 {
			t.Errorf("%v hold the key", held)
		}
	})
}

// TestAClaimIsNoProof: a node that only says that it holds the key gets no vote by it,
// and nobody gives up the key for it.
func TestAClaimIsNoProof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		first := c.Found()
		liar := c.Join(first)
		c.AwaitVoters(1)
		if err := os.MkdirAll(filepath.Join(liar.Dir, "cluster.key", "x"), 0o700); err != nil { // it cannot have it
			t.Fatal(err)
		}
		defer liar.claims(first, first.ClusterKeys())()
		// All that it takes for the other to vote, lead and be the only one with the key.
		if err := first.Drain(t.Context(), first.Self(), false); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Minute)
		if votes := c.voting(first); !slices.Equal(votes, []string{first.Name}) {
			t.Errorf("%v vote", votes)
		}
		if held := len(first.ClusterKeys()); held != pki.ClusterKeySize {
			t.Errorf("the one node with the key holds %d bytes of it now", held)
		}
	})
}

// claims has a node's answers to pings of another say that it holds a key, until the
// end. All else it answers as before.
func (n *Node) claims(to *Node, key []byte) (end func()) {
	id := sha256.Sum256(append([]byte("atoll cluster key id\x00"), key...))
	return n.answers(to, func(said map[string]any) {
		said["keys"] = []string{hex.EncodeToString(id[:16])}
		said["seals"] = hex.EncodeToString(id[:16])
	})
}

// answers has a node's answers to pings of another altered, until the end.
func (n *Node) answers(to *Node, alter func(said map[string]any)) (end func()) {
	t, network := n.cluster.t, n.cluster.Network
	network.mu.Lock()
	honest := n.host.services[member.ServiceControl]
	network.mu.Unlock()
	liar := n.host.Listen(member.ServiceControl)
	n.host.Drop(to.Self())
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", n.Addr },
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			there, back := newStream(link{to.Addr, n.Addr}), newStream(link{n.Addr, to.Addr})
			select {
			case honest.accepted <- &conn{host: n.host, in: there, out: back, peer: to.Self(), accepted: true}:
			case <-honest.closed: // the transport does not end what nobody waits for any more
				return nil, net.ErrClosed
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			return &conn{host: to.host, in: back, out: there, peer: n.Self()}, nil
		}},
		ModifyResponse: func(r *http.Response) error {
			if r.Request.URL.Path != "/v1/ping" {
				return nil
			}
			var said map[string]any
			if err := json.NewDecoder(r.Body).Decode(&said); err != nil {
				return err
			}
			alter(said)
			text, err := json.Marshal(said)
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(text)), int64(len(text))
			r.Header.Set("Content-Length", strconv.Itoa(len(text)))
			return err
		},
	}
	server := &http.Server{Handler: proxy, ErrorLog: log.New(io.Discard, "", 0)}
	served := make(chan error, 1)
	go func() { served <- server.Serve(liar) }()
	return func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		<-served
	}
}

// TestALoneNodeWithoutAVote: with everybody else dead it serves with the certificate
// that it had, and knows the keys that tokens are signed with, also after a restart.
func TestALoneNodeWithoutAVote(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{})
		first := c.Found()
		lone := c.Join(first)
		other, _ := first.TokenKey()
		had, err := lone.ServerCertificate(t.Context(), []string{"x"})
		if err != nil {
			t.Fatal(err)
		}
		first.Kill()
		for range 2 {
			cert, err := lone.ServerCertificate(t.Context(), []string{"x"})
			if err != nil || !bytes.Equal(cert.Certificate[0], had.Certificate[0]) {
				t.Errorf("it does not serve with the certificate that it had: %v", err)
			}
			own, _ := lone.TokenKey()
			for _, kid := range []string{own, other} {
				if public, err := lone.TokenPublic(kid); public == nil || err != nil {
					t.Errorf("key %s: %v", kid, err)
				}
			}
			if _, err := lone.Seal("x", nil); err == nil {
				t.Error("it seals without the cluster key")
			}
			lone.Stop()
			lone.Start()
		}
	})
}

// TestStolenWithoutAVote: it never held the cluster key, so that stays; what it held
// is replaced all the same.
func TestStolenWithoutAVote(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{})
		first := c.Found()
		for range 5 {
			c.Join(first)
		}
		c.AwaitVoters(5)
		key, ca, token := first.ClusterKeys(), first.CA(), first.token()
		without := c.nodes[slices.IndexFunc(c.nodes, func(n *Node) bool { return !slices.Contains(c.voting(first), n.Name) })]
		if err := first.Betray(t.Context(), without.Self()); err != nil {
			t.Fatal(err)
		}
		without.ends()
		c.rotated(ca)
		if s, err := first.Status(t.Context()); err != nil || s.Rekeying || !bytes.Equal(first.ClusterKeys(), key) {
			t.Errorf("the cluster key changed: %v", err)
		}
		if err := c.NewNode().JoinWith(token, first.Addr); err == nil {
			t.Error("a token from before is good")
		}
	})
}

// TestStolenThroughACrash: the leader dies at once when a node is said to be stolen;
// the next one does all of it.
func TestStolenThroughACrash(t *testing.T) {
	for i := range 4 {
		synctest.Test(t, func(t *testing.T) {
			c := New(t, Options{Define: withNotes})
			nodes := c.Grow(5)
			leader := c.Leader()
			others := c.Others(leader)
			stolen, asked := others[0], others[1]
			key, ca, token := asked.ClusterKeys(), asked.CA(), asked.token()
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			id := stolen.Self()
			go func() { done <- asked.Betray(ctx, id) }()
			removed := func() bool {
				for _, m := range members(asked) {
					if m.ID == id {
						return false
					}
				}
				return true
			}
			c.Await("it is removed", removed)
			<-time.After(time.Duration(i) * 30 * time.Millisecond)
			leader.Kill()
			cancel()
			<-done
			c.Leader()
			stolen.ends()
			c.rotated(ca)
			leader.Start()
			c.rotated(ca)
			c.Await("the key has changed", func() bool {
				for _, n := range nodes {
					if !n.Up() || n == stolen {
						continue
					}
					if s, err := n.Status(t.Context()); err != nil || s.Rekeying || len(n.ClusterKeys()) > pki.ClusterKeySize || bytes.Equal(n.ClusterKeys(), key) {
						return false
					}
				}
				return true
			})
			if err := c.NewNode().JoinWith(token, asked.Addr); err == nil {
				t.Error("a join token from before is good")
			}
		})
	}
}

func members(n *Node) []member.Member {
	s, err := n.Status(n.cluster.t.Context())
	if err != nil {
		n.cluster.t.Fatal(err)
	}
	var all []member.Member
	for _, m := range s.Members {
		all = append(all, m.Member)
	}
	return all
}
