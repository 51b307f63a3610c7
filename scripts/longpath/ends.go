package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// Ports of the source: a peer port as it is, one that leaves congestion control to the
// system, and TCP with nothing around it.
const (
	bbrPort   = "5001"
	plainPort = "5002"
	barePort  = "5003"
	// Those at which the engine serves one blob.
	blobPort      = "5004"
	plainBlobPort = "5005"
)

// siteID and nodeIDs are as those that a site makes.
const siteID = "00000000000000000000000000000001"

var nodeIDs = [...]struct{ name, id string }{
	{"near", "0000000000000000000000000000000a"},
	{"far", "0000000000000000000000000000000b"},
}

// writeSite makes the certificates of a site of two nodes, near and far.
func writeSite(dir string) error {
	ca, err := pki.NewAuthority(siteID, time.Now())
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), ca.CertPEM(), 0o600); err != nil {
		return err
	}
	for _, node := range nodeIDs {
		key, err := pki.NewKey()
		if err != nil {
			return err
		}
		cert, err := ca.IssueNode(key.Public(), siteID, node.id, time.Now())
		if err != nil {
			return err
		}
		text, err := pki.MarshalKey(key)
		if err != nil {
			return err
		}
		err = errors.Join(
			os.WriteFile(filepath.Join(dir, node.name+".pem"), cert, 0o600),
			os.WriteFile(filepath.Join(dir, node.name+".key"), text, 0o600),
		)
		if err != nil {
			return err
		}
	}
	return nil
}

// port of a node of the site in dir.
func port(dir, name string, change func(*peernet.Config)) (*peernet.Net, error) {
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key"))
	if err != nil {
		return nil, err
	}
	cfg := peernet.Config{
		SiteID: siteID,
		Cert:   func() tls.Certificate { return cert },
		CA:     func() *x509.CertPool { return pool },
	}
	change(&cfg)
	return peernet.New(cfg)
}

// end is one end of the line, in a process of its own:
//
//	source DIR IP
//	sink DIR IP PORT tcp|quic|bare CONNECTIONS SECONDS
//	fetch DIR IP PORT tcp|quic SECONDS, or 0 for the whole blob
func end(ctx context.Context, args []string) error {
	switch {
	case len(args) == 3 && args[0] == "source":
		return source(ctx, args[1], args[2])
	case len(args) == 6 && args[0] == "fetch":
		seconds, err := strconv.Atoi(args[5])
		if err != nil {
			return err
		}
		rate, err := fetch(ctx, args[1], net.JoinHostPort(args[2], args[3]), load{args[4], 1, time.Duration(seconds) * time.Second})
		if err == nil {
			fmt.Printf("%.3f\n", rate)
		}
		return err
	case len(args) == 7 && args[0] == "sink":
		conns, err1 := strconv.Atoi(args[5])
		seconds, err2 := strconv.Atoi(args[6])
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		rate, err := sink(ctx, args[1], net.JoinHostPort(args[2], args[3]), load{args[4], conns, time.Duration(seconds) * time.Second})
		if err == nil {
			fmt.Printf("%.3f\n", rate)
		}
		return err
	}
	return fmt.Errorf("no end of a line: %q", args)
}

// source sends to whoever connects until they leave.
func source(ctx context.Context, dir, ip string) error {
	failed := make(chan error, 8)
	if err := serveBlob(ctx, dir, ip, failed); err != nil {
		return err
	}
	for number, plain := range map[string]bool{bbrPort: false, plainPort: true} {
		n, err := port(dir, "far", func(c *peernet.Config) { c.NoBBR = plain })
		if err != nil {
			return err
		}
		blobs, err := listen(ctx, n, net.JoinHostPort(ip, number), failed)
		if err != nil {
			return err
		}
		go func() { failed <- pour(blobs) }()
	}
	bare, err := cubic().Listen(ctx, "tcp", net.JoinHostPort(ip, barePort))
	if err != nil {
		return err
	}
	go func() { failed <- pour(bare) }()
	return <-failed
}

// cubic listens for connections that begin with cubic, whatever the system's default
// is; here it is the sender that accepts.
func cubic() *net.ListenConfig {
	return &net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		failed := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic")
		})
		return errors.Join(failed, err)
	}}
}

func pour(ln net.Listener) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			block := make([]byte, 64<<10)
			for {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		}()
	}
}

// load is what a sink takes.
type load struct {
	how    string // tcp, quic, bare
	conns  int
	length time.Duration
}

// sink takes what comes over some connections for a time and gives the rate, Mbit/s.
func sink(ctx context.Context, dir, addr string, l load) (float64, error) {
	n, err := port(dir, "near", func(c *peernet.Config) { c.Transport = func() peernet.Transport { return peernet.Transport(l.how) } })
	if err != nil {
		return 0, err
	}
	var got atomic.Int64
	var wg sync.WaitGroup
	defer wg.Wait()
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for range l.conns {
		var c net.Conn
		for tries := 0; c == nil; tries++ { // the source may not be there yet
			if l.how == "bare" {
				c, err = net.Dial("tcp", addr)
			} else {
				c, err = n.Dial(ctx, addr, peernet.ServiceBlob)
			}
			if err != nil && tries == 300 {
				return 0, err
			}
			if err != nil {
				c = nil
				time.Sleep(100 * time.Millisecond)
			}
		}
		open = append(open, c)
	}
	begun := time.Now()
	for _, c := range open {
		wg.Go(func() { _, _ = io.Copy(counter{&got}, c) })
	}
	select {
	case <-time.After(l.length):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return float64(got.Load()) * 8 / 1e6 / time.Since(begun).Seconds(), nil
}

type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

// listen serves a port at an address over both carriers, and gives its connections for
// blobs. What ends it goes to failed.
func listen(ctx context.Context, n *peernet.Net, addr string, failed chan<- error) (net.Listener, error) {
	ln, err := cubic().Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	packets, err := net.ListenPacket("udp", addr)
	if err != nil {
		return nil, err
	}
	blobs := n.Listen(peernet.ServiceBlob)
	go func() { failed <- n.ServeBoth(ctx, ln, packets) }()
	return blobs, nil
}
