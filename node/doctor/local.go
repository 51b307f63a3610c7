package doctor

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/reserve"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// Local looks at a machine and at the data directory of a node on it, which may be
// stopped. It writes and removes one file of 4 MiB.
func Local(ctx context.Context, data string) []Finding {
	found := []Finding{
		udpBuffers("/proc/sys/net/core"),
		congestion("/proc/sys/net/ipv4/tcp_available_congestion_control"),
		descriptors(openFiles()),
		memory("/proc/meminfo"),
		space(data),
		speed(ctx, data),
		certificate(data, time.Now()),
	}
	return slices.DeleteFunc(found, func(f Finding) bool { return f.State == "" }) // cannot be told here
}

// wantedBuffer is what the QUIC library asks the system for.
const wantedBuffer = 7 << 20

func udpBuffers(dir string) Finding {
	f := Finding{Check: "udp-buffers", State: OK}
	var small []string
	for _, name := range []string{"rmem_max", "wmem_max"} {
		n, err := number(filepath.Join(dir, name))
		if err != nil {
			return Finding{}
		}
		f.Text = fmt.Sprintf("UDP sockets may have buffers of %d KiB", n>>10)
		if n < wantedBuffer {
			small = append(small, fmt.Sprintf("net.core.%s=%d", name, wantedBuffer))
		}
	}
	if len(small) > 0 {
		f.State = Warn
		f.Text = "buffers of sockets are small: QUIC loses packets under load, and TCP sends less over long paths that lose some"
		f.Remedy = "sysctl -w " + strings.Join(small, " ") + ", and the same in /etc/sysctl.d"
	}
	return f
}

func congestion(file string) Finding {
	text, err := os.ReadFile(file)
	if err != nil {
		return Finding{}
	}
	if slices.Contains(strings.Fields(string(text)), peernet.BBR) {
		return Finding{Check: "bbr", State: OK, Text: "BBR is there for long and lossy paths"}
	}
	return Finding{
		Check: "bbr", State: Warn, Text: "the kernel offers no BBR: long or lossy paths to other nodes carry a fraction of what they could",
		Remedy: "modprobe tcp_bbr, and a file in /etc/modules-load.d that names it",
	}
}

func descriptors(limit uint64, known bool) Finding {
	f := Finding{Check: "descriptors", State: OK, Text: fmt.Sprintf("a process may open %d files", limit)}
	switch {
	case !known:
		return Finding{}
	case limit < 1024:
		f.State = Bad
	case limit < 4096:
		f.State = Warn
	default:
		return f
	}
	f.Remedy = "raise LimitNOFILE in the service's unit, or ulimit -n, to 65536"
	return f
}

const (
	littleMemory = 128 << 20
	smallMachine = 1 << 30
)

func memory(file string) Finding {
	text, err := os.ReadFile(file)
	if err != nil {
		return Finding{}
	}
	kib := map[string]int64{}
	for line := range strings.Lines(string(text)) {
		name, rest, _ := strings.Cut(line, ":")
		if fields := strings.Fields(rest); len(fields) > 0 {
			kib[name], _ = strconv.ParseInt(fields[0], 10, 64) // absent and nonsense are 0
		}
	}
	total, free, swap := kib["MemTotal"]<<10, kib["MemAvailable"]<<10, kib["SwapTotal"]<<10
	f := Finding{Check: "memory", State: OK, Text: fmt.Sprintf("%d MiB of %d MiB of memory are free, swap is %d MiB", free>>20, total>>20, swap>>20)}
	switch {
	case free < littleMemory:
		f.State, f.Remedy = Warn, "stop what else runs here, or give the machine more memory"
	case total < smallMachine && swap == 0:
		f.State, f.Remedy = Warn, "a small machine without swap: add some, so that a peak does not end the node"
	}
	return f
}

// leastFree is the share of the disk below which there is little left.
const leastFree = 0.1

