package main

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// A rotation that is under way already is said to be.
func TestRotateSaysWhatIsUnderWay(t *testing.T) {
	for answer, want := range map[string]string{
		`{}`:                 "a new cluster key is being made; atoll cluster status shows how far it is\n",
		`{"under_way":true}`: "under way already: a new cluster key is being made; atoll cluster status shows how far it is\n",
	} {
		node := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodPost || r.URL.Path != "/api/atoll/v1/cluster/rotations/key" {
				http.NotFound(w, r)
				return
			}
			w.WriteHeader(http.StatusAccepted)
			io.WriteString(w, answer)
		}))
		defer node.Close()
		t.Setenv("HOME", t.TempDir())
		t.Setenv("ATOLL_USERNAME", "admin")
		t.Setenv("ATOLL_PASSWORD", "not-a-secret-12")
		var errs bytes.Buffer
		if code := run(t.Context(), []string{"cluster", "rotate", "key", "--server", node.URL}, strings.NewReader(""), io.Discard, &errs); code != 0 || errs.String() != want {
			t.Errorf("for %s it ended with %d and said %q", answer, code, errs.String())
		}
	}
}
