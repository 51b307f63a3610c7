package peernet

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/quic-go/quic-go"
)

// stream is a stream of a QUIC connection as a connection of its own. What TCP does
// it does too: Close may meet a Read and a Write, what was written before is
// delivered, and a peer that is gone is an error of the network.
type stream struct {
	*quic.Stream
	session *session

	writing sync.Mutex // a Write must not meet the stream's Close
	closing atomic.Bool
	late    atomic.Bool // a deadline passed
	end     sync.Once
}

func (s *stream) LocalAddr() net.Addr  { return s.session.conn.LocalAddr() }
func (s *stream) RemoteAddr() net.Addr { return s.session.conn.RemoteAddr() }

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	return n, s.plain("read", err)
}

func (s *stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.closing.Load() {
		return 0, s.plain("write", net.ErrClosed)
	}
	n, err := s.Stream.Write(p)
	return n, s.plain("write", err)
}

// Close ends both directions. Without CancelRead the peer's bytes would be kept for
// a reader who never comes.
func (s *stream) Close() error {
	s.end.Do(func() {
		s.closing.Store(true)
		s.CancelRead(0)
		if s.writing.TryLock() {
			_ = s.Stream.Close() // a stream that the peer cancelled is what we want
			s.writing.Unlock()
		} else {
			s.CancelWrite(0)
		}
		s.session.release(s.late.Load())
	})
	return nil
}

// plain gives errors the meaning that those of a TCP connection have.
func (s *stream) plain(op string, err error) error {
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return err
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.late.Store(true)
		return err
	case s.closing.Load():
		err = net.ErrClosed
	default:
		err = broken{err}
	}
	return &net.OpError{Op: op, Net: "quic", Source: s.LocalAddr(), Addr: s.RemoteAddr(), Err: err}
}

// broken is the end of a stream or connection that this end did not want. quic-go
// calls it net.ErrClosed, which here would mean that this end did.
type broken struct{ cause error }

func (b broken) Error() string        { return b.cause.Error() }
func (b broken) Is(target error) bool { return target == syscall.ECONNRESET }
func (b broken) As(target any) bool   { return errors.As(b.cause, target) }
