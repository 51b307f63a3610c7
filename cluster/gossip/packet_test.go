package gossip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/hashicorp/go-msgpack/v2/codec"
)

// packed is a message as memberlist encodes it.
func packed(t testing.TB, k kind, v any) []byte {
	t.Helper()
	b := bytes.NewBuffer([]byte{byte(k)})
	if err := codec.NewEncoder(b, &codec.MsgpackHandle{}).Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func compound(parts ...[]byte) []byte {
	out := []byte{byte(kindCompound), byte(len(parts))}
	for _, p := range parts {
		out = binary.BigEndian.AppendUint16(out, uint16(len(p)))
	}
	return append(out, bytes.Join(parts, nil)...)
}

type fields map[string]any

func TestReadPacket(t *testing.T) {
	ping := packed(t, kindPing, fields{"SeqNo": uint32(7), "Node": "b", "SourceNode": "a", "SourcePort": uint16(1)})
	alive := packed(t, kindAlive, fields{"Node": "c", "Incarnation": uint32(3), "Meta": []byte{1, 2}, "Vsn": []uint8{1, 5, 5, 0, 0, 0}})
	sum := append([]byte{byte(kindCRC), 0, 0, 0, 0}, ping...)
	deep := packed(t, kindPing, fields{"Node": []any{[]any{[]any{[]any{"b"}}}}})
	for _, c := range []struct {
		name   string
		packet []byte
		kinds  []kind
		fails  bool
	}{
		{"one", ping, []kind{kindPing}, false},
		{"with a sum", sum, []kind{kindPing}, false},
		{"several", compound(ping, alive), []kind{kindPing, kindAlive}, false},
		{"empty", nil, nil, true},
		{"no body", []byte{byte(kindPing)}, nil, true},
		{"too long", make([]byte, maxPacket+1), nil, true},
		{"compressed", packed(t, 9, fields{"Algo": 0, "Buf": []byte("x")}), nil, true},
		{"encrypted", packed(t, 10, fields{}), nil, true},
		{"for users", []byte{8, 'x', 'y'}, nil, true},
		{"labelled", []byte{244, 1, 'x'}, nil, true},
		{"compound in compound", compound(compound(ping)), nil, true},
		{"more behind", append(bytes.Clone(ping), 0xc0), nil, true},
		{"cut short", ping[:len(ping)-1], nil, true},
		{"too deep", deep, nil, true},
		{"a number for a name", packed(t, kindDead, fields{"Node": 5}), nil, true},
		{"a length of 4 GiB", []byte{byte(kindDead), 0xdd, 0xff, 0xff, 0xff, 0xff}, nil, true},
		{"more parts than bytes", []byte{byte(kindCompound), 200, 0, 1}, nil, true},
		{"a part longer than all", []byte{byte(kindCompound), 1, 0xff, 0xff, 0}, nil, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var kinds []kind
			err := readPacket(c.packet, func(m message, _ []byte) {
				kinds = append(kinds, m.kind)
				if m.kind == kindPing && (m.SeqNo != 7 || m.Node != "b" || m.SourceNode != "a") {
					t.Errorf("read as %+v", m)
				}
			})
			if (err != nil) != c.fails || c.fails && !errors.Is(err, errPacket) {
				t.Errorf("error is %v", err)
			}
			if string(kindsText(kinds)) != string(kindsText(c.kinds)) {
				t.Errorf("read %v, want %v", kinds, c.kinds)
			}
		})
	}
}

func kindsText(ks []kind) (b []byte) {
	for _, k := range ks {
		b = append(b, byte(k))
	}
	return b
}

