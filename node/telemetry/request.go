package telemetry

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net/http"
)

// RequestIDHeader carries a request's id, in requests and on every answer.
const RequestIDHeader = "X-Request-Id"

// record is what is known of a request under way. It is made once, by whoever
// sees the request first, and found through the request's context; only the
// goroutine that serves the request touches it.
type record struct {
	id    string
	route string // template of the path, such as /api/v2.0/projects/{name}
	user  string
}

type recordKey struct{}

// Begin gives the request an id, on its context and on the answer: the client's
// own where it sent a short plain one, else a random one. Called again for the
// same request, it changes nothing.
func Begin(w http.ResponseWriter, r *http.Request) *http.Request {
	if rec := recordOf(r.Context()); rec != nil {
		return r
	}
	id := r.Header.Get(RequestIDHeader)
	if !plainID(id) {
		id = newID()
	}
	w.Header().Set(RequestIDHeader, id)
	return r.WithContext(context.WithValue(r.Context(), recordKey{}, &record{id: id}))
}

// RequestID is the id of the request that the context belongs to; "" outside of
// one.
func RequestID(ctx context.Context) string {
	if rec := recordOf(ctx); rec != nil {
		return rec.id
	}
	return ""
}

// SetRoute names the template of the path that the request took, which is what
// the metrics are counted by: routers call it, since paths themselves are
// unbounded.
func SetRoute(ctx context.Context, template string) {
	if rec := recordOf(ctx); rec != nil {
		rec.route = template
	}
}

// SetUser names who asks, for the request's log line.
func SetUser(ctx context.Context, name string) {
	if rec := recordOf(ctx); rec != nil {
		rec.user = name
	}
}

func recordOf(ctx context.Context) *record {
	rec, _ := ctx.Value(recordKey{}).(*record)
	return rec
}

func newID() string {
	var b [12]byte
	rand.Read(b[:]) // never fails: crypto/rand's promise
	return hex.EncodeToString(b[:])
}

// plainID accepts what is safe to repeat in a header and a log line.
func plainID(s string) bool {
	if len(s) == 0 || len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}
