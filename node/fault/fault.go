// Package fault is the product's one vocabulary of failures: eight kinds and
// Internal, each with a public text and the cause kept apart from it.
//
// A room returns a fault where it knows what went wrong in the user's terms;
// everything else is Internal. The edge (rest, registry) logs the whole chain
// once and shows the public text only, so a cause never leaks to a client.
package fault

import (
	"errors"
	"fmt"
)

// Kind says what a caller can do about a failure.
type Kind uint8

const (
	Internal        Kind = iota // ours: report it
	Invalid                     // the request is malformed: change it
	Unauthenticated             // no or wrong credentials: log in
	Denied                      // known, but not allowed: ask for the right
	NotFound                    // no such thing
	Conflict                    // it exists already, or changed meanwhile
	Precondition                // a rule or a stated condition forbids it now
	Limit                       // too large, too many or out of space
	Unavailable                 // no leader, no holder, shutting down: try again
)

func (k Kind) String() string {
	names := [...]string{"internal", "invalid", "unauthenticated", "denied", "not found", "conflict", "precondition", "limit", "unavailable"}
	if int(k) < len(names) {
		return names[k]
	}
	return "internal"
}

// Error is a failure with a public text.
type Error struct {
	Kind Kind
	// Code is the field's own name of the failure where one exists, such as
	// BLOB_UNKNOWN of the OCI Distribution specification; else "".
	Code string
	// Text is shown to the user: what was being done, to which name, what to do.
	Text string
	// Detail is shown to the user as structured data; else nil.
	Detail any
	// Cause is for the log only.
	Cause error
}

func (e *Error) Error() string {
	if e.Cause != nil {
		return e.Text + ": " + e.Cause.Error()
	}
	return e.Text
}

func (e *Error) Unwrap() error { return e.Cause }

// WithCode names the failure in the field's own terms.
func (e *Error) WithCode(code string) *Error { e.Code = code; return e }

// WithDetail attaches structured data that the user may see.
func (e *Error) WithDetail(detail any) *Error { e.Detail = detail; return e }

// New makes a failure of a kind; the text is public.
func New(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Text: fmt.Sprintf(format, args...)}
}

// Wrap makes a failure of a kind with a cause that only the log shows.
func Wrap(cause error, kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Text: fmt.Sprintf(format, args...), Cause: cause}
}

// KindOf finds the kind of an error: that of the outermost Error in its chain,
// Unavailable for an error of a lower floor whose Unavailable method says so,
// else Internal.
func KindOf(err error) Kind {
	var f *Error
	if errors.As(err, &f) {
		return f.Kind
	}
	var u interface{ Unavailable() bool }
	if errors.As(err, &u) && u.Unavailable() {
		return Unavailable
	}
	return Internal
}

// Is reports whether err is a failure of the kind.
func Is(err error, kind Kind) bool { return err != nil && KindOf(err) == kind }

// Public gives what a client may see of an error: code (may be ""), text and
// detail (may be nil). An error of a lower floor gives its text with a method
// Public; one without a public text shows a general one.
func Public(err error) (code, text string, detail any) {
	var f *Error
	if errors.As(err, &f) {
		return f.Code, f.Text, f.Detail
	}
	var reason interface{ Public() string }
	if errors.As(err, &reason) {
		return "", reason.Public(), nil
	}
	if KindOf(err) == Unavailable {
		return "", "the site has no leader at the moment; reads go on, try this again in a few seconds", nil
	}
	return "", "internal error; the server's log has the cause under this request's id", nil
}
