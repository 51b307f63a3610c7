package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strconv"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
)

// DefaultMaxBody bounds the body of a request whose operation says nothing.
const DefaultMaxBody = 1 << 20

// Operation answers a decoded request with a value that is sent as JSON.
//
// In is a struct. Its fields, embedded structs included, are filled from where
// their tag says: `path:"name"`, `query:"name"`, `header:"Name"`,
// `from:"origin"` (scheme and host by which the client found the node); the
// field named Body is the JSON body. Fields are strings, booleans, numbers,
// time.Duration, types with UnmarshalText, slices of these (query only; also
// comma separated) and pointers to these (nil when absent). They are checked by
// `required:"true"`, `min` and `max` (a number's value, a string's or slice's
// length), `pattern` (the whole string) and `enum:"a,b"`; `default` fills what
// is absent. The same checks work on the fields inside Body. A path value that
// still holds an escape after decoding is decoded once more, since clients
// escape the slash of a repository name once or twice.
//
// Out is sent as JSON; None sends no body, Page and Created what their own
// comments say. A type with a method SetHeaders(http.Header) adds headers.
type Operation[In, Out any] struct {
	ID      string // unique; Harbor's own id where Harbor has the operation
	Method  string
	Path    string // template such as /api/v2.0/projects/{project_name_or_id}
	Tag     string
	Summary string
	// Permission that the guard is asked for. Without one, Anonymous must say
	// that the operation is open to all.
	Permission access.Permission
	Anonymous  bool
	// Project says in which project the permission is needed, in the form that
	// ParseProject reads; nil asks for it in the system.
	Project func(*In) string
	// Status of success; 0: 201 for Created, else 200.
	Status int
	// MaxBody bounds the request's body in bytes; 0: DefaultMaxBody.
	MaxBody int64
	Do      func(ctx context.Context, in *In) (Out, error)
}

// StreamOperation reads the request's body and writes the answer itself, for
// content that is no JSON or does not fit in memory. In is filled as for an
// Operation, and has no Body.
type StreamOperation[In any] struct {
	ID, Method, Path, Tag, Summary string
	Permission                     access.Permission
	Anonymous                      bool
	Project                        func(*In) string
	// MaxBody bounds the request's body in bytes; 0: no bound.
	MaxBody int64
	// Consumes and Produces are media types, for the document; "" says that
	// there is no body.
	Consumes, Produces string
	// Do may return an error before it writes: it is answered in the envelope.
	// An error after that is logged and cuts the connection, so that the client
	// does not take a part for the whole.
	Do func(ctx context.Context, in *In, w http.ResponseWriter, r *http.Request) error
}

// None is the answer of an operation that sends no body.
type None = struct{}

// Created is the answer to the making of something.
type Created struct {
	Location string // path without scheme and host
	Body     any    // nil: no body
}

// headerSetter is an answer that adds headers of its own.
type headerSetter interface{ SetHeaders(http.Header) }

// Register adds an operation to the table and panics when it is not in order.
func Register[In, Out any](k *Kernel, op Operation[In, Out]) {
	in := compileInput(op.ID, reflect.TypeFor[In](), op.Path)
	out := compileOutput(reflect.TypeFor[Out]())
	mustBeGuarded(op.ID, op.Permission, op.Anonymous)
	if op.Do == nil {
		panic(fmt.Sprintf("rest: operation %q does nothing", op.ID))
	}
	if op.Status == 0 {
		op.Status = http.StatusOK
		if out.created {
			op.Status = http.StatusCreated
		}
	}
	if op.MaxBody == 0 {
		op.MaxBody = DefaultMaxBody
	}
	row := route{
		id: op.ID, method: op.Method, path: op.Path, tag: op.Tag, summary: op.Summary,
		permission: op.Permission, status: op.Status, input: in, output: out,
	}
	k.add(row, func(w http.ResponseWriter, r *http.Request) {
		var value Out
		input := new(In)
		ctx, err := prepare(k, request[In]{in, op.Permission, op.Project, op.MaxBody}, input, w, r)
		if err == nil {
			value, err = op.Do(ctx, input)
		}
		if err == nil {
			err = encode(w, r, op.Status, value)
		}
		if err != nil {
			k.fail(w, r, op.ID, err)
		}
	})
}

