package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer/peernet"
)

func file(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestWhatIsJudged: each check calls good good and bad bad, and says of what is not
// well what to change.
func TestWhatIsJudged(t *testing.T) {
	dir := t.TempDir()
	buffers := func(size string) Finding {
		file(t, dir, "rmem_max", size+"\n")
		file(t, dir, "wmem_max", size+"\n")
		return udpBuffers(dir)
	}
	meminfo := func(total, available, swap string) Finding {
		return memory(file(t, dir, "meminfo", "MemTotal: "+total+" kB\nMemAvailable: "+available+" kB\nSwapTotal: "+swap+" kB\n"))
	}
	errs := func(tcp, udp error) map[peernet.Carrier]error {
		return map[peernet.Carrier]error{peernet.TCP: tcp, peernet.QUIC: udp}
	}
	auto, tcp := &Doctor{Config: Config{Transport: peernet.Auto}}, &Doctor{Config: Config{Transport: peernet.OnlyTCP}}
	for name, c := range map[string]struct {
		got  Finding
		want string
	}{
		"large buffers":      {buffers("8388608"), OK},
		"small buffers":      {buffers("212992"), Warn},
		"BBR":                {congestion(file(t, dir, "cc", "reno cubic bbr\n")), OK},
		"no BBR":             {congestion(file(t, dir, "cc", "reno cubic\n")), Warn},
		"many files":         {descriptors(65536, true), OK},
		"few files":          {descriptors(2000, true), Warn},
		"hardly any files":   {descriptors(256, true), Bad},
		"memory":             {meminfo("4000000", "2000000", "0"), OK},
		"no memory left":     {meminfo("4000000", "100000", "900000"), Warn},
		"small without swap": {meminfo("900000", "500000", "0"), Warn},
		"no such directory":  {space(filepath.Join(dir, "absent")), Bad},
		"no such disk":       {speed(t.Context(), filepath.Join(dir, "absent")), Bad},
		"both ways":          {auto.ways("reach", "x", errs(nil, nil), "open %s"), OK},
		"no UDP":             {auto.ways("reach", "x", errs(nil, os.ErrDeadlineExceeded), "open %s"), Warn},
		"no UDP wanted":      {tcp.ways("reach", "x", errs(nil, os.ErrDeadlineExceeded), "open %s"), OK},
		"no TCP":             {auto.ways("reach", "x", errs(os.ErrDeadlineExceeded, nil), "open %s"), Warn},
		"nothing":            {auto.ways("reach", "x", errs(os.ErrDeadlineExceeded, os.ErrDeadlineExceeded), "open %s"), Bad},
		"clocks":             {difference(30*time.Millisecond, 40*time.Millisecond), OK},
		"a slow answer":      {difference(3*time.Second, 5*time.Second), OK}, // may be no difference at all
		"clocks apart":       {difference(-5*time.Second, 10*time.Millisecond), Warn},
		"clocks far apart":   {difference(time.Hour, 10*time.Millisecond), Bad},
		"a name":             {address(t.Context(), "127.0.0.1:5001"), OK},
		"no name":            {address(t.Context(), "nobody.invalid:5001"), Bad},
		"no address":         {address(t.Context(), "5001"), Bad},
	} {
		if c.got.State != c.want {
			t.Errorf("%s: %+v, want %s", name, c.got, c.want)
		}
		if (c.got.State == OK) != (c.got.Remedy == "") {
			t.Errorf("%s: a remedy belongs to what is not well: %+v", name, c.got)
		}
		if strings.Contains(c.got.Remedy, "%") || c.got.Text == "" {
			t.Errorf("%s: %+v", name, c.got)
		}
	}
	if f := udpBuffers(filepath.Join(dir, "absent")); f.State != "" {
		t.Errorf("what cannot be told is %+v", f)
	}
}

// TestNothingIsLeft: the examination of a disk leaves no file behind.
func TestNothingIsLeft(t *testing.T) {
	dir := t.TempDir()
	found := Local(t.Context(), dir)
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
	for _, f := range found {
		if f.Check == "certificate" {
			t.Errorf("a directory of no node has %+v", f)
		}
	}
	r := Report{Findings: []Finding{{State: OK}, {State: Warn}}}
	if r.Worst() != Warn || (Report{}).Worst() != OK {
		t.Errorf("the worst is %s", r.Worst())
	}
	r.Findings = append(r.Findings, Finding{State: Bad}, Finding{State: Warn})
	if r.Worst() != Bad {
		t.Errorf("the worst is %s", r.Worst())
	}
}
