package spread

import (
	"context"
	"flag"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// Of eight that begin together two are ten times slower and one is killed midway, and a
// ninth comes midway. The others are compared with what equal nodes could do at best.
func TestSlowDeadAndLateNodesHoldNobodyUp(t *testing.T) {
	size := int64(*mib) << 20
	nodes := []post{{zone: "s", up: *rate, holds: true}}
	for i := range 9 {
		p := post{zone: "s", up: *rate}
		if i < 2 {
			p.up, p.down = *rate/10, *rate/10
		}
		nodes = append(nodes, p)
	}
	c := newCrew(t, byStream, size, nodes)
	c.start(t)
	slow, dies, others, late := c.nodes[1:3], c.nodes[3], c.nodes[4:9], c.nodes[9]
	for _, m := range c.nodes[1:9] {
		m.fetch(t)
	}
	ctx := wait(t, size, *rate, 14)
	if !dies.until(ctx, func(r report) bool { return r.Held >= size/2 }) {
		t.Fatalf("the one that is to die has only %d bytes", dies.says().Held)
	}
	dies.kill()
	late.fetch(t)
	bound := float64(size) / float64(*rate)
	last := c.have(ctx, t, others).Seconds() / bound
	came := c.have(ctx, t, []*member{late}).Seconds() / bound
	if *whole { // of a small blob, whose others say little
		slowest := c.have(ctx, t, slow).Seconds() / bound
		judge(t, "faults_slow", slowest, "x bound", limits{12, 15}) // their own downlink takes ten
		return
	}
	judge(t, "faults_others", last, "x bound", limits{1.4, 3})
	judge(t, "faults_late", came, "x bound", limits{1.4, 3})
	row("faults_source_sent_until_then", float64(c.nodes[0].says().Sent)/float64(size), "F", 0)
	for _, m := range slow { // they go on meanwhile
		had := m.says().Held
		if !m.until(ctx, func(r report) bool { return r.Done || r.Held > had }) {
			t.Errorf("%s is slow and got stuck with %d bytes: %s", m.id, had, m.says().Err)
		}
	}
}

var whole = flag.Bool("whole", false, "of TestSlowDeadAndLateNodesHoldNobodyUp: wait for the slow ones too")

// Three sites of four, the holder in one of them, and a slow link to each other one.
func threeSites(t *testing.T) (c *crew, links map[string]*lab.Line) {
	t.Helper()
	var nodes []post
	for _, zone := range []string{"a", "b", "c"} {
		for i := range 4 {
			nodes = append(nodes, post{zone: zone, up: *rate, holds: zone == "a" && i == 0})
		}
	}
	c = newCrew(t, byStream, int64(*mib)<<20, nodes)
	links = map[string]*lab.Line{}
	for _, zone := range []string{"b", "c"} {
		line, err := c.Line(t.Context(), "a", zone, lab.Path{Rate: *rate / 2, Delay: 25 * time.Millisecond, Queue: 128 << 10})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { line.Close() })
		links[zone] = line
	}
	c.start(t)
	for _, m := range c.nodes[1:] {
		m.fetch(t)
	}
	return c, links
}

// far is what nodes got from beyond the slow link, in bytes of pieces.
func far(nodes []*member) (bytes int64) {
	for _, m := range nodes {
		bytes += m.says().Far
	}
	return bytes
}

func TestABlobCrossesASlowLinkOnce(t *testing.T) {
	c, links := threeSites(t)
	ctx := wait(t, c.blob.Size, *rate/2, 3)
	last := c.have(ctx, t, c.nodes[1:]).Seconds()
	settled(ctx, c.nodes)
	size := float64(c.blob.Size)
	row("sites_last", last/(size/float64(*rate/2)), "x slow link", 0)
	for zone, nodes := range map[string][]*member{"b": c.nodes[4:8], "c": c.nodes[8:]} {
		judge(t, "sites_crossed_into_"+zone, float64(far(nodes))/size, "F", limits{1.05, 1.3})
		row("sites_on_the_wire_into_"+zone, float64(links[zone].Bytes[0].Load())/size, "F, with headers", 0)
	}
}

// The node that asks beyond the slow link loses its network and dies midway, so that
// nobody hears of it: another goes on where it was.
func TestTheElectedNodeDies(t *testing.T) {
	c, links := threeSites(t)
	size := c.blob.Size
	ctx := wait(t, size, *rate/2, 3)
	site := c.nodes[4:8]
	var ids []string
	for _, m := range site {
		ids = append(ids, m.id)
	}
	chosen := plan.Elect(c.blob.Digest.String(), ids)
	var elected *member
	var rest, all []*member
	for _, m := range c.nodes[1:] {
		if m.id == chosen {
			elected = m
			continue
		}
		all = append(all, m)
		if m.zone == site[0].zone {
			rest = append(rest, m)
		}
	}
	if !elected.until(ctx, func(r report) bool { return r.Held >= size/2 }) {
		t.Fatalf("the elected node has only %d bytes", elected.says().Held)
	}
	if err := elected.host.Unplug(ctx); err != nil {
		t.Fatal(err)
	}
	elected.kill()
	lost := time.Now()
	before := far(rest)
	again := crossesAgain(ctx, rest, before)
	if again.IsZero() {
		t.Fatal("nobody went on in the place of the elected node")
	}
	last := c.have(ctx, t, all).Seconds()
	settled(ctx, all)
	crossed := float64(far(rest)+elected.says().Far) / float64(size)
	judge(t, "elected_dies_next_piece", again.Sub(lost).Seconds(), "s", limits{2 + pieceTime(), 6})
	judge(t, "elected_dies_crossed", crossed, "F", limits{1.10, 1.5})
	row("elected_dies_last", last/(float64(size)/float64(*rate/2)), "x slow link", 0)
	row("elected_dies_on_the_wire", float64(links["b"].Bytes[0].Load())/float64(size), "F, with headers", 0)
}

// pieceTime is what a piece takes over the slow link, in seconds.
func pieceTime() float64 { return transfer.PieceSize / float64(*rate/2) }

// crossesAgain waits until more has come from beyond the slow link than before, and says
// when that was; never: the zero time.
func crossesAgain(ctx context.Context, nodes []*member, before int64) time.Time {
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for far(nodes) == before {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return time.Time{}
		}
	}
	return time.Now()
}
