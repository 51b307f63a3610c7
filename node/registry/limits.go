package registry

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/settings"
)

// Settings are what an operator may change of a registry while it runs.
type Settings struct {
	MaxManifest    *settings.Setting[int64]
	MaxLayers      *settings.Setting[int]
	MaxBlob        *settings.Setting[int64]
	MaxUploads     *settings.Setting[int]
	UploadRate     *settings.Setting[int64]
	MirrorProjects *settings.Setting[map[string]string]
	MirrorFallback *settings.Setting[string]
}

// The names of the settings, which refusals tell.
const (
	nameMaxManifest = "registry.max-manifest"
	nameMaxLayers   = "registry.max-layers"
	nameMaxBlob     = "registry.max-blob"
	nameMaxUploads  = "registry.max-uploads"
	nameUploadRate  = "registry.upload-rate"
)

// DefineSettings adds the registry's settings.
func DefineSettings(s *settings.Settings) *Settings {
	return &Settings{
		MaxManifest: settings.Define(s, settings.Spec[int64]{
			Name: nameMaxManifest, Default: "4MiB", Kind: settings.Bytes(64<<10, catalog.MaxManifest, false),
			Summary: "the largest manifest that is taken, in bytes",
		}),
		MaxLayers: settings.Define(s, settings.Spec[int]{
			Name: nameMaxLayers, Default: strconv.Itoa(catalog.MaxDescriptors), Kind: settings.Count(1, catalog.MaxDescriptors),
			Summary: "how many layers a manifest may have",
		}),
		MaxBlob: settings.Define(s, settings.Spec[int64]{
			Name: nameMaxBlob, Default: "0", Kind: settings.Bytes(1<<20, 1<<50, true),
			Summary: "the largest blob that a client may push, in bytes; 0 is no limit but the free space",
		}),
		MaxUploads: settings.Define(s, settings.Spec[int]{
			Name: nameMaxUploads, Default: "256", Kind: settings.Count(1, 4096),
			Summary: "how many uploads a user may have under way on one node",
		}),
		UploadRate: settings.Define(s, settings.Spec[int64]{
			Name: nameUploadRate, Default: "0", Kind: settings.Bytes(32<<10, 1<<40, true),
			Summary: "bytes a second that a node takes from one client, a user at one address; 0 is no limit",
		}),
		MirrorProjects: settings.Define(s, settings.Spec[map[string]string]{
			Name: "mirror.projects", Default: "", Kind: mirrorProjects,
			Summary: "which project stands for which upstream: HOST=PROJECT,...; an upstream that is not listed has the project of its name; HOST= is a name of this site",
		}),
		MirrorFallback: settings.Define(s, settings.Spec[string]{
			Name: "mirror.fallback", Default: "", Kind: mirrorFallback,
			Summary: "the upstream in whose project pulls of repositories are looked for that are unknown here; docker.io serves docker's registry-mirrors; empty is none",
		}),
	}
}

// raise is the end of a refusal by a limit.
func raise(name string) string {
	return "an administrator changes the limit with: atoll settings set " + name + " VALUE"
}

// largeManifests bounds the memory of manifests that arrive at once: those above
// catalog.MaxRow wait for one of so many places, at most manifestWait.
const (
	largeManifests = 8
	manifestWait   = 10 * time.Second
)

// manifestPlace waits until there is room for the request's manifest.
func (g *Registry) manifestPlace(c *call) (release func(), err error) {
	if n := c.r.ContentLength; n >= 0 && n <= catalog.MaxRow {
		return func() {}, nil
	}
	timer := time.NewTimer(manifestWait)
	defer timer.Stop()
	select {
	case g.large <- struct{}{}:
		return func() { <-g.large }, nil
	case <-c.r.Context().Done():
		return nil, c.r.Context().Err()
	case <-timer.C:
		return nil, fault.New(fault.Limit, "%d large manifests are being pushed, as many as this node takes at once; try again in a few seconds", largeManifests).WithCode(codeTooManyRequests)
	}
}

// uploads knows which user has which sessions of this node. Those of an earlier
// process are counted from their next request on.
type uploads struct {
	mu     sync.Mutex
	byUser map[string]map[string]bool // by who, then session
	begun  uint64
}

// who names a principal for counting.
func who(p access.Principal) string { return strconv.Itoa(int(p.Kind)) + ":" + p.Name }

// begin takes a place for a session that is about to be opened.
func (u *uploads) begin(user string, most int, alive func(id string) bool) (placeholder string, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.byUser[user]) >= most {
		u.prune(user, alive)
	}
	if n := len(u.byUser[user]); n >= most {
		return "", fault.New(fault.Limit, "%d of your uploads are under way on this node and %d are allowed: finish or cancel some, or wait until abandoned ones expire; %s", n, most, raise(nameMaxUploads)).WithCode(codeTooManyRequests)
	}
	u.begun++
	placeholder = "?" + strconv.FormatUint(u.begun, 10)
	u.add(user, placeholder)
	return placeholder, nil
}

