// Package telemetry is how a node shows what it does: structured logs, request
// ids, metrics on a passed registry and one middleware that logs and counts
// every HTTP request.
//
// Two invariants: a secret never reaches a log (see Secret and redact), and the
// middleware's ResponseWriter never hides sendfile or flushing from the handler
// below it (see response).
package telemetry

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
)

// Format of the log's lines.
type Format string

const (
	FormatAuto Format = ""     // text on a terminal, JSON otherwise
	FormatText Format = "text" // key=value
	FormatJSON Format = "json"
)

// LogOptions say how to log.
type LogOptions struct {
	Level  slog.Leveler // nil: info
	Format Format
}

// NewLogger makes the logger that everything in a node is given. Whatever it
// writes has passed the redaction of secrets.
func NewLogger(w io.Writer, o LogOptions) (*slog.Logger, error) {
	level := o.Level
	if level == nil {
		level = slog.LevelInfo
	}
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: redact}
	format := o.Format
	if format == FormatAuto {
		format = FormatJSON
		if isTerminal(w) {
			format = FormatText
		}
	}
	switch format {
	case FormatText:
		return slog.New(slog.NewTextHandler(w, options)), nil
	case FormatJSON:
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return nil, fmt.Errorf("log format %q is neither text nor json", format)
}

// ParseLevel reads a level by name: debug, info, warn or error.
func ParseLevel(name string) (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(name)); err != nil {
		return 0, fmt.Errorf("log level %q is none of debug, info, warn, error", name)
	}
	return l, nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// Redacted stands in a log where a secret was.
const Redacted = "[redacted]"

// Secret is a string that prints as Redacted in every format, so that a secret
// held in a struct cannot be logged with it. Convert to string to use it.
type Secret string

func (Secret) String() string               { return Redacted }
func (Secret) GoString() string             { return Redacted }
func (Secret) LogValue() slog.Value         { return slog.StringValue(Redacted) }
func (Secret) MarshalText() ([]byte, error) { return []byte(Redacted), nil }

// Format makes every verb print Redacted.
func (Secret) Format(f fmt.State, _ rune) { io.WriteString(f, Redacted) }

// secretKeys are the attribute names, or their last words, whose values are
// never logged.
var secretKeys = [...]string{
	"password", "passphrase", "secret", "token", "authorization", "cookie", "credential", "credentials", "private_key", "cluster_key", "seed",
}

// secretText matches secrets inside longer texts: HTTP credentials, JSON web
// tokens, join tokens and passwords in URLs. The first group is kept.
var secretText = regexp.MustCompile(`(?i)\b((?:bearer|basic) +)[a-z0-9+/_.=~-]{8,}` +
	`|()\beyJ[a-z0-9_-]{8,}\.[a-z0-9_-]{8,}\.[a-z0-9_-]*` +
	`|\b(ATOLL1-[a-z]+-)[a-z0-9_:=+/-]{8,}` +
	`|(://[^/\s:@]*:)[^/\s@]+@`)

func redact(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
		return a
	}
	if isSecretKey(a.Key) && a.Value.Kind() != slog.KindGroup {
		if a.Value.Kind() == slog.KindString && a.Value.String() == "" {
			return a // that a secret is missing is worth knowing
		}
		return slog.String(a.Key, Redacted)
	}
	switch a.Value.Kind() {
	case slog.KindString:
		if s := a.Value.String(); mayHoldSecret(s) {
			a.Value = slog.StringValue(Scrub(s))
		}
	case slog.KindDuration:
		// With its unit: JSON would show a bare number of nanoseconds.
		a.Value = slog.StringValue(a.Value.Duration().String())
	case slog.KindAny:
		switch v := a.Value.Any().(type) {
		case error:
			a.Value = slog.StringValue(Scrub(v.Error()))
		case fmt.Stringer:
			a.Value = slog.StringValue(Scrub(v.String()))
		case []string, map[string]string, map[string][]string:
			a.Value = slog.StringValue(Scrub(fmt.Sprint(v)))
		case *slog.Source:
		default:
			// A header, a request or a struct: whatever it holds, it is logged as
			// text that has been scrubbed.
			a.Value = slog.StringValue(Scrub(fmt.Sprintf("%+v", v)))
		}
	}
	return a
}

func isSecretKey(key string) bool {
	key = strings.ToLower(key)
	if slices.Contains(secretKeys[:], key) {
		return true
	}
	for _, s := range secretKeys {
		if strings.HasSuffix(key, "_"+s) || strings.HasSuffix(key, "-"+s) {
			return true
		}
	}
	return false
}

// mayHoldSecret is a cheap test before the regular expression.
func mayHoldSecret(s string) bool {
	return len(s) >= 12 && (strings.Contains(s, "eyJ") || strings.Contains(s, "://") || strings.ContainsAny(s, " -"))
}

// Scrub gives a text with everything that looks like a credential replaced.
func Scrub(s string) string {
	return secretText.ReplaceAllStringFunc(s, func(found string) string {
		m := secretText.FindStringSubmatch(found)
		for _, kept := range m[1:] {
			if kept != "" {
				if strings.HasPrefix(kept, "://") {
					return kept + Redacted + "@"
				}
				return kept + Redacted
			}
		}
		return Redacted
	})
}
