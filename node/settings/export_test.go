package settings

import (
	"context"

	"github.com/atoll-registry/atoll/cluster/table"
)

// Write makes a row as another node does, unchecked.
func (s *Settings) Write(ctx context.Context, name, value string) error {
	_, err := s.db.Update(ctx, func(tx *table.Tx) error { return s.rows.Put(tx, row{Value: value}, name) })
	return err
}
