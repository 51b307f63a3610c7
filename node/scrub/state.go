package scrub

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
)

// stateName is the file in Config.Dir. It is advice to the next process and not
// worth a sync: without it, or with one that cannot be read, a pass begins anew.
const stateName = "scrub.json"

// state is what survives a restart.
type state struct {
	// Asked says that somebody wants the pass now, at the full rate.
	Asked    bool                      `json:"asked,omitempty"`
	Pass     Pass                      `json:"pass"` // under way; Started is zero when none is
	Last     Pass                      `json:"last"`
	Findings map[digest.Digest]Finding `json:"findings"`
}

// Pass over all blobs of a node.
type Pass struct {
	Started  time.Time `json:"started,omitzero"`
	Finished time.Time `json:"finished,omitzero"`
	// After is the last blob that was looked at; they come in the order of their
	// digests.
	After   digest.Digest `json:"after,omitempty"`
	Blobs   int           `json:"blobs"` // read
	Bytes   int64         `json:"bytes"` // read
	Damaged int           `json:"damaged"`
	// Missing had no file although this node should hold them. One that just came
	// to this node misses what it has not fetched yet.
	Missing int `json:"missing"`
}

func (s *Scrub) load() state {
	var st state
	data, err := os.ReadFile(filepath.Join(s.Dir, stateName))
	if err == nil {
		err = json.Unmarshal(data, &st)
	}
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.Log.Warn("how far the blobs were checked is not known any more; all are checked again", "err", err)
		}
		st = state{}
	}
	if st.Findings == nil {
		st.Findings = map[digest.Digest]Finding{}
	}
	return st
}

// save writes the state; the caller holds s.mu.
func (s *Scrub) save() error {
	s.saved = time.Now()
	data, err := json.Marshal(s.state)
	if err != nil {
		return err
	}
	name := filepath.Join(s.Dir, stateName)
	if err := os.WriteFile(name+".tmp", data, 0o600); err != nil {
		return err
	}
	return os.Rename(name+".tmp", name)
}

// keep is save where there is nobody to tell; the caller holds s.mu.
func (s *Scrub) keep() {
	if err := s.save(); err != nil {
		s.Log.Warn("how far the blobs were checked could not be saved", "err", err)
	}
}
