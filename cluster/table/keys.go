package table

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// The key of a row is name 0x00 part 0x00 part ..., that of a counter the same
// with a '+' before it, which no table's name can have. A log's key is its
// name. An index entry is a Local row
//
//	i 0x00 table 0x00 index 0x00 (part 0x00)... row-key-without-table len
//
// with the row's key as its value, where len is the length of the part before
// it in 2 bytes: it says where the index's parts end. A Local row
// v 0x00 table 0x00 index holds the version that the entries were built with.

const sep = "\x00"

func joinKey(first string, parts []string) ([]byte, error) {
	n := len(first)
	for _, p := range parts {
		if strings.Contains(p, sep) {
			return nil, fmt.Errorf("key %q of %s: a part of a key must not hold a zero byte", p, first)
		}
		n += 1 + len(p)
	}
	if n > kv.MaxKeyBytes {
		return nil, fmt.Errorf("%w: a key of %d bytes in %s, at most %d", ErrTooLarge, n, first, kv.MaxKeyBytes)
	}
	b := append(make([]byte, 0, n+1), first...)
	for _, p := range parts {
		b = append(append(b, 0), p...)
	}
	return b, nil
}

func rowKey(table string, parts []string) ([]byte, error) {
	if len(parts) == 0 {
		return nil, fmt.Errorf("table %s: a key has at least one part", table)
	}
	return joinKey(table, parts)
}

func counterKey(parts []string) ([]byte, error) {
	if len(parts) == 0 {
		return nil, fmt.Errorf("a counter's key has at least one part")
	}
	return joinKey("+"+parts[0], parts[1:])
}

func logKey(log string) ([]byte, error) {
	if log == "" || len(log) > kv.MaxKeyBytes {
		return nil, fmt.Errorf("%w: a log's name of %d bytes, at least 1 and at most %d", ErrTooLarge, len(log), kv.MaxKeyBytes)
	}
	return []byte(log), nil
}

// below gives the range of the keys that continue a key with more parts.
func below(key []byte) (from, to []byte) {
	return append(key[:len(key):len(key)], 0), append(key[:len(key):len(key)], 1)
}

// after gives the smallest key above a key.
func after(key []byte) []byte { return append(key[:len(key):len(key)], 0) }

// splitKey gives the parts of a row's key.
func splitKey(key []byte) (table string, parts []string) {
	table, rest, _ := strings.Cut(string(key), sep)
	return table, strings.Split(rest, sep)
}

func indexPrefix(table, index string) []byte {
	return []byte("i" + sep + table + sep + index + sep)
}

func indexMark(table, index string) string { return "v" + sep + table + sep + index }

// indexKey appends the parts of an index entry to its prefix.
func indexKey(prefix []byte, parts []string, row []byte) ([]byte, bool) {
	b := prefix[:len(prefix):len(prefix)]
	for _, p := range parts {
		if strings.Contains(p, sep) {
			return nil, false
		}
		b = append(append(b, p...), 0)
	}
	b = append(b, row...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(row))) // at most kv.MaxKeyBytes
	return b, len(b) <= maxLocalKey
}

// maxLocalKey is what the engine takes, less than bbolt's own limit.
const maxLocalKey = 16 << 10

// splitIndexKey gives the index's parts of an entry.
func splitIndexKey(entry, prefix []byte) []string {
	rest := entry[len(prefix):]
	if len(rest) < 2 {
		return nil
	}
	row := int(binary.BigEndian.Uint16(rest[len(rest)-2:]))
	if row > len(rest)-2 {
		return nil
	}
	rest = rest[:len(rest)-2-row]
	if len(rest) == 0 {
		return nil
	}
	return strings.Split(string(rest[:len(rest)-1]), sep)
}
