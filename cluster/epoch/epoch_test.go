package epoch

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/pki"
)

const siteID = "site"

func authority(t *testing.T) *pki.Authority {
	t.Helper()
	a, err := pki.NewAuthority(siteID, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func next(t *testing.T, of Epoch, id string, a *pki.Authority) Epoch {
	t.Helper()
	e := of.Next(id, time.Unix(1700000000, 0))
	e.Index, e.Term = 1<<63, 1<<63
	e, err := e.Sign(siteID, a.Signer())
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func guard(t *testing.T, dir string, a *pki.Authority) *Guard {
	t.Helper()
	g, err := Open(dir, siteID, a.CertPEM(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestWire(t *testing.T) {
	a := authority(t)
	id := strings.Repeat("a", 32)
	e := next(t, Epoch{Number: 1<<64 - 2, ID: id}, strings.Repeat("b", 32), a)
	if len(e.Wire()) > MaxWire {
		t.Errorf("the longest takes %d bytes", len(e.Wire()))
	}
	back, err := Parse(e.Wire())
	if err != nil || back.Wire() != e.Wire() || back.Parent != id || back.Verify(siteID, a.CertPEM()) != nil {
		t.Errorf("read back as %+v, %v", back, err)
	}
	for _, wire := range []string{"1", "0.a..1.1.1.AA", "1.A..1.1.1.AA", "01.a..1.1.1.AA", "1.a..1.1.1.AA.", "1.a..1.1.1.!", "1.a.b c.1.1.1.AA", strings.Repeat("1", 300)} {
		if _, err := Parse(wire); err == nil {
			t.Errorf("%q is read", wire)
		}
	}
}

func TestOnlyTheAuthorityMakesEpochs(t *testing.T) {
	a, other := authority(t), authority(t)
	e := next(t, Epoch{}, "a", a)
	changed := e
	changed.Number = 7
	for name, err := range map[string]error{
		"another authority": e.Verify(siteID, other.CertPEM()),
		"another site":      e.Verify("elsewhere", a.CertPEM()),
		"changed":           changed.Verify(siteID, a.CertPEM()),
	} {
		if err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if err := e.Verify(siteID, append(other.CertPEM(), a.CertPEM()...)); err != nil {
		t.Errorf("one of two authorities: %v", err)
	}
	dir := t.TempDir()
	g := guard(t, dir, a)
	for _, wire := range []string{next(t, Epoch{}, "a", other).Wire(), "nonsense"} {
		if err := g.Meet("peer", wire); err == nil || g.Err() != nil {
			t.Errorf("a stranger's epoch: %v, fenced %v", err, g.Err())
		}
	}
	// A replaced authority does not keep a node from starting, nor from meeting
	// others of its epoch.
	own := next(t, Epoch{}, "a", other)
	if err := Save(dir, own); err != nil {
		t.Fatal(err)
	}
	if g := guard(t, dir, a); g.Meet("peer", own.Wire()) != nil || g.Err() != nil {
		t.Error("a node with an epoch of the authority before is fenced")
	}
}

func TestMeet(t *testing.T) {
	a := authority(t)
	none := Epoch{}
	first := next(t, none, "a", a)
	apart := next(t, none, "b", a)
	second := next(t, first, "c", a)
	third := next(t, second, "d", a)
	for _, c := range []struct {
		name      string
		own, peer Epoch
		want      Relation
	}{
		{"never recovered", none, none, Same},
		{"the same", first, first, Same},
		{"one behind", first, none, Older},
		{"one ahead", none, first, Newer},
		{"far ahead", none, third, Newer},
		{"far behind", third, first, Older},
		{"two of one number", first, apart, Apart},
		{"the next of another line", apart, second, Apart},
		{"the last of another line", second, apart, Apart},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.own.Compare(c.peer); got != c.want {
				t.Fatalf("it is %d, want %d", got, c.want)
			}
			dir := t.TempDir()
			if err := Save(dir, c.own); err != nil {
				t.Fatal(err)
			}
			g := guard(t, dir, a)
			err := g.Meet("peer", c.peer.Wire())
			if (err == nil) != (c.want == Same) || errors.Is(err, ErrFenced) != (c.want == Newer) {
				t.Errorf("error is %v", err)
			}
			strays := g.Strays()
			if (len(strays) == 1) != (c.want == Older || c.want == Apart) || len(strays) == 1 && strays[0].Apart != (c.want == Apart) {
				t.Errorf("strays are %+v", strays)
			}
			again := guard(t, dir, a)
			if (again.Err() != nil) != (c.want == Newer) {
				t.Errorf("after a restart: %v", again.Err())
			}
			select {
			case <-again.Fenced():
				if c.want != Newer {
					t.Error("fenced")
				}
			default:
				if c.want == Newer {
					t.Error("not fenced")
				}
			}
		})
	}
}

// A node that cannot write down that it is fenced is fenced all the same.
func TestFencedWithoutADisk(t *testing.T) {
	a := authority(t)
	dir := t.TempDir()
	g := guard(t, dir, a)
	if err := os.Mkdir(filepath.Join(dir, FencedFile+".new"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := g.Meet("peer", next(t, Epoch{}, "a", a).Wire()); err == nil || g.Err() == nil {
		t.Errorf("not fenced: %v", err)
	}
}

func TestNobodyGuards(t *testing.T) {
	var g *Guard
	if g.Meet("peer", "whatever") != nil || g.Wire() != "" || g.Err() != nil || g.Fenced() != nil || g.Strays() != nil {
		t.Error("a nil guard has an opinion")
	}
}

func FuzzParse(f *testing.F) {
	f.Add("1.a..1.1.1.AA")
	f.Fuzz(func(t *testing.T, wire string) {
		e, err := Parse(wire)
		if err == nil && e.Wire() != wire {
			t.Errorf("%q is read and written as %q", wire, e.Wire())
		}
		if err == nil && bytes.ContainsRune([]byte(wire), 0) {
			t.Errorf("%q is read", wire)
		}
	})
}
