package node

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// The history of a few tags as clients of the registry saw it over HTTP, and the
// check that one order explains it: each answer as if tags were kept in one place.

type tagKind uint8

const (
	readTag tagKind = iota
	moveTag         // to a manifest
	swapTag         // to a manifest, on If-Match
	makeTag         // to a manifest, on If-None-Match: *
	dropTag
)

// tagInput is a request; no two pushes of a test are of one manifest.
type tagInput struct {
	kind   tagKind
	tag    string
	to, on digest.Digest // pushed; named in If-Match
}

// tagOutput is its answer. Status 0 is none: the request may take effect at any
// time after it was made, or never.
type tagOutput struct {
	status int
	at     digest.Digest // where the answer says that the tag points
}

// stepTag is the model: what a tag that points at is ("" is nowhere) can answer,
// and where it points then.
func stepTag(is digest.Digest, in tagInput, out tagOutput) (bool, digest.Digest) {
	holds, next := true, is
	switch in.kind {
	case readTag:
		return out.status == http.StatusOK && out.at == is || out.status == http.StatusNotFound && is == "", is
	case dropTag:
		holds, next = is != "", ""
	case swapTag:
		holds, next = is == in.on && is != "", in.to
	case makeTag:
		holds, next = is == "", in.to
	case moveTag:
		next = in.to
	}
	switch out.status {
	case 0:
		if !holds {
			next = is
		}
		return true, next
	case http.StatusCreated, http.StatusAccepted:
		return holds, next
	case http.StatusPreconditionFailed:
		return !holds && out.at == is, is
	case http.StatusNotFound:
		return !holds && in.kind == dropTag, is
	}
	return false, is
}

// tagHistory is what clients asked and were answered. Answers that say
// themselves that they may be old are counted apart.
type tagHistory struct {
	clock        atomic.Int64
	mu           sync.Mutex
	ops          []porcupine.Operation
	stale, reads int
	unknown      int
}

func (h *tagHistory) record(client int, in tagInput, began int64, out tagOutput) {
	ended := h.clock.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	if out.status == 0 {
		h.unknown++
		ended = math.MaxInt64
	}
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: in, Call: began, Output: out, Return: ended})
}

func (h *tagHistory) linearizable() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return porcupine.CheckOperations(porcupine.Model{
		Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
			byTag := map[string][]porcupine.Operation{}
			for _, op := range all {
				tag := op.Input.(tagInput).tag
				byTag[tag] = append(byTag[tag], op)
			}
			parts := make([][]porcupine.Operation, 0, len(byTag))
			for _, part := range byTag {
				parts = append(parts, part)
			}
			return parts
		},
		Init: func() any { return digest.Digest("") },
		Step: func(state, in, out any) (bool, any) {
			return stepTag(state.(digest.Digest), in.(tagInput), out.(tagOutput))
		},
	}, h.ops)
}

// summary is for the log of the test, and refuses a history that shows nothing.
func (h *tagHistory) summary(t *testing.T, least int) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	seen := map[string]int{}
	for _, op := range h.ops {
		seen[fmt.Sprintf("%d:%d", op.Input.(tagInput).kind, op.Output.(tagOutput).status)]++
	}
	share := 0.0
	if h.reads > 0 {
		share = 100 * float64(h.stale) / float64(h.reads)
	}
	t.Logf("%d operations (by kind and answer: %v), %d of unknown outcome; %d of %d reads marked stale (%.1f %%) and left out",
		len(h.ops), seen, h.unknown, h.stale, h.reads, share)
	if len(h.ops) < least {
		t.Errorf("only %d operations were answered, %d are needed to show anything", len(h.ops), least)
	}
}

// tagClients are clients that work on a few tags through several nodes at once.
type tagClients struct {
	t       *testing.T
	history *tagHistory
	urls    []string
	client  *http.Client
	pushed  atomic.Int64 // manifests are numbered
	// once ends the work at the first change that has no answer.
	once bool
	// takeStale makes answers that are marked stale pass for others.
	takeStale bool
}

const tagRepository = "library/tags"

// newTagClients pushes what all manifests of a test name.
func newTagClients(t *testing.T, urls []string) *tagClients {
	c := &tagClients{t: t, history: &tagHistory{}, urls: urls, client: &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{}}}
	t.Cleanup(c.client.CloseIdleConnections)
	a := c.ask(urls[0], "POST", "blobs/uploads/?digest="+digest.FromString("{}").String(), []byte("{}"), "Content-Type", "application/octet-stream")
	if a.Status != http.StatusCreated {
		t.Fatalf("the config blob: %d %s", a.Status, a.Body)
	}
	return c
}

