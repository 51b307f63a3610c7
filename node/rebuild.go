package node

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/ledger"
)

// Files of a rebuild in the data directory.
const (
	rebuildFile = "rebuilding.json" // while one is under way
	rebuildKept = "before-rebuild"  // who the node was, and its ledger
)

// rebuildPhase says how far a rebuild is. Its moves are done once: afterwards the
// names belong to the new site.
type rebuildPhase struct {
	Moved bool `json:"moved"`
}

// Rebuild makes a new site out of the blobs of a node whose metadata is gone, and
// its ledger. c names the directory, and how the node is called; it listens
// nowhere that others see. Cut short, it is run again.
func Rebuild(ctx context.Context, c Config, progress func(repository string)) (report ledger.Report, err error) {
	err = locked(c.Data, func() error {
		if err := c.Keys.inherit(ctx, c.Data); err != nil {
			return err
		}
		return prepareRebuild(c.Data)
	})
	if err != nil {
		return report, err
	}
	c.Init, c.rebuilding = true, true
	c.Listen, c.PeerListen, c.Advertise, c.TLS = "127.0.0.1:0", "127.0.0.1:0", "", TLSOff
	serving := make(chan struct{})
	c.Started = func(Started) { close(serving) }
	n, err := New(ctx, c)
	if err != nil {
		return report, err
	}
	run, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- n.Run(run) }() // ends before Rebuild returns
	select {
	case <-serving:
	case err := <-ended:
		return report, errors.Join(err, ctx.Err())
	}
	report, err = n.rooms.ledger.Rebuild(run, ledger.Rebuilding{
		Store: n.rooms.store, Records: n.rooms.records, Copies: n.rooms.peers,
		From: filepath.Join(c.Data, rebuildKept, ledger.Dir), Progress: progress,
	})
	stop()
	if err = errors.Join(err, <-ended); err != nil {
		return report, err
	}
	return report, atomicfile.Remove(filepath.Join(c.Data, rebuildFile))
}

// prepareRebuild clears the way for a new site, and keeps what was there.
func prepareRebuild(data string) error {
	var phase rebuildPhase
	b, err := os.ReadFile(filepath.Join(data, rebuildFile))
	switch {
	case err == nil:
		err = json.Unmarshal(b, &phase)
	case errors.Is(err, fs.ErrNotExist):
		if err = rebuildable(data); err == nil {
			err = writeRebuild(data, phase)
		}
	}
	if err != nil || phase.Moved {
		return err
	}
	kept := filepath.Join(data, rebuildKept)
	if err := os.MkdirAll(kept, 0o700); err != nil {
		return err
	}
	for _, name := range append(member.Files(), epoch.File, epoch.FencedFile, PasswordName, ledger.Dir) {
		if err := os.Rename(filepath.Join(data, name), filepath.Join(kept, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := errors.Join(atomicfile.SyncDir(kept), atomicfile.SyncDir(data)); err != nil {
		return err
	}
	return writeRebuild(data, rebuildPhase{Moved: true})
}

// rebuildable refuses a directory that needs no rebuild, or has nothing for one.
func rebuildable(data string) error {
	for _, name := range []string{"meta.db", "raft"} {
		if _, err := os.Stat(filepath.Join(data, name)); err == nil {
			return fault.New(fault.Conflict, "%s still has its metadata (%s): start the node. If that is damaged and no other node and no backup is left, move meta.db and raft away first", data, name)
		}
	}
	if _, err := os.Stat(filepath.Join(data, rebuildKept)); err == nil {
		return fault.New(fault.Conflict, "%s holds what an earlier rebuild kept (%s): move it away first", data, rebuildKept)
	}
	if _, err := os.Stat(filepath.Join(data, "content")); err != nil {
		return fault.New(fault.Conflict, "%s holds no blobs to rebuild anything from", data)
	}
	return nil
}

func writeRebuild(data string, phase rebuildPhase) error {
	return atomicfile.WriteJSON(filepath.Join(data, rebuildFile), phase)
}

// rebuildPending refuses to start a node on half a rebuild.
func rebuildPending(c Config) error {
	if _, err := os.Stat(filepath.Join(c.Data, rebuildFile)); err == nil && !c.rebuilding {
		return fault.New(fault.Conflict, "a rebuild of %s was cut short: run atoll rebuild again, it goes on where it was", c.Data)
	}
	return nil
}