func space(data string) Finding {
	free, total, err := blobs.Disk(data).Space()
	if err != nil || total == 0 {
		return Finding{Check: "space", State: Bad, Text: fmt.Sprintf("the disk of %s cannot be looked at: %v", data, err), Remedy: "name the node's directory with --data"}
	}
	var ballast int64
	if info, err := os.Stat(reserve.Path(data)); err == nil {
		ballast = info.Size()
	}
	f := Finding{Check: "space", State: OK, Text: fmt.Sprintf("%d MiB of %d MiB are free, %d MiB of ballast besides", free>>20, total>>20, ballast>>20)}
	switch share := float64(free) / float64(total); {
	case free < 256<<20:
		f.State, f.Remedy = Bad, "make room: below storage.min-free the node takes no content"
	case share < leastFree:
		f.State, f.Remedy = Warn, "make room, or let old content go with retention rules and collection"
	}
	return f
}

const (
	probeBytes = 4 << 20
	probeSyncs = 8
	slowSync   = 25 * time.Millisecond
	badSync    = 200 * time.Millisecond
)

// speed writes and syncs a file of a bounded size.
func speed(ctx context.Context, data string) Finding {
	f := Finding{Check: "disk", State: OK}
	rate, sync, err := measure(ctx, data)
	if err != nil {
		return Finding{Check: "disk", State: Bad, Text: fmt.Sprintf("the data directory cannot be written: %v", err), Remedy: "give the node's user the right to write there, or make room"}
	}
	f.Text = fmt.Sprintf("%.0f MiB/s are written, a sync takes %v", rate/(1<<20), sync.Round(10*time.Microsecond))
	const remedy = "every push waits for syncs: put the data directory on an SSD"
	switch {
	case sync > badSync:
		f.State, f.Remedy = Bad, remedy+"; so slow a disk makes the site change its leader"
	case sync > slowSync:
		f.State, f.Remedy = Warn, remedy
	}
	return f
}

// measure gives the rate of a write, bytes a second, and the median time of a sync.
func measure(ctx context.Context, data string) (rate float64, sync time.Duration, err error) {
	file, err := os.CreateTemp(data, "doctor-*")
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, file.Close(), os.Remove(file.Name())) }()
	begun := time.Now()
	if _, err := file.Write(make([]byte, probeBytes)); err != nil {
		return 0, 0, err
	}
	if err := file.Sync(); err != nil {
		return 0, 0, err
	}
	rate = probeBytes / max(time.Since(begun).Seconds(), 1e-6)
	var took []time.Duration
	for i := int64(0); i < probeSyncs && ctx.Err() == nil; i++ {
		begun := time.Now()
		if _, err := file.WriteAt(make([]byte, 4096), i*4096); err != nil {
			return 0, 0, err
		}
		if err := file.Sync(); err != nil {
			return 0, 0, err
		}
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	if len(took) == 0 {
		return 0, 0, ctx.Err()
	}
	return rate, took[len(took)/2], nil
}

// certificate looks how long the node's certificate is good. Nodes renew it long
// before its end.
func certificate(data string, now time.Time) Finding {
	f := Finding{Check: "certificate", State: OK}
	who, err := member.LoadIdentity(data, nil)
	if errors.Is(err, member.ErrEmpty) || errors.Is(err, fs.ErrNotExist) {
		return Finding{}
	}
	if errors.Is(err, keyring.ErrLocked) {
		f.Text = "the node's keys are sealed, so its certificate is not looked at here: atoll cluster status says how long it is good"
		return f
	}
	var leaf *x509.Certificate
	if err == nil {
		cert, certErr := who.Certificate()
		err = certErr
		leaf = cert.Leaf
	}
	if err != nil || leaf == nil {
		return Finding{Check: "certificate", State: Bad, Text: fmt.Sprintf("the node's identity cannot be read: %v", err), Remedy: "restore the data directory, or let the node join anew"}
	}
	left, life := leaf.NotAfter.Sub(now), leaf.NotAfter.Sub(leaf.NotBefore)
	f.Text = fmt.Sprintf("the certificate between nodes is good for %d days", int(left.Hours()/24))
	switch {
	case left <= 0:
		f.State = Bad
		f.Text = fmt.Sprintf("the certificate between nodes ended on %s", leaf.NotAfter.UTC().Format(time.DateOnly))
		f.Remedy = "look at the clock of this machine; if it is right, start the node while others of the site are up: it gets a new one"
	case left < life/4:
		f.State, f.Remedy = Warn, "it should have been renewed by now: let the node reach others of the site, and the site have a leader"
	}
	return f
}

func number(file string) (int64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}
