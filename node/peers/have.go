package peers

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
)

// blobsAsked bounds the blobs that one question names, and so what the answer
// costs: a look at the directory for each.
const blobsAsked = 1024

// heldWait bounds the wait for an answer that costs a node a look at its
// directories.
const heldWait = 30 * time.Second

// haveQuestion asks a node which of some blobs it holds durably.
type haveQuestion struct {
	Blobs []byte `json:"blobs"` // see pack
	// Any asks a node that is no home, too. What such a node holds it may let go of.
	Any bool `json:"any,omitempty"`
	// Keep asks which of them are also the node's to keep, by its own reckoning.
	Keep bool `json:"keep,omitempty"`
}

func (q haveQuestion) check() error {
	_, err := unpack(q.Blobs)
	return err
}

// haveAnswer says it of each, in the order of the question. A node that is no
// home, whatever the asker's rows say of it, keeps nothing for the site.
type haveAnswer struct {
	Home bool `json:"home"`
	Held bits `json:"held"`
	Kept bits `json:"kept,omitempty"` // held, and of which the node is a home
}

// bits has one for each blob of a question.
type bits []byte

func newBits(n int) bits        { return make(bits, (n+7)/8) }
func (b bits) set(i int)        { b[i/8] |= 1 << (i % 8) }
func (b bits) has(i int) bool   { return i/8 < len(b) && b[i/8]&(1<<(i%8)) != 0 }
func (b bits) holds(n int) bool { return len(b) == (n+7)/8 }

// pack writes digests one after the other, each as the number of its bytes and
// these: half of what their text takes.
func pack(ds []digest.Digest) ([]byte, error) {
	out := make([]byte, 0, 33*len(ds))
	for _, d := range ds {
		if _, err := entry.ParseDigest(d.String()); err != nil {
			return nil, err
		}
		sum, err := hex.DecodeString(d.Encoded())
		if err != nil {
			return nil, err
		}
		out = append(append(out, byte(len(sum))), sum...)
	}
	return out, nil
}

// unpack reads what pack wrote, up to blobsAsked digests.
func unpack(b []byte) (ds []digest.Digest, err error) {
	for len(b) > 0 {
		size := int(b[0])
		at := slices.IndexFunc(entry.Algorithms(), func(a digest.Algorithm) bool { return a.Size() == size })
		if at < 0 || len(b) <= size {
			return nil, fmt.Errorf("after %d digests comes none", len(ds))
		}
		if len(ds) == blobsAsked {
			return nil, fmt.Errorf("more than %d blobs at once", blobsAsked)
		}
		ds = append(ds, digest.NewDigestFromBytes(entry.Algorithms()[at], b[1:1+size]))
		b = b[1+size:]
	}
	return ds, nil
}

// answerHave implements haveQuestion. It waits for no removal under way here: that
// may wait for the asker.
func (p *Peers) answerHave(_ context.Context, q haveQuestion) (any, error) {
	ds, err := unpack(q.Blobs)
	if err != nil {
		return nil, err
	}
	return p.have(ds, q)
}

func (p *Peers) have(ds []digest.Digest, q haveQuestion) (answer haveAnswer, err error) {
	self, ok := p.find(p.Roster.Self())
	answer = haveAnswer{Home: ok && mayBeHome(self) && !p.Cache.On, Held: newBits(len(ds))}
	if !answer.Home && !q.Any {
		return answer, nil
	}
	for i, d := range ds {
		held, err := p.Store.Keeps(d)
		if err != nil {
			return answer, err
		}
		if held {
			answer.Held.set(i)
		}
	}
	if !q.Keep {
		return answer, nil
	}
	answer.Kept = newBits(len(ds))
	if !answer.Home {
		return answer, nil
	}
	err = p.DB.View(func(v *table.View) error {
		l, err := p.layout(v)
		if err != nil {
			return err
		}
		for i, d := range ds {
			if !answer.Held.has(i) {
				continue
			}
			n, err := p.replicas(v, d)
			if err != nil {
				return err
			}
			if slices.Contains(l.homesOf(d, n), l.self) {
				answer.Kept.set(i)
			}
		}
		return nil
	})
	return answer, err
}

// askHave asks one node for up to blobsAsked blobs, as q says.
func (p *Peers) askHave(ctx context.Context, id string, ds []digest.Digest, q haveQuestion) (answer haveAnswer, err error) {
	if id == p.Roster.Self() {
		return p.have(ds, q)
	}
	if q.Blobs, err = pack(ds); err != nil {
		return answer, err
	}
	ctx, cancel := context.WithTimeout(ctx, heldWait)
	defer cancel()
	err = p.whileLive(ctx, id, func(ctx context.Context) error {
		return p.call(ctx, id, "have", q, &answer)
	})
	if err == nil && (!answer.Held.holds(len(ds)) || q.Keep && !answer.Kept.holds(len(ds))) {
		err = fmt.Errorf("node %s did not answer for all of %d blobs", id, len(ds))
	}
	return answer, err
}
