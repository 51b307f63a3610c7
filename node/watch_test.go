package node

import (
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/peers"
)

// moodyDisk is the disk that a node's watch writes to; it hangs or fails as told.
type moodyDisk struct {
	blobs.FS
	mu   sync.Mutex
	hung chan struct{}
	fail error
	free int64 // 0: what there is
}

func (d *moodyDisk) set(fn func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fn()
}

func (d *moodyDisk) OpenFile(name string, flag int) (blobs.Handle, error) {
	d.mu.Lock()
	hung, fail := d.hung, d.fail
	d.mu.Unlock()
	if hung != nil {
		<-hung
	}
	if fail != nil {
		return nil, fail
	}
	return d.FS.OpenFile(name, flag)
}

func (d *moodyDisk) Space() (free, total int64, err error) {
	free, total, err = d.FS.Space()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.free > 0 {
		free = d.free
	}
	return free, total, err
}

// withDisk gives a configuration's watch a disk of the test's.
func withDisk(c Config) (Config, *moodyDisk) {
	d := &moodyDisk{FS: blobs.Disk(c.Data)}
	c.disk = d
	return c, d
}

// conditions are what a node says is wrong with it.
func (r *running) conditions() (codes []string) {
	r.t.Helper()
	var report struct {
		Conditions []struct{ Code, Severity, Text, Remedy string }
	}
	r.do("GET", "/api/atoll/v1/conditions", nil).want(http.StatusOK).decode(&report)
	for _, c := range report.Conditions {
		if c.Text == "" || c.Remedy == "" || !slices.Contains([]string{"notice", "warning", "critical"}, c.Severity) {
			r.t.Errorf("condition %+v", c)
		}
		codes = append(codes, c.Code)
	}
	return codes
}

// components are the health of a node's parts.
func (r *running) components() (status string, parts map[string]string) {
	r.t.Helper()
	var health struct {
		Status     string
		Components []struct{ Name, Status, Error string }
	}
	r.as(login{}, "GET", "/api/v2.0/health", nil).want(http.StatusOK).decode(&health)
	parts = map[string]string{}
	for _, c := range health.Components {
		parts[c.Name] = strings.TrimSpace(c.Status + " " + c.Error)
	}
	return health.Status, parts
}

func (r *running) awaitCondition(code string, there bool) {
	r.t.Helper()
	await(r.t, fmt.Sprintf("condition %s: %v", code, there), func() string {
		if got := r.conditions(); slices.Contains(got, code) != there {
			return fmt.Sprint(got)
		}
		return ""
	})
}

// shows holds a node to showing a condition: in its status with some words of advice,
// in its metrics by the severity, and in the health of a part, or of none.
func (r *running) shows(code, severity, part, advice string) {
	r.t.Helper()
	await(r.t, "the node shows "+code+", "+severity, func() string {
		var s peers.Status
		r.do("GET", "/api/atoll/v1/cluster", nil).want(http.StatusOK).decode(&s)
		if all := strings.Join(s.Advice, "\n"); !strings.Contains(all, advice) {
			return "the advice is " + all
		}
		if got := r.conditions(); !slices.Contains(got, code) {
			return fmt.Sprint(got)
		}
		metrics := string(r.do("GET", "/metrics", nil).want(http.StatusOK).Body)
		if !strings.Contains(metrics, `atoll_watch_condition_bool{code="`+code+`",severity="`+severity+`"`) {
			return "the metrics do not show it"
		}
		status, parts := r.components()
		if well := part == ""; (status == "healthy") != well || !well && !strings.HasPrefix(parts[part], "unhealthy ") {
			return fmt.Sprintf("health is %s, %v", status, parts)
		}
		return ""
	})
}

