package project

import (
	"slices"
	"strconv"
	"strings"

	"github.com/atoll-registry/atoll/node/fault"
)

// A project's metadata is Harbor's map of strings. Some of it says what the
// project is and travels with it; the rest are settings of one site.

type metadataKind uint8

const (
	boolean  metadataKind = iota // "true" or "false"
	number                       // a decimal integer
	severity                     // of a vulnerability
)

type metadataRule struct {
	kind  metadataKind
	local bool // of this site only
}

func metadataRules() map[string]metadataRule {
	return map[string]metadataRule{
		"public":                         {kind: boolean},
		"enable_content_trust":           {kind: boolean},
		"enable_content_trust_cosign":    {kind: boolean},
		"prevent_vul":                    {kind: boolean},
		"severity":                       {kind: severity},
		"auto_scan":                      {kind: boolean, local: true},
		"auto_sbom_generation":           {kind: boolean, local: true},
		"reuse_sys_cve_allowlist":        {kind: boolean, local: true},
		"retention_id":                   {kind: number, local: true},
		"proxy_speed_kb":                 {kind: number, local: true},
		"max_upstream_conn":              {kind: number, local: true},
		"proxy_referrer_api":             {kind: boolean, local: true},
		"proxy_cache_local_on_not_found": {kind: boolean, local: true},
	}
}

type metadataSet struct {
	public          *bool
	portable, local map[string]string
}

// sortMetadata checks keys and values and tells apart what travels.
func sortMetadata(all map[string]string) (metadataSet, error) {
	rules := metadataRules()
	var set metadataSet
	for key, value := range all {
		rule, known := rules[key]
		if !known {
			keys := make([]string, 0, len(rules))
			for k := range rules {
				keys = append(keys, k)
			}
			slices.Sort(keys)
			return set, fault.New(fault.Invalid, "project metadata has no key %.60q; the keys are %s", key, strings.Join(keys, ", "))
		}
		if err := rule.check(key, value); err != nil {
			return set, err
		}
		switch {
		case key == "public":
			public := value == "true"
			set.public = &public
		case rule.local:
			set.local = with(set.local, key, value)
		default:
			set.portable = with(set.portable, key, value)
		}
	}
	return set, nil
}

func with(m map[string]string, key, value string) map[string]string {
	if m == nil {
		m = map[string]string{}
	}
	m[key] = value
	return m
}

func (r metadataRule) check(key, value string) error {
	ok, want := false, ""
	switch r.kind {
	case boolean:
		ok, want = value == "true" || value == "false", "true or false"
	case number:
		_, err := strconv.ParseInt(value, 10, 64)
		ok, want = err == nil, "a whole number"
	case severity:
		levels := []string{"none", "negligible", "low", "medium", "high", "critical", "unknown"}
		ok, want = slices.Contains(levels, value), "one of "+strings.Join(levels, ", ")
	}
	if !ok {
		return fault.New(fault.Invalid, "project metadata %s is %.60q; it must be %s", key, value, want)
	}
	return nil
}

// metadata is the whole map as clients see it.
func (p Project) metadata() map[string]string {
	out := map[string]string{"public": strconv.FormatBool(p.Public)}
	for k, v := range p.Metadata {
		out[k] = v
	}
	for k, v := range p.Local {
		out[k] = v
	}
	return out
}
