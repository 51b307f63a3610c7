package kv

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "write the golden files anew")

func sampleID(b byte) ID { return ID(bytes.Repeat([]byte{b}, 16)) }

// samples are the published vectors: testdata/txn-v1.golden has their bytes.
func samples() []Txn {
	return []Txn{
		{},
		{ID: sampleID(0x11), Base: 300},
		{
			ID: sampleID(0x22), Base: 1,
			Conds: []Cond{
				{Kind: RevIs, Key: []byte("a"), Rev: 7},
				{Kind: RevIs, Key: []byte("gone")},
				{Kind: RangeIs, Key: []byte("b"), End: []byte("c"), Len: 2, Rev: 130},
				{Kind: LenIs, Key: []byte("log"), Len: 5},
			},
			Ops: []Op{
				{Kind: Put, Key: []byte("a"), Value: []byte("value")},
				{Kind: Put, Key: []byte("empty")},
				{Kind: Delete, Key: []byte("gone")},
				{Kind: Add, Key: []byte("n"), Delta: -1, Max: math.MaxInt64},
				{Kind: Append, Key: []byte("log"), Value: []byte{0, 1}},
				{Kind: Trim, Key: []byte("log"), Upto: 300},
			},
		},
		{ID: sampleID(0xff), Base: math.MaxUint64, Ops: []Op{{Kind: Add, Key: []byte{0xff}, Delta: math.MinInt64, Max: -1}}},
	}
}

var sameTxn = cmp.Options{cmpopts.EquateEmpty()}

func TestGolden(t *testing.T) {
	const path = "testdata/txn-v1.golden"
	var out strings.Builder
	for i, txn := range samples() {
		b, err := txn.Encode()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "%d %x\n", i, b)
	}
	if *update {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), out.String()); diff != "" {
		t.Errorf("the frozen format changed; every log in the field has the old one:\n%s", diff)
	}
	for i, line := range strings.Split(strings.TrimSpace(string(want)), "\n") {
		data, err := hex.DecodeString(strings.Fields(line)[1])
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeTxn(data)
		if err != nil {
			t.Fatalf("vector %d: %v", i, err)
		}
		if diff := cmp.Diff(samples()[i], *got, sameTxn); diff != "" {
			t.Errorf("vector %d: %s", i, diff)
		}
	}
}

// TestByHand spells one Txn out from the package comment alone.
func TestByHand(t *testing.T) {
	data := []byte{1}                              // version
	data = append(data, make([]byte, 16)...)       // ID
	data = append(data, 0xac, 0x02)                // Base 300
	data = append(data, 1, 1, 2, 'k', 0, 9)        // one condition: RevIs, key "k\x00", revision 9
	data = append(data, 1, 4, 1, 'l', 2, 'h', 'i') // one operation: Append, log "l", value "hi"
	got, err := DecodeTxn(data)
	if err != nil {
		t.Fatal(err)
	}
	want := Txn{Base: 300, Conds: []Cond{{Kind: RevIs, Key: []byte("k\x00"), Rev: 9}}, Ops: []Op{{Kind: Append, Key: []byte("l"), Value: []byte("hi")}}}
	if diff := cmp.Diff(want, *got, sameTxn); diff != "" {
		t.Error(diff)
	}
}

