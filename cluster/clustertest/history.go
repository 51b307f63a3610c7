package clustertest

import (
	"math"
	"sync"
	"sync/atomic"

	"github.com/anishathalye/porcupine"
)

// History is what clients of a few registers did and saw. Its clock counts
// events: in virtual time many happen in the same nanosecond.
type History struct {
	clock atomic.Int64
	mu    sync.Mutex
	ops   []porcupine.Operation
}

type input struct {
	key   string
	write bool
	value string
}

// Call is an operation under way.
type Call struct {
	history *History
	client  int
	in      input
	began   int64
}

// Write begins a write of a value that nobody else writes.
func (h *History) Write(client int, key, value string) *Call {
	return &Call{h, client, input{key, true, value}, h.clock.Add(1)}
}

// Read begins a read.
func (h *History) Read(client int, key string) *Call {
	return &Call{h, client, input{key: key}, h.clock.Add(1)}
}

// Done records the end of the operation; of a read with what it saw, "" for
// nothing.
func (c *Call) Done(saw string) { c.record(saw, c.history.clock.Add(1)) }

// Lost records a write that may or may not take effect, at any time from its
// beginning on. An operation that certainly did nothing is not recorded.
func (c *Call) Lost() { c.record("", math.MaxInt64) }

func (c *Call) record(saw string, ended int64) {
	c.history.mu.Lock()
	defer c.history.mu.Unlock()
	c.history.ops = append(c.history.ops, porcupine.Operation{
		ClientId: c.client, Input: c.in, Call: c.began, Output: saw, Return: ended,
	})
}

// Len is the number of operations recorded.
func (h *History) Len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.ops)
}

// Linearizable reports whether one order explains the history: each operation
// takes effect at one moment between its beginning and its end.
func (h *History) Linearizable() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return porcupine.CheckOperations(register(), h.ops)
}

// register is the model: each key holds what was written last.
func register() porcupine.Model {
	return porcupine.Model{
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			byKey := make(map[string][]porcupine.Operation)
			for _, op := range history {
				key := op.Input.(input).key
				byKey[key] = append(byKey[key], op)
			}
			var parts [][]porcupine.Operation
			for _, part := range byKey {
				parts = append(parts, part)
			}
			return parts
		},
		Init: func() any { return "" },
		Step: func(state, in, out any) (bool, any) {
			if op := in.(input); op.write {
				return true, op.value
			}
			return state == out, state
		},
	}
}
