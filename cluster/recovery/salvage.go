package recovery

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/fxamacker/cbor/v2"
	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
)

// Salvaged is the first line of what Salvage writes.
type Salvaged struct {
	Format int    `json:"format"`
	Site   string `json:"site"`
	Node   string `json:"node"`
	Epoch  string `json:"epoch"` // that fences the node off
	// Since is the revision that the recovered site goes on from; what follows was
	// written after it. Exact is false when the log does not tell any more where
	// this node's history and the survivor's part: then Since is 0 and all that the
	// node has follows.
	Since uint64 `json:"since"`
	Exact bool   `json:"exact"`
	Until uint64 `json:"until"`
}

// SalvagedItem is each line after it: a row or an entry of a log.
type SalvagedItem struct {
	Table    string   `json:"table,omitempty"`
	Key      []string `json:"key,omitempty"`
	Revision uint64   `json:"revision,omitempty"`

	Log string `json:"log,omitempty"`
	Seq uint64 `json:"seq,omitempty"`

	// Value is what the row or the entry says, Raw its bytes in base64.
	Value any    `json:"value,omitempty"`
	Raw   string `json:"raw"`
}

// Count says how much was saved.
type Count struct {
	Salvaged
	Rows, Entries int
}

const salvageDir = "salvaging"

// Salvage writes what a fenced node has and the recovered site has not: the
// rows and journal entries after the point at which the site was recovered, as
// lines of JSON. Nothing in the directory changes. Rows that were deleted after
// that point are not named, and secrets stay sealed.
func Salvage(dir string, keys *keyring.Ring, w io.Writer, log *slog.Logger) (Count, error) {
	id, err := member.LoadIdentity(dir, keys)
	if err != nil {
		return Count{}, err
	}
	fence, ok, err := epoch.LoadFence(dir)
	if err != nil {
		return Count{}, err
	}
	if !ok {
		return Count{}, fmt.Errorf("%w: as far as it knows the site was not recovered without it. Start it where it reaches the others; when it is fenced then, there is something to salvage", ErrNotFenced)
	}
	later, err := epoch.Parse(fence.Epoch)
	if err != nil {
		return Count{}, err
	}
	old, err := openOld(dir, log)
	if err != nil {
		return Count{}, err
	}
	defer old.close()
	b := &builder{dir: filepath.Join(dir, salvageDir), log: log}
	defer os.RemoveAll(b.dir)
	if err := b.begin(); err != nil {
		return Count{}, err
	}
	defer b.close()
	if err := old.copyTo(b); err != nil {
		return Count{}, err
	}
	count := Count{Salvaged: Salvaged{Format: 1, Site: id.SiteID, Node: id.NodeID, Epoch: fence.Epoch, Until: b.last}}
	if later.Index > 0 && old.termAt(later.Index) == later.Term {
		count.Since, count.Exact = later.Index, true
	} else if b.last <= later.Index && old.lastTerm <= later.Term {
		count.Since, count.Exact = b.last, true // the survivor had all that this one has
	}
	out := json.NewEncoder(w)
	if err := out.Encode(count.Salvaged); err != nil {
		return count, err
	}
	appended, err := old.appended(count.Salvaged)
	if err != nil {
		return count, err
	}
	return count, b.engine.Read(func(c kv.Content) error {
		for row := range kv.ReadRows(c, nil, nil) {
			if row.Revision <= count.Since {
				continue
			}
			parts := strings.Split(string(row.Key), "\x00")
			item := SalvagedItem{Table: parts[0], Key: parts[1:], Revision: row.Revision}
			if err := out.Encode(item.with(row.Value)); err != nil {
				return err
			}
			count.Rows++
		}
		for name, length := range kv.Logs(c) {
			from := uint64(0)
			if count.Exact && old.covers(count.Since) {
				from = length - min(length, appended[string(name)])
			}
			for seq, value := range kv.ReadLog(c, name, from) {
				if err := out.Encode(SalvagedItem{Log: string(name), Seq: seq}.with(value)); err != nil {
					return err
				}
				count.Entries++
			}
		}
		return nil
	})
}

// appended counts, for each journal, the entries that were appended after the
// point. A transaction that was refused counts too: then more is saved than
// need be.
func (o *oldState) appended(s Salvaged) (map[string]uint64, error) {
	n := map[string]uint64{}
	if s.Since == s.Until {
		return n, nil
	}
	err := o.entries(s.Since+1, func(l *raft.Log) error {
		if l.Type != raft.LogCommand {
			return nil
		}
		t, err := kv.DecodeTxn(l.Data)
		if err != nil {
			return fmt.Errorf("entry %d of the log: %w", l.Index, err)
		}
		for _, op := range t.Ops {
			if op.Kind == kv.Append {
				n[string(op.Key)]++
			}
		}
		return nil
	})
	return n, err
}

// covers reports whether the log has all that came after an index.
func (o *oldState) covers(index uint64) bool {
	return o.last <= index || o.first > 0 && o.first <= index+1
}

// with adds the value, read if it can be.
func (i SalvagedItem) with(value []byte) SalvagedItem {
	i.Raw = base64.StdEncoding.EncodeToString(value)
	mode, err := cbor.DecOptions{DefaultMapType: nil}.DecMode()
	var v any
	if err == nil && mode.Unmarshal(value, &v) == nil {
		i.Value = readable(v)
	}
	return i
}

// readable makes of a value what JSON can say.
func readable(v any) any {
	switch v := v.(type) {
	case map[any]any:
		m := make(map[string]any, len(v))
		for key, value := range v {
			m[fmt.Sprint(key)] = readable(value)
		}
		return m
	case []any:
		for i := range v {
			v[i] = readable(v[i])
		}
		return v
	case string, bool, nil, int64, uint64, float64, []byte:
		return v
	}
	return fmt.Sprint(v)
}
