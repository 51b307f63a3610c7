// Package e2e tests the built binary with clients that others wrote (skopeo,
// crane, oras-go, containerd), on networks of namespaces. make test installs the
// clients; the tests need the right to make network namespaces and fail, rather
// than skip, without it.
package e2e
