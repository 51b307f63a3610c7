package kv

import (
	"fmt"

	"github.com/hashicorp/raft"
	"github.com/klauspost/compress/zstd"
)

// packMark is the Extensions of an entry whose Data is compressed. Raft leaves
// Extensions to the store and the state machine, and this one uses none.
const packMark = "zstd"

// packFrom is from which size on, in bytes, an entry is compressed.
const packFrom = 256

// Packed is a raft.LogStore that compresses entries on their way to the disk and
// reads those that are not compressed as well. A Txn repeats names and digests:
// most take a third. What nodes send each other stays as it is.
type Packed struct {
	raft.LogStore
	pack   *zstd.Encoder
	unpack *zstd.Decoder
}

// NewPacked puts the compression before a store.
func NewPacked(store raft.LogStore) (*Packed, error) {
	pack, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(64<<10), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("compress the log: %w", err)
	}
	unpack, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxTxnBytes), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("compress the log: %w", err)
	}
	return &Packed{store, pack, unpack}, nil
}

// Close ends the goroutines of the compression, not the store.
func (s *Packed) Close() { s.unpack.Close() }

// GetLog implements raft.LogStore.
func (s *Packed) GetLog(index uint64, out *raft.Log) error {
	if err := s.LogStore.GetLog(index, out); err != nil || string(out.Extensions) != packMark {
		return err
	}
	data, err := s.unpack.DecodeAll(out.Data, nil)
	if err != nil {
		return fmt.Errorf("entry %d of the log is damaged: %w", index, err)
	}
	out.Data, out.Extensions = data, nil
	return nil
}

// StoreLog implements raft.LogStore.
func (s *Packed) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. The entries stay the caller's, unchanged.
func (s *Packed) StoreLogs(logs []*raft.Log) error {
	packed := make([]*raft.Log, len(logs))
	for i, l := range logs {
		packed[i] = l
		if l.Type != raft.LogCommand || len(l.Data) < packFrom || len(l.Data) > MaxTxnBytes || len(l.Extensions) > 0 {
			continue
		}
		if data := s.pack.EncodeAll(l.Data, nil); len(data) < len(l.Data) {
			small := *l
			small.Data, small.Extensions = data, []byte(packMark)
			packed[i] = &small
		}
	}
	return s.LogStore.StoreLogs(packed)
}
