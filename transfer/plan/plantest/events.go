package plantest

type kind uint8

const (
	evNote   kind = iota // from a, to all that hear it
	evAsk                // from b, to a
	evCancel             // from b, to a
	evBegun              // from b, to a
	evDone               // a's next piece is out; x is the version of its flows
	evJoin
	evDie
	evGone  // others notice
	evTick  // a looks whether time alone changes what to ask
	evServe // the same for what to send
)

// event of the simulation; what a, b, piece and x mean depends on the kind.
type event struct {
	at    float64
	seq   uint64
	kind  kind
	a, b  int32
	piece int32
	x     int32
}

// push adds an event to the heap.
func (s *sim) push(e event) {
	s.seq++
	e.seq = s.seq
	h := append(s.heap, e)
	i := len(h) - 1
	for i > 0 {
		p := (i - 1) / 2
		if !less(h[i], h[p]) {
			break
		}
		h[i], h[p] = h[p], h[i]
		i = p
	}
	s.heap = h
}

// less is a total order, so that a run is the same each time.
func less(a, b event) bool { return a.at < b.at || a.at == b.at && a.seq < b.seq }

// pop takes the next event.
func (s *sim) pop() event {
	h := s.heap
	top := h[0]
	n := len(h) - 1
	h[0] = h[n]
	h = h[:n]
	i := 0
	for {
		c := 2*i + 1
		if c >= n {
			break
		}
		if c+1 < n && less(h[c+1], h[c]) {
			c++
		}
		if !less(h[c], h[i]) {
			break
		}
		h[i], h[c] = h[c], h[i]
		i = c
	}
	s.heap = h
	return top
}
