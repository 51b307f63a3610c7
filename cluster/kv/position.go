package kv

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/hashicorp/raft"
)

// In the meta space, of this node alone and in no snapshot:
const (
	// positionKey: the version 1, then, 8 bytes each, big-endian: Index, Term,
	// From, Changed, and the bytes of log since the last snapshot.
	positionKey = "position"
	// membersKey: Changed, 8 bytes, big-endian, then Members.
	membersKey = "members"

	positionVersion = 1
	positionSize    = 1 + 5*8
)

// Position says where in raft's log a state is, and which configuration raft
// had there: with it a start need not read the log that the state holds.
//
// A version that knows nothing of it moves the applied index and leaves the
// record alone. So a record counts only while its Index is the applied index;
// else all that was before is unknown.
type Position struct {
	Index uint64 // of the newest entry that the state holds
	Term  uint64 // in which that entry was made
	// From: of the entries behind this one, up to Index, each configuration
	// was seen.
	From uint64
	// Changed is the newest configuration among them, or that of the snapshot which
	// the state came as; 0 when neither is known. Members is its data as raft encoded
	// it.
	Changed uint64
	Members []byte
}

// Position gives where the state is in raft's log.
func (m *Machine) Position() Position {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.position
}

// Place says where in raft's log the state is that was just restored: a snapshot does not
// know. It does nothing when the state ends elsewhere.
func (m *Machine) Place(p Position) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil || p.Index != m.position.Index {
		return m.err
	}
	err := m.engine.Update(func(w Writer) error { return p.write(w, m.position, m.logged.Load()) })
	if err != nil {
		return fmt.Errorf("keep where the state is in the log: %w", err)
	}
	m.position = p
	return nil
}

// Logged is how many bytes of log were applied since the last snapshot, across
// starts. It may be more than that, never for long less.
func (m *Machine) Logged() int64 { return m.logged.Load() }

// Saved tells that a snapshot has been taken when Logged was n.
func (m *Machine) Saved(n int64) { m.logged.Add(-n) }

// replayed is told of entries that the state holds already. Those before From
// were counted by nobody.
func (m *Machine) replayed(l *raft.Log) {
	if l.Index <= m.position.From {
		m.logged.Add(int64(len(l.Data)))
	}
}

// pass moves the position behind an entry.
func (p *Position) pass(l *raft.Log) {
	p.Index, p.Term = l.Index, l.Term
	if l.Type == raft.LogConfiguration {
		p.Changed, p.Members = l.Index, bytes.Clone(l.Data)
	}
}

// write stores a position that was another one before.
func (p *Position) write(w Writer, was Position, logged int64) error {
	b := append(make([]byte, 0, positionSize), positionVersion)
	for _, v := range []uint64{p.Index, p.Term, p.From, p.Changed, uint64(logged)} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	if err := w.Set(meta, []byte(positionKey), b); err != nil || p.Changed == was.Changed {
		return err
	}
	return w.Set(meta, []byte(membersKey), append(be64(p.Changed), p.Members...))
}

// readPosition gives the stored position, or one that knows nothing but the
// applied index when the record is of another time.
func readPosition(c Content) Position {
	applied := Applied(c)
	unknown := Position{Index: applied, From: applied}
	b := positionRecord(c)
	if b == nil {
		return unknown
	}
	p := Position{Index: applied, Term: fromBE64(b[9:17]), From: fromBE64(b[17:25]), Changed: fromBE64(b[25:33])}
	if p.Changed == 0 {
		return p
	}
	members := c.Lookup(meta, []byte(membersKey))
	if len(members) < 8 || fromBE64(members[:8]) != p.Changed {
		return unknown
	}
	p.Members = bytes.Clone(members[8:])
	return p
}

func readLogged(c Content) int64 {
	if b := positionRecord(c); b != nil {
		return int64(fromBE64(b[33:]))
	}
	return 0
}

// positionRecord gives the record when it is of the applied index.
func positionRecord(c Content) []byte {
	b := c.Lookup(meta, []byte(positionKey))
	if len(b) != positionSize || b[0] != positionVersion || fromBE64(b[1:9]) != Applied(c) {
		return nil
	}
	return b
}
