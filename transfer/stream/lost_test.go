package stream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// islands are nodes of which each reaches some, in a bubble.
type islands struct {
	t       *testing.T
	wg      sync.WaitGroup
	trip    time.Duration // there and back
	engines map[string]*Engine
	stores  map[string]*transfertest.Store
	dial    func(from, to string) error // before each connection; nil: nothing
	said    func(from string, k kind)   // hears of each frame of a holder; nil: nobody
}

// bubble runs a test with islands; reach names, for each node, whom it reaches.
func bubble(t *testing.T, reach map[string][]string, test func(t *testing.T, s *islands)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &islands{t: t, trip: 10 * time.Millisecond, engines: map[string]*Engine{}, stores: map[string]*transfertest.Store{}}
		ctx, cancel := context.WithCancel(t.Context())
		defer s.wg.Wait()
		defer cancel()
		for id, others := range reach {
			s.stores[id] = transfertest.NewStore()
			s.engines[id] = mover(t, s.stores[id], alike{id, others}, func(cfg *Config) {
				cfg.Self, cfg.StallTimeout = id, 10*time.Second
				cfg.Dial = func(_ context.Context, to string) (net.Conn, error) {
					if s.dial != nil {
						if err := s.dial(id, to); err != nil {
							return nil, err
						}
					}
					here, there := far(s.trip / 2)
					s.wg.Go(func() { s.engines[to].serveConn(ctx, heard{plugged{there, id, nil}, s, to, new([]byte)}) })
					return plugged{here, to, nil}, nil
				}
			})
		}
		test(t, s)
	})
}

// heard is a holder's end of a connection.
type heard struct {
	plugged
	s    *islands
	id   string
	rest *[]byte // that is no whole frame yet
}

func (h heard) Write(b []byte) (int, error) {
	if h.s.said != nil {
		*h.rest = append(*h.rest, b...)
		for len(*h.rest) >= frameHeader {
			n := frameHeader + int(binary.BigEndian.Uint32((*h.rest)[1:]))
			if len(*h.rest) < n {
				break
			}
			h.s.said(h.id, kind((*h.rest)[0]))
			*h.rest = (*h.rest)[n:]
		}
	}
	return h.plugged.Write(b)
}

// fetch has nodes fetch a blob at the same moment and gives what came of it.
func (s *islands) fetch(blob transfer.Blob, ids ...string) (took time.Duration, errs map[string]error) {
	s.t.Helper()
	var fetches []*transfer.Fetch
	began := time.Now()
	for _, id := range ids {
		f, err := s.engines[id].Fetch(s.t.Context(), blob)
		if err != nil {
			s.t.Fatal(err)
		}
		fetches = append(fetches, f)
	}
	errs = map[string]error{}
	for i, f := range fetches {
		errs[ids[i]] = f.Wait(s.t.Context())
	}
	return time.Since(began), errs
}

// mesh has each of n nodes reach all others.
func mesh(n int) (reach map[string][]string, ids []string) {
	for i := range n {
		ids = append(ids, fmt.Sprintf("%02d", i))
	}
	reach = map[string][]string{}
	for _, id := range ids {
		reach[id] = ids
	}
	return reach, ids
}

// kinds are blobs of one piece and of several, with a root and without.
func kinds(each func(name string, content []byte, blob transfer.Blob)) {
	for _, size := range []int{1000, 5*transfer.PieceSize + 3} {
		for _, rooted := range []bool{true, false} {
			content, blob := random(size)
			if !rooted {
				blob.Root = nil
			}
			each(fmt.Sprintf("%d bytes, root %v", size, rooted), content, blob)
		}
	}
}