// RegisterStream adds a streaming operation to the table and panics when it is
// not in order.
func RegisterStream[In any](k *Kernel, op StreamOperation[In]) {
	in := compileInput(op.ID, reflect.TypeFor[In](), op.Path)
	mustBeGuarded(op.ID, op.Permission, op.Anonymous)
	if op.Do == nil || in.body != nil {
		panic(fmt.Sprintf("rest: streaming operation %q must have a Do and no Body", op.ID))
	}
	row := route{
		id: op.ID, method: op.Method, path: op.Path, tag: op.Tag, summary: op.Summary,
		permission: op.Permission, status: http.StatusOK, input: in, consumes: op.Consumes, produces: op.Produces,
	}
	k.add(row, func(w http.ResponseWriter, r *http.Request) {
		input := new(In)
		ctx, err := prepare(k, request[In]{in, op.Permission, op.Project, op.MaxBody}, input, w, r)
		if err != nil {
			k.fail(w, r, op.ID, err)
			return
		}
		stream := &streamWriter{ResponseWriter: w}
		if err = op.Do(ctx, input, stream, r); err == nil {
			return
		}
		if large := tooLarge(err); large != nil {
			err = large
		}
		if !stream.begun {
			k.fail(w, r, op.ID, err)
			return
		}
		k.note(r, op.ID, err)
		panic(http.ErrAbortHandler)
	})
}

func mustBeGuarded(id string, p access.Permission, anonymous bool) {
	if p == (access.Permission{}) && !anonymous {
		panic(fmt.Sprintf("rest: operation %q names no permission and is not open to all", id))
	}
	if (p.Resource == "") != (p.Action == "") {
		panic(fmt.Sprintf("rest: operation %q names half a permission: %q", id, p))
	}
}

// request is what prepare needs to know of an operation.
type request[In any] struct {
	plan       *plan
	permission access.Permission
	project    func(*In) string
	maxBody    int64
}

// prepare brings a request to the point where the operation can run. The body
// is read only once the guard has agreed; the parameters before, since they name
// the project.
func prepare[In any](k *Kernel, q request[In], input *In, w http.ResponseWriter, r *http.Request) (context.Context, error) {
	ctx, principal, err := k.admit(r)
	if err != nil {
		return nil, err
	}
	target := reflect.ValueOf(input).Elem()
	if err := q.plan.parameters(target, r); err != nil {
		if k.allow(ctx, principal, q.permission, "") != nil && principal.Kind == access.Anonymous {
			// Nobody is told what a guarded operation wants before logging in.
			return nil, fault.Wrap(err, fault.Unauthenticated, "log in to do this")
		}
		return nil, err
	}
	project := ""
	if q.project != nil {
		project = q.project(input)
	}
	if err := k.allow(ctx, principal, q.permission, project); err != nil {
		return nil, err
	}
	if q.maxBody > 0 {
		r.Body = http.MaxBytesReader(w, r.Body, q.maxBody)
	}
	return ctx, q.plan.decodeBody(target, r)
}

// encode sends the answer of an operation.
func encode(w http.ResponseWriter, r *http.Request, status int, value any) error {
	if s, ok := value.(headerSetter); ok {
		s.SetHeaders(w.Header())
	}
	body := value
	switch v := value.(type) {
	case None:
		body = nil
	case Created:
		w.Header().Set("Location", v.Location)
		body = v.Body
	case pager:
		body = v.page(w.Header(), r)
	}
	if body == nil {
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(status)
		return nil
	}
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(body); err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(buffer.Len()))
	w.WriteHeader(status)
	// A failed write means that the client is gone: there is nobody to tell.
	_, _ = w.Write(buffer.Bytes())
	return nil
}

// streamWriter notes whether an answer has begun. It keeps io.ReaderFrom and
// flushing, as telemetry's does.
type streamWriter struct {
	http.ResponseWriter
	begun bool
}

func (w *streamWriter) WriteHeader(status int) {
	w.begun = w.begun || status >= 200
	w.ResponseWriter.WriteHeader(status)
}

func (w *streamWriter) Write(p []byte) (int, error) {
	w.begun = true
	return w.ResponseWriter.Write(p)
}

func (w *streamWriter) ReadFrom(src io.Reader) (int64, error) {
	w.begun = true
	return io.Copy(w.ResponseWriter, src)
}

func (w *streamWriter) Flush() {
	w.begun = true
	_ = http.NewResponseController(w.ResponseWriter).Flush()
}

func (w *streamWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
