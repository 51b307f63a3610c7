package watch

import (
	"context"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
	"github.com/atoll-registry/atoll/node/settings"
)

// machine is what a Watch looks at, all of it made up but the file system, which
// is one in memory.
type machine struct {
	*faultfs.FS
	mu       sync.Mutex
	hung     chan struct{} // nil: the disk answers
	fail     error
	free     int64
	held     int64
	waiting  []string
	status   member.Status
	reported []member.Report
	off      time.Duration // of the clock
	judged   time.Duration // of what the site takes for the time
	certs    []Certificate
	backup   time.Time
	founded  time.Time
}

func (m *machine) set(fn func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fn()
}

func (m *machine) OpenFile(name string, flag int) (blobs.Handle, error) {
	m.mu.Lock()
	hung, fail := m.hung, m.fail
	m.mu.Unlock()
	if hung != nil {
		<-hung
	}
	if fail != nil {
		return nil, fail
	}
	return m.FS.OpenFile(name, flag)
}

func (m *machine) Space() (free, total int64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.free, 10 << 30, nil
}

func (m *machine) Held() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held
}

func (m *machine) Fill() (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.free > 256<<20 {
		m.held = 64 << 20
	}
	return m.held > 0, nil
}

func (m *machine) Waiting() ([]string, time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.waiting, time.Now()
}

func (m *machine) Status(context.Context) (member.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status, nil
}

func (m *machine) Report(r member.Report) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reported = append(m.reported, r)
}

func (m *machine) report() member.Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reported[len(m.reported)-1]
}

func (m *machine) Now() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Now().Add(m.judged)
}

func (m *machine) clock() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Now().Add(m.off)
}

// watching runs a Watch on a machine for as long as the test takes.
func watching(t *testing.T, m *machine) *Watch {
	t.Helper()
	db := table.New(kv.NewMemory(), slog.New(slog.DiscardHandler))
	m.FS = faultfs.New()
	w, err := New(Config{
		Cluster: m, Disk: m, Ballast: m, LowWater: func() int64 { return 256 << 20 },
		Certificates: func() []Certificate {
			m.mu.Lock()
			defer m.mu.Unlock()
			return slices.Clone(m.certs)
		},
		Backup: func() (last, founded time.Time) {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.backup, m.founded
		},
		Settings: settings.New(db, slog.New(slog.DiscardHandler)), Log: slog.New(slog.DiscardHandler),
		Registerer: prometheus.NewRegistry(), Clock: m.clock,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return w
}

// codes are those of the conditions that hold.
func codes(w *Watch) string {
	var all []string
	for _, c := range w.Conditions() {
		if c.Text == "" || c.Remedy == "" || c.Since.IsZero() {
			all = append(all, "INCOMPLETE")
		}
		all = append(all, c.Code)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

func want(t *testing.T, w *Watch, all string) {
	t.Helper()
	synctest.Wait()
	if got := codes(w); got != all {
		t.Errorf("%v: conditions %q, want %q", time.Now().Format(time.TimeOnly), got, all)
	}
}

func pass(d time.Duration) { <-time.After(d) }

func health(w *Watch, part string) string {
	if err := w.Check(part, nil).Run(context.Background()); err != nil {
		return err.Error()
	}
	return ""
}

// A disk that hangs makes the node unfit within the patience, for as long as it
// hangs, and it comes back by itself. The node does not end, however long.
func TestHungDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{free: 5 << 30}
		w := watching(t, m)
		protected := w.Protect(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusTeapot) }))
		ask := func(method string) *httptest.ResponseRecorder {
			rw := httptest.NewRecorder()
			protected.ServeHTTP(rw, httptest.NewRequest(method, "/v2/app/manifests/v1", nil))
			return rw
		}
		pass(time.Minute)
		want(t, w, "")
		if r := m.report(); r.Fitness != member.Fit || ask("PUT").Code != http.StatusTeapot {
			t.Errorf("all is well, and the node reports %+v", r)
		}
		m.set(func() { m.hung = make(chan struct{}) })
		pass(9 * time.Second) // the probe began 5 s ago at the most
		want(t, w, "")
		pass(9 * time.Second)
		want(t, w, "disk-hung")
		r := m.report()
		if r.Fitness != member.Unfit || r.Refusal == nil || strings.Join(r.Codes, ",") != "disk-hung" {
			t.Errorf("reported %+v", r)
		}
		rw := ask("PUT")
		if rw.Code != http.StatusServiceUnavailable || !strings.Contains(rw.Body.String(), "has not finished a small write") || rw.Header().Get("Retry-After") == "" {
			t.Errorf("a push is answered %d %s", rw.Code, rw.Body)
		}
		if ask("GET").Code != http.StatusTeapot || ask("HEAD").Code != http.StatusTeapot {
			t.Error("pulls are refused")
		}
		for _, part := range []string{"database", "registry", "jobservice"} {
			if health(w, part) == "" {
				t.Errorf("%s is healthy", part)
			}
		}
		if health(w, "portal") != "" || health(w, "redis") != "" {
			t.Error("parts that need no disk are unhealthy")
		}
		since := w.Conditions()[0].Since
		pass(10 * time.Minute)
		want(t, w, "disk-hung")
		if !w.Conditions()[0].Since.Equal(since) {
			t.Error("it has begun anew")
		}
		m.set(func() { close(m.hung); m.hung = nil })
		want(t, w, "") // at once
		if r := m.report(); r.Fitness != member.Fit || r.Refusal != nil || ask("PUT").Code != http.StatusTeapot {
			t.Errorf("the disk is back, and the node reports %+v", r)
		}
	})
}

