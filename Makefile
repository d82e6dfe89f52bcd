# What can be done here. Every target first installs what it needs (tests/setup.sh: Debian, as root).
#
#   make demo                          the whole story, on this machine if its kernel has ublk, else in a virtual one
#   make test                          everything below that tests, on both kernels; what CI runs
#   make check                         format, vet, lint, unit tests with and without the race detector: no machine
#   make integration [KERNEL=] [RUN=] [BUILD=giouring]  the tests that need ublk, or those that match RUN
#   make soak [KERNEL=] [RUN=] [KILLS=] [CUTS=]  the long form of what tests deaths, restarts and power cuts, for hours
#   make systemd [KERNEL=]             the tests of unit, udev rules and shutdown, under a real systemd
#   make reboot [KERNEL=]              change tracking, and what is left of snapshots, over restarts and a power failure
#   make boot [KERNEL=]                boots of a Debian whose filesystems lie on filters
#   make powercut [KERNEL=] [CUTS=] [SEED=]  change tracking over power failures of a machine under load
#   make sim [SEEDS=] [MINUTES=]       the simulator
#   make bench [JSON=out.json] [BENCH=pattern] [KERNEL=]    figures, of both kernels unless one is named
#   make vm CMD='…' [KERNEL=]          one command in the machine: its output and nothing else
#   make build | install | clean       bin/ublk-blksnap; to PREFIX/sbin; remove what was built and fetched
#
# KERNEL is 6.12 (the default), newest, or another version; tests/vm tells more, such as VM=host, VM_MEM, VM_TIMEOUT.

export PATH := $(CURDIR)/bin:$(CURDIR)/.cache/bin:$(PATH)
export GOTOOLCHAIN ?= auto
PREFIX ?= /usr/local
RUN ?= .
SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c

# The second build of internal/uring: its binding does not link without the flag.
GIOURING = -tags giouring -ldflags=-checklinkname=0

# The engine with its deliberate bugs, for the simulator alone.
OVERLAY = -overlay .cache/bugs/overlay.json

LINT_VERSION = v2.15.0
LINT = .cache/bin/golangci-lint-$(LINT_VERSION)

# What differs with more queues than the machines of the other tests have processors for.
FOUR_QUEUES = (RandomWriter|FioVerify)/(KiB|4x)/(4queues|512|4096)

# As it was typed, for the guest's shell to expand.
override CMD := $(value CMD)
export CMD

.NOTPARALLEL:
.PHONY: demo test check lint integration integration-run integration-binaries soak systemd reboot boot powercut sim overlay bench vm build build-next install clean setup-go setup bin/vm

demo: build bin/vm
	@VM=$${VM:-auto} bin/vm tests/demo/demo.sh

test: check bin/vm overlay
	go test -race -short $(GIOURING) ./internal/uring ./internal/blockdev/...
	$(MAKE) integration-binaries
	$(MAKE) integration-binaries BUILD=giouring
	tests/together.sh 'UBLK_BLKSNAP_SHARE=0 $(MAKE) integration-run KERNEL=6.12' \
		'UBLK_BLKSNAP_SHARE=1 $(MAKE) integration-run KERNEL=newest' \
		'go test $(OVERLAY) -timeout 60m ./tests/sim && VM_TEST=1 go test -short -count=1 -timeout 60m ./tests/vm/... && \
		$(MAKE) reboot KERNEL=newest && $(MAKE) powercut KERNEL=newest && $(MAKE) boot KERNEL=6.12 && \
		$(MAKE) systemd KERNEL=newest && $(MAKE) demo KERNEL=newest && $(MAKE) integration-run KERNEL=6.1 RUN=OldKernel && \
		$(MAKE) integration-run KERNEL=newest BUILD=giouring RUN=Ublk && \
		$(MAKE) integration-run KERNEL=6.12 VM_CPUS=4 RUN="$(FOUR_QUEUES)" && \
		$(MAKE) integration-run KERNEL=newest VM_CPUS=4 RUN="$(FOUR_QUEUES)"'

check: setup lint
	go test ./...
	go test -race -short ./...
	go test -tags deathpoints ./internal/deathpoint ./snapshots
	go test -tags nextformat,deathpoints -run Format ./daemon

lint: setup overlay $(LINT)
	@files=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$files" ] || { echo "gofmt would change: $$files"; exit 1; }
	go vet ./...
	go vet -tags giouring ./...
	go vet -tags deathpoints ./...
	go vet -tags nextformat,deathpoints ./daemon
	go vet $(OVERLAY) ./...
	$(LINT) run
	$(LINT) run --build-tags giouring ./internal/uring

$(LINT): | setup
	GOTOOLCHAIN=auto GOFLAGS= GOBIN=$(CURDIR)/.cache/bin \
		go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION)
	mv .cache/bin/golangci-lint $@

integration: integration-binaries
	$(MAKE) integration-run

integration-run: BINARIES = .cache/test/integration$(BUILD)
integration-run:
	VM_CPUS=$${VM_CPUS:-2} bin/vm -no-skips -again -timeout 75m -e UBLK_BLKSNAP_SHARE 'exec tests/integration/run.sh 74 $(BINARIES) "$(RUN)"'

