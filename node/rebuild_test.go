package node

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/ledger"
)

// lose stops a node and takes its metadata away.
func (r *running) lose(more ...string) Config {
	r.t.Helper()
	if err := r.stop(); err != nil {
		r.t.Fatal(err)
	}
	for _, name := range append([]string{"meta.db", "raft"}, more...) {
		if err := os.RemoveAll(filepath.Join(r.Data, name)); err != nil {
			r.t.Fatal(err)
		}
	}
	c := r.config
	c.Init, c.Log, c.Started = false, quiet, nil
	return c
}

// All metadata of a site is gone; what the ledger of a node tells comes back from
// its blobs: repositories, tags as they were, referrers, and indexes.
func TestRebuild(t *testing.T) {
	one := start(t, config(t))
	first := one.push("team/app", "v1", content(1, 200<<10))
	second := one.push("team/app", "v2", content(2, 200<<10))
	one.push("library/tool", "old", content(3, 1000))
	one.do("DELETE", "/v2/library/tool/manifests/old", nil).want(202)

	signature := v1.Manifest{
		MediaType: v1.MediaTypeImageManifest, ArtifactType: "application/vnd.example.signature", Config: v1.DescriptorEmptyJSON,
		Layers: []v1.Descriptor{v1.DescriptorEmptyJSON}, Subject: &v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: first.digest, Size: int64(len(first.manifest))},
	}
	signature.SchemaVersion = 2
	one.do("POST", "/v2/team/app/blobs/uploads/?digest="+v1.DescriptorEmptyJSON.Digest.String(), []byte("{}"), "Content-Type", "application/octet-stream").want(201)
	signed := one.manifest("team/app", "", v1.MediaTypeImageManifest, signature)
	index := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{
		{MediaType: v1.MediaTypeImageManifest, Digest: first.digest, Size: int64(len(first.manifest))},
		{MediaType: v1.MediaTypeImageManifest, Digest: second.digest, Size: int64(len(second.manifest))},
	}, Annotations: map[string]string{"padding": strings.Repeat("x", 80<<10)}} // larger than a row takes
	index.SchemaVersion = 2
	one.manifest("team/app", "all", v1.MediaTypeImageIndex, index)

	site := one.member.Identity().SiteID
	c := one.lose()
	if err := prepareRebuild(c.Data); err != nil { // and then it was killed
		t.Fatal(err)
	}
	if _, err := tryStart(t, c); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "run atoll rebuild again") {
		t.Errorf("a node starts on half a rebuild: %v", err)
	}
	report, err := Rebuild(t.Context(), c, nil)
	if err != nil || len(report.Problems) > 0 || report.Tags != 3 || report.Manifests != 5 || report.Found != 0 {
		t.Fatalf("rebuilt %+v, %v", report, err)
	}
	if _, err := Rebuild(t.Context(), c, nil); !fault.Is(err, fault.Conflict) {
		t.Errorf("a second rebuild: %v", err)
	}
	two := start(t, c)
	two.pull(first, "v1")
	two.pull(second, "v2")
	two.do("GET", "/v2/library/tool/manifests/old", nil).want(404)
	var all v1.Index
	two.do("GET", "/v2/team/app/manifests/all", nil, "Accept", v1.MediaTypeImageIndex).want(200).decode(&all)
	if len(all.Manifests) != 2 {
		t.Errorf("the index lists %+v", all.Manifests)
	}
	var referrers v1.Index
	two.do("GET", "/v2/team/app/referrers/"+first.digest.String(), nil).want(200).decode(&referrers)
	if len(referrers.Manifests) != 1 || referrers.Manifests[0].Digest != signed {
		t.Errorf("the referrers are %+v", referrers.Manifests)
	}
	two.logOf("team")
	if two.member.Identity().SiteID == site {
		t.Error("the rebuilt site says that it is the old one")
	}
	two.push("team/app", "v3", content(9, 1000))
	if !exists(filepath.Join(c.Data, rebuildKept, "identity.json")) {
		t.Error("who the node was is not kept")
	}
}

// manifest pushes one and gives its digest.
func (r *running) manifest(repository, tag, mediaType string, m any) digest.Digest {
	r.t.Helper()
	body, err := json.Marshal(m)
	if err != nil {
		r.t.Fatal(err)
	}
	d := digest.FromBytes(body)
	if tag == "" {
		tag = d.String()
	}
	r.do("PUT", "/v2/"+repository+"/manifests/"+tag, body, "Content-Type", mediaType).want(201)
	return d
}

// Without a ledger only manifests that are blobs are found, by content, and what
// is no manifest is not taken for one.
func TestRebuildWithoutALedger(t *testing.T) {
	one := start(t, config(t))
	p := one.push("library/app", "v1", []byte(`{"schemaVersion":2,"note":"a layer that looks like something"}`))
	big := v1.Manifest{
		MediaType: v1.MediaTypeImageManifest, Config: describe(v1.MediaTypeImageConfig, p.blobs[0]),
		Layers: []v1.Descriptor{describe(v1.MediaTypeImageLayer, p.blobs[1])}, Annotations: map[string]string{"padding": strings.Repeat("x", 80<<10)},
	}
	big.SchemaVersion = 2
	d := one.manifest("library/app", "big", v1.MediaTypeImageManifest, big)
	c := one.lose(ledger.Dir, "identity.json", "cluster.key")
	report, err := Rebuild(t.Context(), c, nil)
	if err != nil || report.Found != 1 || report.Tags != 0 || len(report.Problems) != 1 || !strings.Contains(report.Problems[0].Reason, "no ledger") {
		t.Fatalf("rebuilt %+v, %v", report, err)
	}
	two := start(t, c)
	got := two.do("GET", "/v2/"+ledger.FoundProject+"/"+ledger.FoundRepository+"/manifests/"+d.String(), nil).want(200).Body
	if !bytes.Contains(got, []byte("padding")) {
		t.Errorf("the manifest is %.100s", got)
	}
	two.do("GET", "/v2/"+ledger.FoundProject+"/"+ledger.FoundRepository+"/blobs/"+digest.FromBytes(p.blobs[1]).String(), nil).want(200)
}

// A rebuild is for who has lost the metadata, and has blobs.
func TestRebuildRefusals(t *testing.T) {
	one := start(t, config(t))
	if _, err := Rebuild(t.Context(), one.config, nil); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "another node runs") {
		t.Errorf("while the node runs: %v", err)
	}
	one.stop()
	c := one.config
	c.Log = quiet
	if _, err := Rebuild(t.Context(), c, nil); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "still has its metadata") {
		t.Errorf("with metadata: %v", err)
	}
	c = config(t)
	c.Log = quiet
	if _, err := Rebuild(t.Context(), c, nil); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "no blobs") {
		t.Errorf("without blobs: %v", err)
	}
}
