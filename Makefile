# Everything by one command each. `make help` lists them.

PREFIX ?= /usr/local
DESTDIR ?=
SYSCONFDIR ?= /etc
CARGO ?= cargo
INSTALL ?= install
# Where systemd looks for units below PREFIX.
UNITDIR ?= $(PREFIX)/lib/systemd/system

BUILT := $(or $(CARGO_TARGET_DIR),target)/release
BINARIES := rdsock rdsockd rdsock-perf rdsock-engine-perf
SHARE := $(DESTDIR)$(PREFIX)/share
COMPLETIONS := $(SHARE)/bash-completion/completions/rdsock $(SHARE)/zsh/site-functions/_rdsock \
	$(SHARE)/fish/vendor_completions.d/rdsock.fish

.PHONY: build test vm-test demo lint soak fuzz install uninstall clean help

build: ## Build all programs and the shim (release) into target/release
	$(CARGO) build --release --workspace

test: ## Install what the tests need (apt, as root) and run all tests
	tests/setup.sh
	$(CARGO) build --release --workspace
	RDSOCK_BIN_DIR="$(abspath $(BUILT))" $(CARGO) test --workspace --no-fail-fast

vm-test: ## Boot virtual machines that drive the device through VFIO, and try the kernel module in them
	tests/vm/run.sh

demo: ## Build, measure beside kernel TCP, and run real programs with and without the shim
	./tools/demo.sh

lint: ## Check format, lints, documentation and licences
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check; \
	else echo "cargo-deny is not installed: licences and advisories are not checked"; fi

SOAK_MINUTES ?= 30
soak: ## Run the end-to-end tests for SOAK_MINUTES, then ten million messages of the fuzzer and the deeper loom pass
	tests/setup.sh
	$(CARGO) build --release --workspace
	@end=$$(($$(date +%s) + $(SOAK_MINUTES) * 60)); round=0; \
	while [ $$(date +%s) -lt $$end ]; do \
		round=$$((round + 1)); echo "soak: round $$round"; \
		RDSOCK_BIN_DIR="$(abspath $(BUILT))" $(CARGO) test --workspace || exit 1; \
	done; echo "soak: $$round rounds without a failure"
	.ci/fuzz
	RDSOCK_SOAK=$${RDSOCK_SOAK:-1} .ci/loom

FUZZ_MINUTES ?= 60
FUZZ_FAILURES ?= 1
fuzz: ## Compare programs of socket calls from fresh seeds with plain Linux for FUZZ_MINUTES (docs/differential.md)
	$(CARGO) build --release -p rdsockd -p sockshim -p rdsock -p rdsock-differential
	RDSOCK_BIN_DIR="$(abspath $(BUILT))" $(BUILT)/rdsock-differential --count 1000000000 \
		--minutes $(FUZZ_MINUTES) --failures $(FUZZ_FAILURES)

install: ## Install what `make` built below PREFIX (and DESTDIR)
	@test -f $(BUILT)/librdsock.so || { echo "run make first" >&2; exit 1; }
	$(INSTALL) -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/rdsock $(DESTDIR)$(UNITDIR) \
		$(SHARE)/man/man1 $(SHARE)/doc/rdsock $(sort $(dir $(COMPLETIONS)))
	$(INSTALL) -m 755 $(addprefix $(BUILT)/,$(BINARIES)) $(DESTDIR)$(PREFIX)/bin
	$(INSTALL) -m 644 $(BUILT)/librdsock.so $(DESTDIR)$(PREFIX)/lib/rdsock
	$(BUILT)/rdsock man $(SHARE)/man/man1
	$(BUILT)/rdsockd --print-man > $(SHARE)/man/man1/rdsockd.1
	$(BUILT)/rdsock completions bash > $(word 1,$(COMPLETIONS))
	$(BUILT)/rdsock completions zsh > $(word 2,$(COMPLETIONS))
	$(BUILT)/rdsock completions fish > $(word 3,$(COMPLETIONS))
	$(INSTALL) -m 644 docs/rdsockd.example.toml docs/configuration.md docs/deployment.md $(SHARE)/doc/rdsock
	$(INSTALL) -d $(DESTDIR)$(SYSCONFDIR)/rdsock
	test -e $(DESTDIR)$(SYSCONFDIR)/rdsock/rdsockd.toml || \
		$(INSTALL) -m 644 docs/rdsockd.example.toml $(DESTDIR)$(SYSCONFDIR)/rdsock/rdsockd.toml
	sed -e 's|@PREFIX@|$(PREFIX)|g' -e 's|@SYSCONFDIR@|$(SYSCONFDIR)|g' pmd/daemon/systemd/rdsockd.service.in \
		> $(DESTDIR)$(UNITDIR)/rdsockd.service

uninstall: ## Remove what `make install` installed, but for the configuration
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(BINARIES)) $(COMPLETIONS) \
		$(SHARE)/man/man1/rdsock.1 $(SHARE)/man/man1/rdsock-run.1 \
		$(SHARE)/man/man1/rdsock-why.1 $(SHARE)/man/man1/rdsock-stat.1 \
		$(SHARE)/man/man1/rdsock-doctor.1 $(SHARE)/man/man1/rdsock-devices.1 \
		$(SHARE)/man/man1/rdsock-bind.1 $(SHARE)/man/man1/rdsock-unbind.1 \
		$(SHARE)/man/man1/rdsock-completions.1 \
		$(SHARE)/man/man1/rdsock-man.1 $(SHARE)/man/man1/rdsockd.1 \
		$(DESTDIR)$(UNITDIR)/rdsockd.service
	rm -rf $(DESTDIR)$(PREFIX)/lib/rdsock $(SHARE)/doc/rdsock

clean: ## Remove what was built
	$(CARGO) clean

help: ## Say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20
