package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// rawRaft is the floor of the cluster's rows: raft with the same log store and
// payloads of the same size, over plain TCP, and a state machine that does
// nothing. Its nodes share this process, so it pays for no second scheduler.
type rawRaft struct {
	nodes  []*raft.Raft
	stores []io.Closer
	leader *raft.Raft
}

// nothing is the state machine.
type nothing struct{}

func (nothing) Apply(*raft.Log) any { return nil }
func (nothing) Snapshot() (raft.FSMSnapshot, error) {
	return nil, errors.New("there is nothing to keep")
}
func (nothing) Restore(r io.ReadCloser) error     { return r.Close() }
func (nothing) ApplyBatch(logs []*raft.Log) []any { return make([]any, len(logs)) }
func (r *rawRaft) commit(payload []byte) error    { return r.leader.Apply(payload, time.Minute).Error() }

// startRaw starts so many nodes and waits for their leader.
func startRaw(dir string, count int) (r *rawRaft, err error) {
	r = &rawRaft{}
	defer func() {
		if err != nil {
			r.stop()
		}
	}()
	var servers []raft.Server
	for i := range count {
		home := filepath.Join(dir, fmt.Sprintf("raw%d-%d", count, i))
		if err := os.MkdirAll(home, 0o700); err != nil {
			return r, err
		}
		log := hclog.NewNullLogger()
		store, err := raftboltdb.New(raftboltdb.Options{Path: filepath.Join(home, "log.db")})
		if err != nil {
			return r, err
		}
		r.stores = append(r.stores, store)
		transport, err := raft.NewTCPTransportWithLogger("127.0.0.1:0", nil, 3, 10*time.Second, log)
		if err != nil {
			return r, err
		}
		cfg := raft.DefaultConfig()
		cfg.LocalID, cfg.Logger, cfg.BatchApplyCh = raft.ServerID(fmt.Sprint(i)), log, true
		cached, err := raft.NewLogCache(128, store)
		if err != nil {
			return r, err
		}
		node, err := raft.NewRaft(cfg, nothing{}, cached, store, raft.NewDiscardSnapshotStore(), transport)
		if err != nil {
			return r, err
		}
		r.nodes = append(r.nodes, node)
		servers = append(servers, raft.Server{ID: cfg.LocalID, Address: transport.LocalAddr()})
	}
	if err := r.nodes[0].BootstrapCluster(raft.Configuration{Servers: servers}).Error(); err != nil {
		return r, err
	}
	for range 300 {
		for _, node := range r.nodes {
			if node.State() == raft.Leader {
				r.leader = node
				return r, nil
			}
		}
		<-time.After(100 * time.Millisecond)
	}
	return r, errors.New("raw raft elects no leader")
}

func (r *rawRaft) stop() {
	for _, node := range r.nodes {
		_ = node.Shutdown().Error() // the run is over
	}
	for _, store := range r.stores {
		store.Close()
	}
}
