package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

const (
	repairNodes = 3
	repairBlob  = 64 << 20 // bytes of a blob
	repairShare = 80       // percent of the link's speed that repair is to reach
)

// repair loses a node of three with all that it held, puts an empty one in its
// place, and measures until every blob has all its copies again, over a link of a
// known speed. The clock runs from the new node's first answer, so that it has
// what repair needs to notice that something is missing.
func (b *bench) repair(ctx context.Context) error {
	l := lab.New()
	defer func() { _ = l.Close(context.WithoutCancel(ctx)) }()
	var nodes []*lab.Node
	defer func() {
		for _, n := range nodes {
			if n.Process() != nil {
				n.Kill()
			}
		}
	}()
	atoll, err := filepath.Abs(b.atoll)
	if err != nil {
		return err
	}
	for i := range repairNodes {
		host, err := l.Host(ctx, fmt.Sprint("r", i), "repair", fmt.Sprintf("10.78.0.%d/24", i+1))
		if err != nil {
			return fmt.Errorf("the rows of repair take network namespaces, so root: %w", err)
		}
		n := lab.NewNode(host, atoll, filepath.Join(b.dir, host.Name), "--log-level", "warn")
		nodes = append(nodes, n)
		if i == 0 {
			err = n.Found(ctx)
		} else {
			err = n.Join(ctx, nodes[0])
		}
		if err != nil {
			return err
		}
	}
	if err := repaired(ctx, nodes); err != nil {
		return err
	}
	user, err := labUser(ctx, b.dir, nodes[0])
	if err != nil {
		return err
	}
	count := int(b.repairGB * 1e9 / repairBlob)
	began := time.Now()
	for i := range count {
		if err := user.push(ctx, small, newBody(repairBlob+int64(i), byte(i))); err != nil {
			return fmt.Errorf("blob %d: %w", i, err)
		}
	}
	if err := repaired(ctx, nodes); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "bench: %d blobs on three nodes after %v\n", count, time.Since(began).Round(time.Second))

	lost := nodes[repairNodes-1]
	lost.Kill()
	if err := os.RemoveAll(lost.Data); err != nil {
		return err
	}
	speed := b.linkMB * 1e6
	if err := lost.Host.Shape(ctx, int64(speed)); err != nil {
		return err
	}
	if err := nodes[0].WaitStatus(ctx, "the loss to be seen", func(s lab.Status) bool {
		for _, m := range s.Nodes {
			if m.Name == lost.Host.Name && !m.Up {
				return s.Quorum // its name may be taken, and somebody decides it
			}
		}
		return false
	}); err != nil {
		return err
	}
	if err := lost.Join(ctx, nodes[0]); err != nil {
		return err
	}
	began = time.Now()
	before, err := cpuOfAll(nodes) // since the new node began
	if err != nil {
		return err
	}
	if err := holds(ctx, lost, count); err != nil {
		return err
	}
	took := time.Since(began).Seconds()
	if err := repaired(ctx, nodes); err != nil { // and the site knows it
		return err
	}
	after, err := cpuOfAll(nodes)
	if err != nil {
		return err
	}
	bytes := float64(count) * repairBlob
	b.print("repair_link", b.linkMB, "MB/s")
	b.print("repair_bytes", bytes/1e9, "GB")
	b.print("repair_seconds", took, "s")
	b.print("repair_cpu_of_three_nodes", (after-before)/(bytes/1e9), "cpu-s/GB")
	b.judge(line{"repair_share_of_link", 100 * bytes / took / speed, "%"}, ">=", repairShare)
	return nil
}

// holds waits until a node shows so many blobs: each is whole and verified then. Its
// files are looked at, because asking the node costs what is measured.
func holds(ctx context.Context, n *lab.Node, count int) error {
	for {
		all, err := filepath.Glob(filepath.Join(n.Data, "content", "blobs", "sha256", "*", "*"))
		if err != nil {
			return err
		}
		if len(all) >= count {
			return nil
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("the node holds %d of %d blobs: %w", len(all), count, err)
		}
	}
}

// repaired waits until all nodes are up and say that no copy is missing.
func repaired(ctx context.Context, nodes []*lab.Node) error {
	for _, n := range nodes {
		if err := n.WaitStatus(ctx, "all copies", func(s lab.Status) bool {
			up := 0
			for _, m := range s.Nodes {
				if m.Up && m.Voter {
					up++
				}
			}
			return s.Quorum && up == len(nodes) && !s.Counting && s.UnderReplicated == 0 && s.Lost == 0
		}); err != nil {
			return err
		}
	}
	return nil
}

// cpuOfAll is the processor time that the nodes have taken, in seconds.
func cpuOfAll(nodes []*lab.Node) (sum float64, err error) {
	for _, n := range nodes {
		one, err := cpuOf(n.Pid())
		if err != nil {
			return 0, err
		}
		sum += one
	}
	return sum, nil
}

// labUser is a client on a node's own machine.
func labUser(ctx context.Context, dir string, n *lab.Node) (*registry, error) {
	if _, err := lab.Clients(ctx, dir, n); err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("the site's CA is no certificate")
	}
	user := &registry{base: "https://" + n.Registry(), admin: lab.Password, http: &http.Client{Transport: &http.Transport{
		DialContext: n.Host.Dial, TLSClientConfig: &tls.Config{RootCAs: pool},
	}}}
	return user, user.login(ctx)
}
