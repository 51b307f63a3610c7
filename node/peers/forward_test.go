package peers

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

func forwarded(n *node, to string, r *http.Request) (*httptest.ResponseRecorder, error) {
	w := httptest.NewRecorder()
	err := n.Forward(to, w, r)
	return w, err
}

func TestForwardCarriesTheUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		var got *http.Request
		var body []byte
		s.nodes[1].ServeForwarded(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			got = r
			body, _ = io.ReadAll(r.Body)
			w.Header().Set("Range", "0-3")
			w.WriteHeader(http.StatusAccepted)
		}))
		s.run()
		for _, p := range []access.Principal{
			{},
			{Kind: access.User, Name: "eve"},
			{Kind: access.Robot, Name: "r", Grants: []access.Grant{}}, // may do nothing: not the same as nil
			{Kind: access.User, Name: "admin", Admin: true, Grants: []access.Grant{{Repository: "library/app", Actions: []string{"push"}}}},
		} {
			r := httptest.NewRequest("PATCH", "http://registry.example/v2/library/app/blobs/uploads/x?_state=y%2Fz", strings.NewReader("body"))
			r.Header.Set("Authorization", "Basic c2VjcmV0")
			r.Header.Set("Connection", principalHeader) // would have a careless proxy drop it
			r.Header.Set(principalHeader, `{"Kind":3,"Admin":true}`)
			w, err := forwarded(s.nodes[0], s.nodes[1].id, r.WithContext(access.WithPrincipal(r.Context(), p)))
			if err != nil || w.Code != http.StatusAccepted || w.Header().Get("Range") != "0-3" {
				t.Fatalf("%d %v, %v", w.Code, w.Header(), err)
			}
			if who := access.From(got.Context()); !reflect.DeepEqual(who, p) {
				t.Errorf("arrived as %+v, want %+v", who, p)
			}
			if got.Header.Get("Authorization") != "" || got.Header.Get(principalHeader) != "" || got.Host != "registry.example" ||
				got.URL.RequestURI() != "/v2/library/app/blobs/uploads/x?_state=y%2Fz" || string(body) != "body" {
				t.Errorf("arrived as %s %s %v with %q", got.Host, got.URL, got.Header, body)
			}
		}
	})
}

func TestForwardToWhoIsNotThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		s.run(s.nodes[0])
		s.nodes[1].setDown(true)
		for _, id := range []string{s.nodes[1].id, "nobody"} {
			if _, err := forwarded(s.nodes[0], id, httptest.NewRequest("GET", "/v2/", nil)); !fault.Is(err, fault.Unavailable) {
				t.Errorf("to %s: %v", id, err)
			}
		}
		// It hangs, and is noticed by the pings only.
		s.nodes[1].setDown(false)
		go func() {
			if conn, err := s.nodes[1].listener(peernet.ServiceAPI).Accept(); err == nil {
				defer conn.Close()
				_, _ = conn.Read(make([]byte, 1<<10))
				s.nodes[1].setDown(true)
				<-t.Context().Done()
			}
		}()
		_, err := forwarded(s.nodes[0], s.nodes[1].id, httptest.NewRequest("GET", "/v2/", nil))
		if !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "went away") {
			t.Errorf("to a node that hangs: %v", err)
		}
	})
}

// elsewhere says that a node is at another's address.
type elsewhere struct {
	*node
	addr string
}

func (e elsewhere) Live() []member.Member {
	live := e.node.Live()
	for i := range live {
		if live[i].ID != e.id {
			live[i].Addr = e.addr
		}
	}
	return live
}

func TestDialRefusesAnotherNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		n := s.nodes[0]
		n.Roster = elsewhere{n, s.nodes[2].id + ":5001"}
		s.run(s.nodes[2])
		if _, err := n.dialNode(t.Context(), "tcp", s.nodes[1].id+":80"); err == nil || !strings.Contains(err.Error(), "is not node "+s.nodes[1].id) {
			t.Errorf("another node answers at the address: %v", err)
		}
		conn, err := n.dialNode(t.Context(), "tcp", s.nodes[2].id+":80")
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if _, err := n.dialNode(t.Context(), "tcp", "nobody:80"); err == nil {
			t.Error("dialled nobody")
		}
	})
}

func TestPeerMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		n := s.nodes[1]
		held := s.put(bytesOf("held", 2*transfer.PieceSize), n)
		elsewhere := s.put(bytesOf("elsewhere", 100), s.nodes[0])
		s.run(n) // the other is live and answers nothing
		ask := func(path string, body any, header ...string) *httptest.ResponseRecorder {
			data, ok := body.(string)
			if !ok {
				b, err := json.Marshal(body)
				if err != nil {
					t.Fatal(err)
				}
				data = string(b)
			}
			r := httptest.NewRequest("POST", path, strings.NewReader(data))
			if len(header) > 0 {
				r.Header[principalHeader] = header
			}
			w := httptest.NewRecorder()
			n.peerHandler().ServeHTTP(w, r)
			return w
		}
		for _, test := range []struct {
			path   string
			body   any
			header []string
			status int
		}{
			{"/peer/v1/held", heldRequest{}, nil, 204},
			{"/peer/v1/held", heldRequest{Blobs: []heldBlob{{Digest: held, Size: 2 * transfer.PieceSize}}}, nil, 204},
			{"/peer/v1/held", heldRequest{Blobs: []heldBlob{{Digest: "sha256:short", Size: 1}}}, nil, 400},
			{"/peer/v1/held", heldRequest{Blobs: []heldBlob{{Digest: held, Size: -1}}}, nil, 400},
			{"/peer/v1/held", "{", nil, 400},
			{"/peer/v1/held", `{"blobs":[]} and more`, nil, 400},
			{"/peer/v1/held", strings.Repeat(" ", maxPeerMessage+1), nil, 400},
			{"/peer/v1/root", rootRequest{held}, nil, 200},
			{"/peer/v1/root", rootRequest{elsewhere}, nil, 404},
			{"/peer/v1/root", rootRequest{"nonsense"}, nil, 400},
			{"/peer/v1/reached", reachedRequest{1}, nil, 204},
			{"/peer/v1/reached", "1", nil, 400},
			{"/v2/", "", nil, 400},
			{"/v2/", "", []string{"{"}, 400},
			{"/v2/", "", []string{"null"}, 400},
			{"/v2/", "", []string{`{"Kind":99}`}, 400},
			{"/v2/", "", []string{`{"Kind":1,"Name":"eve"}`}, 404}, // the API's answer
		} {
			if w := ask(test.path, test.body, test.header...); w.Code != test.status {
				t.Errorf("%s %.80v: %d %s, want %d", test.path, test.body, w.Code, w.Body, test.status)
			}
		}
		if s.row(held).Root == nil {
			t.Error("the root that was asked for is not on record")
		}
		if got := n.logged("level=WARN"); got != 0 {
			t.Errorf("%d warnings for what others asked:\n%s", got, n.logs.String())
		}
	})
}

func TestAskForRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		b := bytesOf("blob", 5*transfer.PieceSize)
		d := s.put(b, s.nodes[2])
		for _, n := range s.nodes { // without their repairs
			ctx := t.Context()
			go func() { _ = n.tables.run(ctx) }()
			go func() { _ = n.serveHTTP(ctx, peernet.ServiceAPI, n.apiServer()) }()
		}
		want, err := transfer.HashPieces(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		if got := s.nodes[0].askForRoot(t.Context(), d); !bytes.Equal(got, want.Root()) {
			t.Errorf("root %x, want %x", got, want.Root())
		}
		s.nodes[2].setDown(true)
		e := s.put(bytesOf("other", 5*transfer.PieceSize), s.nodes[2])
		if got := s.nodes[0].askForRoot(t.Context(), e); got != nil {
			t.Errorf("no holder is up, and the root is %x", got)
		}
	})
}

// TestACopyAsksForARoot: who reads a blob while repair brings it reads it as it comes,
// for which the fetch needs a root. A push does not wait for one.
func TestACopyAsksForARoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		s.carry() // repairs name roots, too
		for _, c := range []struct {
			class transfer.Class
			roots bool
		}{{transfer.Replication, false}, {transfer.Repair, true}, {transfer.Prefetch, true}} {
			b := bytesOf(c.class.String(), 5*transfer.PieceSize)
			d := s.put(b, s.nodes[1])
			if err := s.nodes[0].obtain(t.Context(), heldBlob{Digest: d, Size: int64(len(b))}, c.class); err != nil {
				t.Fatal(err)
			}
			if root, err := s.nodes[0].root(d); err != nil || (root != nil) != c.roots {
				t.Errorf("after a copy by %s the root is %x (%v)", c.class, root, err)
			}
		}
	})
}

