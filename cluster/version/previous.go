//go:build previous

package version

// Level of the program that stands for the version before, in the tests that run
// two versions in one site: one below that of current.go.
const Level = 1
