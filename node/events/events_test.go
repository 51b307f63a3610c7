package events

import (
	"context"
	"testing"
	"testing/synctest"
)

func TestSubscribersHearInOrderAndLearnWhatTheyMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var topic Topic[int]
		topic.Publish(0) // nobody listens: nothing happens
		ctx, stop := context.WithCancel(t.Context())
		hold := make(chan struct{})
		var heard []int
		lost := 0
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			topic.Each(ctx, 2, func(event, missed int) {
				<-hold
				heard, lost = append(heard, event), lost+missed
			})
		}()
		synctest.Wait()
		for i := 1; i <= 5; i++ {
			topic.Publish(i)
			if i == 1 {
				synctest.Wait() // the first is in the handler, which is held up
			}
		}
		close(hold)
		synctest.Wait()
		stop()
		<-ended
		if want := []int{1, 4, 5}; len(heard) != 3 || heard[0] != want[0] || heard[1] != want[1] || heard[2] != want[2] || lost != 2 {
			t.Fatalf("heard %v and missed %d, want %v and 2: the newest stay", heard, lost, want)
		}
		topic.Publish(6) // after the subscriber left
	})
}
