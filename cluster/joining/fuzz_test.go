package joining

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/atoll-registry/atoll/cluster/pki"
)

// FuzzDecode: what passes is one object in which no field stands twice, however it is
// spelt; what does not is refused as malformed.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"token":"a","csr":"AAAA"}`))
	f.Add([]byte(`{"token":"a","Token":"b"}`))
	f.Add([]byte(`{"a":{"a":1,"a":2}} {}`))
	f.Add([]byte(`[1]`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var into map[string]json.RawMessage
		err := Decode(body, &into)
		var no *Refusal
		if err != nil {
			if !errors.As(err, &no) || no.Code != CodeMalformed || !errors.Is(err, pki.ErrMalformed) {
				t.Fatalf("refused otherwise: %v", err)
			}
			return
		}
		if !json.Valid(body) || into == nil {
			t.Fatalf("%q passes", body)
		}
		seen := map[string]bool{}
		for field := range into {
			if field = strings.ToLower(strings.ToUpper(field)); seen[field] {
				t.Fatalf("%q has %q twice", body, field)
			}
			seen[field] = true
		}
		var again map[string]json.RawMessage
		if err := json.Unmarshal(body, &again); err != nil || len(again) != len(into) {
			t.Fatalf("%q reads otherwise the second time: %v", body, err)
		}
	})
}