// A disk that hangs under the leader: the others elect one that can write, this
// one refuses pushes with a sentence and goes on serving pulls; when the disk
// answers it is back without anybody's help.
func TestHungDisk(t *testing.T) {
	first, disk := withDisk(config(t))
	one := start(t, first)
	nodes := []*running{one, join(t, one, "two"), join(t, one, "three")}
	allLive(t, nodes)
	await(t, "three voters", func() string {
		s, err := one.member.Status(t.Context())
		if err != nil {
			return err.Error()
		}
		for _, m := range s.Members {
			if !m.Voter {
				return m.Name
			}
		}
		return ""
	})
	// Whoever leads now, this node is to: a voter that is reluctant hands over.
	p := one.push("library/app", "v1", content(71, 1000))
	one.do("PUT", "/api/atoll/v1/settings/watch.disk-patience", []byte(`{"value":"2"}`), "Content-Type", "application/json").want(http.StatusOK)
	if status, parts := one.components(); status != "healthy" || len(parts) < 7 {
		t.Errorf("health of a site that is well: %s, %v", status, parts)
	}
	disk.set(func() { disk.hung = make(chan struct{}) })
	one.awaitCondition("disk-hung", true)
	await(t, "another node leads", func() string {
		if leader := nodes[1].member.Leader(); leader == "" || leader == one.member.Self() {
			return leader
		}
		return ""
	})
	a := one.do("PUT", "/v2/library/app/manifests/v2", p.manifest, "Content-Type", "application/vnd.oci.image.manifest.v1+json").want(http.StatusServiceUnavailable)
	if !strings.Contains(string(a.Body), "the disk of this node has not finished a small write") {
		t.Errorf("the refusal says %s", a.Body)
	}
	one.pull(p, "v1")
	nodes[1].push("library/app", "v2", content(72, 1000))
	status, parts := one.components()
	if status != "unhealthy" || !strings.HasPrefix(parts["registry"], "unhealthy the disk") || !strings.HasPrefix(parts["database"], "unhealthy the disk") || parts["core"] != "healthy" {
		t.Errorf("health: %s, %v", status, parts)
	}
	for _, name := range []string{"core", "database", "jobservice", "portal", "redis", "registry", "registryctl"} {
		if parts[name] == "" {
			t.Errorf("health does not name %s", name)
		}
	}
	if got := string(one.do("GET", "/metrics", nil).want(http.StatusOK).Body); !strings.Contains(got, `atoll_watch_condition_bool{code="disk-hung",severity="critical",subject=""} 1`) || !strings.Contains(got, "atoll_watch_fit_bool 0") {
		t.Error("the metrics do not show it")
	}
	await(t, "the others show it", func() string {
		var s peers.Status
		nodes[2].do("GET", "/api/atoll/v1/cluster", nil).want(http.StatusOK).decode(&s)
		for _, n := range s.Nodes {
			if n.ID == one.member.Self() && slices.Contains(n.Conditions, "disk-hung") && strings.Contains(strings.Join(s.Advice, "\n"), "node one reports disk-hung") {
				return ""
			}
		}
		return fmt.Sprintf("%+v", s)
	})

	disk.set(func() { close(disk.hung); disk.hung = nil })
	one.awaitCondition("disk-hung", false)
	await(t, "the node takes pushes again", func() string {
		if status, parts := one.components(); status != "healthy" {
			return fmt.Sprint(parts)
		}
		return ""
	})
	one.push("library/app", "v3", content(73, 1000))
}

// A disk that is full or broken under a lone node: pulls go on, health and
// refusal say what is wrong, and the node is back when it can be.
func TestFullAndBrokenDisk(t *testing.T) {
	c, disk := withDisk(config(t))
	n := start(t, c)
	p := n.push("library/app", "v1", content(74, 1000))
	for _, row := range []struct {
		code, says string
		change     func()
	}{
		{"disk-full", "is full", func() { disk.fail = &fs.PathError{Op: "write", Err: syscall.ENOSPC} }},
		{"disk-error", "refuses writes (input/output error)", func() { disk.fail = &fs.PathError{Op: "write", Err: syscall.EIO} }},
	} {
		disk.set(row.change)
		n.awaitCondition(row.code, true)
		a := n.do("PUT", "/v2/library/app/manifests/v2", p.manifest, "Content-Type", "application/vnd.oci.image.manifest.v1+json").want(http.StatusServiceUnavailable)
		if !strings.Contains(string(a.Body), row.says) {
			t.Errorf("%s: the refusal says %s", row.code, a.Body)
		}
		n.pull(p, "v1")
		disk.set(func() { disk.fail = nil })
		n.awaitCondition(row.code, false)
		n.push("library/app", "v2", content(75, 1000))
	}
	disk.set(func() { disk.free = 100 << 20 })
	n.awaitCondition("disk-low", true)
	var s peers.Status
	n.do("GET", "/api/atoll/v1/cluster", nil).want(http.StatusOK).decode(&s)
	if advice := strings.Join(s.Advice, "\n"); !strings.Contains(advice, "100 MiB free") || !strings.Contains(advice, "storage.min-free") {
		t.Errorf("the advice is %s", advice)
	}
}

// The ballast is made, and survives a restart.
func TestBallastOfANode(t *testing.T) {
	n := start(t, config(t))
	size := func() int64 {
		info, err := os.Stat(filepath.Join(n.Data, "ballast"))
		if err != nil {
			return 0
		}
		return info.Size()
	}
	await(t, "the ballast is made", func() string {
		if slices.Contains(n.conditions(), "ballast-gone") || size() == 0 {
			return fmt.Sprint(n.conditions(), size())
		}
		return ""
	})
	was := size()
	n = n.again()
	if size() != was || n.reserve.Held() != was {
		t.Errorf("%d before the restart, %d after it, of which the node knows %d", was, size(), n.reserve.Held())
	}
}

