package table

import (
	"errors"
	"fmt"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// failure is a failure that passes: the same call may succeed later.
type failure string

func (f failure) Error() string { return string(f) }

// Unavailable says that the caller may try again; node/fault asks for it.
func (f failure) Unavailable() bool { return true }

const (
	// ErrNoLeader: no leader was found in time. A Backend returns it only when
	// the transaction was never handed to one and will not take effect.
	ErrNoLeader = failure("no leader: a majority of the site's voters is not reachable")
	// ErrUnknownOutcome: the transaction was handed to a leader, and whether it
	// takes effect is not known. A Backend returns it, and Update sends the
	// same bytes again until it knows; Update returns it only when its context
	// ends or the leader is gone for good before that.
	ErrUnknownOutcome = failure("outcome unknown: the change may or may not take effect")
	// ErrConflict: what an Update read changed again and again before it could
	// commit.
	ErrConflict = failure("too many conflicting changes; try again")
)

var (
	// ErrTooLarge: a Tx is over a limit of the state machine: 1 MiB, 4096
	// conditions and operations, 256 rows in one scan.
	ErrTooLarge = errors.New("transaction too large")
	// ErrOutOfBounds: an Add would take its counter out of its bounds.
	ErrOutOfBounds = errors.New("counter out of bounds")

	errEnded    = errors.New("table: a transaction was used after its function returned")
	errNotBuilt = errors.New("table: the database is not built yet: call Build, then Attach")
)

func tooLarge(err error) error {
	if errors.Is(err, kv.ErrTooLarge) {
		return fmt.Errorf("%w (%w)", ErrTooLarge, err)
	}
	return err
}