// ask is one request; an answer of status 0 is none.
func (c *tagClients) ask(url, method, path string, body []byte, header ...string) answer {
	q, err := http.NewRequestWithContext(context.WithoutCancel(c.t.Context()), method, url+"/v2/"+tagRepository+"/"+path, bytes.NewReader(body))
	if err != nil {
		c.t.Error(err)
		return answer{}
	}
	q.SetBasicAuth("admin", password)
	for i := 0; i+1 < len(header); i += 2 {
		q.Header.Set(header[i], header[i+1])
	}
	resp, err := c.client.Do(q)
	if err != nil {
		return answer{}
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}
	}
	return answer{Status: resp.StatusCode, Header: resp.Header, Body: data}
}

// manifest makes one that nobody has pushed.
func (c *tagClients) manifest() ([]byte, digest.Digest) {
	data, err := json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: describe(v1.MediaTypeImageConfig, []byte("{}")), Layers: []v1.Descriptor{},
		Annotations: map[string]string{"number": strconv.FormatInt(c.pushed.Add(1), 10)},
	})
	if err != nil {
		c.t.Error(err)
	}
	return data, digest.FromBytes(data)
}

// do carries out one operation and records it, with its answer as the client
// has to take it: a read that was not answered did nothing, and a write that was
// not answered, or answered with a failure of the server, may take effect yet.
func (c *tagClients) do(client int, url string, in tagInput) tagOutput {
	var body []byte
	method, header := http.MethodPut, []string{"Content-Type", v1.MediaTypeImageManifest}
	switch in.kind {
	case readTag:
		method = http.MethodGet
	case dropTag:
		method = http.MethodDelete
	case swapTag:
		header = append(header, "If-Match", strconv.Quote(in.on.String()))
		body, in.to = c.manifest()
	case makeTag:
		header = append(header, "If-None-Match", "*")
		body, in.to = c.manifest()
	default:
		body, in.to = c.manifest()
	}
	began := c.history.clock.Add(1)
	a := c.ask(url, method, "manifests/"+in.tag, body, header...)
	out := tagOutput{status: a.Status}
	if a.Status >= 500 {
		out.status = 0
	}
	switch out.status {
	case http.StatusOK, http.StatusCreated:
		out.at = digest.Digest(a.Header.Get("Docker-Content-Digest"))
	case http.StatusPreconditionFailed:
		var e struct {
			Errors []struct {
				Detail struct{ Digest digest.Digest }
			}
		}
		if err := json.Unmarshal(a.Body, &e); err != nil || len(e.Errors) != 1 {
			c.t.Errorf("412 with %s: %v", a.Body, err)
			return out
		}
		out.at = e.Errors[0].Detail.Digest
	}
	if in.kind == readTag {
		if out.status == 0 {
			return out
		}
		stale := a.Header.Get("Atoll-Stale") != ""
		c.history.mu.Lock()
		c.history.reads++
		if stale {
			c.history.stale++
		}
		c.history.mu.Unlock()
		if stale && !c.takeStale {
			return out
		}
	}
	c.history.record(client, in, began, out)
	return out
}

// work is what one client does: n operations of all kinds through all nodes. Of
// most swaps it knows where the tag was when it looked last.
func (c *tagClients) work(client, n int, tags []string) {
	random := rand.New(rand.NewPCG(uint64(client), 1))
	last := map[string]digest.Digest{}
	for range n {
		in := tagInput{tag: tags[random.IntN(len(tags))], kind: [...]tagKind{readTag, readTag, readTag, moveTag, swapTag, swapTag, makeTag, dropTag}[random.IntN(8)]}
		if in.kind == swapTag {
			if in.on = last[in.tag]; in.on == "" {
				in.kind = readTag
			}
		}
		out := c.do(client, c.urls[random.IntN(len(c.urls))], in)
		if out.at != "" {
			last[in.tag] = out.at
		}
		if out.status == 0 && c.once {
			return
		}
	}
}

// stalls measures for how long this machine lets a goroutine wait that has
// something to do; the answer to stop is the longest such time.
func stalls() (stop func() time.Duration) {
	end, longest := make(chan struct{}), make(chan time.Duration)
	go func() {
		const every = 5 * time.Millisecond
		tick := time.NewTicker(every)
		defer tick.Stop()
		most, last := time.Duration(0), time.Now()
		for {
			select {
			case <-tick.C:
				now := time.Now()
				most, last = max(most, now.Sub(last)-every), now
			case <-end:
				longest <- most
				return
			}
		}
	}()
	return func() time.Duration { close(end); return <-longest }
}

