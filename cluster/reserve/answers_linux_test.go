package reserve_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/reserve"
)

// A disk that is full again and again, in the middle of whatever is written, and
// starts between, change no answer to any entry and no byte of the state: it is that
// of a replica whose disk was never full. Entries come in batches of any size, rest on
// rows and ranges as they are or were, and some come twice.
func TestAFullDiskChangesNoAnswer(t *testing.T) {
	dir := onSmallDisk(t, "24m")
	if dir == "" {
		return
	}
	well := kv.NewMemory()
	replica, err := kv.NewMachine(well, kv.Hooks{})
	if err != nil {
		t.Fatal(err)
	}
	var engine kv.Engine
	var machine *kv.Machine
	start := func() {
		t.Helper()
		r, err := reserve.Open(reserve.Path(dir), statfs{dir}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		bolt, err := kv.OpenBolt(filepath.Join(dir, "state.db"))
		if err != nil {
			t.Fatal(err)
		}
		engine = kv.WriteBehind(r.Engine(bolt))
		if machine, err = kv.NewMachine(engine, kv.Hooks{}); err != nil {
			t.Fatal(err)
		}
	}
	start()
	filled, stop := fillAgainAndAgain(dir)
	dice := rand.New(rand.NewPCG(7, 7))
	p := proposer{t: t, dice: dice, state: well}
	conflicts, starts := 0, 1
	for index, entries := uint64(0), uint64(3000); index < entries; {
		var logs []*raft.Log
		var want []any
		for range min(entries-index, 1+dice.Uint64N(64)) {
			index++
			logs = append(logs, &raft.Log{Index: index, Term: 1, Type: raft.LogCommand, Data: p.txn(index)})
			answer := replica.Apply(logs[len(logs)-1])
			if answer.(kv.Result).Code == kv.Conflict {
				conflicts++
			}
			want = append(want, answer)
		}
		if diff := cmp.Diff(want, machine.ApplyBatch(logs)); diff != "" {
			t.Fatalf("answers up to entry %d: %s", index, diff)
		}
		if dice.IntN(15) == 0 {
			if err := engine.Close(); err != nil {
				t.Fatal(err)
			}
			start()
			starts++
		}
	}
	stop()
	if !bytes.Equal(snapshotOf(t, well), snapshotOf(t, engine)) {
		t.Error("the states differ")
	}
	full := filled()
	t.Logf("%d conflicts, %d starts, full %d times", conflicts, starts, full)
	if conflicts == 0 || full < 3 {
		t.Errorf("only %d conflicts, and a disk that was full %d times", conflicts, full)
	}
	if err := engine.Close(); err != nil {
		t.Fatal(err)
	}
}

// fillAgainAndAgain takes all space for some milliseconds, gives it back for some, and
// so on until stop.
func fillAgainAndAgain(dir string) (times func() int, stop func()) {
	ended, end, n := make(chan struct{}), make(chan struct{}), 0
	go func() {
		defer close(ended)
		tick := time.NewTicker(15 * time.Millisecond)
		defer tick.Stop()
		for block := make([]byte, 64<<10); ; n++ {
			name := filepath.Join(dir, "eaten")
			if f, err := os.Create(name); err == nil {
				for size := len(block); size >= 4096; {
					if _, err := f.Write(block[:size]); errors.Is(err, syscall.ENOSPC) {
						size /= 2
					}
				}
				<-tick.C
				_ = f.Close()
				_ = os.Remove(name) // else the next one is as full
			}
			select {
			case <-tick.C:
			case <-end:
				return
			}
		}
	}()
	return func() int { <-ended; return n }, func() { close(end); <-ended }
}

// proposer makes transactions such as pushes are made of.
type proposer struct {
	t     *testing.T
	dice  *rand.Rand
	state kv.Engine
	sent  [][]byte
}

func (p *proposer) key() []byte {
	switch p.dice.IntN(3) {
	case 0:
		return fmt.Appendf(nil, "tag\x00library\x00t%d", p.dice.IntN(6))
	case 1:
		return fmt.Appendf(nil, "artifact\x00library\x00%04d", p.dice.IntN(2000))
	default:
		return fmt.Appendf(nil, "ref\x00%04d\x00library", p.dice.IntN(2000))
	}
}

func (p *proposer) txn(index uint64) []byte {
	if len(p.sent) > 0 && p.dice.IntN(8) == 0 {
		return p.sent[max(0, len(p.sent)-1-p.dice.IntN(40))] // nobody knew what became of it
	}
	x := kv.Txn{ID: kv.NewID(), Base: index - 1}
	if err := p.state.Read(func(c kv.Content) error {
		for range p.dice.IntN(5) {
			k := p.key()
			row, _ := kv.ReadRow(c, k)
			if p.dice.IntN(12) == 0 {
				row.Revision /= 2 // as it was
			}
			x.Conds = append(x.Conds, kv.Cond{Kind: kv.RevIs, Key: k, Rev: row.Revision})
			if p.dice.IntN(3) == 0 {
				x.Ops = append(x.Ops, kv.Op{Kind: kv.Delete, Key: k})
			} else {
				x.Ops = append(x.Ops, kv.Op{Kind: kv.Put, Key: k, Value: make([]byte, p.dice.IntN(700))})
			}
		}
		from := fmt.Appendf(nil, "ref\x00%03d", p.dice.IntN(200))
		seen := kv.Cond{Kind: kv.RangeIs, Key: from, End: append(bytes.Clone(from), 0xff)}
		for row := range kv.ReadRows(c, seen.Key, seen.End) {
			seen.Len, seen.Rev = seen.Len+1, max(seen.Rev, row.Revision)
		}
		x.Conds = append(x.Conds, seen)
		return nil
	}); err != nil {
		p.t.Fatal(err)
	}
	x.Ops = append(x.Ops, kv.Op{Kind: kv.Put, Key: p.key(), Value: make([]byte, 3000)}, kv.Op{Kind: kv.Append, Key: []byte("journal"), Value: make([]byte, 150)})
	data, err := x.Encode()
	if err != nil {
		p.t.Fatal(err)
	}
	p.sent = append(p.sent, data)
	return data
}

func snapshotOf(t *testing.T, e kv.Engine) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := e.Read(func(c kv.Content) error { return kv.WriteSnapshot(&b, c) }); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
