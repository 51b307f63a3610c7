// Package kv is the replicated state machine of a site.
package kv

// Engine stores the state of a Machine.
type Engine interface {
	Close() error
}

// OpenBolt opens or creates the engine's file at path.
func OpenBolt(path string) (Engine, error) { return nil, errTodo }

// NewMemory gives an engine that keeps everything in memory, for tests.
func NewMemory() Engine { return nil }