// Nodes that look at the same moment for a blob that nobody holds do not wait for each
// other, however many they are and whomever each of them reaches.
func TestNobodyWaitsForOthersThatHaveNothing(t *testing.T) {
	two, ids2 := mesh(2)
	many, ids25 := mesh(25) // more than a fetch deals with at once
	ring := map[string][]string{"00": {"01"}, "01": {"02"}, "02": {"00"}}
	for name, c := range map[string]struct {
		reach map[string][]string
		ids   []string
	}{
		"two":         {two, ids2},
		"twenty-five": {many, ids25},
		"a ring":      {ring, []string{"00", "01", "02"}},
	} {
		kinds(func(kind string, _ []byte, blob transfer.Blob) {
			t.Run(name+", "+kind, func(t *testing.T) {
				bubble(t, c.reach, func(t *testing.T, s *islands) {
					took, errs := s.fetch(blob, c.ids...)
					for id, err := range errs {
						if !errors.Is(err, transfer.ErrNoHolder) {
							t.Errorf("%s: %v", id, err)
						}
					}
					if took > 10*s.trip {
						t.Errorf("it took %v, which is more than ten round trips", took)
					}
				})
			})
		})
	}
}

// Who reaches nobody but nodes that are still looking waits for those that may find it,
// and gets it from them, however late that is.
func TestWhoMayFindASourceIsWaitedFor(t *testing.T) {
	kinds(func(kind string, content []byte, blob transfer.Blob) {
		t.Run(kind, func(t *testing.T) {
			// Each knows only the next, the last two know each other, and one of them the holder.
			reach := map[string][]string{"00": {"01"}, "01": {"02"}, "02": {"03"}, "03": {"04", "02"}, "04": nil}
			bubble(t, reach, func(t *testing.T, s *islands) {
				s.stores["04"].Put(content)
				s.dial = func(_, to string) error {
					if to == "04" {
						<-time.After(4 * time.Second) // of the five that an answer may take
					}
					return nil
				}
				took, errs := s.fetch(blob, "00", "01", "02", "03")
				for id, err := range errs {
					if err != nil {
						t.Errorf("%s: %v", id, err)
					}
				}
				if took > 5*time.Second {
					t.Errorf("it took %v", took)
				}
			})
		})
	})
}

// One that has given up is asked in vain no longer than its answer takes; one that finds a
// source after others have asked it serves those.
func TestALateSourceServesThoseThatHaveAsked(t *testing.T) {
	kinds(func(kind string, content []byte, blob transfer.Blob) {
		t.Run(kind, func(t *testing.T) {
			reach := map[string][]string{"00": {"01"}, "01": {"00", "02", "03"}, "02": nil, "03": nil}
			bubble(t, reach, func(t *testing.T, s *islands) {
				s.dial = func(_, to string) error {
					switch to {
					case "02": // does not have it, and says so late
						<-time.After(time.Second)
					case "03":
						<-time.After(2 * time.Second)
						s.stores["03"].Put(content)
					}
					return nil
				}
				if _, errs := s.fetch(blob, "00", "01"); errors.Join(errs["00"], errs["01"]) != nil {
					t.Error(errs)
				}
			})
		})
	})
}

