package node

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"testing"

	"github.com/atoll-registry/atoll/node/peers"
)

// TestNewCA: the site's CA is replaced while nodes are used; clients that know
// the old one or the new one are served, before and after.
func TestNewCA(t *testing.T) {
	nodes := three(t)
	c := config(t)
	token := nodes[0].do("POST", "/api/atoll/v1/tokens", []byte(`{"ttl_seconds":3600,"uses":1}`), "Content-Type", "application/json").want(201)
	var made peers.JoinToken
	token.decode(&made)
	c.Init, c.Join, c.Token, c.Name, c.AdminPassword, c.TLS = false, []string{nodes[0].PeerAddr}, made.Token, "four", "", TLSAuto
	public := start(t, c)
	nodes = append(nodes, public)
	old := nodes[0].socket("GET", "/api/atoll/v1/ca", nil).want(200).Body
	p := nodes[0].push("library/app", "v1", content(60, 400<<10))

	asks := func(ca []byte) error {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(ca) {
			t.Fatalf("no certificate in %s", ca)
		}
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
		defer transport.CloseIdleConnections()
		resp, err := (&http.Client{Transport: transport}).Get(public.URL + "/api/v2.0/health")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	if err := asks(old); err != nil {
		t.Fatal(err)
	}
	for i := range 2 { // its answer may be lost, and it is asked for once more, of another node
		var s peers.Status
		if nodes[i].do("POST", "/api/atoll/v1/cluster/rotations/ca", nil).want(202).decode(&s); s.UnderWay != (i > 0) {
			t.Errorf("asked for %d times before, it is under way: %v", i, s.UnderWay)
		}
	}
	nodes[1].do("POST", "/api/atoll/v1/cluster/rotations/none", nil).want(422)
	await(t, "every node is of the new CA alone", func() string {
		for _, n := range nodes {
			s, err := n.member.Status(t.Context())
			if now := n.socket("GET", "/api/atoll/v1/ca", nil).want(200).Body; err != nil || s.Rotation.Phase != "" || bytes.Equal(now, old) || bytes.Count(now, []byte("BEGIN")) != 1 {
				return fmt.Sprintf("%s: %+v, %v, %d certificates", n.config.Name, s.Rotation, err, bytes.Count(now, []byte("BEGIN")))
			}
		}
		return ""
	})
	renewed := nodes[0].socket("GET", "/api/atoll/v1/ca", nil).want(200).Body
	for name, ca := range map[string][]byte{"old": old, "new": renewed} {
		if err := asks(ca); err != nil {
			t.Errorf("a client that knows the %s CA: %v", name, err)
		}
	}
	// New connections between the nodes, of all services.
	nodes[2] = nodes[2].again()
	allLive(t, nodes)
	nodes[2].pull(p, "v1")
	q := nodes[2].push("library/app", "v2", content(61, 400<<10))
	nodes[1].pull(q, "v2")
	join(t, nodes[1], "five").pull(q, "v2")
}

// TestDrainAndRemove: a node that was drained and removed takes nothing with it.
func TestDrainAndRemove(t *testing.T) {
	nodes := three(t)
	p := nodes[2].push("library/app", "v1", content(62, 400<<10))
	nodes[0].do("PUT", "/api/atoll/v1/cluster/nodes/three/drain", nil).want(200)
	await(t, "three is drained", func() string {
		a := nodes[0].do("GET", "/api/atoll/v1/cluster", nil).want(200)
		var s peers.Status
		a.decode(&s)
		for _, line := range s.Advice {
			if line == "node three is drained: stop it for maintenance, remove it (atoll cluster remove three), or take it back (atoll cluster drain three --undo)" {
				return ""
			}
		}
		advice, _ := json.Marshal(s.Advice)
		return string(advice)
	})
	nodes[0].do("DELETE", "/api/atoll/v1/cluster/nodes/three", nil).want(200)
	if err := <-nodes[2].done; err == nil {
		t.Error("the removed node ended without a word")
	}
	nodes[2].cancel = nil // it has ended
	nodes[1].pull(p, "v1")
	nodes[0].do("DELETE", "/api/atoll/v1/cluster/nodes/three", nil).want(200)
	nodes[0].do("DELETE", "/api/atoll/v1/cluster/nodes/nobody", nil).want(404)
}

// TestStolen: tokens that the stolen node signed are void, and what it held is
// replaced, while pushes and pulls go on.
func TestStolen(t *testing.T) {
	nodes := three(t)
	p := nodes[0].push("library/app", "v1", content(63, 400<<10))
	var issued struct{ Token string }
	tokenOf := func(n *running) string {
		n.do("GET", "/service/token?service=harbor-registry&scope=repository:library/app:pull", nil).want(200).decode(&issued)
		return issued.Token
	}
	pull := func(n *running, token string) int {
		return n.as(login{}, "GET", "/v2/library/app/manifests/v1", nil, "Authorization", "Bearer "+token).Status
	}
	token := tokenOf(nodes[2])
	for _, n := range nodes { // each has looked at it
		if got := pull(n, token); got != 200 {
			t.Fatalf("a token is good for %d", got)
		}
	}
	held, ca := nodes[2].member.ClusterKeys(), nodes[2].member.CA()
	nodes[2].do("DELETE", "/api/atoll/v1/cluster/nodes/three?stolen=true", nil).want(400)
	for range 2 {
		nodes[0].do("DELETE", "/api/atoll/v1/cluster/nodes/three?stolen=true", nil).want(200)
	}
	<-nodes[2].done
	nodes[2].cancel = nil // it has ended
	await(t, "all that it held is replaced", func() string {
		for _, n := range nodes[:2] {
			s, err := n.member.Status(t.Context())
			if err != nil || s.Rekeying || s.Rotation.Phase != "" || bytes.Equal(n.member.ClusterKeys(), held) || bytes.Equal(n.member.CA(), ca) {
				return fmt.Sprintf("%s: %+v, %v", n.config.Name, s, err)
			}
		}
		return ""
	})
	for _, n := range nodes[:2] {
		if got := pull(n, token); got != 401 {
			t.Errorf("a token from before is good for %d at %s", got, n.config.Name)
		}
		if got := pull(n, tokenOf(n)); got != 200 {
			t.Errorf("a new token is good for %d at %s", got, n.config.Name)
		}
	}
	// The site's own keys, sealed anew, still open: after a restart nothing is kept.
	for i := range nodes[:2] {
		nodes[i] = nodes[i].again()
	}
	allLive(t, nodes[:2])
	nodes[1].pull(p, "v1")
	if got := pull(nodes[0], tokenOf(nodes[1])); got != 200 {
		t.Errorf("after a restart a token is good for %d", got)
	}
	var exported bytes.Buffer
	exported.Write(nodes[1].do("POST", "/api/atoll/v1/bundles/export", []byte(`{"projects":["library"]}`), "Content-Type", "application/json").want(200).Body)
	if exported.Len() == 0 {
		t.Error("the site signs nothing any more")
	}
}