func TestCheckExchange(t *testing.T) {
	head := func(nodes, user int) []byte {
		return packed(t, kindPushPull, fields{"Nodes": nodes, "UserStateLen": user, "Join": true})
	}
	state := packed(t, 0, fields{"Name": "a", "Incarnation": uint32(1)})[1:]
	for _, c := range []struct {
		name  string
		raw   []byte
		fails bool
	}{
		{"one node", append(head(1, 0), state...), false},
		{"none", head(0, 0), false},
		{"a ping", packed(t, kindPing, fields{"SeqNo": 1}), false},
		{"fewer than announced", append(head(2, 0), state...), true},
		{"more than announced", append(head(0, 0), state...), true},
		{"a million announced", head(1<<20, 0), true},
		{"minus one", head(-1, 0), true},
		{"20 MiB of more announced", append(head(1, 20<<20), state...), true},
		{"compressed", packed(t, 9, fields{"Algo": 0, "Buf": []byte("x")}), true},
	} {
		if err := checkExchange(c.raw); (err != nil) != c.fails {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestAnnouncedLengths: a length costs nothing before its bytes are there.
func TestAnnouncedLengths(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 1000 {
		if _, err := readExchange(io.MultiReader(bytes.NewReader([]byte{0, 3, 0xff, 0xff}), strings.NewReader("x"))); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
		if _, err := readExchange(bytes.NewReader([]byte{0xff, 0xff, 0xff, 0xff})); !errors.Is(err, errPacket) {
			t.Fatal(err)
		}
		if _, err := readFrame(bytes.NewReader([]byte{0xff, 0xff}), make([]byte, maxPacket)); !errors.Is(err, errPacket) {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / 1000; each > 8<<10 {
		t.Errorf("%d bytes for each announcement", each)
	}
}

// FuzzPacket: whatever arrives, what is passed on is a single message of a kind that
// is known, and whole.
func FuzzPacket(f *testing.F) {
	ping := packed(f, kindPing, fields{"SeqNo": uint32(7), "Node": "b", "SourceNode": "a"})
	f.Add(ping)
	f.Add(compound(ping, packed(f, kindAlive, fields{"Node": "c", "Vsn": []uint8{1, 5, 5, 0, 0, 0}})))
	f.Add(append([]byte{byte(kindCRC), 0, 0, 0, 0}, ping...))
	f.Add([]byte{byte(kindDead), 0xdf, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, packet []byte) {
		total := 0
		_ = readPacket(packet, func(m message, raw []byte) {
			total += len(raw)
			switch m.kind {
			case kindPing, kindIndirect, kindAck, kindSuspect, kindAlive, kindDead, kindNack:
			default:
				t.Fatalf("kind %d is passed on", m.kind)
			}
			if kind(raw[0]) != m.kind {
				t.Fatal("passed on as another kind")
			}
			if rest, err := skipValue(raw[1:], maxNesting); err != nil || len(rest) != 0 {
				t.Fatalf("passed on with %d bytes behind it: %v", len(rest), err)
			}
		})
		if total > len(packet) {
			t.Fatalf("%d bytes became %d", len(packet), total)
		}
	})
}

// FuzzExchange: what passes is as long as it says.
func FuzzExchange(f *testing.F) {
	state := packed(f, 0, fields{"Name": "a", "Incarnation": uint32(1)})[1:]
	f.Add(append(packed(f, kindPushPull, fields{"Nodes": 1, "UserStateLen": 0, "Join": true}), state...))
	f.Add(packed(f, kindPing, fields{"SeqNo": 1}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(raw))), raw...)
		got, err := readExchange(bytes.NewReader(frame))
		if err != nil {
			return
		}
		if !bytes.Equal(got, raw) {
			t.Fatal("read as something else")
		}
		var head states
		if kind(raw[0]) == kindPushPull {
			if err := codec.NewDecoderBytes(raw[1:], &codec.MsgpackHandle{}).Decode(&head); err != nil || head.Nodes > len(raw) || head.UserStateLen != 0 {
				t.Fatalf("passed: %+v, %v", head, err)
			}
		}
	})
}

// FuzzFrame: a stream of frames is taken apart as it was put together.
func FuzzFrame(f *testing.F) {
	f.Add([]byte("one"), []byte("two"))
	f.Add([]byte{}, []byte{0})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		if len(a) > maxPacket || len(b) > maxPacket {
			return
		}
		r := bytes.NewReader(appendFrame(appendFrame(nil, a), b))
		buf := make([]byte, maxPacket)
		for _, want := range [][]byte{a, b} {
			got, err := readFrame(r, buf)
			if len(want) == 0 {
				if err == nil {
					t.Fatal("an empty packet is read")
				}
				return
			}
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%x, %v", got, err)
			}
		}
	})
}
