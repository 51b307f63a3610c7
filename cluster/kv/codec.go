package kv

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// ErrFormat means that the bytes are no Txn or Result of a format that this
// version reads.
var ErrFormat = errors.New("unreadable format")

// ErrTooLarge means that a Txn is over one of the limits.
var ErrTooLarge = errors.New("transaction too large")

// Encode gives the Txn's bytes, or ErrTooLarge when it is over a limit. The
// result does not alias the Txn.
func (t *Txn) Encode() ([]byte, error) {
	if len(t.Conds)+len(t.Ops) > MaxParts {
		return nil, fmt.Errorf("%w: %d conditions and %d operations, at most %d together", ErrTooLarge, len(t.Conds), len(t.Ops), MaxParts)
	}
	size := 64
	for i := range t.Conds {
		size += len(t.Conds[i].Key) + len(t.Conds[i].End) + 32
	}
	for i := range t.Ops {
		size += len(t.Ops[i].Key) + len(t.Ops[i].Value) + 32
	}
	b := append(make([]byte, 0, size), Version)
	b = append(b, t.ID[:]...)
	b = binary.AppendUvarint(b, t.Base)
	b = binary.AppendUvarint(b, uint64(len(t.Conds)))
	var err error
	for i := range t.Conds {
		if b, err = t.Conds[i].append(b); err != nil {
			return nil, fmt.Errorf("condition %d: %w", i, err)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(t.Ops)))
	for i := range t.Ops {
		if b, err = t.Ops[i].append(b); err != nil {
			return nil, fmt.Errorf("operation %d: %w", i, err)
		}
	}
	if len(b) > MaxTxnBytes {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(b), MaxTxnBytes)
	}
	return b, nil
}

func (c *Cond) append(b []byte) ([]byte, error) {
	if err := checkKey(c.Key); err != nil {
		return nil, err
	}
	b = append(b, byte(c.Kind))
	b = appendBytes(b, c.Key)
	switch c.Kind {
	case RevIs:
		return binary.AppendUvarint(b, c.Rev), nil
	case RangeIs:
		if err := checkRange(c.Key, c.End, c.Len); err != nil {
			return nil, err
		}
		b = appendBytes(b, c.End)
		b = binary.AppendUvarint(b, c.Len)
		return binary.AppendUvarint(b, c.Rev), nil
	case LenIs:
		return binary.AppendUvarint(b, c.Len), nil
	}
	return nil, fmt.Errorf("%w: condition of kind %d", ErrFormat, c.Kind)
}

func (o *Op) append(b []byte) ([]byte, error) {
	if err := checkKey(o.Key); err != nil {
		return nil, err
	}
	b = append(b, byte(o.Kind))
	b = appendBytes(b, o.Key)
	switch o.Kind {
	case Put, Append:
		return appendBytes(b, o.Value), nil
	case Delete:
		return b, nil
	case Add:
		b = binary.BigEndian.AppendUint64(b, uint64(o.Delta))
		return binary.BigEndian.AppendUint64(b, uint64(o.Max)), nil
	case Trim:
		return binary.AppendUvarint(b, o.Upto), nil
	}
	return nil, fmt.Errorf("%w: operation of kind %d", ErrFormat, o.Kind)
}

func checkKey(key []byte) error {
	if len(key) == 0 {
		return fmt.Errorf("%w: empty key", ErrFormat)
	}
	if len(key) > MaxKeyBytes {
		return fmt.Errorf("%w: a key of %d bytes, at most %d", ErrTooLarge, len(key), MaxKeyBytes)
	}
	return nil
}

func checkRange(key, end []byte, rows uint64) error {
	if err := checkKey(end); err != nil {
		return err
	}
	if bytes.Compare(key, end) >= 0 {
		return fmt.Errorf("%w: a range that ends before it starts", ErrFormat)
	}
	if rows > MaxRangeRows {
		return fmt.Errorf("%w: a range of %d rows, at most %d", ErrTooLarge, rows, MaxRangeRows)
	}
	return nil
}

func appendBytes(b, data []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(data))), data...)
}

// DecodeTxn reads what Encode wrote and refuses everything else. Keys and
// values alias data.
func DecodeTxn(data []byte) (*Txn, error) {
	t := &Txn{}
	if err := readTxn(data, t); err != nil {
		return nil, err
	}
	return t, nil
}

// CheckTxn gives the error that DecodeTxn would give. A leader calls it on bytes
// before it commits them: an entry that is committed and cannot be read halts every
// node.
func CheckTxn(data []byte) error { return readTxn(data, nil) }

