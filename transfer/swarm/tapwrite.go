package swarm

import (
	"encoding/binary"
	"slices"
	"time"
)

// Write is the library's. What it writes is looked at message by message: so the tap
// knows what was asked for, and what is of no use between nodes does not go out.
func (t *tap) Write(p []byte) (int, error) {
	t.wmu.Lock()
	defer t.wmu.Unlock()
	b := p
	if len(t.part) > 0 {
		t.part = append(t.part, p...)
		b = t.part
	}
	n, err := t.flush(b)
	if err != nil {
		t.end(err)
		return 0, err
	}
	if n < len(b) || len(t.part) > 0 {
		t.part = append(t.part[:0:0], b[n:]...)
	}
	return len(p), nil
}

// flush sends the whole messages of b and says how much of b that was. wmu is held.
func (t *tap) flush(b []byte) (int, error) {
	if !t.shook {
		if len(b) < handshakeSize {
			return 0, nil
		}
		t.shook = true
		hello := slices.Clone(b[:handshakeSize])
		hello[len(protocol)] |= pushBit
		t.mu.Lock()
		t.greeted = true
		t.mu.Unlock()
		n, err := t.flushMessages(b[handshakeSize:], hello)
		return handshakeSize + n, err
	}
	return t.flushMessages(b, nil)
}

// flushMessages sends what comes before, the engine's own messages that wait, and whole
// messages of b.
func (t *tap) flushMessages(b, before []byte) (int, error) {
	t.mu.Lock()
	out := append(before, t.words...)
	t.words = nil
	t.mu.Unlock()
	var w written
	from, at := 0, 0
	for len(b)-at >= lengthSize {
		n := int(binary.BigEndian.Uint32(b[at:]))
		if len(b)-at < lengthSize+n {
			break
		}
		if n > 0 && !t.told(b[at+lengthSize:at+lengthSize+n], &w) {
			out, from = append(out, b[from:at]...), at+lengthSize+n
		}
		at += lengthSize + n
	}
	if w.bytes > 0 {
		if err := t.limit(w.bytes); err != nil {
			return at, err
		}
	}
	for _, part := range [...][]byte{out, b[from:at]} {
		if len(part) == 0 {
			continue
		}
		_ = t.Conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		if _, err := t.Conn.Write(part); err != nil {
			return at, err
		}
	}
	t.s.went(t, w)
	return at, nil
}

// written is what the library sends at once.
type written struct {
	bytes  int
	chunks []chunk
	opened bool
}

// told takes note of a message that the library sends and says whether it goes out.
func (t *tap) told(m []byte, w *written) bool {
	chunkOf := func() chunk {
		return chunk{binary.BigEndian.Uint32(m[1:]), binary.BigEndian.Uint32(m[5:]), binary.BigEndian.Uint32(m[9:])}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch m[0] {
	case msgPiece:
		n := len(m) - pieceHead
		c := chunk{binary.BigEndian.Uint32(m[1:]), binary.BigEndian.Uint32(m[5:]), uint32(n)}
		t.served(c)
		w.bytes += n
		w.chunks = append(w.chunks, c)
	case msgReject:
		t.served(chunkOf())
		t.unpush(chunkOf())
	case msgChoke, msgUnchoke:
		t.open = m[0] == msgUnchoke
		w.opened = w.opened || t.open
	case msgHave, msgBitfield, msgHaveAll, msgHaveNone:
	default: // what the library would ask for, or say about that
		return false
	}
	return true
}

// limit waits until bytes may go out, and tells the peer meanwhile that it is not
// forgotten. wmu is held.
func (t *tap) limit(bytes int) error {
	limiter := t.s.e.cfg.Limiter
	for limiter != nil {
		wait := limiter.Take(t.flow(), bytes)
		if wait <= 0 {
			break
		}
		select {
		case <-time.After(min(wait, max(time.Millisecond, t.s.e.cfg.StallTimeout/4))):
		case <-t.done:
			return t.err
		}
		_ = t.Conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		if _, err := t.Conn.Write(appendHeld(nil)); err != nil {
			return err
		}
	}
	return nil
}

// speak sends a message of the engine's own. It does not wait until that is sent.
func (t *tap) speak(message []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tell(message)
}

// tell is speak with t.mu held. Nothing goes out before the handshake.
func (t *tap) tell(message []byte) {
	t.words = append(t.words, message...)
	if !t.telling && t.greeted && len(t.words) > 0 {
		t.telling = true
		t.s.e.wg.Go(t.say)
	}
}

// say sends the engine's own messages until there are no more.
func (t *tap) say() {
	for {
		t.wmu.Lock() // first: what the library writes meanwhile comes after the words
		t.mu.Lock()
		words := t.words
		t.words = nil
		t.telling = len(words) > 0
		t.mu.Unlock()
		if len(words) == 0 {
			t.wmu.Unlock()
			return
		}
		_ = t.Conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, err := t.Conn.Write(words)
		t.wmu.Unlock()
		if err != nil {
			t.end(err)
			return
		}
	}
}
