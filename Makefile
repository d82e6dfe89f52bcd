# What can be done here. Every target first installs what it needs (tests/setup.sh: Debian, as root).
#
#   make demo                          the whole story, on this machine if its kernel has ublk, else in a virtual one
#   make test                          everything below that tests, on both kernels; what CI runs
#   make check                         format, vet, lint, unit tests with and without the race detector: no machine
#   make integration [KERNEL=] [RUN=] [BUILD=giouring]  the tests that need ublk, or those that match RUN
#   make soak [KERNEL=] [RUN=] [KILLS=] [CUTS=]  the long forms of tests, and what tests deaths, restarts and power cuts, for hours
#   make systemd [KERNEL=]             the tests of unit, udev rules and shutdown, under a real systemd
#   make docs [KERNEL=] [PAGE=]        every command of README and docs, or those of the pages that match PAGE
#   make picture                       the README's picture, docs/session.svg, recorded anew
#   make reboot [KERNEL=]              change tracking, and what is left of snapshots, over restarts and a power failure
#   make boot [KERNEL=]                boots of a Debian whose filesystems lie on filters
#   make root [KERNEL=] [LOAD=seconds] [TARGET=linear|crypt]  a Debian whose root filesystem gets a filter while it runs, under load
#   make powercut [KERNEL=] [CUTS=] [SEED=]  change tracking over power failures of a machine under load
#   make sim [SEEDS=] [MINUTES=]       the simulator
#   make bench [JSON=out.json] [BENCH=pattern] [KERNEL=]    figures, of both kernels unless one is named
#   make vm CMD='…' [KERNEL=]          one command in the machine: its output and nothing else
#   make build | install | uninstall   bin/ublk-blksnap; to PREFIX (/usr/local), and away again
#   make deb | rpm [ARCH=] [VERSION=]  packages in bin/, for amd64 or arm64
#   make package [VERSION=]            both, looked at by lintian and rpmlint
#   make clean                         remove what was built and fetched
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

NFPM_VERSION = v2.45.0
NFPM = .cache/bin/nfpm-$(NFPM_VERSION)

# What a package is stamped with, and which processor it is for.
MODULE = github.com/ublk-blksnap/ublk-blksnap
VERSION ?= $(shell sed -n 's/^var Version = "\(.*\)"$$/\1/p' control/version.go)
COMMIT ?= $(shell git describe --always --exclude='*' --abbrev=12 --dirty=+ 2>/dev/null)
ARCH ?= amd64

# What is installed, and where unit and rules go: a package's beside the system's own, another's to the administrator's.
BINARY = bin/ublk-blksnap
PACKAGES = bin
COMPLETION = $(foreach name,ublk-blksnap blksnap,$(addprefix .$(PREFIX)/share/,bash-completion/completions/$(name) fish/vendor_completions.d/$(name).fish $(ZSH)/_$(name)))
ZSH = zsh/site-functions
LIBDIR = $(if $(filter /usr,$(PREFIX)),/usr/lib,/etc)

# What differs with more queues than the machines of the other tests have processors for.
FOUR_QUEUES = (RandomWriter|FioVerify|KilledUnderLoad)/(KiB|4x|copy)/(4queues|512|4096)

# As it was typed, for the guest's shell to expand.
override CMD := $(value CMD)
export CMD

.NOTPARALLEL:
.PHONY: demo test check lint integration integration-run integration-binaries soak systemd docs picture reboot boot root powercut sim overlay bench vm build build-next install uninstall deb rpm package test-packages clean setup-go setup bin/vm

demo: build bin/vm
	@VM=$${VM:-auto} bin/vm tests/demo/demo.sh

test: check bin/vm overlay
	go test -race -short $(GIOURING) ./internal/uring ./internal/blockdev/...
	$(MAKE) integration-binaries
	$(MAKE) integration-binaries BUILD=giouring
	tests/together.sh 'UBLK_BLKSNAP_SHARE=0 $(MAKE) integration-run KERNEL=6.12 && $(MAKE) integration-run KERNEL=6.12 VM_CPUS=4 RUN="$(FOUR_QUEUES)"' \
		'UBLK_BLKSNAP_SHARE=1 $(MAKE) integration-run KERNEL=newest && $(MAKE) integration-run KERNEL=newest VM_CPUS=4 RUN="$(FOUR_QUEUES)" && \
		$(MAKE) docs KERNEL=newest PAGE="(README|quick-start|lvm)"' \
		'go test $(OVERLAY) -timeout 60m ./tests/sim && VM_TEST=1 go test -short -count=1 -timeout 60m ./tests/vm/... && \
		$(MAKE) package && $(MAKE) reboot KERNEL=newest && $(MAKE) powercut KERNEL=newest && $(MAKE) boot KERNEL=6.12 && \
		$(MAKE) root KERNEL=6.12 TARGET=crypt && $(MAKE) systemd KERNEL=newest && $(MAKE) demo KERNEL=newest && $(MAKE) integration-run KERNEL=6.1 RUN=OldKernel && \
		$(MAKE) integration-run KERNEL=newest BUILD=giouring RUN=Ublk'