// A node that stops does not wait for its disk for ever.
func TestStopWhileTheDiskHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hung := make(chan struct{})
		m := &machine{free: 5 << 30, hung: hung}
		watching(t, m)
		pass(time.Minute)
		t.Cleanup(func() { close(hung) }) // after the node has ended
	})
}

// A disk that refuses writes is told from one that is full, and both from one
// that is only short of space.
func TestDiskFills(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{free: 5 << 30}
		w := watching(t, m)
		for _, step := range []struct {
			name    string
			change  func()
			codes   string
			fitness member.Fitness
		}{
			{"much is free", func() {}, "", member.Fit},
			{"it gets less", func() { m.free = 300 << 20 }, "disk-filling", member.Fit},
			{"below the mark", func() { m.free = 200 << 20 }, "disk-low", member.Reluctant},
			{"full, the ballast given up", func() { m.free, m.held = 60<<20, 0 }, "ballast-gone disk-low", member.Reluctant},
			{"full", func() { m.free = 4 << 10 }, "ballast-gone disk-full", member.Unfit},
			{"the state waits", func() { m.free, m.waiting = 2<<20, []string{"the state"} }, "ballast-gone disk-full", member.Unfit},
			{"some is free", func() { m.free, m.waiting = 200<<20, nil }, "ballast-gone disk-low", member.Reluctant},
			{"the probe has no room", func() { m.fail = &fs.PathError{Op: "write", Err: syscall.ENOSPC} }, "ballast-gone disk-full", member.Unfit},
			{"a broken disk", func() { m.fail = &fs.PathError{Op: "write", Err: syscall.EIO} }, "disk-error", member.Unfit},
			{"read-only", func() { m.fail = &fs.PathError{Op: "open", Err: syscall.EROFS} }, "disk-error", member.Unfit},
			{"all is well again", func() { m.free, m.fail = 5<<30, nil }, "", member.Fit},
		} {
			m.set(step.change)
			pass(12 * time.Second)
			want(t, w, step.codes)
			if r := m.report(); r.Fitness != step.fitness || (r.Refusal != nil) != (step.fitness == member.Unfit) {
				t.Errorf("%s: reported %+v", step.name, r)
			}
			if unhealthy := health(w, "registry") != ""; unhealthy != (step.fitness != member.Fit) {
				t.Errorf("%s: the registry's health is %q", step.name, health(w, "registry"))
			}
		}
	})
}

// The probe goes through the file system, every step of which may fail.
func TestProbeSeesEveryStep(t *testing.T) {
	w := &Watch{Config: Config{Clock: time.Now}}
	disk := faultfs.New()
	w.Disk = disk
	if err := w.touch(); err != nil {
		t.Fatal(err)
	}
	steps := disk.Steps()
	if err := w.touch(); err != nil {
		t.Fatal(err)
	}
	each := disk.Steps() - steps
	if each < 3 {
		t.Fatalf("a probe takes %d steps", each)
	}
	for i := range each {
		disk.Inject(disk.Steps()+i, faultfs.Fault{Err: syscall.EIO})
		if err := w.touch(); !errors.Is(err, syscall.EIO) {
			t.Errorf("step %d fails, and the probe gives %v", i, err)
		}
	}
}

