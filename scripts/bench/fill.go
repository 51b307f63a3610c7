package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// samples is how many artifacts are pushed through the API for the fill to
// learn from and to prove itself on.
const samples = 64

// The names of an artifact that its rows repeat: its number in the manifest's
// bytes, its digest as text and as bytes, its tag.
const (
	names   = 4
	nameTag = 3
)

type artifact struct {
	number int
	names  [names][]byte
}

func newArtifact(number int) (artifact, error) {
	data, err := manifest(number)
	if err != nil {
		return artifact{}, err
	}
	d := digest.FromBytes(data)
	raw, err := hex.DecodeString(d.Encoded())
	return artifact{number, [names][]byte{fmt.Appendf(nil, "%08d", number), []byte(d.Encoded()), raw, []byte(tagOf(number))}}, err
}

func (a *artifact) in(b []byte) bool {
	return slices.ContainsFunc(a.names[:], func(name []byte) bool { return bytes.Contains(b, name) })
}

// fill gives the node of a data directory, which is down, artifacts with the
// numbers from..to-1 and a tag each, where the samples are. Rows, entries of the
// journal and results are those of a sample that was pushed through the API, with
// other names in them, and they reach the node as all state reaches a node that
// joins: in a snapshot, which it restores at its next start, where it derives its
// indexes. Pushing a million one by one takes an hour on a busy machine.
func fill(dir string, from, to int, sample [samples]artifact) error {
	f, err := learn(dir, sample)
	if err != nil {
		return err
	}
	f.to = make([]artifact, 0, to-from)
	for i := from; i < to; i++ {
		a, err := newArtifact(i)
		if err != nil {
			return err
		}
		f.to = append(f.to, a)
	}
	f.byDigest = slices.SortedFunc(indexes(len(f.to)), func(i, j int) int { return bytes.Compare(f.to[i].names[1], f.to[j].names[1]) })
	return f.write(dir)
}

func indexes(n int) func(func(int) bool) {
	return func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
}

// filling is what is known of a push, and what is to be pushed.
type filling struct {
	rows     []family
	journal  []byte // the name of the log
	entries  []form // of the model's push
	to       []artifact
	byDigest []int
	at       kv.Position
	value    []byte                // is used again for each record
	state    func(io.Writer) error // writes the node's state as a snapshot
	close    func() error
}

// family is the rows of one kind: a row of the model, and the place of the next.
type family struct {
	key      form
	value    form
	byTag    bool
	next     int
	nextKey  []byte
	nextFrom *artifact
	rev      uint64
}

// learn takes the first sample's rows for the model and derives the others' from
// them: they must be those that the node wrote.
func learn(dir string, sample [samples]artifact) (*filling, error) {
	engine, err := kv.OpenBolt(filepath.Join(dir, "meta.db"))
	if err != nil {
		return nil, err
	}
	machine, err := kv.NewMachine(engine, kv.Hooks{})
	if err != nil {
		return nil, err
	}
	f := &filling{at: machine.Position(), close: engine.Close}
	f.state = func(w io.Writer) error {
		return engine.Read(func(c kv.Content) error { return kv.WriteSnapshot(w, c) })
	}
	var found [samples][]record
	err = f.read(func(rec record) error {
		if rec.kind == 'L' {
			f.journal = rec.key
		}
		if rec.kind != 'R' && rec.kind != 'E' {
			return nil
		}
		for i := range sample {
			if !sample[i].in(rec.key) && !sample[i].in(rec.value) {
				continue
			}
			if rec.kind == 'R' && !sample[i].in(rec.key) {
				return fmt.Errorf("the row %q tells of a push and is not its own: the fill cannot make such a row", rec.key)
			}
			if rec.kind == 'E' {
				rec.key = f.journal
			}
			found[i] = append(found[i], rec)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := range sample {
		if err := like(found[0], found[i], &sample[0], &sample[i]); err != nil {
			return nil, err
		}
	}
	for _, rec := range found[0] {
		if rec.kind == 'E' {
			f.journal, f.entries = rec.key, append(f.entries, formOf(rec.value, &sample[0].names))
			continue
		}
		key := formOf(rec.key, &sample[0].names)
		f.rows = append(f.rows, family{key: key, value: formOf(rec.value, &sample[0].names), byTag: key.holes[0] == nameTag})
	}
	if len(f.rows) < 3 || len(f.entries) == 0 {
		return nil, fmt.Errorf("a push wrote %d rows and %d entries: these are not all", len(f.rows), len(f.entries))
	}
	return f, nil
}

// like reports how the records of one push differ from those of another.
func like(model, other []record, from, to *artifact) error {
	if len(model) != len(other) {
		return fmt.Errorf("a push wrote %d records and another one %d", len(model), len(other))
	}
	made := slices.Clone(model)
	for i := range made {
		made[i].key = formOf(made[i].key, &from.names).with(nil, &to.names)
		made[i].value = formOf(made[i].value, &from.names).with(nil, &to.names)
	}
	order := func(a, b record) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), bytes.Compare(a.key, b.key), cmp.Compare(len(a.value), len(b.value)))
	}
	slices.SortStableFunc(made, order)
	other = slices.SortedStableFunc(slices.Values(other), order)
	for i := range made {
		if made[i].kind != other[i].kind || !bytes.Equal(made[i].key, other[i].key) || !sameButTime(made[i].value, other[i].value) {
			return fmt.Errorf("a push wrote %q = %x, the fill would write %q = %x", other[i].key, other[i].value, made[i].key, made[i].value)
		}
	}
	return nil
}