check: setup lint
	tests/together.sh 'go test ./...' 'go test -race -short ./...' \
		'go test -tags deathpoints ./internal/deathpoint ./snapshots && go test -tags nextformat,deathpoints -run Format ./daemon'

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
soak: integration-binaries
	@failed=; for kernel in $(or $(KERNEL),6.12 newest); do \
		cpus=VM_CPUS=$${VM_CPUS:-4}; export KERNEL=$$kernel; \
		env $$cpus bin/vm -no-skips -timeout 6h -e UBLK_BLKSNAP_LONG -e UBLK_BLKSNAP_KILLS=$(KILLS) \
			'exec tests/integration/run.sh 355 .cache/test/integration "$(RUN)"' || failed="$$failed integration:$$kernel"; \
		for target in "powercut CUTS=$(or $(CUTS),30) $$cpus" reboot systemd boot "root LOAD=600" docs; do $(MAKE) $$target || failed="$$failed $${target%% *}:$$kernel"; done; \
	done; \
	VM_TEST=1 go test -count=1 -timeout 60m ./tests/vm/... || failed="$$failed vm"; \
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

systemd: build bin/vm
	tests/setup.sh package
	$(MAKE) test-packages FORMAT=rpm
	CGO_ENABLED=0 go test -c -o .cache/test/systemd.test ./tests/systemd
	bin/vm -no-skips -again -systemd -disk data=128M -disk swap=64M -disk lower=64M -disk volume=48M -timeout 15m 'cd tests/systemd && exec ../../.cache/test/systemd.test -test.v'

docs: build bin/vm
	CGO_ENABLED=0 go test -c -o .cache/test/docs.test ./tests/docs
	bin/vm -no-skips -again -systemd -disk data=64M -disk docs1=64M -disk docs2=128M -timeout 30m \
		'cd tests/docs && exec ../../.cache/test/docs.test -test.v -test.run "TestCommands/$(PAGE)"'

picture: build bin/vm
	CGO_ENABLED=0 go build -o .cache/test/picture ./tests/picture
	bin/vm -disk data=64M -disk docs1=64M .cache/test/picture >.cache/session.svg
	mv .cache/session.svg docs/

reboot: build bin/vm
	tests/reboot/run.sh

boot: build bin/vm
	$(MAKE) test-packages FORMAT=deb
	tests/boot/run.sh

root: build bin/vm
	$(MAKE) test-packages FORMAT=deb
	SECONDS_UNDER_LOAD=$(or $(LOAD),20) tests/root/run.sh

powercut: build bin/vm
	CGO_ENABLED=0 go build -o .cache/test/ ./tests/powercut
	tests/powercut/run.sh $(or $(CUTS),3)

sim: overlay
	SEEDS="$(SEEDS)" MINUTES="$(MINUTES)" go test $(OVERLAY) ./tests/sim -v -count=1 -timeout 0 -args -sim.search

overlay: setup-go
	@go run ./tests/sim/overlay

