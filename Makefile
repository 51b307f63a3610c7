# Every target works on a fresh machine with Go and git; what the tests need
# besides is installed by scripts/testdeps/install.
export CGO_ENABLED = 0
# All with the same flags: other paths in the object files would be a second copy of
# every package in the build cache, which takes minutes to compile.
export GOFLAGS = -buildvcs=false -trimpath

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  = -s -w -X main.version=$(VERSION)
TOOLS    = $(CURDIR)/.cache/bin
# With this a test that lacks one of the installed tools fails instead of being
# skipped.
TESTED   = ATOLL_TESTDEPS=1 PATH="$(TOOLS):$$PATH"

.PHONY: build build-cloud run test test-unit test-race test-e2e test-cloud fuzz faults soak chaos powerloss demo bench bench-long bench-cluster bench-repair bench-transfer testdeps clean

build:
	go build -ldflags '$(LDFLAGS)' -o bin/atoll ./cmd/atoll

# With S3, GCS and Azure, which are larger than all the rest.
build-cloud:
	go build -tags cloud -ldflags '$(LDFLAGS)' -o bin/atoll-cloud ./cmd/atoll

run: build
	./bin/atoll serve --init --data ./atoll-data

# All that CI runs. The S3 server's suite goes without the race detector: it finds
# the S3 driver of distribution 3.1.2 reusing the buffer of a request that was
# broken off (its writer's pool); our own part of it runs under the detector on
# the disk and memory backends. Whole nodes and the command line go without it too,
# which saves minutes, and node/peers, which once ended in the detector's own runtime
# (see scripts/gotest) and never in a race; test-race has all. Four and three packages
# at once, because some wait much: for elections, and for disks and nodes that are late.
# Those that take minutes come first, so that nothing runs alone in the end. What go
# test looks for by itself in each package, go vet has looked for before.
test: testdeps build
	test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	$(TESTED) CGO_ENABLED=1 scripts/gotest -race -vet=off -p 4 -timeout 12m -- \
		$$(go list ./transfer/... ./cluster/... ./node/... ./... | grep -vE '/scripts/|atoll/(node|node/peers|cmd/atoll)$$')
	$(TESTED) go test -vet=off -timeout 5m -tags s3 -run S3 ./node/blobs/cloud
	$(TESTED) scripts/gotest -vet=off -count=1 -p 3 -timeout 14m -- ./scripts/e2e ./node ./cmd/atoll ./node/peers ./scripts/...

# The quick part, with nothing installed.
test-unit:
	go test $$(go list ./... | grep -v -e /scripts/e2e -e /scripts/spread)

# All under the race detector, whole nodes and the command line too.
test-race: testdeps build
	$(TESTED) CGO_ENABLED=1 scripts/gotest -race -p 4 -timeout 20m -- $$(go list ./... | grep -v /scripts/)

# All object stores, against a server of S3 and emulators of GCS and Azure. From
# nothing the emulators take two minutes of CPU time, so CI has S3 only.
test-cloud:
	scripts/testdeps/install $(TOOLS) cloud
	$(TESTED) go test -count=1 -timeout 10m -tags cloud ./node/blobs/cloud

test-e2e: testdeps build
	PATH="$(TOOLS):$$PATH" go test -count=1 -timeout 12m -v ./scripts/e2e

# Each fuzz target in turn, FUZZTIME each.
FUZZTIME ?= 30s
fuzz:
	scripts/fuzz $(FUZZTIME)

# A push over a disk and a log that fail or stop at every single step; make test
# takes a sample of them.
faults:
	ATOLL_FAULTS=all go test -count=1 -run 'TestPush(Crashes|Faults|ToAFullDisk)$$' ./node/registry
	go test -count=1 -run 'Crash|Fault' ./node/blobs/...

# Mixed load by 200 clients, after a warm-up; fails when memory, descriptors or
# goroutines grow.
SOAK_SECONDS ?= 600
soak: build
	go run ./scripts/soak -seconds $(SOAK_SECONDS)

# A site of real nodes that is broken under load for as long as CHAOS_SECONDS, as
# root; then sites in one process for as long. Both print their seeds: CHAOS_SEED
# plays a schedule again.
CHAOS_SECONDS ?= 600
chaos: testdeps build
	go run ./scripts/chaos -seconds $(CHAOS_SECONDS) $(if $(CHAOS_SEED),-seed $(CHAOS_SEED))
	CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_SEED=$(CHAOS_SEED) go test -count=1 -timeout 0 -run TestRandomSchedule ./cluster/clustertest

# Cuts the power of a real node after every change that it makes on its disk, in
# five ways; half an hour on two idle cores. make test takes a sample.
POWER_PUSHES ?= 10
powerloss: testdeps build
	go run ./scripts/powerloss -pushes $(POWER_PUSHES) $(if $(POWER_SEED),-seed $(POWER_SEED))

# Two sites with no route between them, played unattended.
demo: testdeps build
	PATH="$(TOOLS):$$PATH" go run ./scripts/demo

# Atoll beside a minimal server and distribution's registry, in one run of a few
# minutes; adds the figures to docs/benchmarks.md.
bench: build
	scripts/testdeps/install $(TOOLS) bench
	go run ./scripts/bench -write docs/benchmarks.md

# The same with the rows that need 1,000,000 artifacts and bigger blobs: ten
# minutes more.
bench-long: build
	scripts/testdeps/install $(TOOLS) bench
	go run ./scripts/bench -long -mib 512 -write docs/benchmarks.md

# What the consensus costs beside raw raft, and how long a killed leader is missed.
bench-cluster: build
	go run ./scripts/bench -only cluster,failover -write docs/benchmarks.md

# How long a site takes to make its copies again after the loss of a node, as root:
# REPAIR_GB over a link of REPAIR_LINK MB/s.
REPAIR_GB ?= 10
REPAIR_LINK ?= 100
bench-repair: build
	go run ./scripts/bench -only repair -gb $(REPAIR_GB) -link $(REPAIR_LINK) -write docs/benchmarks.md

# What moving blobs takes and costs, as root, a quarter of an hour: how fast a blob reaches
# 8 and 12 nodes over shaped links, beside BitTorrent's library with its defaults and all
# asking the holder alone; with slow, dead and late nodes, over slow links between sites,
# and with the leader, the holder and both ends killed; a long and lossy path; first bytes,
# processor time and memory. The lines are for docs/benchmarks.md and transfer/DESIGN.md.
bench-transfer: testdeps
	PATH="$(TOOLS):$$PATH" scripts/benchtransfer

testdeps:
	scripts/testdeps/install $(TOOLS)

clean:
	rm -rf bin .cache
