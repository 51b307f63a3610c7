package member

import (
	"errors"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/cluster/version"
)

// A backup of a site that this program is too old for makes no site.
func TestAStateOfALaterLevelIsRefused(t *testing.T) {
	for _, level := range []int{version.Level, version.Level + 1} {
		dir := t.TempDir()
		t.Run("written", func(t *testing.T) {
			db := tabletest.OpenBolt(t, dir)
			gate := version.NewGate(db, level, "v9.9")
			tabletest.Start(t, db)
			if _, err := db.Update(t.Context(), func(tx *table.Tx) error { return gate.Found(tx, time.Unix(1, 0)) }); err != nil {
				t.Fatal(err)
			}
		})
		t.Run("read", func(t *testing.T) {
			db := tabletest.OpenBolt(t, dir)
			offline := NewOffline(db, nil)
			tabletest.Start(t, db)
			err := offline.Alone(t.Context(), Member{ID: "a", Name: "a"}, epoch.Epoch{})
			if refused := errors.Is(err, version.ErrMismatch); refused != (level > version.Level) || !refused && err != nil {
				t.Errorf("a state of level %d: %v", level, err)
			}
		})
	}
}
