package traffic

import "github.com/atoll-registry/atoll/transfer"

// The memory for parts of blobs is cut in ninths, and a node may have so many
// connections of others for each file that it may open.
const (
	ninths        = 9
	comingNinths  = 4 // of each engine
	sendingNinths = 1
	filesPerConn  = 4
)

// limit makes what bounds the engines and the answers to clients, as the settings say
// at each moment.
func (t *Traffic) limit(files int) {
	memory := func(parts int64) func() int {
		return func() int { return int(t.set.memory.Value() * parts / ninths / transfer.PieceSize) }
	}
	t.answering, t.fetching = transfer.NewPlaces(t.set.answers.Value), transfer.NewPlaces(t.set.fetches.Value)
	t.stream = transfer.Limits{
		Fetches: transfer.NewPlaces(func() int { return t.set.pulls.Value() + t.set.fetches.Value() }),
		Pieces:  transfer.NewPlaces(memory(comingNinths)),
		Sending: transfer.NewPlaces(memory(sendingNinths)),
		Conns: transfer.NewPlaces(func() int {
			most := t.set.conns.Value()
			if files > 0 {
				most = min(most, max(files/filesPerConn, 1))
			}
			return most
		}),
		Holders: t.set.holders.Value,
	}
	t.swarm = t.stream
	t.swarm.Pieces = transfer.NewPlaces(memory(comingNinths))
}

// Limits of the two engines, which share all but the memory for what comes in.
func (t *Traffic) Limits() (stream, swarm transfer.Limits) { return t.stream, t.swarm }

// Bound is how much of something is in use, and how much there may be.
type Bound struct {
	Taken int64 `json:"taken"`
	Most  int64 `json:"most"`
}

// Use is what a node has in use of its limits.
type Use struct {
	Node    string `json:"node"`
	Fetches Bound  `json:"fetches"` // blobs on their way to it
	// Background are those of them that are for repair and prefetch.
	Background  Bound `json:"background"`
	Answers     Bound `json:"answers"`     // blobs on their way to clients
	Connections Bound `json:"connections"` // of other nodes, for blobs
	Memory      Bound `json:"memory"`      // bytes, for parts of blobs on their way between nodes
}

// use is this node's.
func (t *Traffic) use(name string) Use {
	u := Use{
		Node: name, Fetches: bound(t.stream.Fetches, 1), Background: bound(t.fetching, 1), Answers: bound(t.answering, 1),
		Connections: bound(t.stream.Conns, 1),
	}
	for _, p := range []*transfer.Places{t.stream.Pieces, t.swarm.Pieces, t.stream.Sending} {
		b := bound(p, transfer.PieceSize)
		u.Memory.Taken += b.Taken
		u.Memory.Most += b.Most
	}
	return u
}

func bound(p *transfer.Places, each int64) Bound {
	taken, most := p.Use()
	return Bound{int64(taken) * each, int64(most) * each}
}