// TestOpenReadsWhileItArrives and says in time that nobody has a blob.
func TestOpenReadsWhileItArrives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		b := bytesOf("blob", 3*transfer.PieceSize+7)
		d := s.put(b, s.nodes[1])
		s.run()
		from, err := s.nodes[0].Open(t.Context(), d, int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(from)
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if err := from.Close(); err != nil {
			t.Error(err)
		}
		lost := s.put(bytesOf("lost", 100))
		began := time.Now()
		if _, err := s.nodes[0].Open(t.Context(), lost, 100); !fault.Is(err, fault.Unavailable) || time.Since(began) > 10*time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}

// TestStopWaitsForRequests: nobody uses the store after Run.
func TestStopWaitsForRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		inside, ended := make(chan struct{}), false
		s.nodes[1].ServeForwarded(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(inside)
			<-r.Context().Done() // cut when the grace is over
			ended = true
		}))
		s.run()
		result := make(chan error, 1)
		go func() {
			_, err := forwarded(s.nodes[0], s.nodes[1].id, httptest.NewRequest("GET", "/v2/", nil))
			result <- err
		}()
		<-inside
		began := time.Now()
		s.nodes[1].stop()
		if took := time.Since(began); !ended || took < grace || took > grace+time.Second {
			t.Errorf("Run returned after %v, the request had ended: %v", took, ended)
		}
		if err := <-result; !fault.Is(err, fault.Unavailable) {
			t.Errorf("the one who was cut off was told %v", err)
		}
	})
}

// FuzzDecodeMessage: nothing that a peer sends gets past the checks or breaks
// the node.
func FuzzDecodeMessage(f *testing.F) {
	d := digest.FromString("x").String()
	for _, seed := range []string{
		`{"blobs":[{"digest":"` + d + `","size":5}]}`, `{"digest":"` + d + `"}`, `{"Kind":1,"Name":"eve","Grants":[{"Repository":"a/b","Actions":["pull"]}]}`,
		`{"Kind":3,"Admin":true,"Grants":null}`, `{"blobs":[{"digest":"sha256:","size":-1}]}`, `null`, `[]`, `{"blobs":null}`, `{"Kind":256}`, "", "{",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if q, err := decodeMessage[heldRequest](bytes.NewReader(data)); err == nil {
			for _, b := range q.Blobs {
				if b.Size < 0 || b.Digest.Validate() != nil {
					t.Fatalf("%q gives blob %+v", data, b)
				}
			}
			again(t, q)
		}
		if q, err := decodeMessage[rootRequest](bytes.NewReader(data)); err == nil {
			if q.Digest.Validate() != nil {
				t.Fatalf("%q gives digest %q", data, q.Digest)
			}
			again(t, q)
		}
		if p, err := decodePrincipal(string(data)); err == nil {
			header, err := json.Marshal(p)
			if err != nil {
				t.Fatal(err)
			}
			if q, err := decodePrincipal(string(header)); err != nil || !reflect.DeepEqual(p, q) || p.Kind > access.System {
				t.Fatalf("%+v came back as %+v, %v", p, q, err)
			}
		}
	})
}

// again holds a message to being read as it was written.
func again[Q any](t *testing.T, q Q) {
	data, err := json.Marshal(q)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := decodeMessage[Q](bytes.NewReader(data)); err != nil || !reflect.DeepEqual(q, r) {
		t.Fatalf("%+v came back as %+v, %v", q, r, err)
	}
}

var errBroken = errors.New("broken")

type brokenBody struct{}

func (brokenBody) Read([]byte) (int, error) { return 0, errBroken }

func TestDecodeMessageReportsAReadError(t *testing.T) {
	if _, err := decodeMessage[heldRequest](brokenBody{}); !errors.Is(err, errBroken) {
		t.Errorf("got %v", err)
	}
}
