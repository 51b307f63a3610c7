// Package spread measures how fast a blob reaches many nodes over real links: each
// node has a network namespace of its own whose uplink is shaped, and a peer port with
// certificates. Its test prints the time until the last node has the blob over the
// bound that no plan can beat, and what the holder and all nodes sent:
//
//	go test ./scripts/spread -v -args -nodes 8 -mib 64 -rate 3300000
//
// Others measure the first byte over a long path, pulls through a node beside direct ones,
// processor time beside a bare connection, and memory; make bench-transfer runs them all.
//
// It needs root. The simulator of transfer/plan/plantest predicts the same figures.
package spread