// The disk is full, and not broken, whichever step of a probe finds no room: a quota may
// say so where space is free. With room again all is well.
func TestProbeFindsNoRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{free: 5 << 30}
		w := watching(t, m)
		pass(7 * time.Second) // two probes, five seconds apart
		steps := m.Steps() / 2
		for i := range steps {
			for _, err := range []error{syscall.ENOSPC, syscall.EDQUOT} {
				m.Inject(m.Steps()+i, faultfs.Fault{Err: err})
				pass(5 * time.Second)
				want(t, w, "disk-full")
				if r := m.report(); r.Fitness != member.Unfit || r.Refusal == nil {
					t.Errorf("step %d finds no room: reported %+v", i, r)
				}
				pass(5 * time.Second)
				want(t, w, "")
			}
		}
		if steps < 3 {
			t.Errorf("a probe takes %d steps", steps)
		}
	})
}

func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{free: 5 << 30}
		w := watching(t, m)
		pass(time.Minute)
		m.set(func() { m.off, m.judged = 2*time.Second, 2*time.Second }) // as a time service corrects it
		pass(time.Minute)
		want(t, w, "")
		m.set(func() { m.off, m.judged = time.Hour, time.Hour })
		pass(5 * time.Second)
		want(t, w, "clock-jump")
		pass(30 * time.Minute)
		want(t, w, "clock-jump")
		pass(31 * time.Minute)
		want(t, w, "")
		m.set(func() { m.off = -50 * 365 * 24 * time.Hour })
		pass(5 * time.Second)
		want(t, w, "clock-jump clock-wrong")
		if r := m.report(); r.Fitness != member.Fit {
			t.Errorf("a wrong clock makes the node %v", r.Fitness)
		}
		m.set(func() { m.off, m.judged = 0, 0 })
		pass(2 * time.Hour)
		want(t, w, "")
	})
}

// three gives a status of three voters that are up.
func three(change ...func(*member.Status)) member.Status {
	s := member.Status{Self: "a", Leader: "a", Quorum: true}
	for _, id := range []string{"a", "b", "c"} {
		s.Members = append(s.Members, member.MemberStatus{Member: member.Member{ID: id, Name: "node-" + id}, Voter: true, Up: true, Clocked: id != "a"})
	}
	for _, fn := range change {
		fn(&s)
	}
	return s
}

func TestShape(t *testing.T) {
	down := func(n int) func(*member.Status) { return func(s *member.Status) { s.Members[n].Up = false } }
	for _, row := range []struct {
		name  string
		s     member.Status
		codes string
		says  string // in one of the texts
	}{
		{"all up", three(), "", ""},
		{"one voter down", three(down(2)), "voter-down", "no further voter may fail"},
		{"two down", three(down(1), down(2)), "no-quorum", "1 of 3 voters are up and 2 are needed"},
		{"two voters", three(func(s *member.Status) { s.Members[2].Voter = false }), "voters-even", "2 nodes vote"},
		{"five, one down", three(down(2), func(s *member.Status) { s.Members = append(s.Members, s.Members[0], s.Members[0]) }), "voter-down", "1 more voters may fail instead of 2"},
		{"a non-voter down", three(func(s *member.Status) {
			s.Members[2].Up, s.Members[2].Voter, s.Members[1].Voter = false, false, false
		}), "", ""},
		{"one far behind", three(func(s *member.Status) { s.Members[1].Lag = 50_000 }), "node-behind", "50000 changes behind"},
		{"one ails", three(func(s *member.Status) { s.Members[1].Codes = []string{"disk-hung"} }), "node-ails", "node-b reports disk-hung"},
	} {
		found := shape(row.s)
		var got []string
		texts := ""
		for _, c := range found {
			got = append(got, c.Code)
			texts += c.Text + "\n"
			if c.Remedy == "" {
				t.Errorf("%s: %s says not what to do", row.name, c.Code)
			}
		}
		if strings.Join(got, " ") != row.codes || !strings.Contains(texts, row.says) {
			t.Errorf("%s: %q with %s", row.name, got, texts)
		}
	}
}

func TestSkews(t *testing.T) {
	skew := func(n int, by, bound time.Duration) func(*member.Status) {
		return func(s *member.Status) { s.Members[n].Skew, s.Members[n].SkewBound = by, bound }
	}
	for _, row := range []struct {
		name string
		s    member.Status
		want string // subjects
	}{
		{"equal", three(), ""},
		{"little", three(skew(1, 4*time.Second, 0)), ""},
		{"perhaps", three(skew(1, 8*time.Second, 4*time.Second)), ""},
		{"one", three(skew(1, -8*time.Second, time.Second)), "node-b"},
		{"it is this one", three(skew(1, time.Hour, time.Second), skew(2, time.Hour, time.Second)), "(this)"},
		{"all differ", three(skew(1, time.Hour, time.Second), skew(2, -time.Hour, time.Second)), "node-b node-c"},
		{"down", three(skew(1, time.Hour, 0), func(s *member.Status) { s.Members[1].Up = false }), ""},
		{"an older version", three(skew(1, time.Hour, 0), func(s *member.Status) { s.Members[1].Clocked = false }), ""},
	} {
		var got []string
		for _, c := range skews(row.s, 5*time.Second) {
			if c.Subject == "" {
				c.Subject = "(this)"
			}
			got = append(got, c.Subject)
		}
		if strings.Join(got, " ") != row.want {
			t.Errorf("%s: %q, want %q", row.name, got, row.want)
		}
	}
}

