package joining

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/pki"
)

type question struct {
	Node string `json:"node"`
	Size int    `json:"size"`
}

func TestDecode(t *testing.T) {
	for body, ok := range map[string]bool{
		`{"node":"a","size":3}`:                   true,
		` {"size":3,"node":"a"} `:                 true,
		`{"node":"a","size":3,"newer":{"x":[1]}}`: true, // a newer node says more
		`{"node":"a","size":3,"node":"b"}`:        false,
		`{"node":"a","size":3,"NODE":"b"}`:        false, // one field to encoding/json
		`{"node":"a","size":3,"ſize":4}`:          false, // as is this
		`{"newer":1,"newer":2,"node":"a"}`:        false,
		`{"node":"a"} {"node":"b"}`:               false,
		`{"node":"a","size":"many"}`:              false,
		`{"node":"a"`:                             false,
		`[{"node":"a"}]`:                          false,
		`null`:                                    false,
		``:                                        false,
	} {
		var q question
		err := Decode([]byte(body), &q)
		if ok && (err != nil || q != question{"a", 3}) {
			t.Errorf("%s: %+v, %v", body, q, err)
		}
		if !ok && !errors.Is(err, pki.ErrMalformed) {
			t.Errorf("%s: %v, want a refusal as malformed", body, err)
		}
	}
}

// pipes is a listener on which everybody in the process can call.
type pipes struct {
	calls  chan net.Conn
	closed chan struct{}
}

func (p pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.calls:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}
func (p pipes) Close() error   { close(p.closed); return nil }
func (p pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes"} }

func (p pipes) dial(ctx context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case p.calls <- far:
		return near, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func TestServerBoundsStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held, free := make(chan struct{}), make(chan struct{})
		var mu sync.Mutex
		var logged bytes.Buffer // slog's handler writes one line at a time
		refused := map[string]int{}
		s := Server(Strangers(), map[string]Handler{
			"/ask": func(_ context.Context, body []byte) (any, error) {
				var q question
				err := Decode(body, &q)
				return q, err
			},
			"/hold": func(context.Context, []byte) (any, error) {
				held <- struct{}{}
				<-free
				return question{}, nil
			},
			"/fail": func(context.Context, []byte) (any, error) { return nil, errors.New("a secret of the disk") },
		}, slog.New(slog.NewTextHandler(&logged, nil)), func(code string) {
			mu.Lock()
			defer mu.Unlock()
			refused[code]++
		})
		l := pipes{make(chan net.Conn), make(chan struct{})}
		go s.Serve(l)
		defer s.Close()
		ask := func(path string, q any) (answer question, err error) {
			err = Post(t.Context(), l.dial, path, q, &answer)
			return answer, err
		}
		code := func(err error) string {
			var no *Refusal
			if !errors.As(err, &no) {
				t.Fatalf("%v is no refusal", err)
			}
			return no.Code
		}
		if a, err := ask("/ask", map[string]any{"node": "a", "size": 3, "newer": true}); err != nil || a.Size != 3 {
			t.Fatalf("%+v, %v", a, err)
		}
		_, err := ask("/ask", question{Node: strings.Repeat("a", MaxBody)})
		if code(err) != CodeMalformed {
			t.Errorf("a request that is too long: %v", err)
		}
		_, err = ask("/fail", question{})
		if code(err) != CodeLater || strings.Contains(err.Error(), "secret") {
			t.Errorf("a failure of the node: %v", err)
		}
		for range Strangers().AtOnce {
			go ask("/hold", question{})
			<-held
		}
		if _, err := ask("/ask", question{Node: "a"}); code(err) != CodeLater {
			t.Errorf("one more at a time: %v", err)
		}
		close(free)
		synctest.Wait()
		for range Strangers().Burst {
			_, err = ask("/ask", question{Node: "a"})
		}
		if err == nil || code(err) != CodeLater {
			t.Errorf("one more a second: %v", err)
		}
		// Whoever goes on asking is counted, and soon not written down any more.
		for range 1000 {
			_, err = ask("/ask", question{Node: "a"})
		}
		if lines := strings.Count(logged.String(), "\n"); lines < 3 || lines > 30 || !strings.Contains(logged.String(), "code="+CodeLater) {
			t.Errorf("%d lines of log", lines)
		}
		mu.Lock()
		if refused[CodeLater] < 1000 || refused[CodeMalformed] != 1 {
			t.Errorf("counted are %v", refused)
		}
		mu.Unlock()
		<-time.After(time.Second)
		if _, err := ask("/ask", question{Node: "a"}); err != nil {
			t.Errorf("a second later: %v", err)
		}
	})
}
