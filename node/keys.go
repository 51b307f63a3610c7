package node

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"

	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/recovery"
	"github.com/atoll-registry/atoll/cluster/version"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/storage"
)

// Keys says what opens the keys of a data directory.
type Keys struct {
	// Provider is keyring.File or keyring.PassphraseName; "" is the one that the
	// directory has, in an empty one keyring.File.
	Provider   string
	Passphrase []byte
	// Named: somebody named the passphrase for this node, so it is an error when the
	// keys are not sealed with any.
	Named bool

	cost keyring.Cost // of sealing with Passphrase; tests shrink it
}

// protected are the names of the files that hold keys or passwords of other services.
func protected() []string { return append(member.Secrets(), storage.FileName) }

// provider gives nil for keyring.File.
func (k Keys) provider(name string) (keyring.Provider, error) {
	switch name {
	case keyring.File:
		return nil, nil
	case keyring.PassphraseName:
		cost := k.cost
		if cost == (keyring.Cost{}) {
			cost = keyring.DefaultCost()
		}
		return keyring.NewPassphrase(bytes.Clone(k.Passphrase), cost), nil // the provider overwrites its own
	}
	return nil, fault.New(fault.Invalid, "there is no key provider %s: choose %s or %s with --key-provider", name, keyring.File, keyring.PassphraseName)
}

// open opens the keys of a data directory, which the caller has locked. It brings a
// rekeying that was cut short to its end, and alters nothing else.
func (k Keys) open(ctx context.Context, data string) (*keyring.Ring, error) {
	if _, err := k.provider(k.kind()); err != nil {
		return nil, err // before the directory is asked
	}
	found, err := keyring.ProviderOf(data, protected())
	if err != nil {
		return nil, err
	}
	name := k.kind()
	if found != "" {
		if k.Provider != "" && k.Provider != found {
			return nil, fault.New(fault.Conflict, "the keys in %s are kept by the key provider %s, not %s: stop the node and change that with atoll node rekey --key-provider %s, or leave --key-provider away", data, found, k.Provider, k.Provider)
		}
		name = found
	}
	if name == keyring.File && k.Named {
		return nil, fault.New(fault.Invalid, "there is a passphrase for keys, but those in %s are not sealed: seal them with atoll node rekey --key-provider passphrase, or a new node's with --key-provider passphrase; or leave the passphrase away", data)
	}
	p, err := k.provider(name)
	if err != nil {
		return nil, err
	}
	if err := finishRekey(ctx, data, p); err != nil {
		return nil, unopened(err)
	}
	ring, err := keyring.Open(ctx, p, protected(), recovery.Dirs(data)...)
	if p, ok := p.(interface{ Forget() }); ok && err == nil {
		p.Forget()
	}
	return ring, unopened(err)
}

// inherit has a rebuilt node's keys kept as those of before were, unless it was said
// how: then what opened those may be lost, as they are.
func (k *Keys) inherit(ctx context.Context, data string) error {
	if k.Provider != "" {
		return nil
	}
	here, err := keyring.ProviderOf(data, protected())
	if err != nil {
		return err
	}
	if here != "" {
		if _, err := k.open(ctx, data); err != nil {
			return err
		}
	} else if here, err = keyring.ProviderOf(filepath.Join(data, rebuildKept), protected()); err != nil {
		return err
	}
	k.Provider = here
	return nil
}

func (k Keys) kind() string {
	if k.Provider == "" {
		return keyring.File
	}
	return k.Provider
}

// unopened gives what keeps keys locked the kind that decides the exit code.
func unopened(err error) error {
	switch {
	case errors.Is(err, keyring.ErrLocked):
		return fault.New(fault.Denied, "%v", err)
	case errors.Is(err, keyring.ErrWeak):
		return fault.New(fault.Invalid, "%v", err)
	case errors.Is(err, keyring.ErrPlain):
		return fault.New(fault.Conflict, "%v", err)
	}
	return err
}

// finishRekey brings a rekeying that was cut short to its end, with the provider that
// it was going to.
func finishRekey(ctx context.Context, data string, p keyring.Provider) error {
	name, err := keyring.ProviderOf(data, nil)
	if err != nil {
		return err
	}
	var to *keyring.Ring // of a plain file, or of the rest of one that was being erased
	if name != "" && name != keyring.File {
		if to, err = keyring.Open(ctx, p, []string{keyring.RekeyFile}, data); err != nil {
			return err
		}
	}
	return keyring.Rekeying{Dir: data, Names: protected(), To: to}.Finish()
}