bench: JSON ?= bench.json
bench: build bin/vm
	@go build -o .cache/test/bench ./tests/bench
	@rm -rf .cache/bench; mkdir -p .cache/bench
	@for kernel in $(or $(KERNEL),6.12 newest); do \
		VM_TIMEOUT=$${VM_TIMEOUT:-90m} bin/vm -fine-timers -kernel $$kernel -out .cache/bench -e KERNEL=$$kernel -e BENCH \
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
	install -D -m 755 $(BINARY) $(DESTDIR)$(PREFIX)/sbin/ublk-blksnap
	ln -sf ublk-blksnap $(DESTDIR)$(PREFIX)/sbin/blksnap
	install -D -m 644 dist/59-ublk-blksnap.rules $(DESTDIR)$(LIBDIR)/udev/rules.d/59-ublk-blksnap.rules
	install -D -m 755 dist/ublk-blksnap.shutdown $(DESTDIR)/usr/lib/systemd/system-shutdown/ublk-blksnap
	install -d $(DESTDIR)$(LIBDIR)/systemd/system
	sed 's|/usr/local/sbin|$(PREFIX)/sbin|' dist/ublk-blksnap.service >$(DESTDIR)$(LIBDIR)/systemd/system/ublk-blksnap.service
	@# What the program says of itself: the manual, and what shells complete.
	@rm -rf .cache/manual && mkdir -p .cache/manual
	bin/ublk-blksnap manual .cache/manual
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man8 .cache/manual/*.8
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man5 .cache/manual/*.5
	@cd $(DESTDIR)/ && mkdir -p $(dir $(COMPLETION))
	bin/ublk-blksnap completion bash >$(DESTDIR)/$(word 1,$(COMPLETION))
	bin/ublk-blksnap completion fish >$(DESTDIR)/$(word 2,$(COMPLETION))
	bin/ublk-blksnap completion zsh >$(DESTDIR)/$(word 3,$(COMPLETION))
	@ln -s $(CURDIR)/bin/ublk-blksnap .cache/manual/blksnap
	.cache/manual/blksnap completion bash >$(DESTDIR)/$(word 4,$(COMPLETION))
	.cache/manual/blksnap completion fish >$(DESTDIR)/$(word 5,$(COMPLETION))
	.cache/manual/blksnap completion zsh >$(DESTDIR)/$(word 6,$(COMPLETION))
	@# The texts stand as they do here, so that their links and their commands hold.
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/doc/ublk-blksnap README.md
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/doc/ublk-blksnap/docs docs/*.md docs/session.svg
	install -m 755 docs/backup.sh $(DESTDIR)$(PREFIX)/share/doc/ublk-blksnap/docs/
	@# A configuration that somebody has written stays.
	[ -e $(DESTDIR)/etc/ublk-blksnap.conf ] || install -D -m 644 dist/ublk-blksnap.conf $(DESTDIR)/etc/ublk-blksnap.conf

# A configuration that somebody has written stays here too, and what is kept of disks in /var/lib/ublk-blksnap.
uninstall:
	[ -n "$(DESTDIR)" ] || [ ! -e $(PREFIX)/sbin/ublk-blksnap ] || PATH=$(PREFIX)/sbin:$$PATH sh dist/package/prerm remove
	cd $(DESTDIR)/ && rm -f .$(PREFIX)/sbin/{ublk-blksnap,blksnap} .$(LIBDIR)/udev/rules.d/59-ublk-blksnap.rules \
		./usr/lib/systemd/system-shutdown/ublk-blksnap .$(LIBDIR)/systemd/system/ublk-blksnap.service \
		.$(PREFIX)/share/man/man8/{ublk-blksnap{,-*},blksnap}.8 .$(PREFIX)/share/man/man5/ublk-blksnap.conf.5 $(COMPLETION)
	rm -rf $(DESTDIR)$(PREFIX)/share/doc/ublk-blksnap
	! cmp -s dist/ublk-blksnap.conf $(DESTDIR)/etc/ublk-blksnap.conf || rm $(DESTDIR)/etc/ublk-blksnap.conf
	[ -n "$(DESTDIR)" ] || sh dist/package/postrm remove

# Two packages each: the program, and the link that gives it blksnap's name.
deb rpm: export STAGE = .cache/package/$(ARCH)
deb rpm: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
deb rpm: export VERSION := $(VERSION)
deb rpm: setup-go $(NFPM)
	@rm -rf $(STAGE) && mkdir -p $(STAGE) $(PACKAGES)
	@GOARCH=$(ARCH) CGO_ENABLED=0 go build -trimpath -o $(STAGE)/program \
		-ldflags '-s -w -X $(MODULE)/control.Version=$(VERSION) -X $(MODULE)/control.commit=$(COMMIT)' ./cmd/ublk-blksnap
	@$(MAKE) --no-print-directory install DESTDIR=$(STAGE) PREFIX=/usr BINARY=$(STAGE)/program \
		$(if $(filter deb,$@),ZSH=zsh/vendor-completions) >/dev/null
	@gzip -9n $(STAGE)/usr/share/man/*/*
	@cd $(STAGE) && rm usr/sbin/blksnap && find usr -name 'blksnap*' -o -name _blksnap | \
		while read -r file; do install -D -m 644 -t compat/$${file%/*} $$file && rm $$file; done
	@GOARCH=$(ARCH) CGO_ENABLED=0 dist/package/copyright.sh >$(STAGE)/copyright
	@for config in nfpm compat; do ARCH=$(ARCH) $(NFPM) package -f dist/package/$$config.yaml -p $@ -t $(PACKAGES)/; done

# What Debian's and Fedora's own checks say of the packages, that their copyright names every module in the program, and that
# what is installed can be taken away again.
package: PACKAGES = .cache/package/checked
package: build
	tests/setup.sh package
	rm -rf $(PACKAGES) .cache/test/tree
	$(MAKE) deb rpm ARCH=arm64 PACKAGES=$(PACKAGES)
	$(MAKE) deb rpm ARCH=amd64 PACKAGES=$(PACKAGES)
	lintian --fail-on error $(PACKAGES)/*.deb
	rpmlint -c dist/package/rpmlint.toml $(PACKAGES)/*.rpm
	tests/copyright.sh $(PACKAGES)/ublk-blksnap_*.deb
	$(MAKE) -o build install uninstall DESTDIR=$(CURDIR)/.cache/test/tree
	@left=$$(find .cache/test/tree -not -type d); [ -z "$$left" ] || { echo "left by make uninstall: $$left"; exit 1; }

# What the machines install, and the version that they upgrade to.
test-packages: PACKAGES = .cache/test/$(FORMAT)
test-packages:
	rm -rf $(PACKAGES)
	$(MAKE) $(FORMAT) PACKAGES=$(PACKAGES)/now
	$(MAKE) $(FORMAT) PACKAGES=$(PACKAGES)/next VERSION=99.0.0

$(NFPM): | setup-go
	GOTOOLCHAIN=auto GOFLAGS= GOBIN=$(CURDIR)/.cache/bin go install github.com/goreleaser/nfpm/v2/cmd/nfpm@$(NFPM_VERSION)
	mv .cache/bin/nfpm $@

clean:
	rm -rf bin .cache

setup-go:
	@tests/setup.sh go

setup:
	@tests/setup.sh go test