// Certificates, backups and what the metrics and the advice make of it all.
func TestExpiringAndShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const day = 24 * time.Hour
		m := &machine{free: 5 << 30, backup: time.Now().Add(-8 * day), status: three(func(s *member.Status) { s.Members[2].Up = false })}
		m.certs = []Certificate{
			{Code: "tls-certificate-expiring", Of: "the certificate x.pem", Renew: "put a new one there", Within: 30 * day, Public: true, Leaf: &x509.Certificate{NotAfter: time.Now().Add(29 * day)}},
			{Code: "ca-expiring", Of: "the authority's", Renew: "renew it", Within: 365 * day, Leaf: &x509.Certificate{NotAfter: time.Now().Add(400 * day)}},
			{Code: "not-there", Within: day},
		}
		w := watching(t, m)
		pass(5 * time.Second)
		want(t, w, "backup-old tls-certificate-expiring voter-down")
		if health(w, "portal") != "" {
			t.Error("unhealthy before it has expired")
		}
		advice := strings.Join(w.Advice(), "\n")
		for _, part := range []string{"x.pem ends on", "put a new one there", "the last backup is of"} {
			if !strings.Contains(advice, part) {
				t.Errorf("%q is not in the advice:\n%s", part, advice)
			}
		}
		if n, err := testutil.GatherAndCount(w.Registerer.(*prometheus.Registry), "atoll_watch_condition_bool"); n != 3 || err != nil {
			t.Errorf("%d conditions in the metrics, %v", n, err)
		}
		if strings.Contains(advice, "voter") {
			t.Errorf("the cluster's status says that itself:\n%s", advice)
		}
		m.set(func() {
			m.certs[0].Leaf = &x509.Certificate{NotAfter: time.Now().Add(-time.Second)}
			m.backup, m.status = time.Now(), three()
		})
		pass(5 * time.Second)
		want(t, w, "tls-certificate-expiring")
		if !strings.Contains(health(w, "portal"), "has ended on") || health(w, "redis") != "" {
			t.Errorf("health of the portal %q, of what the nodes share %q", health(w, "portal"), health(w, "redis"))
		}
		m.set(func() { m.certs[0].Public = false }) // one between the nodes
		pass(5 * time.Second)
		if health(w, "portal") != "" || !strings.Contains(health(w, "redis"), "has ended on") {
			t.Errorf("health of the portal %q, of what the nodes share %q", health(w, "portal"), health(w, "redis"))
		}
		if codes := m.report().Codes; len(codes) != 1 {
			t.Errorf("the others are told %q", codes)
		}
	})
}

// A site without a backup is spoken of when it is a day old, one with an old backup
// when that is a week old, and none where nobody wants to hear of it.
func TestBackupOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const day = 24 * time.Hour
		m := &machine{free: 5 << 30, status: three()}
		w := watching(t, m)
		for _, row := range []struct {
			what          string
			last, founded time.Duration // before now; 0: not known
			want, text    string
		}{
			{"nothing is known", 0, 0, "", ""},
			{"founded just now", 0, time.Hour, "", ""},
			{"founded long ago, never backed up", 0, 2 * day, "backup-old", "this site was never backed up"},
			{"backed up this week", 6 * day, 30 * day, "", ""},
			{"backed up last week", 8 * day, 30 * day, "backup-old", "the last backup is of"},
			{"backed up again", time.Minute, 30 * day, "", ""},
		} {
			m.set(func() {
				m.backup, m.founded = time.Time{}, time.Time{}
				if row.last != 0 {
					m.backup = time.Now().Add(-row.last)
				}
				if row.founded != 0 {
					m.founded = time.Now().Add(-row.founded)
				}
			})
			pass(5 * time.Second)
			if got, advice := codes(w), strings.Join(w.Advice(), "\n"); got != row.want || !strings.Contains(advice, row.text) {
				t.Errorf("%s: %q, %q", row.what, got, advice)
			}
		}
	})
}
