package raftnet

import (
	"fmt"
	"io"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
)

// Snapshots are raft's, in files, whose names are durable. Raft 1.8.0 syncs the
// files and the name of their directory and not the names in it. A file system that
// does not keep the order of changes in several directories could lose those in a
// power cut, after the log that the snapshot stands for was cut.
type Snapshots struct {
	*raft.FileSnapshotStore
	dir string
}

// NewSnapshots opens those in a directory of raft's, of which so many are kept.
func NewSnapshots(dir string, keep int, log hclog.Logger) (*Snapshots, error) {
	files, err := raft.NewFileSnapshotStoreWithLogger(dir, keep, log)
	return &Snapshots{files, filepath.Join(dir, "snapshots")}, err
}

// Create implements raft.SnapshotStore.
func (s *Snapshots) Create(version raft.SnapshotVersion, index, term uint64, members raft.Configuration, membersIndex uint64, trans raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.FileSnapshotStore.Create(version, index, term, members, membersIndex, trans)
	if err != nil {
		return nil, err
	}
	return syncedSink{sink, filepath.Join(s.dir, sink.ID())}, nil
}

// syncedSink is a snapshot that is being written, and where it will be.
type syncedSink struct {
	raft.SnapshotSink
	dir string
}

// Close implements raft.SnapshotSink. The snapshot before this one is there until the
// next one comes, and the log is cut after this has returned.
func (s syncedSink) Close() error {
	if err := s.SnapshotSink.Close(); err != nil {
		return err
	}
	if err := atomicfile.SyncDir(s.dir); err != nil {
		return fmt.Errorf("keeping the names of a snapshot: %w", err)
	}
	return nil
}

// Open implements raft.SnapshotStore.
func (s *Snapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, source, err := s.FileSnapshotStore.Open(id)
	if err != nil {
		return nil, nil, err
	}
	return meta, openSnapshot{source, meta}, nil
}

// openSnapshot is a snapshot that is being read, and where in the log it ends.
type openSnapshot struct {
	io.ReadCloser
	meta *raft.SnapshotMeta
}

// endOf finds where a snapshot ends that raft hands on, wrapped up; nil when that is not
// known.
func endOf(source io.ReadCloser) *raft.SnapshotMeta {
	for {
		switch s := source.(type) {
		case openSnapshot:
			return s.meta
		case interface{ WrappedReadCloser() io.ReadCloser }:
			source = s.WrappedReadCloser()
		default:
			return nil
		}
	}
}
