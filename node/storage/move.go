package storage

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// States of a move.
const (
	None       = "none"    // there was none since the node started
	Running    = "running" // goes on after a restart
	Done       = "done"
	Incomplete = "incomplete" // what is in Problems is still in the old place, which is read on
)

// Status of moving blobs to another storage.
type Status struct {
	State string `json:"state"`
	// From and To are without secrets.
	From    string `json:"from"`
	To      string `json:"to"`
	Delete  bool   `json:"delete"`
	Total   int    `json:"total"`   // blobs that were in another place when it began
	Checked int    `json:"checked"` // of these, so far
	Moved   int    `json:"moved"`   // the rest was in the new place already
	Bytes   int64  `json:"bytes"`   // moved
	// Waiting says what the move waits for, "" when it goes on.
	Waiting  string    `json:"waiting"`
	Problems []Problem `json:"problems"`
}

// Problem is a blob that could not be moved.
type Problem struct {
	Digest string `json:"digest"`
	Reason string `json:"reason"`
}

// Request asks to move blobs.
type Request struct {
	To Choice `json:"to"`
	// Delete removes each blob from the old place once the new one holds it.
	Delete bool `json:"delete"`
}

const (
	pageSize    = 256
	retryAfter  = 5 * time.Second
	maxProblems = 1000
)

// Operations adds the room's operations to the API.
func (s *Storage) Operations(k *rest.Kernel) {
	type moveIn struct{ Body Request }
	rest.Register(k, rest.Operation[moveIn, Status]{
		ID: "moveBlobs", Method: http.MethodPost, Path: "/api/atoll/v1/blobs/migration", Tag: "storage",
		Summary: "Move this node's blobs to another storage while it serves", Permission: access.NodeManage, Status: http.StatusAccepted,
		Do: func(ctx context.Context, in *moveIn) (Status, error) { return s.Begin(ctx, in.Body) },
	})
	rest.Register(k, rest.Operation[struct{}, Status]{
		ID: "getBlobsMove", Method: http.MethodGet, Path: "/api/atoll/v1/blobs/migration", Tag: "storage",
		Summary: "How far this node is with moving its blobs", Permission: access.NodeRead,
		Do: func(context.Context, *struct{}) (Status, error) { return s.Status(), nil },
	})
}

// Status says how far a move is.
func (s *Storage) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.move
	if out.State == "" {
		out.State, out.To = None, s.state.Home.describe()
	}
	out.Problems = append([]Problem{}, out.Problems...)
	return out
}

// Begin makes another storage the home of blobs and starts the move. Run does it.
func (s *Storage) Begin(ctx context.Context, asked Request) (Status, error) {
	if asked.To.Kind == Local && len(asked.To.Parameters) > 0 {
		return Status{}, fault.New(fault.Invalid, "local storage has no parameters")
	}
	to, err := s.open(ctx, asked.To, false)
	if err != nil {
		return Status{}, err
	}
	members, err := s.Members()
	if err != nil {
		return Status{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	home := s.state.Home
	again := same(asked.To, home) // to finish what was incomplete, or with other credentials
	switch {
	case s.move.State == Running:
		return Status{}, fault.New(fault.Conflict, "blobs are being moved to %s; wait for that", s.move.To)
	case s.state.Former != nil && !again:
		return Status{}, fault.New(fault.Conflict, "not all blobs have moved from %s yet; finish that with atoll blobs migrate --to %s", s.state.Former.describe(), home.Kind)
	case asked.Delete && members > 1 && home.Kind != Local && !again:
		return Status{}, fault.New(fault.Invalid, "%s is read by the other %d nodes of this site too: move them as well, without deleting, and then empty it with the storage's own tools", home.describe(), members-1)
	}
	next := state{Home: asked.To, Former: s.state.Former, Delete: asked.Delete}
	if !again {
		next.Former = &home
	} else if next.Former == nil {
		next.Former = &Choice{Kind: Local} // what the directory still holds
	}
	if err := s.save(next); err != nil {
		return Status{}, err
	}
	s.state = next
	if !again {
		s.Store.Rehome(to) // from here on new blobs go there
	}
	s.move = Status{State: Running, From: next.Former.describe(), To: asked.To.describe(), Delete: asked.Delete}
	s.start <- struct{}{}
	s.Log.Info("blobs are being moved", "from", s.move.From, "to", s.move.To, "delete", asked.Delete, "user", access.From(ctx).Name)
	return s.move, nil
}

// Run moves blobs when it is asked to, and goes on with what an earlier process
// began.
func (s *Storage) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.start:
		}
		s.mu.Lock()
		st := s.state
		s.move = Status{State: Running, From: st.Former.describe(), To: st.Home.describe(), Delete: st.Delete}
		s.mu.Unlock()
		if err := s.pass(ctx, st); err != nil {
			if ctx.Err() != nil {
				return nil // the file says to go on
			}
			return err
		}
	}
}

