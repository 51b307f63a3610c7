package swarm

import (
	"encoding/binary"
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
		n, err := t.flushMessages(b[handshakeSize:], b[:handshakeSize])
		t.mu.Lock()
		t.greeted = true
		t.tell(nil)
		t.mu.Unlock()
		return handshakeSize + n, err
	}
	return t.flushMessages(b, nil)
}

// flushMessages sends what comes before, and whole messages of b.
func (t *tap) flushMessages(b, before []byte) (int, error) {
	out, from, at := before, 0, 0
	bytes := 0
	for len(b)-at >= lengthSize {
		n := int(binary.BigEndian.Uint32(b[at:]))
		if len(b)-at < lengthSize+n {
			break
		}
		if n > 0 && !t.told(b[at+lengthSize:at+lengthSize+n], &bytes) {
			out, from = append(out, b[from:at]...), at+lengthSize+n
		}
		at += lengthSize + n
	}
	if bytes > 0 {
		if err := t.limit(bytes); err != nil {
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
	if bytes > 0 {
		t.s.went(t, bytes)
	}
	return at, nil
}

// told takes note of a message that the library sends and says whether it goes out.
func (t *tap) told(m []byte, bytes *int) bool {
	chunkOf := func() chunk {
		return chunk{binary.BigEndian.Uint32(m[1:]), binary.BigEndian.Uint32(m[5:]), binary.BigEndian.Uint32(m[9:])}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch m[0] {
	case msgRequest:
		t.asks[chunkOf()] = false
	case msgCancel:
		if _, ok := t.asks[chunkOf()]; ok {
			t.asks[chunkOf()] = true
		}
	case msgPiece:
		n := len(m) - pieceHead
		c := chunk{binary.BigEndian.Uint32(m[1:]), binary.BigEndian.Uint32(m[5:]), uint32(n)}
		t.served(c)
		*bytes += n
	case msgReject:
		t.served(chunkOf())
	case msgChoke, msgUnchoke, msgInterested, msgNotInterested, msgHave, msgBitfield, msgHaveAll, msgHaveNone:
	default:
		return false
	}
	return true
}

// suggest offers pieces to the peer.
func (t *tap) suggest(pieces []int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, i := range pieces {
		t.tell(appendSuggest(nil, i))
	}
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
		t.mu.Lock()
		words := t.words
		t.words = nil
		t.telling = len(words) > 0
		t.mu.Unlock()
		if len(words) == 0 {
			return
		}
		t.wmu.Lock()
		_ = t.Conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, err := t.Conn.Write(words)
		t.wmu.Unlock()
		if err != nil {
			t.end(err)
			return
		}
	}
}
