package traffic

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/rest/resttest"
	"github.com/atoll-registry/atoll/transfer"
)

// What is under way is shown once, with what holds it back, from all nodes.
func TestTransfers(t *testing.T) {
	bubble(t, 3, func(t *testing.T, s *site) {
		a, b := s.nodes[0], s.nodes[1]
		d := blob("x")
		s.mu.Lock()
		s.owners[d] = []Repository{{"library", "app"}}
		s.mu.Unlock()
		s.set("traffic.links", "a>b: 1MiB")
		settle()
		f := transfer.Flow{Blob: transfer.Blob{Digest: d, Size: 64 << 20}, Peer: "id-b", Class: transfer.Replication, Way: transfer.ByBitTorrent}
		back := f
		back.Peer = "id-a"
		l := &load{take: func(n int) time.Duration { return a.Take(f, n) }, done: func(n int) { a.Sent(f, n); b.Received(back, n) }}
		drive([]*load{l}, 8*time.Second)
		s.mu.Lock()
		s.down["id-c"] = false
		s.members = append(s.members, s.members[2])
		s.members[3].ID, s.members[3].Name = "id-d", "d" // it does not answer
		s.mu.Unlock()
		view := s.nodes[2].View(t.Context())
		if len(view.Transfers) != 1 || len(view.Silent) != 1 || view.Silent[0].Node != "d" {
			t.Fatalf("seen: %+v", view)
		}
		one := view.Transfers[0]
		if one.Blob != d || one.From != "a" || one.To != "b" || one.Class != "replication" || one.Engine != "bittorrent" || one.Repository != "library/app" || one.HeldBack != "link a>b" {
			t.Errorf("seen: %+v", one)
		}
		near(t, "rate", one.Rate, 1<<20, 0.2)
		near(t, "done", one.Done, 8<<20, 0.1)
		if one.ETA < 45 || one.ETA > 70 {
			t.Errorf("%d s are left for 56 MiB at 1 MiB/s", one.ETA)
		}
		if got := testutil.ToFloat64(a.metrics.bytes.WithLabelValues("out", "replication", "id-b")); got != float64(l.sent) {
			t.Errorf("the metrics say %.0f, %d went", got, l.sent)
		}
		if got := testutil.ToFloat64(a.metrics.held.WithLabelValues("replication", "link")); got < 6 || got > 9 {
			t.Errorf("held back for %.1f s of 8", got)
		}
		pass(10 * time.Second)
		if view := s.nodes[2].View(t.Context()); len(view.Transfers) != 0 {
			t.Errorf("it has ended, and is shown: %+v", view.Transfers)
		}
	})
}

