//go:build race

package plantest

// largest is the largest fleet: the race detector finds nothing in one goroutine and
// takes minutes for 300 nodes.
const largest = 60
