package scrub

import (
	"cmp"
	"context"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/rest"
)

// Status of scrubbing on the node that answers.
type Status struct {
	Node    string  `json:"node"`
	Running bool    `json:"running"`
	Percent float64 `json:"percent"` // of the pass under way
	Pass    Pass    `json:"pass"`    // under way, else empty
	Last    Pass    `json:"last"`    // the last one that ended, else empty
	// Next is when the next pass begins; absent when that is left to atoll scrub
	// start.
	Next *time.Time `json:"next,omitempty"`
	// Lost are the blobs that no node which is up holds, in the whole site.
	Lost int `json:"lost"`
	// Findings of this node, the newest first.
	Findings []Finding `json:"findings"`
}

// Operations adds the room's operations to the API.
func (s *Scrub) Operations(k *rest.Kernel) {
	rest.Register(k, rest.Operation[struct{}, Status]{
		ID: "getScrub", Method: http.MethodGet, Path: "/api/atoll/v1/scrub", Tag: "scrub",
		Summary: "How far this node has checked its blobs, and what was damaged or missing", Permission: access.NodeRead,
		Do: func(context.Context, *struct{}) (Status, error) { return s.Status() },
	})
	rest.Register(k, rest.Operation[struct{}, Status]{
		ID: "startScrub", Method: http.MethodPost, Path: "/api/atoll/v1/scrub", Tag: "scrub", Status: http.StatusAccepted,
		Summary: "Check all blobs of this node now, at the full rate", Permission: access.NodeManage,
		Do: func(context.Context, *struct{}) (Status, error) { s.Start(); return s.Status() },
	})
}

// Status tells what the room does and what it has found.
func (s *Scrub) Status() (Status, error) {
	out := Status{Node: s.Node}
	err := s.DB.View(func(v *table.View) (err error) {
		out.Lost, err = s.Records.CountLost(v)
		return err
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	out.Pass, out.Last = s.state.Pass, s.state.Last
	out.Running = !out.Pass.Started.IsZero() || s.state.Asked
	out.Percent = percent(out.Pass.After)
	out.Findings = sorted(s.state.Findings)
	slices.SortStableFunc(out.Findings, func(a, b Finding) int { return b.At.Compare(a.At) })
	if days := s.days.Value(); days > 0 && !out.Running {
		next := out.Last.Started.AddDate(0, 0, days)
		out.Next = &next
	}
	return out, err
}

// percent tells from the last digest how far a pass is: digests are spread evenly.
func percent(after digest.Digest) float64 {
	algorithm, hex, _ := strings.Cut(string(after), ":")
	n, err := strconv.ParseUint(hex[:min(4, len(hex))], 16, 16)
	if err != nil || algorithm != "sha256" {
		return 0 // the few others come last, or first
	}
	return float64(n*1000/65536) / 10
}

func sorted(findings map[digest.Digest]Finding) []Finding {
	all := slices.AppendSeq(make([]Finding, 0, len(findings)), maps.Values(findings)) // never nil: the API says []
	slices.SortFunc(all, func(a, b Finding) int { return cmp.Compare(a.Digest, b.Digest) })
	return all
}
