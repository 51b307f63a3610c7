package main

import (
	"math"
	"testing"
)

// TestTrend: what comes and goes is no growth, what is slow and steady is.
func TestTrend(t *testing.T) {
	memory := func(s sample) float64 { return s.memory }
	for name, test := range map[string]struct {
		at   func(i int) float64
		want float64
	}{
		"constant":        {func(int) float64 { return 50 }, 0},
		"sawtooth":        {func(i int) float64 { return 50 + float64(i%7)*2 }, 0},
		"a step back":     {func(i int) float64 { return 50 - 20*float64(i/90) }, 0},
		"a leak":          {func(i int) float64 { return 50 + float64(i)*0.1 }, 9.9},
		"a leak in noise": {func(i int) float64 { return 50 + float64(i%7)*2 + float64(i)*0.1 }, 9.9},
	} {
		var samples []sample
		for i := range 100 {
			samples = append(samples, sample{memory: test.at(i)})
		}
		if got := trend(samples, memory); math.Abs(got-test.want) > 1 {
			t.Errorf("%s: grew by %.2f, want %.2f", name, got, test.want)
		}
	}
}
