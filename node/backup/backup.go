// Package backup writes a site's backup while the site works, and makes a site
// of one.
//
// Invariants:
//   - A backup is of one revision of the metadata, which is not older than what
//     was acknowledged before it was asked for. What it holds in memory does not
//     grow with the site.
//   - The cluster key, which opens the site's secrets, is in a backup only when
//     its content is encrypted to a recipient.
//   - A blob in a backup has been compared with its digest; one that no node
//     holds whole is named as missing.
//   - The site remembers a backup as its last when whoever asked for it has said
//     that it is whole (record.go).
//   - A restored site is another life of the site (see life.go): it never uses a
//     number of a journal again that the old one may have given away.
package backup

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"filippo.io/age"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// Member is this node as a member of its site.
type Member interface {
	Identity() member.Identity
	ClusterKeys() []byte // a copy of those that this node holds
	Status(ctx context.Context) (member.Status, error)
}

// Fetcher reads blobs that this node lacks.
type Fetcher interface {
	// Open gives a blob from other nodes; a fault Unavailable says that none which
	// is up holds it.
	Open(ctx context.Context, d digest.Digest, size int64) (io.ReadSeekCloser, error)
}

// Config of Backup. All fields are needed.
type Config struct {
	DB      *table.DB
	Engine  kv.Engine // of DB
	Member  Member
	Store   *blobs.Store
	Records *blobs.Records
	Fetcher Fetcher
	Version string
	Log     *slog.Logger

	Registerer prometheus.Registerer
}

// Backup is the room.
type Backup struct {
	Config
	rows *table.Table[Record]
	sent sent
}

// New makes the room and defines its table.
func New(c Config) (*Backup, error) {
	b := &Backup{Config: c, rows: table.Define[Record](c.DB, "backup")}
	if err := c.Registerer.Register(newAge(b)); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	return b, nil
}

// Request asks for a backup.
type Request struct {
	// Recipients are public keys of age; with none the backup is not encrypted and
	// holds no keys.
	Recipients []string `json:"recipients"`
	Blobs      bool     `json:"blobs"`
}

// Operations adds the room's operations to the API.
func (b *Backup) Operations(k *rest.Kernel) {
	rest.RegisterStream(k, rest.StreamOperation[struct{}]{
		ID: "createBackup", Method: http.MethodPost, Path: "/api/atoll/v1/backup", Tag: "cluster",
		Summary: "Write a backup of the site", Permission: access.NodeManage,
		MaxBody: 1 << 20, Consumes: "application/json", Produces: "application/octet-stream",
		Do: func(ctx context.Context, _ *struct{}, w http.ResponseWriter, r *http.Request) error {
			var asked Request
			if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
				return fault.Wrap(err, fault.Invalid, "the body is no request for a backup: {\"recipients\": [\"age1...\"], \"blobs\": true}")
			}
			w.Header().Set("Content-Type", "application/octet-stream")
			return b.Write(ctx, w, asked)
		},
	})
	b.confirmOperation(k)
}

// maxExamples bounds the missing blobs that a summary names.
const maxExamples = 20

// Write writes a backup. An error after its first byte leaves a file that fails
// every check.
func (b *Backup) Write(ctx context.Context, w io.Writer, asked Request) error {
	recipients, err := parseRecipients(asked.Recipients)
	if err != nil {
		return err
	}
	start := time.Now()
	if err := b.DB.ReadIndex(ctx); err != nil {
		return err
	}
	// The site may change its key meanwhile: what is sealed in the state opens with
	// a key of before or of after.
	before := b.Member.ClusterKeys()
	defer clear(before)
	if len(recipients) > 0 && len(before) == 0 {
		return fault.New(fault.Precondition, "this node has no vote and does not hold the keys that a backup with recipients has to hold: write it on a node that atoll cluster status shows as a voter")
	}
	state, err := b.Engine.Open()
	if err != nil {
		return fmt.Errorf("opening the state for a backup: %w", err)
	}
	defer state.Release()
	header, err := b.header(ctx, state, asked)
	if err != nil {
		return err
	}
	out, err := newFileWriter(w, header, recipients)
	if err != nil {
		return err
	}
	if len(recipients) > 0 {
		after := b.Member.ClusterKeys()
		keys := Keys{ClusterKey: joinKeys(before, after)}
		err := out.part(partKeys, "", func(w io.Writer) error { return json.NewEncoder(w).Encode(keys) })
		clear(after)
		clear(keys.ClusterKey)
		if err != nil {
			return err
		}
	}
	if err := out.part(partMetadata, "", func(w io.Writer) error { return kv.WriteSnapshot(w, state) }); err != nil {
		return err
	}
	state.Release() // old pages are free again while the blobs travel
	var sum Summary
	if asked.Blobs {
		if sum, err = b.writeBlobs(ctx, out); err != nil {
			return err
		}
	}
	sending := b.sent.ending(Record{
		ID: header.ID, At: header.Created.Unix(), Node: header.Node, Revision: header.Revision,
		Recipients: asked.Recipients, Blobs: asked.Blobs, Missing: sum.Missing,
	})
	if err := sending.end(out.close(sum)); err != nil {
		return err
	}
	b.Log.Info("backup written", "id", header.ID, "revision", header.Revision, "encrypted", len(recipients) > 0,
		"blobs", sum.Blobs, "bytes", sum.Bytes, "missing", sum.Missing, "took", time.Since(start), "user", access.From(ctx).Name)
	return nil
}

// joinKeys gives all cluster keys that are in two lists of them.
func joinKeys(a, b []byte) []byte {
	all := bytes.Clone(a)
	for key := range slices.Chunk(b, pki.ClusterKeySize) {
		if !slices.ContainsFunc(slices.Collect(slices.Chunk(a, pki.ClusterKeySize)), func(k []byte) bool { return bytes.Equal(k, key) }) {
			all = append(all, key...)
		}
	}
	return all
}

func parseRecipients(texts []string) (recipients []age.Recipient, err error) {
	for _, text := range texts {
		r, err := age.ParseX25519Recipient(text)
		if err != nil {
			return nil, fault.Wrap(err, fault.Invalid, "%.100q is no public key of age: it begins with age1 and is made by age-keygen", text)
		}
		recipients = append(recipients, r)
	}
	return recipients, nil
}

func (b *Backup) header(ctx context.Context, state kv.Content, asked Request) (Header, error) {
	status, err := b.Member.Status(ctx)
	if err != nil {
		return Header{}, fault.Wrap(err, fault.Unavailable, "the node is starting; try again in a few seconds")
	}
	id := b.Member.Identity()
	h := Header{
		ID: table.NewID(), Version: b.Version, Site: id.SiteID, Node: id.Name, CA: string(id.CA), Epoch: status.Epoch.Wire(),
		Revision: kv.Applied(state), Created: time.Now().UTC().Truncate(time.Second), Blobs: asked.Blobs, Expected: b.Engine.Size() / 4,
	}
	for _, m := range status.Members {
		if m.ID == status.Self {
			h.Node, h.Addr = m.Name, m.Addr
		}
	}
	if asked.Blobs {
		err = b.each(ctx, func(_ digest.Digest, size int64) error { h.Expected += size; return nil })
	}
	return h, err
}

// each visits the live blobs of the site.
func (b *Backup) each(ctx context.Context, visit func(d digest.Digest, size int64) error) error {
	type blob struct {
		digest.Digest
		size int64
	}
	const page = 256
	for after := digest.Digest(""); ; {
		var found []blob
		rows := 0
		err := b.DB.View(func(v *table.View) error {
			for row, err := range b.Records.Scan(v, after, page) {
				if err != nil {
					return err
				}
				rows++
				after = digest.Digest(row.Key[0])
				if row.Value.State == blobs.Live {
					found = append(found, blob{after, row.Value.Size})
				}
			}
			return nil
		})
		if err != nil || rows == 0 {
			return err
		}
		for _, f := range found {
			if err := errors.Join(ctx.Err(), visit(f.Digest, f.size)); err != nil {
				return err
			}
		}
	}
}

func (b *Backup) writeBlobs(ctx context.Context, out *fileWriter) (s Summary, err error) {
	err = b.each(ctx, func(d digest.Digest, size int64) error {
		defer b.Store.Pin(d)() // no collection between row and file
		from, err := b.open(ctx, d, size)
		if err == nil {
			err = out.part(partBlob, d.String(), func(w io.Writer) error { return copyBlob(w, from, d, size) })
			from.Close()
		} else {
			err = fmt.Errorf("%w: %w", errGivenUp, err)
		}
		switch {
		case err == nil:
			s.Blobs++
			s.Bytes += size
		case errors.Is(err, errGivenUp) && ctx.Err() == nil:
			b.Log.Warn("a blob is missing in the backup", "digest", d.String(), "error", err)
			if s.Missing++; len(s.Examples) < maxExamples {
				s.Examples = append(s.Examples, d.String())
			}
		default:
			return err
		}
		return nil
	})
	return s, err
}

func (b *Backup) open(ctx context.Context, d digest.Digest, size int64) (io.ReadCloser, error) {
	file, _, err := b.Store.OpenBlob(d)
	if fault.Is(err, fault.NotFound) {
		return b.Fetcher.Open(ctx, d, size)
	}
	return file, err
}

// copyBlob copies a blob and proves it. What is wrong with the blob wraps
// errGivenUp, what is wrong with the backup does not.
func copyBlob(w io.Writer, from io.Reader, d digest.Digest, size int64) error {
	verifier := d.Verifier()
	source := &failing{from: io.LimitReader(from, size+1)}
	n, err := io.Copy(io.MultiWriter(w, verifier), source)
	switch {
	case source.err != nil:
		return fmt.Errorf("%w: %w", errGivenUp, source.err)
	case err != nil:
		return err
	case n != size || !verifier.Verified():
		return fmt.Errorf("%w: its %d bytes are not what the digest says", errGivenUp, n)
	}
	return nil
}

// failing remembers the error of a reader.
type failing struct {
	from io.Reader
	err  error
}

func (f *failing) Read(p []byte) (int, error) {
	n, err := f.from.Read(p)
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}