integration-binaries: BINARIES = .cache/test/integration$(BUILD)
integration-binaries: build build-next bin/vm
	rm -rf $(BINARIES)
	CGO_ENABLED=0 go build -trimpath -tags deathpoints -o bin/ublk-blksnap-deathpoints ./cmd/ublk-blksnap
	CGO_ENABLED=0 go test -c $(if $(filter giouring,$(BUILD)),$(GIOURING)) -o $(BINARIES)/ ./tests/integration/...
	CGO_ENABLED=0 go test -c -o .cache/test/snapshots.test ./snapshots

soak: export UBLK_BLKSNAP_LONG = 1
soak: RUN := $(if $(filter .,$(RUN)),TestKilled|TestGuard|TestDeathIn|TestUblkRecovery|TestStorageOutlives|TestStorageGone|TestUpgradedUnderLoad|TestReload|TestLowMemory|TestNumberWraps|TestClaimedWhileDead|TestPowerFailureDoubts|TestWrittenBehindOurBack,$(RUN))
soak: integration-binaries
	@for kernel in $(or $(KERNEL),6.12 newest); do \
		VM_CPUS=$${VM_CPUS:-4} bin/vm -kernel $$kernel -no-skips -timeout 6h -e UBLK_BLKSNAP_LONG -e UBLK_BLKSNAP_KILLS=$(KILLS) \
			'exec tests/integration/run.sh 355 .cache/test/integration "$(RUN)"'; \
		KERNEL=$$kernel CUTS=$${CUTS:-30} VM_CPUS=$${VM_CPUS:-4} $(MAKE) powercut; \
		KERNEL=$$kernel $(MAKE) reboot; \
		KERNEL=$$kernel $(MAKE) systemd; \
	done
	$(MAKE) boot KERNEL=newest
	VM_TEST=1 go test -count=1 -timeout 60m ./tests/vm/...

systemd: build bin/vm
	CGO_ENABLED=0 go test -c -o .cache/test/systemd.test ./tests/systemd
	bin/vm -no-skips -again -systemd -disk data=128M -disk swap=64M -disk lower=64M -timeout 15m 'cd tests/systemd && exec ../../.cache/test/systemd.test -test.v'

reboot: build bin/vm
	tests/reboot/run.sh

boot: build bin/vm
	rm -rf .cache/test/boot
	$(MAKE) -o build install DESTDIR=.cache/test/boot
	tests/boot/run.sh

powercut: build bin/vm
	CGO_ENABLED=0 go build -o .cache/test/ ./tests/powercut
	tests/powercut/run.sh $(or $(CUTS),3)

sim: overlay
	SEEDS="$(SEEDS)" MINUTES="$(MINUTES)" go test $(OVERLAY) ./tests/sim -v -count=1 -timeout 0

overlay: setup-go
	@go run ./tests/sim/overlay

bench: JSON ?= bench.json
bench: build bin/vm
	@go build -o .cache/test/bench ./tests/bench
	@rm -rf .cache/bench; mkdir -p .cache/bench
	@for kernel in $(or $(KERNEL),6.12 newest); do \
		VM_TIMEOUT=$${VM_TIMEOUT:-90m} bin/vm -kernel $$kernel -out .cache/bench -e KERNEL=$$kernel -e BENCH \
			".cache/test/bench -json \$$VM_OUT/$$kernel.json"; \
	done
	@jq -s add .cache/bench/*.json >$(JSON)

vm: bin/vm
	@bin/vm "$$CMD"

build: setup-go
	@CGO_ENABLED=0 go build -trimpath -o bin/ublk-blksnap ./cmd/ublk-blksnap

# The program with a format of the state that is to come, for the test of an upgrade.
build-next: build
	@CGO_ENABLED=0 go build -trimpath -tags nextformat -o bin/ublk-blksnap-next ./cmd/ublk-blksnap

bin/vm: setup
	@CGO_ENABLED=0 go build -o $@ ./tests/vm

install: build
	install -D -m 755 bin/ublk-blksnap $(DESTDIR)$(PREFIX)/sbin/ublk-blksnap
	ln -sf ublk-blksnap $(DESTDIR)$(PREFIX)/sbin/blksnap
	install -D -m 644 dist/59-ublk-blksnap.rules $(DESTDIR)/etc/udev/rules.d/59-ublk-blksnap.rules
	install -D -m 755 dist/ublk-blksnap.shutdown $(DESTDIR)/usr/lib/systemd/system-shutdown/ublk-blksnap
	install -d $(DESTDIR)/etc/systemd/system
	sed 's|/usr/local/sbin|$(PREFIX)/sbin|' dist/ublk-blksnap.service >$(DESTDIR)/etc/systemd/system/ublk-blksnap.service
	@# A configuration that somebody has written stays.
	[ -e $(DESTDIR)/etc/ublk-blksnap.conf ] || install -D -m 644 dist/ublk-blksnap.conf $(DESTDIR)/etc/ublk-blksnap.conf

clean:
	rm -rf bin .cache

setup-go:
	@tests/setup.sh go

setup:
	@tests/setup.sh go test