// Tags of a site without faults are registers: what any node answers fits one
// order of all that was asked anywhere, and no answer is stale. A machine that
// stands still for longer than a node waits for its leader's word is a fault, so
// such a run is made again; its order is checked all the same.
func TestTagsAreLinearizable(t *testing.T) {
	nodes := three(t)
	var urls []string
	for _, n := range nodes {
		urls = append(urls, n.URL)
	}
	for try := range 5 {
		tags := []string{fmt.Sprint("a", try), fmt.Sprint("b", try)}
		c := newTagClients(t, urls)
		c.pushed.Store(int64(try) << 32)
		stop := stalls()
		var clients sync.WaitGroup
		for id := range 6 {
			clients.Go(func() { c.work(id, 40, tags) })
		}
		clients.Wait()
		stalled := stop()
		c.history.summary(t, 200)
		if !c.history.linearizable() {
			t.Error("no order explains what the clients were answered")
		}
		if c.history.stale == 0 && c.history.unknown == 0 {
			return
		}
		if stalled < 40*time.Millisecond {
			t.Fatalf("with all nodes up, %d reads were marked stale and %d changes have no known outcome; the machine stood still for %v at most", c.history.stale, c.history.unknown, stalled)
		}
		t.Logf("the machine stood still for %v: once more", stalled)
	}
	t.Error("five runs without a fault of the nodes', and in each some answer was stale")
}

// A push to one node is what every other one serves at once.
func TestPushIsVisibleEverywhereAtOnce(t *testing.T) {
	nodes := three(t)
	var urls []string
	for _, n := range nodes {
		urls = append(urls, n.URL)
	}
	c := newTagClients(t, urls)
	for i := range 12 {
		to, d := c.manifest()
		if a := c.ask(urls[i%3], "PUT", "manifests/now", to, "Content-Type", v1.MediaTypeImageManifest); a.Status != http.StatusCreated {
			t.Fatalf("push %d: %d %s", i, a.Status, a.Body)
		}
		for j, url := range urls {
			a := c.ask(url, "GET", "manifests/now", nil)
			if a.Status != http.StatusOK || a.Header.Get("Docker-Content-Digest") != d.String() || a.Header.Get("Atoll-Stale") != "" {
				t.Errorf("pushed %s through node %d; node %d answers %d with %v", d, i%3, j, a.Status, a.Header)
			}
		}
	}
}

// The model itself: what it must refuse.
func TestModelOfTags(t *testing.T) {
	const a, b = digest.Digest("sha256:a"), digest.Digest("sha256:b")
	for _, row := range []struct {
		is   digest.Digest
		in   tagInput
		out  tagOutput
		want bool
		next digest.Digest
	}{
		{a, tagInput{kind: readTag}, tagOutput{200, a}, true, a},
		{a, tagInput{kind: readTag}, tagOutput{200, b}, false, a},
		{a, tagInput{kind: readTag}, tagOutput{404, ""}, false, a},
		{"", tagInput{kind: readTag}, tagOutput{404, ""}, true, ""},
		{a, tagInput{kind: moveTag, to: b}, tagOutput{201, b}, true, b},
		{a, tagInput{kind: swapTag, on: a, to: b}, tagOutput{201, b}, true, b},
		{b, tagInput{kind: swapTag, on: a, to: b}, tagOutput{201, b}, false, b},
		{b, tagInput{kind: swapTag, on: a, to: b}, tagOutput{412, b}, true, b},
		{b, tagInput{kind: swapTag, on: a, to: b}, tagOutput{412, a}, false, b},
		{a, tagInput{kind: swapTag, on: a, to: b}, tagOutput{412, a}, false, a},
		{"", tagInput{kind: swapTag, on: a, to: b}, tagOutput{0, ""}, true, ""},
		{a, tagInput{kind: swapTag, on: a, to: b}, tagOutput{0, ""}, true, b},
		{a, tagInput{kind: makeTag, to: b}, tagOutput{201, b}, false, b},
		{"", tagInput{kind: makeTag, to: b}, tagOutput{201, b}, true, b},
		{a, tagInput{kind: dropTag}, tagOutput{202, ""}, true, ""},
		{"", tagInput{kind: dropTag}, tagOutput{202, ""}, false, ""},
		{"", tagInput{kind: dropTag}, tagOutput{404, ""}, true, ""},
		{a, tagInput{kind: dropTag}, tagOutput{404, ""}, false, a},
		{a, tagInput{kind: moveTag, to: b}, tagOutput{403, ""}, false, a},
	} {
		if ok, next := stepTag(row.is, row.in, row.out); ok != row.want || ok && next != row.next {
			t.Errorf("at %q, %+v answered %+v: %v and %q, want %v and %q", row.is, row.in, row.out, ok, next, row.want, row.next)
		}
	}
}
