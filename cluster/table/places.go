package table

import "bytes"

// places says where in a list what belongs to a key is, the newest of several. Most
// transactions have a dozen keys, which are compared sooner than hashed.
type places struct {
	keys [][]byte
	at   []int          // of each key
	many map[string]int // all of them, once there are more than fewPlaces
}

const fewPlaces = 32

func (p *places) find(key []byte) (at int, ok bool) {
	if p.many != nil {
		at, ok = p.many[string(key)]
		return at, ok
	}
	for i := len(p.keys) - 1; i >= 0; i-- {
		if bytes.Equal(p.keys[i], key) {
			return p.at[i], true
		}
	}
	return 0, false
}

// set keeps the key, which must stay as it is.
func (p *places) set(key []byte, at int) {
	p.keys, p.at = append(p.keys, key), append(p.at, at)
	switch {
	case p.many != nil:
		p.many[string(key)] = at
	case len(p.keys) > fewPlaces:
		p.many = make(map[string]int, 2*fewPlaces)
		for i, k := range p.keys {
			p.many[string(k)] = p.at[i]
		}
	}
}

func (p *places) empty() {
	clear(p.keys)
	p.keys, p.at, p.many = p.keys[:0], p.at[:0], nil
}
