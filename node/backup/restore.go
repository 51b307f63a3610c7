package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"

	"filippo.io/age"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/recovery"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
)

// contentDir is where the blobs are in a data directory.
const contentDir = "content"

// Verified says what a whole backup holds.
type Verified struct {
	Header
	Summary
	// Opened: its content was decrypted and every part read.
	Opened bool `json:"opened"`
}

// Verify proves that a backup is whole: its hash over all its bytes, and, when
// it is not encrypted or one of the identities opens it, every blob by its digest.
func Verify(r io.Reader, identities []age.Identity) (Verified, error) {
	f, err := openFile(r)
	if err != nil {
		return Verified{}, refusal(err)
	}
	v := Verified{Header: f.Header}
	if !f.Encrypted || len(identities) > 0 {
		v.Opened = true
		if err := verifyParts(f, identities); err != nil {
			return v, refusal(err)
		}
	}
	v.Summary, err = f.check()
	return v, refusal(err)
}

func verifyParts(f *fileReader, identities []age.Identity) error {
	if err := f.unseal(identities); err != nil {
		return err
	}
	for {
		p, err := f.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		var into io.Writer = io.Discard
		var verifier digest.Verifier
		if p.kind == partBlob {
			d, err := digest.Parse(p.name)
			if err != nil {
				return fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			verifier = d.Verifier()
			into = verifier
		}
		_, err = io.Copy(into, p)
		if err != nil && !errors.Is(err, errGivenUp) {
			return err
		}
		if err == nil && verifier != nil && !verifier.Verified() {
			return fmt.Errorf("%w: blob %s is not what its digest says", ErrDamaged, p.name)
		}
	}
}

// refusal gives what is wrong with a backup its kind.
func refusal(err error) error {
	switch {
	case errors.Is(err, ErrIdentity):
		return fault.New(fault.Denied, "%v", err)
	case errors.Is(err, ErrNoBackup), errors.Is(err, ErrDamaged), errors.Is(err, ErrVersion):
		return fault.New(fault.Invalid, "%v", err)
	}
	return err
}

// Restoring asks to make a site of a backup.
type Restoring struct {
	Data       string        // directory, which the caller has locked
	Keys       *keyring.Ring // seals the files that hold keys; nil: they are plain
	File       io.ReadSeeker
	Identities []age.Identity
	// ClusterKey opens the secrets of a backup without keys: the content of the
	// file cluster.key of a node of the site; else nil.
	ClusterKey []byte
	Name, Addr string // of the new node; "" are those of the node that wrote the backup
	// Replace: nodes of the old site that are up do not matter; else Answers, of
	// recovery.Founding, is asked about them.
	Replace bool
	Answers func(who member.Identity) (func(ctx context.Context, addr, id string) bool, error)
	Log     *slog.Logger
	// Progress is told, as bytes of the file are read, how many: the file is read
	// twice. May be nil.
	Progress func(n int)
	// Step is called between the steps of the work; its error ends it there, as a
	// crash would. For tests; nil otherwise.
	Step func(name string) error
}

// Restored says what a site was made of.
type Restored struct {
	Site   string  `json:"site"`
	Node   string  `json:"node"`
	Epoch  string  `json:"epoch"`
	Backup Header  `json:"backup"`
	Blobs  Summary `json:"blobs"` // that are in the directory now
	// Resumed: an earlier try had done all but its last steps.
	Resumed bool `json:"resumed"`
}

// Restore makes a site of one node. The whole backup is verified first. Cut
// short, it is to be run again, and does not copy blobs again that it has.
func Restore(ctx context.Context, r Restoring) (Restored, error) {
	if r.Progress == nil {
		r.Progress = func(int) {}
	}
	from := &counted{from: r.File, tell: r.Progress, ended: ctx.Err}
	checked, err := openFile(from)
	if err != nil {
		return Restored{}, refusal(err)
	}
	out := Restored{Site: checked.Site, Backup: checked.Header}
	source := "restore " + checked.ID
	if id, e, ok, err := recovery.Resume(r.Data, source, r.Keys); err != nil {
		return out, fault.New(fault.Conflict, "%v", err)
	} else if ok {
		out.Node, out.Epoch, out.Resumed = id.NodeID, e.String(), true
		return out, nil
	}
	if err := recovery.Vacant(r.Data); err != nil {
		return out, fault.New(fault.Conflict, "%v", err)
	}
	if out.Blobs, err = checked.check(); err != nil {
		return out, refusal(err)
	}
	if _, err := r.File.Seek(0, io.SeekStart); err != nil {
		return out, err
	}
	file, err := openFile(from)
	if err == nil {
		err = file.unseal(r.Identities)
	}
	if err != nil {
		return out, refusal(err)
	}
	if file.ID != checked.ID {
		return out, fault.New(fault.Conflict, "the backup changed while it was read")
	}
	id, e, err := r.found(ctx, file, source)
	out.Node, out.Epoch = id.NodeID, e.String()
	return out, err
}

func (r Restoring) found(ctx context.Context, file *fileReader, source string) (id member.Identity, e epoch.Epoch, err error) {
	parent, err := epoch.Parse(file.Epoch)
	if err != nil {
		return id, e, err
	}
	key, metadata, err := r.upToMetadata(file)
	if err != nil {
		return id, e, err
	}
	if r.Name == "" {
		r.Name = file.Node
	}
	if r.Addr == "" {
		r.Addr = file.Addr
	}
	f := recovery.Founding{
		Dir: r.Data, Keys: r.Keys, Site: file.Site, Name: r.Name, Addr: r.Addr, ClusterKey: key, Parent: parent, Source: source,
		Snapshot: metadata, Prepare: NewLife(r.Data), Log: r.Log,
		Beside: func(ctx context.Context) error { return r.takeBlobs(ctx, file) },
	}
	if !r.Replace {
		f.Answers = r.Answers
	}
	f.Step = r.Step
	return recovery.Found(ctx, f)
}

// upToMetadata reads the keys, if there are any, and gives the reader of the
// metadata.
func (r Restoring) upToMetadata(file *fileReader) (key []byte, metadata io.Reader, err error) {
	key = r.ClusterKey
	for {
		p, err := file.next()
		if err != nil {
			return nil, nil, refusal(cut(err))
		}
		switch p.kind {
		case partKeys:
			var keys Keys
			if err := json.NewDecoder(p).Decode(&keys); err != nil {
				return nil, nil, err
			}
			if _, err := io.Copy(io.Discard, p); err != nil {
				return nil, nil, err
			}
			key = keys.ClusterKey
		case partMetadata:
			if len(key) == 0 || len(key)%pki.ClusterKeySize != 0 {
				return nil, nil, fault.New(fault.Invalid, "the backup was written without a recipient and holds no keys: give the file cluster.key of a node of the site with --cluster-key FILE. Without that key the site's secrets cannot be opened")
			}
			return key, p, nil
		default:
			return nil, nil, fault.New(fault.Invalid, "%v: a part of kind %q before the metadata", ErrDamaged, p.kind)
		}
	}
}

// takeBlobs puts the blobs that follow the metadata into the directory.
func (r Restoring) takeBlobs(ctx context.Context, file *fileReader) error {
	store, err := blobs.Open(filepath.Join(r.Data, contentDir), blobs.Options{Log: r.Log})
	if err != nil {
		return err
	}
	defer store.Close()
	for n := 0; ; n++ {
		p, err := file.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		d, err := digest.Parse(p.name)
		if p.kind != partBlob || err != nil {
			return fault.New(fault.Invalid, "%v: a part of kind %q named %q among the blobs", ErrDamaged, p.kind, p.name)
		}
		if _, err := store.Stat(d); err == nil {
			_, err = io.Copy(io.Discard, p)
		} else {
			_, err = store.Put(ctx, d, p)
		}
		if err != nil && !errors.Is(err, errGivenUp) {
			return fmt.Errorf("restoring blob %s: %w", d, err)
		}
		if r.Step != nil {
			if err := r.Step(fmt.Sprintf("blob %d", n)); err != nil {
				return err
			}
		}
	}
}

// counted tells how much was read, and ends when it is told to.
type counted struct {
	from  io.Reader
	tell  func(int)
	ended func() error
}

func (c *counted) Read(p []byte) (int, error) {
	if err := c.ended(); err != nil {
		return 0, err
	}
	n, err := c.from.Read(p)
	c.tell(n)
	return n, err
}
