package fault

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

type noLeader struct{}

func (noLeader) Error() string     { return "raft: no leader at 10.0.0.1" }
func (noLeader) Unavailable() bool { return true }

func TestKindAndPublicText(t *testing.T) {
	cause := errors.New("secret cause")
	for _, c := range []struct {
		name string
		err  error
		kind Kind
		code string
		text string // a part of it
	}{
		{"plain", cause, Internal, "", "internal error"},
		{"new", New(NotFound, "there is no project %q", "x").WithCode("NAME_UNKNOWN"), NotFound, "NAME_UNKNOWN", `no project "x"`},
		{"wrapped cause", Wrap(cause, Denied, "not you"), Denied, "", "not you"},
		{"inside another error", fmt.Errorf("while pushing: %w", New(Limit, "too large")), Limit, "", "too large"},
		{"the outermost counts", Wrap(New(NotFound, "inner"), Conflict, "outer"), Conflict, "", "outer"},
		{"of a lower floor", fmt.Errorf("update: %w", noLeader{}), Unavailable, "", "no leader at the moment"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := KindOf(c.err); got != c.kind {
				t.Errorf("kind %v, want %v", got, c.kind)
			}
			code, text, _ := Public(c.err)
			if code != c.code || !strings.Contains(text, c.text) {
				t.Errorf("public %q %q, want %q and %q in it", code, text, c.code, c.text)
			}
			if strings.Contains(text, "secret cause") || strings.Contains(text, "10.0.0.1") {
				t.Errorf("the public text %q leaks the cause", text)
			}
		})
	}
	if Is(nil, Internal) {
		t.Error("no error is of a kind")
	}
	if err := Wrap(cause, Denied, "not you"); !errors.Is(err, cause) || err.Error() != "not you: secret cause" {
		t.Errorf("the log shows %q, want text and cause", err)
	}
}