func (s *Storage) note(change func(*Status)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.move)
}

// pass moves all blobs that are in another place than home. New ones go home by
// themselves, so once is enough.
func (s *Storage) pass(ctx context.Context, st state) error {
	total := 0
	for page, err := range s.pages(ctx) {
		if err != nil {
			return err
		}
		total += len(page)
	}
	s.note(func(m *Status) { m.Total = total })
	for page, err := range s.pages(ctx) {
		if err != nil {
			return err
		}
		for _, d := range page {
			if err := s.one(ctx, d, st.Delete); err != nil {
				return err
			}
		}
	}
	return s.finish(st)
}

// pages lists what is in another place than home.
func (s *Storage) pages(ctx context.Context) func(yield func([]digest.Digest, error) bool) {
	return func(yield func([]digest.Digest, error) bool) {
		after := digest.Digest("")
		for {
			var page []digest.Digest
			err := s.retry(ctx, func() (err error) {
				page, err = s.Store.Elsewhere(after, pageSize)
				return err
			})
			if len(page) == 0 && err == nil || !yield(page, err) || err != nil {
				return
			}
			after = page[len(page)-1]
		}
	}
}

// retry waits out what may pass: a storage that does not answer. Other failures
// are the caller's.
func (s *Storage) retry(ctx context.Context, do func() error) error {
	for {
		err := do()
		if err == nil || ctx.Err() != nil || !fault.Is(err, fault.Unavailable) && !fault.Is(err, fault.Limit) {
			return errors.Join(ctx.Err(), err)
		}
		_, text, _ := fault.Public(err)
		s.note(func(m *Status) { m.Waiting = text })
		s.Log.Warn("moving blobs waits", "err", err)
		timer := time.NewTimer(retryAfter)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
		s.note(func(m *Status) { m.Waiting = "" })
	}
}

// one moves a blob. What cannot be moved is noted and stays where it is.
func (s *Storage) one(ctx context.Context, d digest.Digest, remove bool) error {
	var bytes int64
	err := s.retry(ctx, func() (err error) {
		bytes, err = s.Store.Carry(ctx, d)
		return err
	})
	if err == nil && remove {
		err = s.retry(ctx, func() error { return s.Store.Unload(d) })
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	s.note(func(m *Status) {
		m.Checked++
		switch {
		case err == nil && bytes > 0:
			m.Moved++
			m.Bytes += bytes
		case err != nil && !fault.Is(err, fault.NotFound) && len(m.Problems) < maxProblems: // removed meanwhile is none
			m.Problems = append(m.Problems, Problem{Digest: d.String(), Reason: reason(err)})
		}
	})
	if err != nil {
		s.Log.Error("a blob could not be moved", "blob", d, "err", err)
	}
	return nil
}

func reason(err error) string {
	if errors.Is(err, blobs.ErrDamaged) {
		return "it is damaged where it is"
	}
	_, text, _ := fault.Public(err)
	return text
}

// finish leaves the old place when nothing is left there that only it holds.
func (s *Storage) finish(st state) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.move.Problems) > 0 {
		s.move.State = Incomplete
		s.Log.Error("not all blobs could be moved; the old storage is read on", "from", s.move.From, "to", s.move.To, "left", len(s.move.Problems))
		return nil
	}
	next := state{Home: st.Home}
	if err := s.save(next); err != nil {
		return err
	}
	s.state = next
	s.Store.Leave()
	s.move.State = Done
	s.Log.Info("all blobs are moved; use the new storage in --storage and --storage-config from now on", "from", s.move.From, "to", s.move.To,
		"blobs", s.move.Total, "bytes", s.move.Bytes)
	return nil
}
