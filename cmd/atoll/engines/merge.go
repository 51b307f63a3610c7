package engines

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
)

// k3s reads one file for all registries, which may hold others.
func k3s(p Plan, dir string, mirrors []mirror) (files []File, notes []string) {
	ca, needed := caFile(p, path.Join(dir, "atoll-ca.crt"), mirrors)
	if needed {
		files = append(files, ca)
	}
	registries := File{Path: path.Join(dir, "registries.yaml"), merge: func(before []byte) ([]byte, error) {
		caPath := ""
		if needed {
			caPath = ca.Path
		}
		return mergeRegistries(before, p.Upstreams, mirrors, caPath)
	}}
	return append(files, registries), []string{"k3s reads the file when it starts: systemctl restart k3s (or k3s-agent)"}
}

// mergeRegistries puts the mirrors before those that registries.yaml has for the
// upstreams. Other comments and the order of keys stay.
func mergeRegistries(before []byte, upstreams []Upstream, mirrors []mirror, ca string) ([]byte, error) {
	var doc yaml.MapSlice
	comments := yaml.CommentMap{}
	if len(bytes.TrimSpace(before)) > 0 {
		if err := yaml.UnmarshalWithOptions(before, &doc, yaml.UseOrderedMap(), yaml.CommentToMap(comments)); err != nil {
			return nil, fmt.Errorf("registries.yaml is no YAML map: %w", err)
		}
	} else {
		comments["$.mirrors"] = []*yaml.Comment{yaml.HeadComment(heading(K3s)[1 : len(heading(K3s))-1])}
	}
	section, err := submap(doc, "mirrors")
	if err != nil {
		return nil, err
	}
	for _, u := range upstreams {
		one, err := submap(section, u.Host)
		if err != nil {
			return nil, err
		}
		endpoints := []any{}
		for _, m := range mirrors {
			endpoints = append(endpoints, m.url)
		}
		old, _ := lookup(one, "endpoint").([]any)
		for _, e := range old {
			if !slices.Contains(endpoints, e) {
				endpoints = append(endpoints, e)
			}
		}
		section = set(section, u.Host, set(one, "endpoint", endpoints))
	}
	doc = set(doc, "mirrors", section)
	// Comments are known by their place, and the places in these lists have
	// changed: none is better than one beside the wrong line.
	maps.DeleteFunc(comments, func(place string, _ []*yaml.Comment) bool { return strings.Contains(place, ".endpoint[") })
	if ca != "" {
		if section, err = submap(doc, "configs"); err != nil {
			return nil, err
		}
		for _, m := range mirrors {
			one, err := submap(section, m.host)
			if err != nil {
				return nil, err
			}
			security, err := submap(one, "tls")
			if err != nil {
				return nil, err
			}
			if m.tls && lookup(security, "ca_file") == nil {
				section = set(section, m.host, set(one, "tls", set(security, "ca_file", ca)))
			}
		}
		doc = set(doc, "configs", section)
	}
	return yaml.MarshalWithOptions(doc, yaml.WithComment(comments), yaml.IndentSequence(true))
}

func lookup(m yaml.MapSlice, key string) any {
	for _, item := range m {
		if fmt.Sprint(item.Key) == key {
			return item.Value
		}
	}
	return nil
}

// submap gives the map under a key, an empty one when there is none.
func submap(m yaml.MapSlice, key string) (yaml.MapSlice, error) {
	switch v := lookup(m, key).(type) {
	case nil:
		return nil, nil
	case yaml.MapSlice:
		return slices.Clone(v), nil
	default:
		return nil, fmt.Errorf("%s in registries.yaml is no map; correct the file first", key)
	}
}

func set(m yaml.MapSlice, key string, value any) yaml.MapSlice {
	for i, item := range m {
		if fmt.Sprint(item.Key) == key {
			m[i].Value = value
			return m
		}
	}
	return append(m, yaml.MapItem{Key: key, Value: value})
}

// docker has mirrors of Docker Hub only, in a file with much else in it.
func docker(p Plan, dir string, mirrors []mirror) (files []File, notes []string, err error) {
	for _, u := range p.Upstreams {
		if u.Host != dockerHub {
			return nil, nil, fmt.Errorf("docker mirrors docker.io only, not %s; pull that through the node's own name: NODE/%s/REPOSITORY", u.Host, u.Host)
		}
	}
	daemon := File{Path: path.Join(dir, "daemon.json"), merge: func(before []byte) ([]byte, error) { return mergeDaemon(before, mirrors) }}
	return append(certificates(p, dir, mirrors), daemon), []string{
		"docker reads the file on: systemctl reload docker",
		"docker does not say that it means Docker Hub: the site has to look there for names that it does not know, with: atoll settings set mirror.fallback docker.io",
	}, nil
}

// member is a key of a JSON object with its value.
type member struct {
	key   string
	value json.RawMessage
}

// mergeDaemon puts the mirrors before those that daemon.json has. The order of
// keys stays.
func mergeDaemon(before []byte, mirrors []mirror) ([]byte, error) {
	members, err := readObject(before)
	if err != nil {
		return nil, fmt.Errorf("daemon.json is no JSON object, which docker would not take either: %w", err)
	}
	const key = "registry-mirrors"
	at := slices.IndexFunc(members, func(m member) bool { return m.key == key })
	var old []string
	if at < 0 {
		at = len(members)
		members = append(members, member{key: key})
	} else if err := json.Unmarshal(members[at].value, &old); err != nil {
		return nil, fmt.Errorf("%s in daemon.json is no list of texts; correct the file first", key)
	}
	all := []string{}
	for _, m := range mirrors {
		all = append(all, m.url)
	}
	for _, url := range old {
		if !slices.Contains(all, url) && !slices.Contains(all, url[:max(0, len(url)-1)]) { // docker writes a slash at the end
			all = append(all, url)
		}
	}
	if members[at].value, err = json.Marshal(all); err != nil {
		return nil, err
	}
	var b, out bytes.Buffer
	b.WriteByte('{')
	for i, m := range members {
		name, err := json.Marshal(m.key)
		if err != nil {
			return nil, err
		}
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(name)
		b.WriteByte(':')
		b.Write(m.value)
	}
	b.WriteByte('}')
	if err := json.Indent(&out, b.Bytes(), "", "  "); err != nil {
		return nil, err
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// readObject splits a JSON object into its members, in order. An empty file is an
// empty object.
func readObject(text []byte) (members []member, err error) {
	if len(bytes.TrimSpace(text)) == 0 {
		return nil, nil
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	if token, err := dec.Token(); err != nil || token != json.Delim('{') {
		return nil, fmt.Errorf("it does not begin with {")
	}
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return nil, err
		}
		m := member{key: token.(string)} // keys are: the decoder sees to it
		if err := dec.Decode(&m.value); err != nil {
			return nil, err
		}
		members = append(members, m)
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("more follows the object")
	}
	return members, nil
}
