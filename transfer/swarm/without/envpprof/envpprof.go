// Package envpprof stands in for github.com/anacrolix/envpprof, which the BitTorrent
// library links: at the start of the process it would read GOPPROF from the
// environment and, if told to, serve the process's memory over HTTP without asking
// who wants it. A node has a profile of its own, behind its own authorization.
package envpprof

// Stop does nothing.
func Stop() {}
