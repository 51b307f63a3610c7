package registry

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"strconv"

	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/telemetry"
)

// Codes of OCI Distribution 1.1, "Error Codes", and the few beside them that
// registries have in common where the specification names only a status.
const (
	codeBlobUnknown     = "BLOB_UNKNOWN"
	codeUploadInvalid   = "BLOB_UPLOAD_INVALID"
	codeUploadUnknown   = "BLOB_UPLOAD_UNKNOWN"
	codeDigestInvalid   = "DIGEST_INVALID"
	codeManifestInvalid = "MANIFEST_INVALID"
	codeManifestUnknown = "MANIFEST_UNKNOWN"
	codeNameInvalid     = "NAME_INVALID"
	codeNameUnknown     = "NAME_UNKNOWN"
	codeSizeInvalid     = "SIZE_INVALID"
	codeUnauthorized    = "UNAUTHORIZED"
	codeDenied          = "DENIED"
	codeUnsupported     = "UNSUPPORTED"
	codeTooManyRequests = "TOOMANYREQUESTS"

	codeRangeInvalid  = "RANGE_INVALID"
	codeTagInvalid    = "TAG_INVALID"
	codePageInvalid   = "PAGINATION_NUMBER_INVALID"
	codeMethodInvalid = "METHOD_NOT_ALLOWED"
	codeNoSpace       = "INSUFFICIENT_STORAGE"
	codeNotFound      = "NOT_FOUND"
	codeTooManyTags   = "TOO_MANY_TAGS"
	codeTimeout       = "REQUEST_TIMEOUT"
	codeUnavailable   = "UNAVAILABLE"
)

// retryAfter is what a client is told to wait when the site cannot answer now,
// in seconds: about an election.
const retryAfter = "3"

type answer struct {
	status int
	code   string
}

// kindAnswers give status and code by kind of fault, for faults without a code.
var kindAnswers = [...]answer{
	fault.Internal:        {http.StatusInternalServerError, "UNKNOWN"},
	fault.Invalid:         {http.StatusBadRequest, codeUnsupported},
	fault.Unauthenticated: {http.StatusUnauthorized, codeUnauthorized},
	fault.Denied:          {http.StatusForbidden, codeDenied},
	fault.NotFound:        {http.StatusNotFound, codeNameUnknown},
	fault.Conflict:        {http.StatusConflict, "CONFLICT"},
	fault.Precondition:    {http.StatusPreconditionFailed, "PRECONDITION"},
	fault.Limit:           {http.StatusRequestEntityTooLarge, codeSizeInvalid},
	fault.Unavailable:     {http.StatusServiceUnavailable, codeUnavailable},
}

// answerOf gives the status and the code for an error.
func answerOf(err error) answer {
	kind := fault.KindOf(err)
	a := kindAnswers[fault.Internal]
	if int(kind) < len(kindAnswers) {
		a = kindAnswers[kind]
	}
	code, _, _ := fault.Public(err)
	if code == "" || kind == fault.Internal {
		return a
	}
	a.code = code
	switch code { // where the specification's status is not that of the kind
	case codeTooManyTags:
		a.status = http.StatusRequestURITooLong
	case codeRangeInvalid:
		a.status = http.StatusRequestedRangeNotSatisfiable
	case codeMethodInvalid, codeUnsupported:
		a.status = http.StatusMethodNotAllowed
	case codeTooManyRequests:
		a.status = http.StatusTooManyRequests
	case codeNoSpace:
		a.status = http.StatusInsufficientStorage
	case codeTimeout:
		a.status = http.StatusRequestTimeout
	}
	if a.code == codeMethodInvalid {
		a.code = codeUnsupported // the specification has one name for both
	}
	return a
}

type errorBody struct {
	Errors []errorItem `json:"errors"`
}

type errorItem struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Detail  any    `json:"detail,omitempty"`
}

// fail is the one place that answers a failed request and logs it.
func (g *Registry) fail(c *call, err error) {
	a := answerOf(err)
	g.logFailure(c, a, err)
	if c.w.begun() {
		// Half an answer is out: cut it, so that nobody takes the part for the whole.
		panic(http.ErrAbortHandler)
	}
	_, text, detail := fault.Public(err)
	body, encodeErr := json.Marshal(errorBody{[]errorItem{{a.code, text, detail}}})
	if encodeErr != nil { // only a detail can do that
		body, _ = json.Marshal(errorBody{[]errorItem{{a.code, text, nil}}})
	}
	h := c.w.Header()
	for _, name := range []string{"Etag", "Docker-Content-Digest", "Accept-Ranges"} {
		h.Del(name)
	}
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	switch a.status {
	case http.StatusUnauthorized:
		g.auth.Challenge(c.w, c.r, c.scopes...)
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		if h.Get("Retry-After") == "" {
			h.Set("Retry-After", retryAfter)
		}
	}
	c.refuse(a.status, body)
}

// logFailure writes one line: what is ours as an error, what is the client's as
// debug.
func (g *Registry) logFailure(c *call, a answer, err error) {
	level, kind := slog.LevelDebug, fault.KindOf(err)
	switch {
	case clientGone(c.r, err):
		a.code = "CLIENT_GONE"
	case kind == fault.Internal:
		level = slog.LevelError
	case kind == fault.Unavailable || a.status == http.StatusInsufficientStorage:
		level = slog.LevelWarn
	}
	g.log.LogAttrs(c.r.Context(), level, "registry request refused",
		slog.String("id", telemetry.RequestID(c.r.Context())), slog.String("method", c.r.Method),
		slog.String("route", c.route.Endpoint.template()), slog.String("repository", c.route.Name.Full()),
		slog.Int("status", a.status), slog.String("code", a.code), slog.Any("error", err))
}

func clientGone(r *http.Request, err error) bool {
	return errors.Is(err, context.Canceled) && r.Context().Err() != nil
}

// readFault names the failure of taking in a request's body: the client's where
// its bytes stopped, else that of whoever took them.
func (c *call) readFault(err error) error {
	if c.body == nil || c.body.broken == nil {
		return err
	}
	err = errors.Join(err, c.body.broken)
	if errors.Is(c.body.broken, os.ErrDeadlineExceeded) {
		return fault.Wrap(err, fault.Invalid, "no bytes came for too long; ask the upload where it stands and go on from there").WithCode(codeTimeout)
	}
	return fault.Wrap(err, fault.Invalid, "the request's body ended early; ask the upload where it stands and go on from there").WithCode(codeUploadInvalid)
}
