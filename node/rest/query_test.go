package rest_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

func FuzzParseQuery(f *testing.F) {
	for _, s := range []string{"a=b", "k=~v,m=[a~b],n={a 'b c'},o=(1 2)", "k=[~b]", "k='x,y'", "=", "k={"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		q, err := rest.ParseQuery(s)
		if err != nil && !fault.Is(err, fault.Invalid) {
			t.Fatalf("%q: %v", s, err)
		}
		for _, term := range q {
			term.Holds("x") // must not panic whatever was parsed
			if term.Key == "" {
				t.Fatalf("%q: a term without a key", s)
			}
		}
	})
}

func TestParseQuery(t *testing.T) {
	for s, want := range map[string]rest.Query{
		"":                      nil,
		"name=web":              {{Key: "name", Values: []string{"web"}}},
		"name=~we b, x='1'":     {{Key: "name", Op: rest.Fuzzy, Values: []string{"we b"}}, {Key: "x", Values: []string{"1"}, Quoted: true}},
		"t=[2020-01-01 00:00~]": {{Key: "t", Op: rest.Range, Values: []string{"2020-01-01 00:00", ""}}},
		"n=[1~9]":               {{Key: "n", Op: rest.Range, Values: []string{"1", "9"}}},
		"name={'p1' 'p2'}":      {{Key: "name", Op: rest.AnyOf, Values: []string{"p1", "p2"}, Quoted: true}},
		"l=(a  b),k=v":          {{Key: "l", Op: rest.AllOf, Values: []string{"a", "b"}}, {Key: "k", Values: []string{"v"}}},
		"blob_digest=sha256:ab": {{Key: "blob_digest", Values: []string{"sha256:ab"}}},
		"k=":                    {{Key: "k", Values: []string{""}}},
	} {
		got, err := rest.ParseQuery(s)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%q: %v %s", s, err, diff)
		}
	}
	for _, s := range []string{"name", "=x", "k={a", "k={}", "k=[a]", "k=[a~b", "k='a", "k='a'b", "a=b c=d,=", strings.Repeat("a=b,", 40), strings.Repeat("x", 5000)} {
		if q, err := rest.ParseQuery(s); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %v, %v", clip(s), q, err)
		}
	}
}

func clip(s string) string {
	return s[:min(len(s), 40)]
}
