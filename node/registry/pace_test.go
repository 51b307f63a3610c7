package registry

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// oneConn is a listener of one connection.
type oneConn struct {
	conns chan net.Conn
	addr  net.Addr
}

func (l *oneConn) Accept() (net.Conn, error) {
	conn, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return l.addr }

// paced serves one connection, whose deadlines move as a request's do, and gives
// the client's end and what the handler returns.
func paced(t *testing.T, handle func(c *call) error) (net.Conn, <-chan error) {
	client, server := net.Pipe()
	l := &oneConn{make(chan net.Conn, 1), server.LocalAddr()}
	l.conns <- server
	result := make(chan error, 1)
	s := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := newCall(w, r, time.Minute)
		defer c.release()
		result <- handle(c)
	})}
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		client.Close()
		close(l.conns)
		<-served
		s.Close()
	})
	return client, result
}

// A download that crawls takes as long as it takes; one that stands still ends.
func TestSlowDownload(t *testing.T) {
	for name, takes := range map[string]int{"crawls": 64, "stops": 10} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				data := make([]byte, 4<<20)
				client, result := paced(t, func(c *call) error {
					_, err := io.Copy(c.w, &io.LimitedReader{R: bytes.NewReader(data), N: int64(len(data))})
					return err
				})
				go fmt.Fprint(client, "GET / HTTP/1.1\r\nHost: test\r\n\r\n")
				answer, err := http.ReadResponse(bufio.NewReader(client), nil)
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				for range takes {
					time.Sleep(10 * time.Second) // of the bubble's clock
					if _, err := io.CopyN(io.Discard, answer.Body, int64(len(data)/64)); err != nil {
						t.Fatalf("after %v: %v", time.Since(began), err)
					}
				}
				err = <-result
				if whole := takes == 64; whole != (err == nil) || !whole && !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("after %v the server says %v", time.Since(began), err)
				}
				if took := time.Since(began); took > time.Duration(takes)*10*time.Second+time.Minute {
					t.Errorf("a client that stood still was waited for %v", took)
				}
			})
		})
	}
}

// So does an upload.
func TestSlowUpload(t *testing.T) {
	for name, sends := range map[string]int{"crawls": 60, "stops": 10} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, result := paced(t, func(c *call) error {
					_, err := io.Copy(io.Discard, c.r.Body)
					return err
				})
				fmt.Fprint(client, "PATCH / HTTP/1.1\r\nHost: test\r\nContent-Length: 60\r\n\r\n")
				began := time.Now()
				for range sends {
					time.Sleep(20 * time.Second) // of the bubble's clock
					if _, err := client.Write([]byte{0}); err != nil {
						t.Fatalf("after %v: %v", time.Since(began), err)
					}
				}
				err := <-result
				if whole := sends == 60; whole != (err == nil) || !whole && !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("after %v the server says %v", time.Since(began), err)
				}
				if took := time.Since(began); took > time.Duration(sends)*20*time.Second+time.Minute {
					t.Errorf("a client that stood still was waited for %v", took)
				}
			})
		})
	}
}

// The rate is a client's over all that it sends at once, and each client has it.
func TestRateOfAClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pacers{all: map[string]*pacer{}}
		took := func(clients ...string) time.Duration {
			began := time.Now()
			var all sync.WaitGroup
			for _, client := range clients {
				all.Go(func() {
					pace := p.enter(client)
					defer p.leave(client)
					in := &intake{from: bytes.NewReader(make([]byte, 64<<10)), left: -1, rate: 64 << 10, pay: func(cost time.Duration) error { return pace.wait(t.Context(), cost) }}
					if _, err := io.Copy(io.Discard, in); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
			return time.Since(began)
		}
		for want, clients := range map[time.Duration][]string{time.Second: {"a"}, 2 * time.Second: {"a", "a"}, 3 * time.Second: {"a", "b", "a", "b", "a"}} {
			if got := took(clients...); got < want || got > want+10*time.Millisecond {
				t.Errorf("64 KiB each of %v at 64 KiB/s took %v, want %v", clients, got, want)
			}
		}
		if len(p.all) != 0 {
			t.Errorf("%d clients are remembered", len(p.all))
		}
	})
}