// The only holder lets go of the blob in the middle: nodes in a ring, which have heard of it
// from each other, do not keep each other's hopes up.
func TestALostSourceIsNoHopeOfAnybody(t *testing.T) {
	for _, pieces := range []int{0, 2} {
		t.Run(fmt.Sprint(pieces, " pieces have come"), func(t *testing.T) {
			reach := map[string][]string{"00": {"01"}, "01": {"02"}, "02": {"00", "03"}, "03": nil}
			bubble(t, reach, func(t *testing.T, s *islands) {
				content, blob := random(6 * transfer.PieceSize)
				source := s.engines["03"]
				s.stores["03"].Put(content)
				out := 0
				source.desk.limiter = limiter(func(transfer.Flow, int) time.Duration {
					if out >= pieces {
						return time.Hour
					}
					out++
					return 0
				})
				var fetches []*transfer.Fetch
				for _, id := range []string{"00", "01", "02"} {
					f, err := s.engines[id].Fetch(t.Context(), blob)
					if err != nil {
						t.Fatal(err)
					}
					fetches = append(fetches, f)
				}
				<-time.After(2 * time.Second)
				synctest.Wait()
				for i, f := range fetches {
					if held := f.Progress().Held; held != int64(pieces*transfer.PieceSize) {
						t.Errorf("%d holds %d bytes", i, held)
					}
					select {
					case <-f.Done():
						t.Errorf("%d: %v, while there is a source", i, f.Wait(t.Context()))
					default:
					}
				}
				began := time.Now()
				source.desk.held(blob.Digest, -1, false) // says that it is gone
				for i, f := range fetches {
					if err := f.Wait(t.Context()); !errors.Is(err, transfer.ErrNoHolder) {
						t.Errorf("%d: %v", i, err)
					}
				}
				if took := time.Since(began); took > 10*s.trip {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

// A reader that comes to a fetch of a lost blob hears at once that it is lost, and one
// that comes when it is back gets it.
func TestAReaderOfALostBlobDoesNotWait(t *testing.T) {
	reach, ids := mesh(3)
	bubble(t, reach, func(t *testing.T, s *islands) {
		content, blob := random(3 * transfer.PieceSize)
		blind := blob
		blind.Root = nil
		for _, id := range ids {
			if _, err := s.engines[id].Fetch(t.Context(), blind, transfer.For(transfer.Repair)); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		for range 3 { // with the root: the fetch goes on by it
			f, err := s.engines[ids[0]].Fetch(t.Context(), blob, transfer.ReadFrom(0))
			if err == nil {
				err = f.Ready(t.Context())
			}
			if !errors.Is(err, transfer.ErrNoHolder) {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took > 20*s.trip {
			t.Errorf("readers waited for %v", took)
		}
		s.stores[ids[2]].Put(content)
		if _, errs := s.fetch(blob, ids[0], ids[1]); errors.Join(errs[ids[0]], errs[ids[1]]) != nil {
			t.Error(errs)
		}
	})
}

// A fetch that waits for its turn has nobody wait for it.
func TestNobodyWaitsForOneThatWaitsForItsTurn(t *testing.T) {
	reach, ids := mesh(2)
	bubble(t, reach, func(t *testing.T, s *islands) {
		_, blob := random(transfer.PieceSize)
		busy := s.engines[ids[0]]
		taken := 0
		for busy.cfg.Fetches.Try() {
			taken++
		}
		f, err := busy.Fetch(t.Context(), blob)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		took, errs := s.fetch(blob, ids[1])
		if err := errs[ids[1]]; !errors.Is(err, transfer.ErrNoHolder) || took > 10*s.trip {
			t.Errorf("%v after %v", err, took)
		}
		for range taken {
			busy.cfg.Fetches.Give()
		}
		if err := f.Wait(t.Context()); !errors.Is(err, transfer.ErrNoHolder) {
			t.Error(err)
		}
	})
}

// Nodes that begin together with one that holds the blob have nothing to say about it, and
// nothing takes longer for it.
func TestAColdStartIsNotHeldUp(t *testing.T) {
	reach, ids := mesh(9)
	bubble(t, reach, func(t *testing.T, s *islands) {
		content, blob := random(24 * transfer.PieceSize)
		s.stores[ids[0]].Put(content)
		var mu sync.Mutex
		var heard []kind
		s.said = func(_ string, k kind) {
			mu.Lock()
			defer mu.Unlock()
			if !slices.Contains(heard, k) {
				heard = append(heard, k)
			}
		}
		took, errs := s.fetch(blob, ids[1:]...)
		for id, err := range errs {
			if err != nil {
				t.Errorf("%s: %v", id, err)
			}
		}
		t.Logf("it took %v", took)
		if slices.Contains(heard, kindHops) || !slices.Contains(heard, kindHave) {
			t.Errorf("frames of the kinds %v were sent", heard)
		}
	})
}