func (u *uploads) add(user, id string) {
	if u.byUser[user] == nil {
		u.byUser[user] = map[string]bool{}
	}
	u.byUser[user][id] = true
}

func (u *uploads) hold(user, id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.add(user, id)
}

func (u *uploads) drop(user, id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.byUser[user], id)
	if len(u.byUser[user]) == 0 {
		delete(u.byUser, user)
	}
}

// prune forgets the sessions that have ended otherwise than by a request.
func (u *uploads) prune(user string, alive func(id string) bool) {
	for id := range u.byUser[user] {
		if id[0] != '?' && !alive(id) {
			delete(u.byUser[user], id)
		}
	}
	if len(u.byUser[user]) == 0 {
		delete(u.byUser, user)
	}
}

func (u *uploads) pruneAll(alive func(id string) bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for user := range u.byUser {
		u.prune(user, alive)
	}
}

func (g *Registry) alive(id string) bool {
	_, err := g.store.Upload(id)
	return err == nil
}

// newUpload opens a session for the request's user.
func (g *Registry) newUpload(c *call) (*blobs.Upload, error) {
	user := who(c.who)
	placeholder, err := g.uploads.begin(user, g.settings.MaxUploads.Value(), g.alive)
	if err != nil {
		return nil, err
	}
	defer g.uploads.drop(user, placeholder)
	u, err := g.store.NewUpload(c.r.Context())
	if err == nil {
		g.uploads.hold(user, u.ID())
	}
	return u, err
}

// errTooLarge ends the reading of a blob that exceeds the limit. It never leaves
// this package.
var errTooLarge = errors.New("the blob exceeds the limit")

// intake is what is read of a blob: no more than it may have, and no faster.
type intake struct {
	from io.Reader
	left int64 // -1: no limit
	over bool
	rate int64                          // bytes a second; 0: no limit
	pay  func(cost time.Duration) error // waits; for a rate
}

// intake makes the reader of a blob's next piece, and the way to end it.
func (g *Registry) intake(c *call, u *blobs.Upload, from io.Reader) (in *intake, done func()) {
	in = &intake{from: from, left: -1, rate: g.settings.UploadRate.Value()}
	if most := g.settings.MaxBlob.Value(); most > 0 {
		in.left = max(0, most-u.Size())
	}
	if in.rate == 0 {
		return in, func() {}
	}
	host, _, err := net.SplitHostPort(c.r.RemoteAddr)
	if err != nil {
		host = c.r.RemoteAddr
	}
	client := who(c.who) + "@" + host
	pace := g.pacers.enter(client)
	in.pay = func(cost time.Duration) error { return pace.wait(c.r.Context(), cost) }
	return in, func() { g.pacers.leave(client) }
}

// announced refuses a piece whose announced length is too much.
func (in *intake) announced(length int64) bool {
	in.over = in.over || in.left >= 0 && length > in.left
	return in.over
}

func (in *intake) Read(p []byte) (int, error) {
	if in.rate > 0 {
		p = p[:min(int64(len(p)), max(in.rate/8, 4<<10))]
	}
	n, err := in.from.Read(p)
	if in.left >= 0 {
		if int64(n) > in.left {
			in.over = true
			return 0, errTooLarge
		}
		in.left -= int64(n)
	}
	if in.rate > 0 && n > 0 {
		if ended := in.pay(time.Duration(float64(n) / float64(in.rate) * float64(time.Second))); err == nil {
			err = ended
		}
	}
	return n, err
}

// tooLarge ends a session whose blob exceeds the limit.
func (g *Registry) tooLarge(c *call, u *blobs.Upload) error {
	err := fault.New(fault.Limit, "the blob is larger than the %s that this registry takes; %s", settings.FormatBytes(g.settings.MaxBlob.Value()), raise(nameMaxBlob)).WithCode(codeSizeInvalid)
	if failure := u.Cancel(); failure != nil {
		return errors.Join(err, failure)
	}
	g.uploads.drop(who(c.who), u.ID())
	return err
}

// pacers has a pacer for each client that sends.
type pacers struct {
	mu  sync.Mutex
	all map[string]*pacer
}

// pacer spreads what one client sends, over all its connections.
type pacer struct {
	users int // connections, under the lock of pacers

	mu   sync.Mutex
	paid time.Time // until when what was taken uses up the rate
}

func (p *pacers) enter(client string) *pacer {
	p.mu.Lock()
	defer p.mu.Unlock()
	one := p.all[client]
	if one == nil {
		one = &pacer{}
		p.all[client] = one
	}
	one.users++
	return one
}

func (p *pacers) leave(client string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if one := p.all[client]; one != nil {
		if one.users--; one.users == 0 {
			delete(p.all, client)
		}
	}
}

// wait pays for what was taken, in time at the full rate.
func (p *pacer) wait(ctx context.Context, cost time.Duration) error {
	p.mu.Lock()
	now := time.Now()
	if p.paid.Before(now) {
		p.paid = now
	}
	p.paid = p.paid.Add(cost)
	wait := p.paid.Sub(now)
	p.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
