//go:build !race

package plantest

// largest is the largest fleet.
const largest = 300
