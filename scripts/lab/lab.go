// Package lab builds small networks on one machine for the end-to-end tests,
// the demo and the benchmark: hosts are network namespaces, switches are
// bridges, and two switches that are not joined have no route between them.
//
// It needs the right to make namespaces: root, or a user namespace of one's own.
package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Lab is a set of hosts and switches that is removed as a whole.
type Lab struct {
	prefix string // of every namespace and link, so that two labs do not meet

	mu       sync.Mutex
	hosts    []*Host
	switches map[string]string // name -> namespace
	ports    int
}

// Host is one machine of the lab.
type Host struct {
	Name  string
	IP    string
	space string // network namespace
	sw    string // that of its switch
	port  string // the switch's end of its link
}

// New makes an empty lab.
func New() *Lab {
	return &Lab{prefix: "at-" + strings.ToLower(rand.Text()[:8]), switches: map[string]string{}}
}

// Host adds a machine with an address, a.b.c.d/24, on a switch.
func (l *Lab) Host(ctx context.Context, name, sw, cidr string) (*Host, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	bridge, ok := l.switches[sw]
	if !ok {
		bridge = l.prefix + "-sw-" + sw
		if err := runAll(ctx,
			"ip netns add "+bridge,
			"ip -n "+bridge+" link add br0 type bridge",
			"ip -n "+bridge+" link set br0 up",
		); err != nil {
			return nil, err
		}
		l.switches[sw] = bridge
	}
	l.ports++
	h := &Host{
		Name: name, IP: strings.Split(cidr, "/")[0], space: l.prefix + "-" + name,
		sw: bridge, port: fmt.Sprintf("port%d", l.ports),
	}
	if err := runAll(ctx,
		"ip netns add "+h.space,
		"ip -n "+h.space+" link set lo up",
		"ip -n "+h.space+" link add eth0 type veth peer name "+h.port+" netns "+bridge,
		"ip -n "+h.space+" addr add "+cidr+" dev eth0",
		"ip -n "+h.space+" link set eth0 up",
		"ip -n "+bridge+" link set "+h.port+" master br0",
		"ip -n "+bridge+" link set "+h.port+" up",
	); err != nil {
		return nil, err
	}
	l.hosts = append(l.hosts, h)
	return h, nil
}

// Close removes the hosts and switches; processes in them must have ended.
func (l *Lab) Close(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, h := range l.hosts {
		errs = append(errs, runAll(ctx, "ip netns del "+h.space))
	}
	for _, bridge := range l.switches {
		errs = append(errs, runAll(ctx, "ip netns del "+bridge))
	}
	l.hosts, l.switches = nil, map[string]string{}
	return errors.Join(errs...)
}

