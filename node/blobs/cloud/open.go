package cloud

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"

	"github.com/atoll-registry/atoll/node/fault"
)

// opener makes a driver; nil when it is not compiled in.
type opener func(ctx context.Context, parameters map[string]any) (storagedriver.StorageDriver, error)

// kind is an object store that this version knows.
type kind struct {
	tag     string
	writing Writing
	flat    bool // see Backend
	open    opener
	// needs are the parameters without which the driver cannot work.
	needs []string
}

func kinds() map[string]kind {
	return map[string]kind{
		// S3 and GCS show an object when its upload is completed, and not before.
		"s3":  {tag: "s3", writing: Direct, open: openS3(), needs: []string{"bucket"}},
		"gcs": {tag: "gcs", writing: Unended, open: openGCS(), needs: []string{"bucket"}},
		// An append blob of Azure grows in sight of everybody.
		"azure": {tag: "azure", writing: Staged, flat: true, open: openAzure(), needs: []string{"container", "accountname"}},
	}
}

// Kinds names the object stores, sorted, whether compiled in or not.
func Kinds() []string { return slices.Sorted(maps.Keys(kinds())) }

// Open opens an object store of the kind with the parameters of its storage
// driver (https://distribution.github.io/distribution/storage-drivers/). Whether
// it answers is Check's to say. fault.Invalid when it cannot be used so; the text
// never holds a secret.
func Open(ctx context.Context, name string, parameters map[string]any) (*Backend, error) {
	if err := Supported(name, parameters); err != nil {
		return nil, err
	}
	k := kinds()[name]
	driver, err := k.open(ctx, parameters)
	if err != nil {
		return nil, fault.New(fault.Invalid, "storage %s cannot be opened; check the parameters of --storage-config: %s", name, Redact(err.Error(), parameters))
	}
	b := New(ctx, driver, k.writing)
	b.flat = k.flat
	b.redact = func(text string) string { return Redact(text, parameters) }
	return b, nil
}

// Supported tells before anything is opened whether it could be; fault.Invalid
// says what is missing.
func Supported(name string, parameters map[string]any) error {
	k, known := kinds()[name]
	switch {
	case !known:
		return fault.New(fault.Invalid, "%q is no storage: it is local, %s", name, strings.Join(Kinds(), ", "))
	case k.open == nil:
		return fault.New(fault.Invalid, "this atoll was built without storage in %s, to stay small; use a build with -tags cloud (or %s): go build -tags cloud ./cmd/atoll", name, k.tag)
	}
	for _, need := range k.needs {
		if parameters[need] == nil || parameters[need] == "" {
			return fault.New(fault.Invalid, "storage %s needs the parameter %s; give it with --storage-config %s=VALUE or in the file that --storage-config names", name, need, need)
		}
	}
	return nil
}

// secret reports whether nobody is to be shown the parameter's value.
func secret(parameter string) bool {
	switch parameter {
	case "secretkey", "accesskey", "sessiontoken", "accountkey", "connectionstring", "credentials", "keyfile", "private_key":
		return true
	}
	return strings.Contains(parameter, "secret") || strings.Contains(parameter, "password") || strings.Contains(parameter, "token")
}

// Redact takes the secret values among parameters out of a text.
func Redact(text string, parameters map[string]any) string {
	for name, value := range parameters {
		if s := fmt.Sprint(value); secret(name) && len(s) > 0 {
			text = strings.ReplaceAll(text, s, "***")
		}
		if inner, ok := value.(map[string]any); ok {
			text = Redact(text, inner)
		}
	}
	return text
}
