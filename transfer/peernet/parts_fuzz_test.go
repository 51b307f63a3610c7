package peernet

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// script is a connection over which so much is said, and what is answered kept.
type script struct {
	net.Conn // nil: nothing else of it is used
	said     io.Reader
	heard    bytes.Buffer
}

func (s *script) Read(p []byte) (int, error)       { return s.said.Read(p) }
func (s *script) Write(p []byte) (int, error)      { return s.heard.Write(p) }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// FuzzParts: whatever is said where parts are passed on, the node between passes on whole
// parts as they came and nothing else, and the far end reads what is in them.
func FuzzParts(f *testing.F) {
	f.Add([]byte{0, 0, 2, 'h', 'i', 3, 0, 1, '!'})
	f.Add([]byte{255, 0, 1, 'x', 0, 0, 0})
	f.Add([]byte{0, 255, 255, 'x'})
	f.Add([]byte{1, 0, 9, 'c', 'u', 't'})
	f.Add(append([]byte{1, maxPart >> 8, maxPart & 255}, make([]byte, maxPart)...))
	f.Add(append([]byte{1, (maxPart + 1) >> 8, (maxPart + 1) & 255}, make([]byte, maxPart+1)...))
	f.Fuzz(func(t *testing.T, said []byte) {
		var whole, content []byte
		for rest := said; len(rest) >= partHead; {
			end := partHead + int(rest[1])<<8 + int(rest[2])
			if end == partHead || end > partHead+maxPart || end > len(rest) {
				break
			}
			whole, content = append(whole, rest[:end]...), append(content, rest[partHead:end]...)
			rest = rest[end:]
		}
		n := &Net{relayed: prometheus.NewCounter(prometheus.CounterOpts{})}
		from, to := &script{said: bytes.NewReader(said)}, &script{}
		err := n.passMarked(t.Context(), &Conn{Conn: to}, &Conn{Conn: from})
		if got := to.heard.Bytes(); err == nil || !bytes.Equal(got, whole) {
			t.Fatalf("of %x it passes on %x (%v)", said, got, err)
		}
		_, far := mark(&Conn{Conn: &script{said: &to.heard}, service: ServicePassing})
		if got, err := io.ReadAll(far); err != nil || !bytes.Equal(got, content) {
			t.Fatalf("of %x the far end reads %x (%v)", whole, got, err)
		}
		// Where nobody is between, or who is passes on anything, an end is as careful.
		_, near := mark(&Conn{Conn: &script{said: bytes.NewReader(said)}, service: ServicePassing})
		got, err := io.ReadAll(near)
		if !bytes.HasPrefix(got, content) || len(got) > len(said) {
			t.Fatalf("of %x an end reads %x", said, got)
		}
		if err != nil && !errors.Is(err, errPart) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
	})
}
