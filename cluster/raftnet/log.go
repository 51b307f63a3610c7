package raftnet

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// sink lets raft write to slog, one level lower than it means to, and what
// it repeats for as long as a peer is away as debug: that is everyday at an edge
// site, and package member logs it once in its own words.
type sink struct {
	log  *slog.Logger
	name string
	args []any
}

var _ hclog.Logger = (*sink)(nil)

// NewLog gives raft a logger that writes to log.
func NewLog(log *slog.Logger) hclog.Logger {
	return &sink{log: log.With("part", "raft"), name: "raft"}
}

func everyday(msg string) bool {
	for _, start := range []string{
		"failed to appendEntries to", "failed to heartbeat to", "failed to contact", "failed to make request",
		"failed to decode incoming command", "failed to flush response", "failed to accept connection",
		"rejecting pre-vote request", "rejecting vote request", "Election timeout reached", "unable to connect to peer",
		"skipping application of old log", "pre-vote",
		"failed to get previous log", "appendEntries rejected", // a new node has no log yet
	} {
		if strings.HasPrefix(msg, start) {
			return true
		}
	}
	return false
}

func lower(level hclog.Level) slog.Level {
	switch level {
	case hclog.Error:
		return slog.LevelWarn
	case hclog.Warn:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}

// Log implements hclog.Logger, and so do the methods below.
func (l *sink) Log(level hclog.Level, msg string, args ...any) {
	if level == hclog.Trace || level == hclog.Off || !l.enabled(level) {
		return
	}
	if everyday(msg) {
		level = hclog.Debug
	}
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			if format, ok := f[0].(string); ok {
				args[i] = fmt.Sprintf(format, f[1:]...)
			}
		}
	}
	l.log.Log(noContext(), lower(level), msg, args...)
}

// noContext: raft logs without one.
func noContext() context.Context { return closing{} }

func (l *sink) enabled(level hclog.Level) bool {
	return l.log.Enabled(noContext(), lower(level))
}

func (l *sink) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *sink) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *sink) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *sink) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *sink) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *sink) IsTrace() bool { return false }
func (l *sink) IsDebug() bool { return l.enabled(hclog.Debug) }
func (l *sink) IsInfo() bool  { return l.enabled(hclog.Info) }
func (l *sink) IsWarn() bool  { return l.enabled(hclog.Warn) }
func (l *sink) IsError() bool { return l.enabled(hclog.Error) }

func (l *sink) ImpliedArgs() []any { return l.args }
func (l *sink) Name() string       { return l.name }

func (l *sink) With(args ...any) hclog.Logger {
	return &sink{log: l.log.With(args...), name: l.name, args: append(append([]any(nil), l.args...), args...)}
}

func (l *sink) Named(name string) hclog.Logger { return l.ResetNamed(l.name + "." + name) }

func (l *sink) ResetNamed(name string) hclog.Logger {
	return &sink{log: l.log, name: name, args: l.args}
}

func (l *sink) SetLevel(hclog.Level) {} // slog's handler decides

func (l *sink) GetLevel() hclog.Level { return hclog.Debug }

func (l *sink) StandardLogger(o *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(o), "", 0)
}

func (l *sink) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return lineWriter{l} }

type lineWriter struct{ log *sink }

func (w lineWriter) Write(p []byte) (int, error) {
	w.log.Debug(string(p))
	return len(p), nil
}
