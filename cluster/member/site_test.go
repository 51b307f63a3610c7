package member_test

import (
	"context"
	"crypto/x509"
	"errors"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/clustertest"
	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

func token(t *testing.T, n *clustertest.Node, ttl time.Duration, uses int) string {
	t.Helper()
	text, err := n.CreateToken(t.Context(), ttl, uses)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// Nodes of a newer version may say more than this one knows, in each request.
func TestRequestsWithNewFields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		first := c.Found()
		key, err := pki.ParseKey(first.Identity().Key)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := pki.NewCSR(key)
		if err != nil {
			t.Fatal(err)
		}
		dial := func(ctx context.Context) (net.Conn, error) {
			return c.Network.Visitor("10.0.0.9:5001").DialJoin(ctx, first.Addr, mustPin(t, first.CA()))
		}
		for path, ask := range map[string]map[string]any{
			"/v1/renew":    {"node": first.Self(), "csr": csr},
			"/v1/standing": {"node": first.Self()},
		} {
			ask["newer"] = []string{"than", "this"}
			var answer map[string]any
			if err := joining.Post(t.Context(), dial, path, ask, &answer); err != nil {
				t.Errorf("%s: %v", path, err)
			}
			ask["NODE"] = "another"
			if err := joining.Post(t.Context(), dial, path, ask, &answer); !errors.Is(err, pki.ErrMalformed) {
				t.Errorf("%s with a field twice: %v", path, err)
			}
		}
	})
}

func TestJoinIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		first := c.Found()
		otherSite := clustertest.New(t, clustertest.Options{})
		elsewhere := otherSite.Found()

		used := token(t, first, time.Hour, 1)
		if err := c.NewNode().JoinWith(used, first.Addr); err != nil {
			t.Fatal(err)
		}
		expired := token(t, first, time.Minute, 1)
		<-time.After(2 * time.Minute)
		good := token(t, first, time.Hour, 5)
		parts := strings.Split(good, "-")
		forged, err := pki.NewToken(pki.KindJoin, mustPin(t, first.CA()))
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range []struct {
			name, token, addr string
			want              error
		}{
			{"malformed", "hello", first.Addr, pki.ErrMalformed},
			{"truncated", good[:len(good)-5], first.Addr, pki.ErrMalformed},
			{"other kind", strings.Join([]string{parts[0], "robot", parts[2], parts[3], parts[4]}, "-"), first.Addr, pki.ErrMalformed},
			{"expired", expired, first.Addr, member.ErrTokenExpired},
			{"used up", used, first.Addr, member.ErrTokenUsed},
			{"never made", forged.String(), first.Addr, member.ErrTokenUnknown},
			{"wrong secret", strings.Join([]string{parts[0], parts[1], parts[2], parts[3], strings.Split(used, "-")[4]}, "-"), first.Addr, member.ErrTokenUnknown},
			{"another site's", token(t, elsewhere, time.Hour, 1), first.Addr, member.ErrOtherSite},
			{"nobody there", good, "10.9.9.9:5001", member.ErrUnreachable},
		} {
			n := c.NewNode()
			err := n.JoinWith(row.token, row.addr)
			if !errors.Is(err, row.want) {
				t.Errorf("%s: %v, want %v", row.name, err, row.want)
			} else {
				t.Logf("%s: %v", row.name, err)
			}
			if err != nil && strings.Contains(err.Error(), parts[4]) {
				t.Errorf("%s: the error repeats the secret", row.name)
			}
			if _, err := member.LoadIdentity(n.Dir, nil); !errors.Is(err, member.ErrEmpty) {
				t.Errorf("%s: the refused node has an identity: %v", row.name, err)
			}
		}
		n := c.NewNode()
		n.Name = first.Name
		if err := n.JoinWith(good, first.Addr); !errors.Is(err, member.ErrNameTaken) {
			t.Errorf("a live node's name: %v, want ErrNameTaken", err)
		}
		// A refusal takes no use, and one address that answers is enough.
		n.Name = "another"
		if err := n.JoinWith(good, "10.9.9.9:5001", first.Addr); err != nil {
			t.Error(err)
		}
		if err := n.JoinWith(good, first.Addr); !errors.Is(err, member.ErrFounded) {
			t.Errorf("joining twice: %v, want ErrFounded", err)
		}
	})
}

func mustPin(t *testing.T, ca []byte) []byte {
	t.Helper()
	pin, err := pki.PinPEM(ca)
	if err != nil {
		t.Fatal(err)
	}
	return pin
}

// breaking loses what the site answers, a few times.
type breaking struct {
	net.Conn
	lose *atomic.Int32
}

func (b breaking) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	if n > 0 && b.lose.Add(-1) >= 0 {
		b.Conn.Close()
		return 0, net.ErrClosed
	}
	return n, err
}

func TestJoinAgainAfterALostAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		first := c.Found()
		n := c.NewNode()
		cfg := member.JoinConfig{
			Dir: n.Dir, Name: n.Name, Advertise: n.Addr, Token: token(t, first, time.Hour, 1), Addrs: []string{first.Addr},
			Retry: time.Millisecond,
		}
		var lose atomic.Int32
		lose.Store(1)
		cfg.Dial = func(ctx context.Context, addr string, pin []byte) (net.Conn, error) {
			conn, err := c.Network.Visitor(n.Addr).DialJoin(ctx, addr, pin)
			if err != nil {
				return nil, err
			}
			return breaking{conn, &lose}, nil
		}
		if _, err := member.Join(t.Context(), cfg); !errors.Is(err, member.ErrUnreachable) {
			t.Fatalf("a lost answer gives %v", err)
		}
		if _, err := member.Join(t.Context(), cfg); err != nil {
			t.Fatalf("the same node with the same token again: %v", err)
		}
		n.Start()
		c.Await("the node is a member, once", func() bool {
			s, err := n.Status(t.Context())
			return err == nil && s.Quorum && len(s.Members) == 2
		})
		if err := c.NewNode().JoinWith(cfg.Token, first.Addr); !errors.Is(err, member.ErrTokenUsed) {
			t.Errorf("another node with that token: %v", err)
		}
	})
}

func TestANodeTakesADeadOnesPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		nodes := c.Grow(3)
		dead := nodes[2]
		id := dead.Self()
		dead.Kill()
		c.Await("it is missed", func() bool { return len(nodes[0].Live()) == 2 && len(nodes[1].Live()) == 2 })
		heir := c.NewNode()
		heir.Name = dead.Name
		if err := heir.JoinWith(token(t, nodes[0], time.Hour, 1), nodes[0].Addr); err != nil {
			t.Fatal(err)
		}
		heir.Start()
		c.Await("the dead node's vote passes on", func() bool {
			s, err := nodes[0].Status(t.Context())
			if err != nil || !s.Quorum || len(s.Members) != 3 {
				return false
			}
			for _, m := range s.Members {
				if !m.Voter || m.ID == id {
					return false
				}
			}
			return true
		})
		if err := nodes[0].Authorize(id, member.ServiceRaft); err == nil {
			t.Error("the replaced node may still connect")
		}
		if err := nodes[0].Authorize("ffff", member.ServiceRaft); err != nil {
			t.Errorf("a node that is not known yet may not talk raft: %v", err)
		}
		if err := nodes[0].Authorize("ffff", 3); err == nil {
			t.Error("a node that is not known may ask for blobs")
		}
	})
}

func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		nodes := c.Grow(2)
		before := []*x509.Certificate{nodes[0].Certificate().Leaf, nodes[1].Certificate().Leaf}
		// Asleep past the certificates' end: the next start renews.
		nodes[1].Stop()
		nodes[0].Stop()
		<-time.After(pki.NodeLife + 24*time.Hour)
		nodes[0].Start()
		nodes[1].Start()
		for i, n := range nodes {
			c.Await(n.Name+" renews", func() bool { return n.Certificate().Leaf.NotAfter.After(time.Now()) })
			leaf := n.Certificate().Leaf
			if leaf.SerialNumber.Cmp(before[i].SerialNumber) == 0 || !leaf.NotBefore.Before(time.Now().Add(-time.Hour)) {
				t.Errorf("%s has a certificate from %v to %v", n.Name, leaf.NotBefore, leaf.NotAfter)
			}
			stored, err := member.LoadIdentity(n.Dir, nil)
			if err != nil {
				t.Fatal(err)
			}
			if string(stored.Cert) != string(n.Identity().Cert) {
				t.Errorf("%s did not store its new certificate", n.Name)
			}
		}
	})
}

func TestServerCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		n := c.Found()
		cert, err := n.ServerCertificate(t.Context(), []string{"registry.lan", "192.0.2.1"})
		if err != nil {
			t.Fatal(err)
		}
		pool, err := pki.Pool(n.CA())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: "registry.lan"}); err != nil {
			t.Error(err)
		}
	})
}

// What a start says of its node is what every node reads of it, and a row that is
// true already is not written again.
func TestANodePublishesItsLabels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		nodes := c.Grow(2)
		n := nodes[1]
		row := func() (found member.Member) {
			if err := nodes[0].DB.View(func(v *table.View) error {
				members, err := nodes[0].Members(v)
				for _, m := range members {
					if m.ID == n.Self() {
						found = m
					}
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
			return found
		}
		restart := func(labels map[string]string, cache bool) {
			n.Stop()
			n.Labels, n.Cache = labels, cache
			n.Start()
			c.Await("the first node reads the labels", func() bool {
				m := row()
				return maps.Equal(m.Labels, labels) && m.Cache == cache
			})
		}
		restart(map[string]string{"rack": "a", "zone": "north"}, true)
		c.AwaitVoters(1)
		<-time.After(time.Minute) // for what the start itself commits
		before := nodes[0].DB.Machine().Applied()
		<-time.After(time.Hour)
		if after := nodes[0].DB.Machine().Applied(); after != before {
			t.Errorf("an idle hour committed %d revisions", after-before)
		}
		restart(map[string]string{"rack": "b"}, false)
		restart(nil, false)

		n.Stop()
		n.Labels = map[string]string{"rack": "a b"}
		if err := n.TryStart(); err == nil || !strings.Contains(err.Error(), "rack=a b") {
			t.Errorf("a start with a malformed label: %v", err)
		}
	})
}

func TestADirectoryInUse(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	n := c.Found()
	copied := c.NewNode()
	copied.Dir = t.TempDir()
	for _, name := range []string{"identity.json", "cluster.key", version.StampFile} {
		b, err := os.ReadFile(filepath.Join(n.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(copied.Dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(n.Dir, "raft"), filepath.Join(copied.Dir, "raft")); err != nil {
		t.Fatal(err)
	}
	if err := copied.TryStart(); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second node on the same log: %v", err)
	}
}
