package main

import (
	"context"
	"errors"

	"github.com/atoll-registry/atoll/airgap"
	clusterversion "github.com/atoll-registry/atoll/cluster/version"
	"github.com/atoll-registry/atoll/node/fault"
)

// The exit codes, which scripts may rely on.
const (
	exitOK          = 0
	exitFailed      = 1 // anything not named below
	exitUsage       = 2 // the command line or the configuration is wrong
	exitUnavailable = 3 // no node answers, or the site has no leader: try again
	exitDenied      = 4 // wrong or missing credentials, or not allowed
	exitNotFound    = 5 // no such thing
	exitConflict    = 6 // it exists already, or a rule forbids it now
	exitRefused     = 7 // a bundle is untrusted, altered, truncated or not for this site
	exitVersion     = 8 // this version of atoll is too old or too new for the data directory or the site
	exitInterrupted = 130
)

const exitCodesHelp = `
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no node or no leader (try again),
4 not allowed, 5 not found, 6 conflict, 7 bundle refused, 8 wrong version of atoll
for this data directory or site, 130 interrupted.`

// usageError marks an error as one of the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func exitCode(err error) int {
	var usage usageError
	var refused *airgap.Refusal
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	case errors.As(err, &refused):
		return exitRefused
	case errors.Is(err, clusterversion.ErrMismatch):
		return exitVersion
	}
	switch fault.KindOf(err) {
	case fault.Invalid:
		return exitUsage
	case fault.Unavailable:
		return exitUnavailable
	case fault.Denied, fault.Unauthenticated:
		return exitDenied
	case fault.NotFound:
		return exitNotFound
	case fault.Conflict, fault.Precondition:
		return exitConflict
	}
	return exitFailed
}
