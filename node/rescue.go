package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/recovery"
	"github.com/atoll-registry/atoll/node/backup"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/ledger"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// What is done with the data directory of a node that does not run. Each takes
// the directory's lock, so that no node can start meanwhile.

// Restore makes a site of a backup in a data directory that holds no node.
func Restore(ctx context.Context, r backup.Restoring, keys Keys) (out backup.Restored, err error) {
	r.Answers = func(who member.Identity) (func(ctx context.Context, addr, id string) bool, error) {
		return answering(who, r.Log)
	}
	err = locked(r.Data, func() error {
		if r.Keys, err = keys.open(ctx, r.Data); err != nil {
			return err
		}
		out, err = backup.Restore(ctx, r)
		return refused(err)
	})
	return out, err
}

// Offline is a stopped node's data directory and what opens its keys.
type Offline struct {
	Data string
	Keys Keys
	Log  *slog.Logger
}

// Recover makes the node of a data directory, alone, the whole of its site. A
// fault Conflict says why it is not done. clusterKey is for a node that had no vote:
// see recovery.Survivor.
func Recover(ctx context.Context, o Offline, clusterKey []byte) (out recovery.Recovered, err error) {
	err = locked(o.Data, func() error {
		keys, err := o.Keys.open(ctx, o.Data)
		if err != nil {
			return err
		}
		who, err := member.LoadIdentity(o.Data, keys)
		if err != nil {
			return refused(err)
		}
		answers, err := answering(who, o.Log)
		if err != nil {
			return err
		}
		out, err = recovery.Recover(ctx, recovery.Survivor{Dir: o.Data, Keys: keys, Answers: answers, Prepare: backup.NewLife(o.Data), ClusterKey: clusterKey, Log: o.Log})
		return refused(err)
	})
	return out, err
}

// Salvage writes what a fenced node alone has.
func Salvage(ctx context.Context, o Offline, w io.Writer) (out recovery.Count, err error) {
	err = locked(o.Data, func() error {
		keys, err := o.Keys.open(ctx, o.Data)
		if err != nil {
			return err
		}
		out, err = recovery.Salvage(o.Data, keys, w, o.Log)
		return refused(err)
	})
	return out, err
}

// Wipe makes a data directory one of no node; its blobs stay.
func Wipe(data string) (removed []string, err error) {
	err = locked(data, func() error {
		removed, err = recovery.Wipe(data)
		for _, name := range []string{PasswordName, SocketName, ledger.Dir} {
			path := filepath.Join(data, name)
			if _, absent := os.Lstat(path); absent == nil {
				err = errors.Join(err, os.RemoveAll(path))
				removed = append(removed, name)
			}
		}
		return err
	})
	return removed, err
}

// refused gives the reasons why nothing was done the kind that decides the exit
// code.
func refused(err error) error {
	for _, reason := range []error{recovery.ErrAnswers, recovery.ErrNotNeeded, recovery.ErrNotFenced, recovery.ErrNoKey, epoch.ErrFenced, member.ErrEmpty} {
		if errors.Is(err, reason) {
			return fault.New(fault.Conflict, "%v", err)
		}
	}
	return err
}

func locked(data string, work func() error) error {
	if err := checkDir(data); err != nil {
		return err
	}
	lock, err := lockData(data)
	if err != nil {
		return err
	}
	defer lock.Close()
	return work()
}

// answering asks, as a node, others of the site whether they are up. One that
// refuses is.
func answering(who member.Identity, log *slog.Logger) (func(ctx context.Context, addr, id string) bool, error) {
	cert, err := who.Certificate()
	if err != nil {
		return nil, err
	}
	pool, err := who.Pool()
	if err != nil {
		return nil, err
	}
	port, err := peernet.New(peernet.Config{
		SiteID: who.SiteID, Log: log,
		Cert: func() tls.Certificate { return cert },
		CA:   func() *x509.CertPool { return pool },
	})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, addr, id string) bool {
		conn, err := port.Dial(ctx, addr, peernet.ServiceControl)
		if err != nil {
			log.Info("a node does not answer", "node", id, "address", addr, "error", err)
			return errors.Is(err, peernet.ErrRefused) || errors.Is(err, peernet.ErrNoService)
		}
		defer conn.Close()
		proven, ok := conn.(interface{ PeerID() string })
		return ok && proven.PeerID() == id
	}, nil
}