func runAll(ctx context.Context, lines ...string) error {
	for _, line := range lines {
		words := strings.Fields(line)
		out, err := exec.CommandContext(ctx, words[0], words[1:]...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", line, err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// Shape makes the link towards the host carry at most so many bytes a second; 0
// gives it back its full speed. What the host sends is not slowed down.
func (h *Host) Shape(ctx context.Context, bytesPerSecond int64) error {
	if bytesPerSecond == 0 {
		return runAll(ctx, "tc -n "+h.sw+" qdisc del dev "+h.port+" root")
	}
	return runAll(ctx, fmt.Sprintf("tc -n %s qdisc replace dev %s root tbf rate %dbps burst 64kb latency 200ms", h.sw, h.port, bytesPerSecond))
}

// ShapeOut makes the host send at most so many bytes a second, as an uplink does.
func (h *Host) ShapeOut(ctx context.Context, bytesPerSecond int64) error {
	return runAll(ctx, fmt.Sprintf("tc -n %s qdisc replace dev eth0 root tbf rate %dbps burst 64kb latency 200ms", h.space, bytesPerSecond))
}

// Unplug takes the host's link down: nothing reaches it and nobody is told. Plug ends it.
func (h *Host) Unplug(ctx context.Context) error {
	return runAll(ctx, "ip -n "+h.sw+" link set "+h.port+" down")
}

// Plug takes the host's link up again.
func (h *Host) Plug(ctx context.Context) error {
	return runAll(ctx, "ip -n "+h.sw+" link set "+h.port+" up")
}

// Narrow makes packets vanish that are longer than so many bytes, headers of IP and all, on
// their way to and from the host, and nobody is told: a path whose MTU is smaller than its
// ends believe, with what would say so filtered. Hosts that send to it need Segment.
func (h *Host) Narrow(ctx context.Context, mtu int) error {
	return errors.Join(h.Segment(ctx), runAll(ctx, fmt.Sprintf("ip -n %s link set %s mtu %d", h.sw, h.port, mtu)))
}

// Segment has the host cut what it sends into packets itself, as they go over a real link;
// between namespaces they would pass uncut, whatever the MTU.
func (h *Host) Segment(ctx context.Context) error {
	return runAll(ctx, "ip -n "+h.space+" link set eth0 gso_max_segs 1")
}

// Inside runs fn on a thread of its own that is in the host's network: sockets that fn
// opens are the host's.
func (h *Host) Inside(fn func() error) error { return inside(h.space, fn) }

// Deafen loses every packet that other sends to this host; what this host sends
// still arrives. One Hear ends one Deafen.
func (h *Host) Deafen(ctx context.Context, other *Host) error {
	return runAll(ctx, "ip netns exec "+h.space+" iptables -w -A INPUT -s "+other.IP+" -j DROP")
}

// Hear ends one Deafen of the host to other.
func (h *Host) Hear(ctx context.Context, other *Host) error {
	return runAll(ctx, "ip netns exec "+h.space+" iptables -w -D INPUT -s "+other.IP+" -j DROP")
}

// Block loses every packet of a protocol, tcp or udp, from or to a port that arrives
// at the host. One Unblock ends one Block.
func (h *Host) Block(ctx context.Context, protocol, port string) error {
	return h.filter(ctx, "-A", protocol, port)
}

// Unblock ends one Block.
func (h *Host) Unblock(ctx context.Context, protocol, port string) error {
	return h.filter(ctx, "-D", protocol, port)
}

// Wall loses every packet that arrives at the host and answers none of its own, as a
// firewall or an address translator does that lets nothing in: the host dials out only.
func (h *Host) Wall(ctx context.Context) error {
	return runAll(ctx, "ip netns exec "+h.space+" iptables -w -A INPUT -i eth0 -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP")
}

func (h *Host) filter(ctx context.Context, change, protocol, port string) error {
	rule := "ip netns exec " + h.space + " iptables -w " + change + " INPUT -p " + protocol
	return runAll(ctx, rule+" --dport "+port+" -j DROP", rule+" --sport "+port+" -j DROP")
}

// Dial connects as a program on the host would. The address must be numeric.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := inside(h.space, func() (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// ListenPacket opens a UDP socket as a program on the host would.
func (h *Host) ListenPacket(address string) (conn net.PacketConn, err error) {
	err = inside(h.space, func() error {
		conn, err = net.ListenPacket("udp", address)
		return err
	})
	return conn, err
}

// Command prepares a command that runs on the host.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", h.space, name}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Kill() }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Run runs a command on the host and gives what it printed on standard output;
// the error holds what it printed on standard error.
func (h *Host) Run(ctx context.Context, name string, args ...string) (string, error) {
	return h.RunEnv(ctx, nil, name, args...)
}

// RunEnv is Run with further environment variables.
func (h *Host) RunEnv(ctx context.Context, env []string, name string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := h.Command(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("on %s: %s %s: %w\n%s", h.Name, name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Process is a program that goes on running on a host.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Start starts a program on the host, with its output going to log.
func (h *Host) Start(ctx context.Context, log io.Writer, env []string, name string, args ...string) (*Process, error) {
	cmd := h.Command(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Process{cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Kill ends the program as kill -9 does and waits until it is gone. ip netns
// exec replaces itself by the program, so the signal reaches the program.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // an ended process is what we want
	<-p.done
}

// Freeze stops the program where it is, as a machine that swaps or a paused
// virtual machine does; Thaw lets it go on.
func (p *Process) Freeze() error { return p.cmd.Process.Signal(syscall.SIGSTOP) }

// Thaw ends Freeze.
func (p *Process) Thaw() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// Stop asks the program to end and waits for that, at most as long as ctx.
func (p *Process) Stop(ctx context.Context) error {
	_ = p.cmd.Process.Signal(os.Interrupt)
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		p.Kill()
		return ctx.Err()
	}
}

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Pid is the program's process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }
