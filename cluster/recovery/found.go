package recovery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// Founding makes a site of one new node out of a snapshot of another's state.
type Founding struct {
	Dir  string        // without the state or the identity of a node; the caller has locked it
	Keys *keyring.Ring // seals the files that hold keys; nil: they are plain
	Site string        // id of the site, which stays
	// Name and Addr are of the new node; the address of its peer port is corrected
	// when it starts.
	Name, Addr string
	ClusterKey []byte
	Parent     epoch.Epoch // of the state
	Source     string      // what it is made from: another source does not go on with it

	Snapshot io.Reader // in the format of cluster/kv
	// Beside brings, after the snapshot was read, what is kept beside the state; it
	// may have been done before. May be nil.
	Beside  func(ctx context.Context) error
	Prepare Prepare // may be nil
	// Answers gives, for the new node, what Survivor.Answers is: a member of the
	// old site that is up ends the work with ErrAnswers, because the new one would
	// put it out of service. Nil: nobody is asked.
	Answers func(who member.Identity) (func(ctx context.Context, addr, id string) bool, error)
	Log     *slog.Logger

	// Step is called between the steps of the work; its error ends it there, as a
	// crash would. For tests; nil otherwise.
	Step func(name string) error
}

// Vacant refuses a directory that holds a node, or the rest of one.
func Vacant(dir string) error {
	for _, name := range append(member.Files(), stateFile, raftDir) {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return fmt.Errorf("%s holds a node already (%s): take an empty directory, or clear this one with atoll node wipe", dir, name)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Resume brings founding from the source to its end if it was cut short after
// all had been built; not ok when there is nothing to resume. keys were opened over Dirs.
func Resume(dir, source string, keys *keyring.Ring) (id member.Identity, e epoch.Epoch, ok bool, err error) {
	p, pending, err := pendingPlan(dir)
	if err != nil || !pending {
		return id, e, false, err
	}
	if p.For != source {
		return id, e, false, fmt.Errorf("%s: what was begun here is something else (%s): bring that to its end, or clear the directory with atoll node wipe", dir, p.For)
	}
	if e, err = epoch.Parse(p.Epoch); err != nil {
		return id, e, false, err
	}
	if err := finish(dir, p, func(string) error { return nil }); err != nil {
		return id, e, false, err
	}
	id, err = member.LoadIdentity(dir, keys)
	return id, e, err == nil, err
}

// Found makes the site. Cut short, it leaves a directory on which nothing
// starts, and which Found or Resume can go on with.
func Found(ctx context.Context, f Founding) (member.Identity, epoch.Epoch, error) {
	var e epoch.Epoch
	id := member.Identity{SiteID: f.Site, NodeID: table.NewID(), Name: f.Name, ClusterKey: f.ClusterKey}
	if err := Vacant(f.Dir); err != nil {
		return id, e, err
	}
	b := &builder{dir: f.Dir, log: f.Log, prepare: f.Prepare, step: f.Step}
	if err := b.begin(); err != nil {
		return id, e, err
	}
	defer b.close()
	if err := b.load(f.Snapshot); err != nil {
		return id, e, err
	}
	if err := b.at("loaded"); err != nil {
		return id, e, err
	}
	if f.Beside != nil {
		if err := f.Beside(ctx); err != nil {
			return id, e, err
		}
	}
	err := b.change(ctx, f.ClusterKey, func(ctx context.Context, offline *member.Offline) (err error) {
		self, err := identify(&id, f, offline)
		if err != nil {
			return err
		}
		if err := f.unanswered(ctx, id, offline); err != nil {
			return err
		}
		if e, err = newEpoch(f.Site, f.Parent, offline, func(*epoch.Epoch) {}); err != nil {
			return err
		}
		return offline.Alone(ctx, self, e)
	})
	if err != nil {
		return id, e, err
	}
	if err := b.consensus(id.NodeID, f.Addr); err != nil {
		return id, e, err
	}
	if err := errors.Join(epoch.Save(b.path(), e), id.Save(b.path(), f.Keys)); err != nil {
		return id, e, err
	}
	names := []string{stateFile, raftDir, epoch.File}
	for _, name := range member.Files() {
		if _, err := os.Lstat(b.path(name)); err == nil {
			names = append(names, name)
		}
	}
	// The identity last: its existence says that the directory is a node's.
	names[3], names[len(names)-1] = names[len(names)-1], names[3]
	return id, e, b.commit(plan{Names: names, Epoch: e.Wire(), For: f.Source})
}

// unanswered refuses while members of the old site are up.
func (f Founding) unanswered(ctx context.Context, id member.Identity, offline *member.Offline) error {
	if f.Answers == nil {
		return nil
	}
	answers, err := f.Answers(id)
	if err != nil {
		return err
	}
	members, err := offline.Members()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	up := make([]string, len(members))
	var asked sync.WaitGroup
	for i, m := range members {
		asked.Go(func() {
			if answers(ctx, m.Addr, m.ID) {
				up[i] = fmt.Sprintf("%s at %s", m.Name, m.Addr)
			}
		})
	}
	asked.Wait()
	if up = slices.DeleteFunc(up, func(s string) bool { return s == "" }); len(up) > 0 {
		return fmt.Errorf("%w: %s. The restored site would put the nodes of the old one out of service. To try a backup out, restore it where it cannot reach them; to replace the site, stop them first, or say so with --replace", ErrAnswers, strings.Join(up, ", "))
	}
	return nil
}

// identify gives the new node its key and certificate, and its row.
func identify(id *member.Identity, f Founding, offline *member.Offline) (member.Member, error) {
	authority, err := offline.Authority()
	if err != nil {
		return member.Member{}, fmt.Errorf("opening the site's authority with the cluster key: %w", err)
	}
	key, err := pki.NewKey()
	if err != nil {
		return member.Member{}, err
	}
	if id.Key, err = pki.MarshalKey(key); err != nil {
		return member.Member{}, err
	}
	now := time.Now()
	id.CA = authority.CertPEM()
	if id.Cert, err = authority.IssueNode(key.Public(), id.SiteID, id.NodeID, now); err != nil {
		return member.Member{}, err
	}
	hash, err := pki.KeyHash(key.Public())
	return member.Member{ID: id.NodeID, Name: f.Name, Addr: f.Addr, Joined: now.Unix(), Feature: version.Level, KeyHash: hash}, err
}
