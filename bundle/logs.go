package bundle

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// Scope is one log of a bundle.
type Scope struct {
	Goal
	From       uint64
	Checkpoint []byte // verified with the keys of its origin
	Entries    File   // the file that Body reads

	reader  *Reader
	body    *content
	checked bool
}

// NextLog goes on to the next log, io.EOF after the last. The log before it must
// have been checked.
func (b *Reader) NextLog() (*Scope, error) {
	if b.err != nil {
		return nil, b.err
	}
	if b.stage != stageLogs || b.pending != nil && !b.pending.checked {
		return nil, b.fail(errors.New("read bundle: NextLog wants Authenticate, and Check of the log before"))
	}
	if err := b.drain(); err != nil {
		return nil, err
	}
	p := b.Claims()
	if b.log == len(p.Target) {
		b.stage = stageBlobs
		return nil, io.EOF
	}
	goal := p.Target[b.log]
	signed, err := b.small(b.manifest.Files[b.next])
	if err != nil {
		return nil, b.fail(err)
	}
	checkpoint, err := entry.OpenCheckpoint(signed, b.keys[goal.Site].Checkpoints()...)
	if err != nil {
		return nil, b.fail(altered("%s: %v", b.manifest.Files[b.next].Path, err).Because(err))
	}
	if checkpoint.Log != goal.LogID || checkpoint.Size != goal.Size || hex.EncodeToString(checkpoint.Root[:]) != goal.Root {
		return nil, b.fail(altered("the checkpoint of log %s is not the one of the statement", goal.LogID))
	}
	file := b.manifest.Files[b.next+1]
	body, err := b.enter(file)
	if err != nil {
		return nil, b.fail(err)
	}
	b.next, b.log = b.next+2, b.log+1
	b.pending = &Scope{Goal: goal, From: p.From(goal.LogID), Checkpoint: signed, Entries: file, reader: b, body: body}
	return b.pending, nil
}

// Body is the file of entries as it arrives, for Check or to be kept first. Its
// hash is verified at its end.
func (s *Scope) Body() io.Reader { return s.body }

// Check reads the log's entries, from Body or from where its bytes were kept,
// and verifies that they are the entries of the checkpoint and of the state. It
// returns the root that the log had with its first at entries, From <= at <=
// Size: whoever knows that root from before knows whether this is the same log.
func (s *Scope) Check(body io.Reader, at uint64) (tlog.Hash, error) {
	b := s.reader
	if b.err != nil {
		return tlog.Hash{}, b.err
	}
	if at < s.From || at > s.Size {
		return tlog.Hash{}, b.fail(fmt.Errorf("read bundle: log %s has no root at %d entries", s.LogID, at))
	}
	refuse := func(err error) error {
		if !errors.Is(err, entry.ErrMalformed) {
			return b.fail(err)
		}
		return b.fail(altered("%s: %v", s.Entries.Path, err).Because(err))
	}
	var l *ledger
	var rootAt tlog.Hash
	mark := func() {
		if l.tree.Size() == at {
			rootAt = l.tree.Root()
		}
	}
	err := readEntries(body, func(edge []byte) (uint64, error) {
		tree := &entry.Tree{}
		if err := tree.UnmarshalBinary(edge); err != nil {
			return 0, err
		}
		if tree.Size() != s.From {
			return 0, fmt.Errorf("begins at %d, the statement says %d: %w", tree.Size(), s.From, entry.ErrMalformed)
		}
		l = newLedger(s.LogID, tree)
		mark()
		return tree.Size(), nil
	}, func(seq uint64, value []byte) error {
		if seq >= s.Size {
			return fmt.Errorf("more than the %d entries of the checkpoint: %w", s.Size, entry.ErrMalformed)
		}
		if _, err := l.add(value); err != nil {
			return fmt.Errorf("%w: %w", err, entry.ErrMalformed)
		}
		mark()
		return nil
	})
	if err == nil {
		err = s.compare(l)
	}
	if err != nil {
		return tlog.Hash{}, refuse(err)
	}
	if err := b.drain(); err != nil {
		return tlog.Hash{}, err
	}
	b.graph.ledgers = append(b.graph.ledgers, l)
	s.checked = true
	return rootAt, nil
}

// compare holds what the entries gave against what was signed.
func (s *Scope) compare(l *ledger) error {
	root := l.tree.Root()
	if l.tree.Size() != s.Size || hex.EncodeToString(root[:]) != s.Root {
		return fmt.Errorf("the entries are not those of the checkpoint: %w", entry.ErrMalformed)
	}
	checkpoint, err := entry.ParseCheckpoint(s.Checkpoint)
	if err != nil {
		return err
	}
	if l.seen && checkpoint.At != l.lastAt {
		return fmt.Errorf("the checkpoint has the time %d, its last entry %d: %w", checkpoint.At, l.lastAt, entry.ErrMalformed)
	}
	if l.project != "" && l.project != s.Project {
		return fmt.Errorf("the statement calls the project %q, its entries %q: %w", s.Project, l.project, entry.ErrMalformed)
	}
	if s.From > 0 {
		return nil
	}
	state, err := l.state.Root()
	if err != nil {
		return err
	}
	if hex.EncodeToString(state[:]) != s.State {
		return fmt.Errorf("the entries give the state %x, the statement says %s: %w", state, s.State, entry.ErrMalformed)
	}
	return nil
}
