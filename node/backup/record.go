package backup

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// Record is what the site remembers of its last backup. It is written when
// whoever asked for the backup has said that it has all of it, verified: a backup
// that this node has sent may still have got lost.
type Record struct {
	ID         string   `cbor:"id" json:"id"`
	At         int64    `cbor:"at" json:"at"`     // the moment whose state it holds, in Unix seconds
	Node       string   `cbor:"node" json:"node"` // name of the node that wrote it
	Revision   uint64   `cbor:"revision" json:"revision"`
	Recipients []string `cbor:"recipients,omitempty" json:"recipients"` // public keys; none: not encrypted
	Blobs      bool     `cbor:"blobs,omitempty" json:"blobs"`           // it holds content, too
	Missing    int      `cbor:"missing,omitempty" json:"missing"`       // blobs that are not in it
}

// lastKey is the key of the one row.
const lastKey = "last"

// A backup that was sent is waited for by nobody for longer than sentKept, and of
// more than sentMost the oldest is forgotten.
const (
	sentKept = time.Hour
	sentMost = 16
)

// sent is what this node has sent or is about to end sending. It is safe for
// concurrent use.
type sent struct {
	mu  sync.Mutex
	all []*sending
}

type sending struct {
	Record
	began time.Time
	done  chan struct{} // closed when the last byte was taken
	err   error         // of that
}

// ending notes a backup whose last bytes are about to go, so that the answer to
// them finds it.
func (s *sent) ending(r Record) *sending {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := &sending{Record: r, began: time.Now(), done: make(chan struct{})}
	s.all = slices.DeleteFunc(append(s.all, one), func(o *sending) bool { return time.Since(o.began) > sentKept })
	s.all = s.all[max(0, len(s.all)-sentMost):]
	return one
}

func (o *sending) end(err error) error {
	o.err = err
	close(o.done)
	return err
}

func (s *sent) find(id string) *sending {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.all, func(o *sending) bool { return o.ID == id })
	if i < 0 {
		return nil
	}
	return s.all[i]
}

// Confirm makes the site remember a backup that this node has sent: whoever asked
// for it has it whole. fault.NotFound when this node knows of none with that id.
// An older backup than the one remembered changes nothing.
func (b *Backup) Confirm(ctx context.Context, id string) (Record, error) {
	one := b.sent.find(id)
	if one == nil {
		return Record{}, fault.New(fault.NotFound, "this node has sent no backup %s within the last hour; say that it arrived to the node that sent it", id)
	}
	select {
	case <-one.done:
	case <-ctx.Done():
		return Record{}, ctx.Err()
	}
	if one.err != nil {
		return Record{}, fault.Wrap(one.err, fault.Precondition, "backup %s was not sent to its end", id)
	}
	_, err := b.DB.Update(ctx, func(tx *table.Tx) error {
		was, _, ok, err := b.rows.Get(tx, lastKey)
		if err != nil || ok && was.Revision >= one.Revision {
			return err
		}
		return b.rows.Put(tx, one.Record, lastKey)
	})
	if err != nil {
		return Record{}, fmt.Errorf("noting backup %s: %w", id, err)
	}
	b.Log.Info("backup arrived", "id", id, "revision", one.Revision)
	return one.Record, nil
}

// Last is the site's last backup that arrived; ok is false when there was none.
func (b *Backup) Last(r table.Reader) (last Record, ok bool, err error) {
	last, _, ok, err = b.rows.Get(r, lastKey)
	return last, ok, err
}

func (b *Backup) confirmOperation(k *rest.Kernel) {
	type in struct {
		ID string `path:"id" max:"64"`
	}
	rest.Register(k, rest.Operation[in, Record]{
		ID: "confirmBackup", Method: http.MethodPut, Path: "/api/atoll/v1/backup/{id}", Tag: "cluster",
		Summary: "Say that a backup arrived whole, so that the site remembers it as its last", Permission: access.NodeManage,
		Do: func(ctx context.Context, in *in) (Record, error) { return b.Confirm(ctx, in.ID) },
	})
}

// ageMetric is the metric of the last backup; there is none before the first.
type ageMetric struct {
	*Backup
	desc *prometheus.Desc
}

func newAge(b *Backup) ageMetric {
	return ageMetric{b, prometheus.NewDesc("atoll_backup_age_seconds", "How old the site's last backup is that arrived; not there before the first.", nil, nil)}
}

// Describe implements prometheus.Collector.
func (a ageMetric) Describe(ch chan<- *prometheus.Desc) { ch <- a.desc }

// Collect implements prometheus.Collector.
func (a ageMetric) Collect(ch chan<- prometheus.Metric) {
	err := a.DB.View(func(v *table.View) error {
		last, ok, err := a.Last(v)
		if err == nil && ok {
			ch <- prometheus.MustNewConstMetric(a.desc, prometheus.GaugeValue, time.Since(time.Unix(last.At, 0)).Seconds())
		}
		return err
	})
	if err != nil {
		a.Log.Debug("reading the last backup for the metrics", slog.Any("err", err))
	}
}