// Rekeyed says how the keys of a node are kept now.
type Rekeyed struct {
	Data     string `json:"data"`
	Former   string `json:"former_provider"`
	Provider string `json:"provider"`
	// Left are directories below Data in which older files with keys lie that were not
	// touched: what recoveries and rebuilds kept.
	Left []string `json:"left,omitempty"`
	// Resumed: an earlier try was brought to its end.
	Resumed bool `json:"resumed"`
}

// Rekey has the keys of a node that does not run kept by another provider, or sealed
// with another passphrase. Cut short, it is brought to its end by the next start of the
// node with the new passphrase, or by the same call.
func Rekey(ctx context.Context, data string, from, to Keys) (out Rekeyed, err error) {
	out = Rekeyed{Data: data, Provider: to.Provider}
	if _, err := os.Stat(data); err != nil {
		return out, fault.Wrap(err, fault.NotFound, "there is no node to give other keys")
	}
	if err := version.Check(data, ""); err != nil {
		return out, err
	}
	err = locked(data, func() error {
		if err := recovery.Pending(data); err != nil {
			return fault.New(fault.Conflict, "%v", err)
		}
		if out.Resumed, err = resumeRekey(ctx, data, from, to); err != nil {
			return unopened(err)
		}
		out.Former, err = keyring.ProviderOf(data, protected())
		if err != nil {
			return err
		}
		if out.Former == "" {
			return fault.New(fault.NotFound, "%s holds no keys: a new node seals them from the start with atoll serve --key-provider %s", data, to.Provider)
		}
		out.Left = keptKeys(data)
		return unopened(rekey(ctx, data, from, to, out.Former))
	})
	return out, err
}

// rekey does it, if it is not done already.
func rekey(ctx context.Context, data string, from, to Keys, former string) error {
	if former == to.Provider {
		p, err := to.provider(former)
		if err == nil {
			_, err = keyring.Open(ctx, p, protected(), data)
		}
		if !errors.Is(err, keyring.ErrLocked) {
			return err
		}
	}
	old, err := from.provider(former)
	if err != nil {
		return err
	}
	if former != keyring.File && len(from.Passphrase) == 0 {
		return fault.New(fault.Denied, "the keys in %s are sealed: give the passphrase that they were sealed with by --old-key-passphrase-file FILE; nothing was changed", data)
	}
	r := keyring.Rekeying{Dir: data, Names: protected()}
	if r.From, err = keyring.Open(ctx, old, protected(), data); err != nil {
		return err
	}
	fresh, err := to.provider(to.Provider)
	if err != nil {
		return err
	}
	if to.Provider != keyring.File && len(to.Passphrase) == 0 {
		return fault.New(fault.Denied, "there is no new passphrase: write one into a file and name it with --key-passphrase-file FILE; nothing was changed")
	}
	if r.To, err = keyring.Fresh(ctx, fresh, append(protected(), keyring.RekeyFile)); err != nil {
		return err
	}
	return r.Run()
}

// resumeRekey finishes what was cut short, with whichever passphrase opens it.
func resumeRekey(ctx context.Context, data string, from, to Keys) (bool, error) {
	name, err := keyring.ProviderOf(data, nil)
	if err != nil {
		return false, err
	}
	if name == "" {
		return false, finishRekey(ctx, data, nil) // at most an erased file
	}
	for _, k := range []Keys{to, from} {
		p, err := k.provider(name)
		if err != nil {
			return false, err
		}
		if err = finishRekey(ctx, data, p); err == nil || !errors.Is(err, keyring.ErrLocked) {
			return err == nil, err
		}
	}
	return false, fault.New(fault.Denied, "an earlier atoll node rekey was cut short, and neither passphrase is the one that it was going to: give that one with --key-passphrase-file FILE; nothing was changed")
}

// keptKeys names the directories of earlier recoveries that hold keys.
func keptKeys(data string) (left []string) {
	for _, name := range member.Secrets() {
		found, _ := filepath.Glob(filepath.Join(data, "before-*", name)) // the pattern is good
		for _, path := range found {
			left = append(left, filepath.Base(filepath.Dir(path)))
		}
	}
	slices.Sort(left)
	return slices.Compact(left)
}
