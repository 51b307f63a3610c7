package rest

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"strconv"

	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/telemetry"
)

// Codes of the envelope that a fault's kind alone does not give. A room sets
// them with fault's WithCode.
const (
	CodeUnprocessable    = "UNPROCESSABLE_ENTITY"   // 422: well-formed, but a value is out of its bounds
	CodePolicyViolation  = "PROJECTPOLICYVIOLATION" // 412: a project's rule forbids it
	CodeTooManyRequests  = "TOO_MANY_REQUEST"       // 429, in Harbor's spelling
	CodeNoSpace          = "NO_SPACE"               // 507
	codeMethodNotAllowed = "METHOD_NOT_ALLOWED"
	codeMediaType        = "UNSUPPORTED_MEDIA_TYPE"
	codeClientGone       = "CLIENT_CLOSED_REQUEST"
)

// kindAnswers give status and code by kind of fault.
var kindAnswers = [...]struct {
	status int
	code   string
}{
	fault.Internal:        {http.StatusInternalServerError, "UNKNOWN"},
	fault.Invalid:         {http.StatusBadRequest, "BAD_REQUEST"},
	fault.Unauthenticated: {http.StatusUnauthorized, "UNAUTHORIZED"},
	fault.Denied:          {http.StatusForbidden, "FORBIDDEN"},
	fault.NotFound:        {http.StatusNotFound, "NOT_FOUND"},
	fault.Conflict:        {http.StatusConflict, "CONFLICT"},
	fault.Precondition:    {http.StatusPreconditionFailed, "PRECONDITION"},
	fault.Limit:           {http.StatusRequestEntityTooLarge, "REQUEST_ENTITY_TOO_LARGE"},
	fault.Unavailable:     {http.StatusServiceUnavailable, "SERVICE_UNAVAILABLE"},
}

// StatusOf gives the HTTP status and the envelope's code for an error.
func StatusOf(err error) (status int, code string) {
	kind := fault.KindOf(err)
	answer := kindAnswers[fault.Internal]
	if int(kind) < len(kindAnswers) {
		answer = kindAnswers[kind]
	}
	status, code = answer.status, answer.code
	if own, _, _ := fault.Public(err); own != "" {
		code = own
	}
	switch code {
	case CodeUnprocessable:
		status = http.StatusUnprocessableEntity
	case CodeTooManyRequests, "TOOMANYREQUESTS":
		status = http.StatusTooManyRequests
	case CodeNoSpace:
		status = http.StatusInsufficientStorage
	case codeMethodNotAllowed:
		status = http.StatusMethodNotAllowed
	case codeMediaType:
		status = http.StatusUnsupportedMediaType
	}
	return status, code
}

type envelope struct {
	Errors []envelopeError `json:"errors"`
}

type envelopeError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Detail  any    `json:"detail,omitempty"`
}

// WriteError answers with the envelope and logs nothing: for handlers beside the
// kernel that speak the same dialect.
func WriteError(w http.ResponseWriter, err error) {
	status, code := StatusOf(err)
	_, text, detail := fault.Public(err)
	body, encodeErr := json.Marshal(envelope{[]envelopeError{{code, text, detail}}})
	if encodeErr != nil { // only a detail can do that
		body, _ = json.Marshal(envelope{[]envelopeError{{code, text, nil}}})
	}
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	if status == http.StatusServiceUnavailable && h.Get("Retry-After") == "" {
		h.Set("Retry-After", "2")
	}
	w.WriteHeader(status)
	_, _ = w.Write(body) // a failed write means that the client is gone
}

// fail answers a request with an error and logs it.
func (k *Kernel) fail(w http.ResponseWriter, r *http.Request, operation string, err error) {
	k.note(r, operation, err)
	WriteError(w, err)
}

// note logs and counts the failure of an operation: what is ours as an error,
// what is the client's as debug.
func (k *Kernel) note(r *http.Request, operation string, err error) {
	kind := fault.KindOf(err)
	level, name := slog.LevelDebug, kind.String()
	switch {
	case errors.Is(err, context.Canceled) && r.Context().Err() != nil:
		name = codeClientGone
	case kind == fault.Internal:
		level = slog.LevelError
	case kind == fault.Unavailable:
		level = slog.LevelWarn
	}
	k.failures.WithLabelValues(operation, name).Inc()
	k.config.Log.LogAttrs(r.Context(), level, "operation failed",
		slog.String("id", telemetry.RequestID(r.Context())), slog.String("operation", operation),
		slog.String("kind", name), slog.Any("error", err))
}