// One node wakes in 1970 and another in 2038. Nodes see each other, push and
// pull through each other, and show whose clock is wrong.
func TestWrongClocks(t *testing.T) {
	at := func(year int) func(*Config) {
		off := time.Until(time.Date(year, 1, 19, 3, 14, 0, 0, time.UTC))
		return func(c *Config) { c.clock = func() time.Time { return time.Now().Add(off) } }
	}
	nodes := three(t)
	p := nodes[0].push("library/app", "v1", content(76, 100<<10))
	nodes[1], nodes[2] = nodes[1].again(at(1970)), nodes[2].again(at(2038))
	allLive(t, nodes)
	for i, n := range nodes {
		n.pull(p, "v1")
		q := n.push("library/app", fmt.Sprint("from-", i), content(uint64(77+i), 100<<10))
		for _, other := range nodes {
			other.pull(q, fmt.Sprint("from-", i))
		}
	}
	nodes[1].awaitCondition("clock-wrong", true)
	nodes[2].awaitCondition("clock-wrong", true)
	nodes[0].awaitCondition("clock-skew", true)
	nodes[1].awaitCondition("clock-skew", true)
}

// A voter that goes lowers what the site can bear, a second ends its writes: each is in
// status, health and metrics, and gone when the voter is back.
func TestVotersDown(t *testing.T) {
	nodes := three(t)
	one := nodes[0]
	if err := nodes[2].stop(); err != nil {
		t.Fatal(err)
	}
	one.shows("voter-down", "warning", "", "node three")
	one.push("library/app", "v1", content(91, 1000))
	if err := nodes[1].stop(); err != nil {
		t.Fatal(err)
	}
	one.shows("no-quorum", "critical", "redis", "no quorum: pulls go on, pushes are refused")
	nodes[1], nodes[2] = nodes[1].again(), nodes[2].again()
	one.awaitCondition("no-quorum", false)
	one.awaitCondition("voter-down", false)
	await(t, "it is healthy again", func() string {
		if status, parts := one.components(); status != "healthy" {
			return fmt.Sprint(parts)
		}
		return ""
	})
}

// A voter goes, and the node that is to take its vote has a disk that keeps no key: two
// vote, of which the network could make two halves that elect nobody. That is shown until
// the number is odd again, which it is as soon as it can be.
func TestVotersEven(t *testing.T) {
	nodes := three(t)
	one := nodes[0]
	four := join(t, one, "four")
	allLive(t, append(nodes, four))
	key := filepath.Join(four.Data, member.ClusterKeyFile)
	if err := os.Mkdir(key, 0o700); err != nil {
		t.Fatal(err)
	}
	one.do("DELETE", "/api/atoll/v1/cluster/nodes/three", nil).want(http.StatusOK)
	if err := <-nodes[2].done; err == nil {
		t.Error("the removed node ended without a word")
	}
	nodes[2].cancel = nil // it has ended
	for _, n := range []*running{one, nodes[1], four} {
		n.shows("voters-even", "warning", "", "2 nodes vote: a network that splits them in halves leaves neither able to write")
	}
	one.push("library/app", "v1", content(93, 1000))
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*running{one, nodes[1], four} {
		n.awaitCondition("voters-even", false)
	}
	voters := 0
	s, err := four.member.Status(t.Context())
	for _, m := range s.Members {
		if m.Voter {
			voters++
		}
	}
	if err != nil || voters != 3 {
		t.Errorf("%d nodes vote, %v", voters, err)
	}
}

// A node that comes back alone from hours in the dark says how old what it serves may be:
// since a leader was heard of, and not since it started.
func TestAgeOfWhatASurvivorServes(t *testing.T) {
	nodes := three(t)
	one := nodes[0]
	p := one.push("library/app", "v1", content(97, 1000))
	one.pull(p, "v1")
	for _, n := range nodes {
		must(t, n.stop())
	}
	const dark = 5 * time.Hour
	one = one.again(func(c *Config) { c.clock = func() time.Time { return time.Now().Add(dark) } })
	a := one.do("GET", "/v2/library/app/manifests/v1", nil).want(http.StatusOK)
	if age, err := strconv.Atoi(a.Header.Get("Atoll-Stale")); err != nil || age < int(dark/time.Second) || age > int(dark/time.Second)+600 {
		t.Errorf("the answer is stale by %q seconds", a.Header.Get("Atoll-Stale"))
	}
	var s peers.Status
	one.do("GET", "/api/atoll/v1/cluster", nil).want(http.StatusOK).decode(&s)
	if s.StaleSeconds < int64(dark/time.Second) || !strings.Contains(strings.Join(s.Advice, "\n"), "no leader has confirmed what this node serves for 5h") {
		t.Errorf("stale by %d seconds, advice %q", s.StaleSeconds, s.Advice)
	}
}

// A clock that jumps is shown, and the node works on.
func TestClockJumps(t *testing.T) {
	var ahead atomic.Int64
	c := config(t)
	c.clock = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	n := start(t, c)
	n.awaitCondition("clock-jump", false)
	ahead.Store(int64(time.Hour))
	n.awaitCondition("clock-jump", true)
	p := n.push("library/app", "v1", content(92, 1000))
	n.pull(p, "v1")
	if status, parts := n.components(); status != "healthy" {
		t.Errorf("health is %s, %v", status, parts)
	}
	if got := string(n.do("GET", "/metrics", nil).want(http.StatusOK).Body); !strings.Contains(got, `atoll_watch_condition_bool{code="clock-jump"`) {
		t.Error("the metrics do not show it")
	}
}