func TestAnswersAreShownAndBounded(t *testing.T) {
	bubble(t, 1, func(t *testing.T, s *site) {
		n := s.nodes[0]
		s.set("traffic.answers", "2")
		c := Content{Digest: blob("x"), Size: 1 << 20, Project: "library", Repository: "app", Client: "ann@192.0.2.1"}
		first, err := n.Begin(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		second, err := n.Begin(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if wait := first.Take(piece); wait != 0 {
			t.Errorf("without a cap it waits %v", wait)
		}
		view := n.View(t.Context())
		if len(view.Transfers) != 1 || view.Transfers[0].To != "ann@192.0.2.1" || view.Transfers[0].Repository != "library/app" || view.Transfers[0].Class != "pull" {
			t.Errorf("shown: %+v", view.Transfers)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := n.Begin(ctx, c); err == nil {
			t.Error("a third answer began")
		}
		ended := make(chan error)
		go func() {
			third, err := n.Begin(t.Context(), c)
			if err == nil {
				third.End()
			}
			ended <- err
		}()
		synctest.Wait()
		first.End()
		if err := <-ended; err != nil {
			t.Errorf("a place was free: %v", err)
		}
		second.End()
		if view := n.View(t.Context()); len(view.Transfers) != 0 {
			t.Errorf("after the end: %+v", view.Transfers)
		}
	})
}

// A lower number counts for copies that begin after it, a higher one for those that wait.
func TestCopiesAreBounded(t *testing.T) {
	bubble(t, 1, func(t *testing.T, s *site) {
		n := s.nodes[0]
		s.set("traffic.fetches", "1")
		release, err := n.Place(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, err := n.Place(ctx); err == nil {
			t.Fatal("two copies at once")
		}
		got := make(chan func(), 1)
		go func() {
			if second, err := n.Place(t.Context()); err == nil {
				got <- second
			}
		}()
		synctest.Wait()
		s.set("traffic.fetches", "2")
		second := <-got
		release()
		second()
	})
}

// The board, the metrics and the queues are bounded, however many come.
func TestManyAreBounded(t *testing.T) {
	bubble(t, 1, func(t *testing.T, s *site) {
		n := s.nodes[0]
		s.set("traffic.node", "1GiB")
		settle()
		for i := range 3 * boardMax {
			f := transfer.Flow{Peer: "peer" + string(rune('0'+i%10)) + time.Duration(i).String()}
			n.Take(f, 1)
			n.Sent(f, 1)
		}
		figures := func() (shown, told int) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.board.mu.Lock()
			defer n.board.mu.Unlock()
			return len(n.board.flows), len(n.caps.nodeOut.classes[0].leaves)
		}
		if shown, told := figures(); shown != boardMax || told > leavesMax+1 {
			t.Errorf("%d shown, %d told apart", shown, told)
		}
		if got := testutil.CollectAndCount(n.metrics.bytes); got > peersMax+1 {
			t.Errorf("%d series", got)
		}
		pass(2 * leafLife)
		if shown, told := figures(); shown != 0 || told != 0 {
			t.Error("they are remembered for ever")
		}
	})
}

func TestPermissions(t *testing.T) {
	s := newSite(t, 1)
	api := resttest.New(t)
	s.nodes[0].Operations(api.Kernel)
	var v View
	api.Do("GET", "/api/atoll/v1/transfers", nil).Want(200).Decode(&v)
	if v.Transfers == nil || v.Silent == nil {
		t.Errorf("lists are missing: %+v", v)
	}
	api.As = access.Principal{Kind: access.User, Name: "u"}
	api.Do("GET", "/api/atoll/v1/transfers", nil).Want(403)
	api.Do("GET", "/api/atoll/v1/transfers/events", nil).Want(403)
}

// slowClient takes what it is sent only when the test lets it.
type slowClient struct {
	*httptest.ResponseRecorder
	may chan struct{}
}

func (c slowClient) Write(p []byte) (int, error) { <-c.may; return c.ResponseRecorder.Write(p) }
func (c slowClient) Flush()                      {}

func TestEvents(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		n := s.nodes[0]
		n.Sent(n.flow("id-b", transfer.Pull), piece)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 2)
		good := slowClient{httptest.NewRecorder(), make(chan struct{})}
		slow := slowClient{httptest.NewRecorder(), make(chan struct{})}
		close(good.may)
		go func() { ended <- n.events.serve(ctx, good) }()
		synctest.Wait()
		go func() { ended <- n.events.serve(ctx, slow) }()
		synctest.Wait()
		pass((behindMax + 5) * time.Second)
		close(slow.may) // it reads again, too late
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if body := slow.Body.String(); !strings.HasSuffix(strings.TrimSpace(body), "connect again\"}") || strings.Count(body, "event: dropped") != 1 ||
			strings.Count(body, "event: transfers") != behindMax+1 {
			t.Errorf("the slow one got %q", body)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if got := strings.Count(good.Body.String(), "event: transfers"); got < behindMax+3 {
			t.Errorf("the other one got %d events", got)
		}
		if good.Header().Get("Content-Type") != "text/event-stream" {
			t.Error(good.Header())
		}
		if n.events.watched() {
			t.Error("somebody still watches")
		}
		for range watchersMax {
			if _, err := n.events.join(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := n.events.join(); err == nil {
			t.Error("there is no bound on those who watch")
		}
	})
}

// Over a real connection, as a client reads it.
func TestEventsOverHTTP(t *testing.T) {
	s := newSite(t, 2)
	stop := s.run()
	defer stop()
	n := s.nodes[0]
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _ = n.events.serve(r.Context(), w) }))
	defer server.Close()
	answer, err := server.Client().Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	n.Sent(n.flow("id-b", transfer.Pull), piece)
	lines := bufio.NewScanner(answer.Body)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		var v View
		if err := json.Unmarshal([]byte(data), &v); err != nil || len(v.Transfers) != 1 || v.Transfers[0].To != "b" {
			t.Errorf("%v, %+v", err, v)
		}
		return
	}
	t.Error("no event came")
}