// readTxn reads into a Txn, in the place of what it held; nil is for who only wants to know
// whether it can be read.
func readTxn(data []byte, t *Txn) error {
	if len(data) == 0 {
		return fmt.Errorf("%w: an empty entry", ErrFormat)
	}
	if data[0] != Version {
		return fmt.Errorf("%w: transaction format %d, this version reads %d; update this node", ErrFormat, data[0], Version)
	}
	if len(data) > MaxTxnBytes {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(data), MaxTxnBytes)
	}
	p := parser{rest: data[1:]}
	id, base := p.take(uint64(len(ID{}))), p.uvarint()
	conds := p.count(MaxParts)
	if t != nil {
		copy(t.ID[:], id)
		t.Base, t.Conds = base, slices.Grow(t.Conds[:0], int(conds))
	}
	for i := uint64(0); i < conds && p.err == nil; i++ {
		if c := p.cond(); t != nil {
			t.Conds = append(t.Conds, c)
		}
	}
	ops := p.count(MaxParts - conds)
	if t != nil {
		t.Ops = slices.Grow(t.Ops[:0], int(ops))
	}
	for i := uint64(0); i < ops && p.err == nil; i++ {
		if o := p.op(); t != nil {
			t.Ops = append(t.Ops, o)
		}
	}
	if p.err == nil && len(p.rest) > 0 {
		p.fail("%d bytes after the last operation", len(p.rest))
	}
	if p.err != nil {
		return fmt.Errorf("transaction: %w", p.err)
	}
	return nil
}

// parser takes values off the front of a byte string. After the first failure
// it gives zero values.
type parser struct {
	rest []byte
	err  error
}

func (p *parser) fail(format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
		p.rest = nil
	}
}

func (p *parser) take(n uint64) []byte {
	if n > uint64(len(p.rest)) {
		p.fail("cut short")
		return nil
	}
	b := p.rest[:n:n]
	p.rest = p.rest[n:]
	return b
}

func (p *parser) byte() byte {
	if b := p.take(1); len(b) == 1 {
		return b[0]
	}
	return 0
}

func (p *parser) uvarint() uint64 {
	v, n := binary.Uvarint(p.rest)
	if n <= 0 {
		p.fail("bad integer")
		return 0
	}
	if n > 1 && p.rest[n-1] == 0 {
		p.fail("an integer that is not in its shortest form")
		return 0
	}
	p.rest = p.rest[n:]
	return v
}

func (p *parser) int64() int64 {
	if b := p.take(8); len(b) == 8 {
		return int64(binary.BigEndian.Uint64(b))
	}
	return 0
}

// count reads a number of parts. Each takes at least two bytes, so that a
// short input cannot make the caller reserve much.
func (p *parser) count(limit uint64) uint64 {
	n := p.uvarint()
	if n > limit || n > uint64(len(p.rest)/2) {
		if p.err == nil {
			p.fail("%d parts in %d bytes", n, len(p.rest))
		}
		return 0
	}
	return n
}

func (p *parser) bytes() []byte { return p.take(p.uvarint()) }

func (p *parser) key() []byte {
	b := p.bytes()
	if p.err == nil {
		if err := checkKey(b); err != nil {
			p.err = err
		}
	}
	return b
}

func (p *parser) cond() Cond {
	c := Cond{Kind: CondKind(p.byte()), Key: p.key()}
	switch c.Kind {
	case RevIs:
		c.Rev = p.uvarint()
	case RangeIs:
		c.End, c.Len, c.Rev = p.bytes(), p.uvarint(), p.uvarint()
		if p.err == nil {
			p.err = checkRange(c.Key, c.End, c.Len)
		}
	case LenIs:
		c.Len = p.uvarint()
	default:
		p.fail("condition of kind %d", c.Kind)
	}
	return c
}

func (p *parser) op() Op {
	o := Op{Kind: OpKind(p.byte()), Key: p.key()}
	switch o.Kind {
	case Put, Append:
		o.Value = p.bytes()
	case Delete:
	case Add:
		o.Delta, o.Max = p.int64(), p.int64()
	case Trim:
		o.Upto = p.uvarint()
	default:
		p.fail("operation of kind %d", o.Kind)
	}
	return o
}

// Encode gives the Result's bytes: uvarint Rev, 1 byte Code, uvarint At,
// uvarint number of Numbers, each Number as uvarint. Nodes send it to each
// other and the state keeps it.
func (r Result) Encode() []byte {
	b := binary.AppendUvarint(make([]byte, 0, 16+4*len(r.Numbers)), r.Rev)
	b = append(b, byte(r.Code))
	b = binary.AppendUvarint(b, uint64(r.At))
	b = binary.AppendUvarint(b, uint64(len(r.Numbers)))
	for _, n := range r.Numbers {
		b = binary.AppendUvarint(b, n)
	}
	return b
}

// DecodeResult reads what Result.Encode wrote and refuses everything else.
func DecodeResult(data []byte) (Result, error) {
	p := parser{rest: data}
	r := Result{Rev: p.uvarint(), Code: Code(p.byte())}
	if r.Code > TooOld {
		p.fail("result code %d", r.Code)
	}
	at := p.uvarint()
	if at > MaxParts {
		p.fail("part %d", at)
	}
	r.At = int(at)
	n := p.uvarint()
	if n > MaxParts || n > uint64(len(p.rest)) {
		p.fail("%d numbers", n)
	}
	if p.err == nil && n > 0 {
		r.Numbers = make([]uint64, n)
		for i := range r.Numbers {
			r.Numbers[i] = p.uvarint()
		}
	}
	if p.err == nil && len(p.rest) > 0 {
		p.fail("%d bytes after the end", len(p.rest))
	}
	if p.err != nil {
		return Result{}, fmt.Errorf("result: %w", p.err)
	}
	return r, nil
}
