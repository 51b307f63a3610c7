package member

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// raftLog lets raft write to slog, one level lower than it means to, and what
// it repeats for as long as a peer is away as debug: that is everyday at an edge
// site, and this package logs it once in its own words.
type raftLog struct {
	log  *slog.Logger
	name string
	args []any
}

var _ hclog.Logger = (*raftLog)(nil)

func newRaftLog(log *slog.Logger) hclog.Logger {
	return &raftLog{log: log.With("part", "raft"), name: "raft"}
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
func (l *raftLog) Log(level hclog.Level, msg string, args ...any) {
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

func (l *raftLog) enabled(level hclog.Level) bool {
	return l.log.Enabled(noContext(), lower(level))
}

func (l *raftLog) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *raftLog) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *raftLog) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *raftLog) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *raftLog) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *raftLog) IsTrace() bool { return false }
func (l *raftLog) IsDebug() bool { return l.enabled(hclog.Debug) }
func (l *raftLog) IsInfo() bool  { return l.enabled(hclog.Info) }
func (l *raftLog) IsWarn() bool  { return l.enabled(hclog.Warn) }
func (l *raftLog) IsError() bool { return l.enabled(hclog.Error) }

func (l *raftLog) ImpliedArgs() []any { return l.args }
func (l *raftLog) Name() string       { return l.name }

func (l *raftLog) With(args ...any) hclog.Logger {
	return &raftLog{log: l.log.With(args...), name: l.name, args: append(append([]any(nil), l.args...), args...)}
}

func (l *raftLog) Named(name string) hclog.Logger { return l.ResetNamed(l.name + "." + name) }

func (l *raftLog) ResetNamed(name string) hclog.Logger {
	return &raftLog{log: l.log, name: name, args: l.args}
}

func (l *raftLog) SetLevel(hclog.Level) {} // slog's handler decides

func (l *raftLog) GetLevel() hclog.Level { return hclog.Debug }

func (l *raftLog) StandardLogger(o *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(o), "", 0)
}

func (l *raftLog) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return lineWriter{l} }

type lineWriter struct{ log *raftLog }

func (w lineWriter) Write(p []byte) (int, error) {
	w.log.Debug(string(p))
	return len(p), nil
}
