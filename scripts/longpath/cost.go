package main

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/atoll-registry/atoll/transfer/peernet"
)

// cost measures the processor time that a copy takes on both ends, over the peer port
// and over bare TLS, in turns.
func cost(size int64) error {
	dir, err := os.MkdirTemp("", "longpath")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := writeSite(dir); err != nil {
		return err
	}
	n, err := port(dir, "far", func(c *peernet.Config) { c.Transport = func() peernet.Transport { return peernet.OnlyTCP } })
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	blobs := n.Listen(peernet.ServiceBlob)
	go func() { served <- n.Serve(ctx, ln) }()
	defer func() {
		cancel()
		<-served
	}()
	cert, err := tls.LoadX509KeyPair(dir+"/far.pem", dir+"/far.key")
	if err != nil {
		return err
	}
	bare, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}})
	if err != nil {
		return err
	}
	defer bare.Close()
	var ours, plain []float64
	for range 5 {
		used, err := copied(size, blobs, func() (net.Conn, error) { return n.Dial(ctx, ln.Addr().String(), peernet.ServiceBlob) })
		if err != nil {
			return err
		}
		ours = append(ours, used)
		used, err = copied(size, bare, func() (net.Conn, error) {
			return tls.Dial("tcp", bare.Addr().String(), &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true})
		})
		if err != nil {
			return err
		}
		plain = append(plain, used)
	}
	slices.Sort(ours)
	slices.Sort(plain)
	say("lan_cpu_bare_tls", plain[len(plain)/2], "cpu-s/GiB", "", 0)
	say("lan_cpu_peer_port", ours[len(ours)/2], "cpu-s/GiB", "", 0)
	say("lan_cpu_over_bare_tls", ours[len(ours)/2]/plain[len(plain)/2], "x", "<=", 1.15)
	return nil
}

// copied sends size bytes over one connection and gives the processor time for 1 GiB.
func copied(size int64, ln net.Listener, dial func() (net.Conn, error)) (float64, error) {
	sent := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			sent <- err
			return
		}
		defer c.Close()
		block := make([]byte, 256<<10)
		for left := size; left > 0 && err == nil; left -= int64(len(block)) {
			_, err = c.Write(block)
		}
		sent <- err
	}()
	c, err := dial()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	before, err := processor()
	if err != nil {
		return 0, err
	}
	got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
	if err = errors.Join(err, <-sent); err != nil {
		return 0, err
	}
	after, err := processor()
	return (after - before).Seconds() * (1 << 30) / float64(got), err
}

func processor() (time.Duration, error) {
	var u syscall.Rusage
	err := syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}