// sameButTime compares two values but for times in seconds, which are 4 bytes
// behind their CBOR head.
func sameButTime(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	const head = 0x1a
	for i := 0; i < len(a); i++ {
		if i+5 <= len(a) && a[i] == head && b[i] == head {
			i += 4
		} else if a[i] != b[i] {
			return false
		}
	}
	return true
}

// read gives the records of the node's state.
func (f *filling) read(each func(record) error) error {
	from, to := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := f.state(to)
		to.CloseWithError(err)
		done <- err
	}()
	err := readState(from, func(_ uint64, rec record) error { return each(rec) })
	from.Close()
	if wrote := <-done; err == nil {
		err = wrote
	}
	return err
}

// write stores the node's state with the artifacts in it as its newest snapshot.
func (f *filling) write(dir string) (err error) {
	defer f.close()
	store, err := raft.NewFileSnapshotStoreWithLogger(filepath.Join(dir, "raft"), 2, hclog.NewNullLogger())
	if err != nil {
		return err
	}
	_, transport := raft.NewInmemTransport("")
	last := f.at.Index + uint64(len(f.to))
	sink, err := store.Create(raft.SnapshotVersionMax, last, f.at.Term, raft.DecodeConfiguration(f.at.Members), f.at.Changed, transport)
	if err != nil {
		return err
	}
	out, err := writeState(sink, last)
	if err == nil {
		err = f.merge(out, last)
	}
	if err == nil {
		err = out.end()
	}
	if err != nil {
		sink.Cancel()
		return err
	}
	return sink.Close()
}

// merge puts the new records between those of the state.
func (f *filling) merge(out *stateWriter, last uint64) error {
	for i := range f.rows {
		f.advance(&f.rows[i])
	}
	var before byte
	var length uint64 // of the journal, while its entries pass
	ours := false
	turn := func(kind byte) error {
		defer func() { before = kind }()
		if before == 'R' && kind != 'R' {
			if err := f.rowsBefore(out, nil); err != nil {
				return err
			}
		}
		if ours && kind != 'E' {
			ours = false
			return f.extend(out, length)
		}
		return nil
	}
	err := f.read(func(rec record) error {
		if err := turn(rec.kind); err != nil {
			return err
		}
		switch rec.kind {
		case 'R':
			if err := f.rowsBefore(out, rec.key); err != nil {
				return err
			}
		case 'L':
			if ours = bytes.Equal(rec.key, f.journal); ours {
				length = rec.a
				rec.a += uint64(len(f.to) * len(f.entries))
			}
		case 'S':
			if rec.a+kv.Window < last {
				return nil
			}
		}
		return out.put(rec)
	})
	if err == nil {
		err = turn('Z')
	}
	if err != nil {
		return err
	}
	for rev := max(last-kv.Window, f.at.Index+1); rev <= last; rev++ {
		id, r := kv.NewID(), kv.Result{Rev: rev}
		for i := range f.entries {
			r.Numbers = append(r.Numbers, length+(rev-f.at.Index-1)*uint64(len(f.entries))+uint64(i))
		}
		if err := out.put(record{kind: 'S', a: rev, key: id[:], value: r.Encode()}); err != nil {
			return err
		}
	}
	return nil
}

// rowsBefore writes the new rows with keys below one, in order; all that are left
// for nil.
func (f *filling) rowsBefore(out *stateWriter, key []byte) error {
	for {
		var least *family
		for i := range f.rows {
			x := &f.rows[i]
			if x.nextKey != nil && (least == nil || bytes.Compare(x.nextKey, least.nextKey) < 0) {
				least = x
			}
		}
		if least == nil || key != nil && bytes.Compare(least.nextKey, key) >= 0 {
			return nil
		}
		f.value = least.value.with(f.value[:0], &least.nextFrom.names)
		if err := out.put(record{kind: 'R', key: least.nextKey, a: least.rev, b: least.rev, value: f.value}); err != nil {
			return err
		}
		f.advance(least)
	}
}

// advance moves a family to its next row.
func (f *filling) advance(x *family) {
	if x.next == len(f.to) {
		x.nextKey = nil
		return
	}
	i := x.next
	if !x.byTag {
		i = f.byDigest[i]
	}
	x.next++
	x.nextFrom, x.rev = &f.to[i], f.at.Index+1+uint64(i)
	x.nextKey = x.key.with(x.nextKey[:0], &f.to[i].names)
}

// extend writes the new entries of the journal.
func (f *filling) extend(out *stateWriter, seq uint64) error {
	for i := range f.to {
		for _, entry := range f.entries {
			f.value = entry.with(f.value[:0], &f.to[i].names)
			if err := out.put(record{kind: 'E', a: seq, value: f.value}); err != nil {
				return err
			}
			seq++
		}
	}
	return nil
}

// teach pushes the samples.
func (b *bench) teach(ctx context.Context, first int) (sample [samples]artifact, err error) {
	for i := range sample {
		if sample[i], err = newArtifact(first + i); err != nil {
			return sample, err
		}
	}
	s := b.fleet[0]
	return sample, together(writers, samples, func(i int) error {
		data, err := manifest(first + i)
		if err != nil {
			return err
		}
		return s.putManifest(ctx, large, tagOf(first+i), data)
	})
}
