package joining

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"time"

	"golang.org/x/time/rate"
)

// Bounds are how much one server answers; whoever asks for more is told to try again.
type Bounds struct {
	PerSecond float64
	Burst     int
	AtOnce    int
}

// Strangers may ask little: few requests at a time, few a second.
func Strangers() Bounds { return Bounds{PerSecond: 5, Burst: 20, AtOnce: 4} }

// MaxBody bounds what is read of a stranger's request, maxAnswer of its answer.
const (
	MaxBody   = 16 << 10
	maxAnswer = 256 << 10
)

// Handler answers the body of a request with what becomes JSON, or with an error:
// a *Refusal is told to the asker, any other stays in the log.
type Handler func(ctx context.Context, body []byte) (any, error)

// Server serves the handlers by their paths, all of them together within the bounds.
// It logs few of its refusals in a row, and calls refused, which may be nil, with the
// code of each.
func Server(b Bounds, handlers map[string]Handler, log *slog.Logger, refused func(code string)) *http.Server {
	if refused == nil {
		refused = func(string) {}
	}
	d := &desk{
		log: log, limiter: rate.NewLimiter(rate.Limit(b.PerSecond), b.Burst), places: make(chan struct{}, b.AtOnce), refused: refused,
		said: rate.Sometimes{First: 20, Interval: 10 * time.Second},
	}
	mux := http.NewServeMux()
	for path, answer := range handlers {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) { d.serve(w, r, answer) })
	}
	s := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      40 * time.Second, // longer than a write waits for a leader
		MaxHeaderBytes:    4 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	s.SetKeepAlivesEnabled(false)
	return s
}

// desk is where strangers queue.
type desk struct {
	log     *slog.Logger
	limiter *rate.Limiter
	places  chan struct{}
	refused func(code string)
	said    rate.Sometimes // strangers can have as much refused as they like
}

func (d *desk) serve(w http.ResponseWriter, r *http.Request, answer Handler) {
	select {
	case d.places <- struct{}{}:
		defer func() { <-d.places }()
	default:
		d.refuse(w, Refuse(CodeLater, "too many nodes are joining at this moment: try again in a few seconds"))
		return
	}
	if !d.limiter.Allow() {
		d.refuse(w, Refuse(CodeLater, "too many nodes are joining at this moment: try again in a few seconds"))
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	if err != nil {
		d.refuse(w, Refuse(CodeMalformed, "reading the request: %v", err))
		return
	}
	v, err := answer(r.Context(), body)
	if err != nil {
		d.refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		d.log.Debug("answering a node", "error", err)
	}
}

// refuse answers with a refusal; other errors stay in the log.
func (d *desk) refuse(w http.ResponseWriter, err error) {
	var no *Refusal
	var passing interface{ Unavailable() bool }
	switch {
	case errors.As(err, &no):
	case errors.As(err, &passing) && passing.Unavailable(), errors.Is(err, context.DeadlineExceeded):
		no = Refuse(CodeLater, "the site cannot take a node in at the moment, because no leader answers: try again")
	default:
		no = Refuse(CodeLater, "the node could not answer; its log says why")
	}
	d.refused(no.Code)
	d.said.Do(func() {
		d.log.Info("refused the request of a node without a certificate", "code", no.Code, "error", err)
	})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusForbidden)
	if err := json.NewEncoder(w).Encode(no); err != nil {
		d.log.Debug("answering a node", "error", err)
	}
}