func TestDecodeRefuses(t *testing.T) {
	good, _ := samples()[2].Encode()
	head := good[:17]
	cases := map[string][]byte{
		"nothing":            {},
		"another version":    append([]byte{2}, good[1:]...),
		"one byte more":      append(bytes.Clone(good), 0),
		"long integer":       append(bytes.Clone(head), 0x80, 0, 0, 0),
		"too many parts":     append(bytes.Clone(head), 0, 0xff, 0xff, 3),
		"empty key":          append(bytes.Clone(head), 0, 1, 1, 0, 0, 0),
		"unknown condition":  append(bytes.Clone(head), 0, 1, 9, 1, 'k', 0, 0),
		"unknown operation":  append(bytes.Clone(head), 0, 0, 1, 9, 1, 'k', 0),
		"backward range":     append(bytes.Clone(head), 0, 1, 2, 1, 'b', 1, 'a', 0, 0, 0),
		"wide range":         append(bytes.Clone(head), 0, 1, 2, 1, 'a', 1, 'b', 0x81, 2, 0, 0),
		"over the size":      append(bytes.Clone(good), make([]byte, MaxTxnBytes)...),
		"a length past here": append(bytes.Clone(head), 0, 1, 1, 0x7f, 'k', 0),
	}
	for name, data := range cases {
		if _, err := DecodeTxn(data); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
		if err := CheckTxn(data); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s, checked: %v", name, err)
		}
	}
	for n := range len(good) {
		if _, err := DecodeTxn(good[:n]); err == nil {
			t.Errorf("the first %d bytes decode", n)
		}
		if CheckTxn(good[:n]) == nil {
			t.Errorf("the first %d bytes pass the check", n)
		}
	}
}

func TestEncodeLimits(t *testing.T) {
	key := []byte("k")
	many := make([]Op, MaxParts+1)
	for i := range many {
		many[i] = Op{Kind: Delete, Key: key}
	}
	for name, c := range map[string]struct {
		txn  Txn
		want error
	}{
		"parts":          {Txn{Ops: many}, ErrTooLarge},
		"just the parts": {Txn{Ops: many[1:]}, nil},
		"bytes":          {Txn{Ops: []Op{{Kind: Put, Key: key, Value: make([]byte, MaxTxnBytes)}}}, ErrTooLarge},
		"key":            {Txn{Ops: []Op{{Kind: Put, Key: make([]byte, MaxKeyBytes+1)}}}, ErrTooLarge},
		"no key":         {Txn{Conds: []Cond{{Kind: RevIs}}}, ErrFormat},
		"range":          {Txn{Conds: []Cond{{Kind: RangeIs, Key: key, End: []byte("l"), Len: MaxRangeRows + 1}}}, ErrTooLarge},
		"no kind":        {Txn{Ops: []Op{{Key: key}}}, ErrFormat},
	} {
		if _, err := c.txn.Encode(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestResultRoundTrip(t *testing.T) {
	for _, r := range []Result{{}, {Rev: 5}, {Rev: 1 << 60, Code: Conflict, At: 4095}, {Rev: 1, Numbers: []uint64{0, math.MaxUint64}}, {Rev: 9, Code: TooOld}} {
		got, err := DecodeResult(r.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r, got); diff != "" {
			t.Error(diff)
		}
	}
	for _, b := range [][]byte{nil, {1}, {1, 9, 0, 0}, {1, 0, 0, 200}, {1, 0, 0, 0, 0}} {
		if _, err := DecodeResult(b); !errors.Is(err, ErrFormat) {
			t.Errorf("%x: %v", b, err)
		}
	}
}

func FuzzDecodeTxn(f *testing.F) {
	for _, txn := range samples() {
		b, _ := txn.Encode()
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		txn, err := DecodeTxn(data)
		if checked := CheckTxn(data); (err == nil) != (checked == nil) {
			t.Fatalf("decoding says %v, the check %v", err, checked)
		}
		if err != nil {
			return
		}
		again, err := txn.Encode()
		if err != nil {
			t.Fatalf("decodes and does not encode: %v", err)
		}
		if !bytes.Equal(data, again) {
			t.Fatalf("two encodings of one Txn: %x and %x", data, again)
		}
	})
}

func FuzzDecodeResult(f *testing.F) {
	f.Add(Result{Rev: 300, Numbers: []uint64{1, 500}}.Encode())
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := DecodeResult(data)
		if err == nil && !bytes.Equal(r.Encode(), data) {
			t.Fatalf("two encodings of %+v", r)
		}
	})
}
