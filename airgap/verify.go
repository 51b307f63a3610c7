package airgap

import (
	"context"
	"io"

	"github.com/atoll-registry/atoll/bundle"
	"github.com/atoll-registry/atoll/bundle/entry"
)

// Verify reads a bundle to its last byte and proves that it is whole and comes
// from one of the sites. It needs no node; the keys inside the file count for
// nothing by themselves.
func Verify(ctx context.Context, r io.Reader, sites ...Site) (Report, error) {
	var report Report
	b, err := bundle.Open(&during{ctx.Err, r})
	if err != nil {
		return report, err
	}
	report.describe(b.Claims())
	report.Warning = unverified
	if err := b.Authenticate(rootsOf(sites)); err != nil {
		return report, err
	}
	if err := checkLogs(b); err != nil {
		return report, err
	}
	for {
		// NextBlob reads what is left of the blob before.
		_, err := b.NextBlob()
		if err == io.EOF {
			break
		}
		if err != nil {
			return report, err
		}
	}
	report.contents(b)
	report.Verified, report.Warning = true, ""
	return report, nil
}

// Inspect reads what a bundle says of itself, up to where the bulk begins. The
// file has to be consistent in itself that far; whose it is stays unproven, and
// the report says so.
func Inspect(ctx context.Context, r io.Reader) (Report, error) {
	var report Report
	b, err := bundle.Open(&during{ctx.Err, r})
	if err != nil {
		return report, err
	}
	report.describe(b.Claims())
	report.Warning = unverified
	claimed := func(site string) (entry.Key, bool) {
		_, root, err := b.Chain(site).Claimed()
		return root, err == nil
	}
	if err := b.Authenticate(claimed); err != nil {
		return report, err
	}
	if err := checkLogs(b); err != nil {
		return report, err
	}
	for {
		blob, err := b.NextBlob()
		if err != nil && err != io.EOF {
			return report, err
		}
		if err != nil || blob.Role != bundle.RoleManifest {
			break
		}
	}
	report.contents(b)
	return report, nil
}

func checkLogs(b *bundle.Reader) error {
	for {
		scope, err := b.NextLog()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := scope.Check(scope.Body(), scope.Size); err != nil {
			return err
		}
	}
}

func rootsOf(sites []Site) bundle.Trusted {
	return func(id string) (entry.Key, bool) {
		for _, site := range sites {
			if site.ID == id {
				return site.RootKey, true
			}
		}
		return "", false
	}
}

// during ends reading when the operation is cancelled.
type during struct {
	cancelled func() error
	r         io.Reader
}

func (d *during) Read(p []byte) (int, error) {
	if err := d.cancelled(); err != nil {
		return 0, err
	}
	return d.r.Read(p)
}
