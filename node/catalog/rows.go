package catalog

import (
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
)

// tables of the catalog, and their keys.
type tables struct {
	repositories *table.Table[repositoryRow] // project, repository
	artifacts    *table.Table[artifactRow]   // project, repository, digest
	tags         *table.Table[tagRow]        // project, repository, tag
	// tagged has a row for each tag of an artifact. It is what a deletion of
	// the artifact is guarded by: an index is local and guards nothing.
	tagged *table.Table[mark] // project, repository, digest, tag
	// members has a row for each manifest that an index lists.
	members *table.Table[mark] // project, repository, child, index
	// manifests are the bytes, once for the whole site, while a holder has them.
	manifests *table.Table[manifestRow] // digest
	holders   *table.Table[mark]        // digest, project, repository
}

const subjectIndex = "subject" // project, repository, subject

func define(db *table.DB) tables {
	return tables{
		repositories: table.Define[repositoryRow](db, "repository"),
		artifacts: table.Define(db, "artifact", table.Index[artifactRow]{
			Name: subjectIndex, Version: 1,
			Keys: func(key []string, a artifactRow) [][]string {
				if a.Subject == "" || len(key) != 3 {
					return nil
				}
				return [][]string{{key[0], key[1], string(a.Subject)}}
			},
		}),
		tags:      table.Define[tagRow](db, "tag"),
		tagged:    table.Define[mark](db, "tagged"),
		members:   table.Define[mark](db, "index_member"),
		manifests: table.Define[manifestRow](db, "manifest"),
		holders:   table.Define[mark](db, "manifest_holder"),
	}
}

// mark is a row whose key says everything.
type mark struct{}

// A Txn may create several rows of a table, all with its revision; slot tells
// them apart in the integer ids that Harbor's clients want.
const slots = 256

func idOf(meta table.Meta, slot uint8) int64 { return int64(meta.Created)*slots + int64(slot) }

type repositoryRow struct {
	Slot        uint8  `cbor:"slot"`
	Description string `cbor:"description"`
	CreatedAt   int64  `cbor:"created_at"`
}

func (r repositoryRow) repository(key []string, meta table.Meta) Repository {
	return Repository{ID: idOf(meta, r.Slot), Project: key[0], Name: key[1], Description: r.Description, CreatedAt: unix(r.CreatedAt)}
}

// artifactRow holds what travels as it stands in the entry, and local facts.
type artifactRow struct {
	MediaType    string        `cbor:"media_type"`
	Size         int64         `cbor:"size"`
	ArtifactType string        `cbor:"artifact_type"`
	Subject      digest.Digest `cbor:"subject"`
	PushedAt     int64         `cbor:"pushed_at"`

	Slot       uint8  `cbor:"slot"`
	ConfigType string `cbor:"config_type"`
	Total      int64  `cbor:"total"`
	Actor      string `cbor:"actor"`
	Withheld   bool   `cbor:"withheld"`
	Absent     bool   `cbor:"absent"`
}

func (a artifactRow) artifact(key []string, meta table.Meta) Artifact {
	return Artifact{
		ID: idOf(meta, a.Slot), Project: key[0], Repository: key[1], Digest: digest.Digest(key[2]),
		MediaType: a.MediaType, ArtifactType: a.ArtifactType, ConfigType: a.ConfigType, Subject: a.Subject,
		Size: a.Size, Total: a.Total, PushedAt: unix(a.PushedAt), Actor: a.Actor, Withheld: a.Withheld, Absent: a.Absent,
	}
}

// entry is the put that the row stands for.
func (a artifactRow) entry(repository, d string) entry.Entry {
	return entry.Entry{
		Kind: entry.ArtifactPut, Repository: repository, Digest: digest.Digest(d), MediaType: a.MediaType, Size: a.Size,
		ArtifactType: a.ArtifactType, Subject: a.Subject, PushedAt: a.PushedAt,
	}
}

type tagRow struct {
	Digest   digest.Digest `cbor:"digest"`
	PushedAt int64         `cbor:"pushed_at"`

	Slot     uint8 `cbor:"slot"`
	Withheld bool  `cbor:"withheld"`
}

func (t tagRow) tag(key []string, meta table.Meta) Tag {
	return Tag{ID: idOf(meta, t.Slot), Name: key[2], Digest: t.Digest, PushedAt: unix(t.PushedAt), Withheld: t.Withheld}
}

func (t tagRow) entry(repository, tag string) entry.Entry {
	return entry.Entry{Kind: entry.TagPut, Repository: repository, Tag: tag, Digest: t.Digest, PushedAt: t.PushedAt}
}

type manifestRow struct {
	Bytes []byte `cbor:"bytes"`
}

func unix(s int64) time.Time { return time.Unix(s, 0).UTC() }
