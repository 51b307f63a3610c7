package registry

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/settings"
)

// Clients that use this registry as a mirror ask for names of another one, the
// upstream. containerd says which in the query parameter ns; docker says nothing
// and means Docker Hub. What they ask for is read from the project that stands
// for the upstream; nothing is ever written through such a name.
//
// What a client may read there its user decides, and a token does not stand
// against it if it names the repository under either name: a client asks for a
// token by the name that it knows.

// dockerHub is the upstream whose names of one part stand for library/NAME.
const dockerHub = "docker.io"

// hubAliases are other hosts of Docker Hub.
var hubAliases = [...]string{"registry-1.docker.io", "index.docker.io", "registry.hub.docker.com"}

// mirrorProjects takes the table of upstreams: HOST=PROJECT, and HOST= for a name
// of this site, whose repositories are asked for as they are.
var mirrorProjects = settings.Pairs(func(host, name string) error {
	if err := checkUpstream(host); err != nil || name == "" {
		return err
	}
	return project.CheckName(name)
})

// mirrorFallback takes an upstream, or nothing.
var mirrorFallback = settings.Text(func(host string) error {
	if host == "" {
		return nil
	}
	return checkUpstream(host)
})

// checkUpstream refuses what cannot be a registry's host, with or without port.
func checkUpstream(host string) error {
	if host == "" || len(host) > maxName || strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789.-:[]") != "" {
		return fmt.Errorf("%.80q is not the host of a registry, such as docker.io or registry.example:5000", host)
	}
	return nil
}

// upstreamName gives the repository here that stands for one of an upstream.
// It is false for an upstream that is this site.
func upstreamName(projects map[string]string, host string, n Name) (Name, bool) {
	for _, alias := range hubAliases {
		if host == alias {
			host = dockerHub
		}
	}
	to, listed := projects[host]
	if listed && to == "" {
		return n, false
	}
	if !listed {
		to = strings.NewReplacer(":", "-", "[", "", "]", "").Replace(host)
	}
	mapped := Name{Sent: n.Sent, Project: to, Repository: n.Sent}
	if host == dockerHub && !strings.Contains(n.Sent, "/") {
		mapped.Repository = "library/" + n.Sent
	}
	return mapped, true
}

// mapMirror points a read at the project of the upstream that the client means.
func (g *Registry) mapMirror(c *call) error {
	n := c.route.Name
	if host, ok := namespace(c.r); ok {
		if host = strings.ToLower(host); strings.EqualFold(host, c.r.Host) {
			return nil
		}
		if err := checkUpstream(host); err != nil {
			return fault.New(fault.Invalid, "the parameter ns: %v", err).WithCode(codeNameInvalid)
		}
		if mapped, other := upstreamName(g.settings.MirrorProjects.Value(), host, n); other {
			c.route.Name, c.mirrored = mapped, n.Full()
		}
		return nil
	}
	host := g.settings.MirrorFallback.Value()
	if host == "" || !mayFallBack(c) {
		return nil
	}
	mapped, other := upstreamName(g.settings.MirrorProjects.Value(), host, n)
	if !other {
		return nil
	}
	use, err := g.fallsBack(c, n, mapped)
	if err == nil && use {
		c.route.Name, c.mirrored = mapped, n.Full()
	}
	return err
}

// namespace gives the upstream that the query names. Nearly no request has one,
// so that the query is parsed only then.
func namespace(r *http.Request) (string, bool) {
	if !strings.Contains(r.URL.RawQuery, "ns=") {
		return "", false
	}
	q := r.URL.Query()
	return q.Get("ns"), q.Get("ns") != ""
}

// mayFallBack reports whether a request could come from a client that takes this
// registry for a mirror. One that pushes, or looks whether it has to, must see
// what is under the name itself: a layer of an upstream would make it leave its
// own out.
func mayFallBack(c *call) bool {
	if c.route.Endpoint == EndpointBlob && c.r.Method == http.MethodHead {
		return false
	}
	return c.who.Grants != nil && !access.Granted(c.who, c.route.Name.Full(), actionPush)
}

// fallsBack reports whether a name is unknown here and that of the upstream is
// known. For content by digest this node's state is enough; a tag that was
// pushed a moment ago must not be taken for the upstream's.
func (g *Registry) fallsBack(c *call, n, mapped Name) (use bool, err error) {
	look := func(v *table.View) error {
		own, err := g.catalog.Has(v, n.Project, n.Repository)
		if err != nil || own {
			use = false
			return err
		}
		use, err = g.catalog.Has(v, mapped.Project, mapped.Repository)
		return err
	}
	if err := g.db.View(look); err != nil || !use || isDigest(c.route.Reference) {
		return use, err
	}
	_, err = g.db.Confirmed(c.r.Context(), look)
	return use, err
}

// reaches reports whether the token of a request, if it came with one, reaches
// the repository.
func (c *call) reaches(p access.Project, action string) bool {
	if access.Granted(c.who, c.route.Name.Full(), action) {
		return true
	}
	if c.mirrored == "" {
		return false
	}
	if p.Public {
		return true
	}
	for _, grant := range c.who.Grants {
		if grant.Repository == c.mirrored {
			return true
		}
	}
	return false
}
