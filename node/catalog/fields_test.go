package catalog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"strings"
	"testing"
)

// byTokens is what checkJSON has to refuse, told by encoding/json token by token.
func byTokens(body []byte) error {
	if !json.Valid(body) {
		return io.ErrUnexpectedEOF
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	type level struct {
		keys  map[string]bool // nil in a list
		value bool            // in an object: the next token is a value
	}
	var open []level
	for {
		token, err := dec.Token()
		if err != nil {
			return err
		}
		if n := len(open); n > 0 && open[n-1].keys != nil {
			if key, ok := token.(string); ok && !open[n-1].value {
				if open[n-1].keys[key] {
					return fmt.Errorf("twice")
				}
				open[n-1].keys[key] = true
				open[n-1].value = true
				continue
			}
			open[n-1].value = false
		}
		switch token {
		case json.Delim('{'):
			open = append(open, level{keys: map[string]bool{}})
		case json.Delim('['):
			open = append(open, level{})
		case json.Delim('}'), json.Delim(']'):
			open = open[:len(open)-1]
		}
		if len(open) > maxDepth {
			return fmt.Errorf("deep")
		}
		if len(open) == 0 {
			return nil
		}
	}
}

func agree(t *testing.T, body []byte) {
	t.Helper()
	got, want := checkJSON(body), byTokens(body)
	if (got == nil) != (want == nil) {
		t.Fatalf("%q: %v, want %v", body, got, want)
	}
	if got != nil {
		return
	}
	var fields map[string]json.RawMessage
	err := json.Unmarshal(body, &fields)
	mine, mineErr := object(body)
	if (mineErr == nil) != (err == nil && fields != nil) || mineErr == nil && !equal(fields, mine) {
		t.Fatalf("the fields of %q are %q, %v; want %q, %v", body, mine, mineErr, fields, err)
	}
	var items []json.RawMessage
	err = json.Unmarshal(body, &items)
	parts, ok := list(body)
	if ok != (err == nil) || ok && fmt.Sprintf("%q", parts) != fmt.Sprintf("%q", items) {
		t.Fatalf("the items of %q are %q, %v; want %q, %v", body, parts, ok, items, err)
	}
	var named map[string]string
	err = json.Unmarshal(body, &named)
	if mine, ok := texts(body); ok != (err == nil) || ok && !maps.Equal(mine, named) {
		t.Fatalf("the texts of %q are %q, %v; want %q, %v", body, mine, ok, named, err)
	}
	for _, raw := range append(parts, body) {
		var text string
		err := json.Unmarshal(raw, &text)
		if s, mine := textOf(bytes.TrimSpace(raw)); s != text || (mine == nil) != (err == nil) {
			t.Fatalf("the text %q is %q, %v; want %q, %v", raw, s, mine, text, err)
		}
		var size int64
		err = json.Unmarshal(raw, &size)
		if n, mine := sizeOf(bytes.TrimSpace(raw)); n != size || (mine == nil) != (err == nil) {
			t.Fatalf("the number %q is %d, %v; want %d, %v", raw, n, mine, size, err)
		}
	}
}

func equal(a, b map[string]json.RawMessage) bool {
	if len(a) != len(b) {
		return false
	}
	for name := range a {
		if mine, ok := b[name]; !ok || !bytes.Equal(a[name], mine) {
			return false
		}
	}
	return true
}

var fieldSeeds = []string{
	`{}`, `[]`, `null`, ` null `, `1`, `-1`, `-0`, `1e3`, `12345678901234567890`, `"a"`, `""`, `"\""`, `"\u0061"`, `"é"`, "\"\xff\"", `true`,
	` { "a" : 1 , "b":[1,2 , {"c":"]}"}] } `, `{"a":1,"\u0061":2}`, `{"a":{"a":{"a":1}}}`, `{"a":"\\","b":"\\\""}`, `[[],[[]],{},"",null]`,
	"{\"\xfe\":1,\"\xff\":2}", `{"a":1,}`, `[1,]`, `{"a" 1}`, `[1 2]`, `{"a":1}{`, `{"a":1} x`, `{"a":1} `, `{a:1}`, `{"a":"b","c":null,"d":"\u00e9"}`, `{"a":"b","c":1}`, ``, ` `, "\"\x01\"", `{"":"","a":null}`,
	strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth), strings.Repeat("[", maxDepth+1) + strings.Repeat("]", maxDepth+1),
	strings.Repeat("[", 20000) + strings.Repeat("]", 20000), strings.Repeat("[", 100),
}

func TestFields(t *testing.T) {
	for _, seed := range fieldSeeds {
		agree(t, []byte(seed))
	}
	// Many fields: twice the first, twice a late one, none twice.
	for _, twice := range []string{"f0", "f39", "other"} {
		var b strings.Builder
		for i := range 40 {
			fmt.Fprintf(&b, `"f%d":[%d],`, i, i)
		}
		agree(t, []byte("{"+b.String()+`"`+twice+`":1}`))
	}
}

func FuzzFields(f *testing.F) {
	for _, seed := range fieldSeeds {
		f.Add([]byte(seed))
	}
	f.Fuzz(agree)
}
