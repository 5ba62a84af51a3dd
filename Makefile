# One entry point. Every target that proves or measures something leaves build/reports/TARGET.json.
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

RUN_STEPS := python3 tools/run-steps
PYTEST    := .venv/bin/pytest
SCRIPTS   := tools/guest-kernel tools/run-steps
# Unit tests need no privilege; so that they cannot come to need one, they run without any, whoever runs them.
UNPRIVILEGED := $(if $(filter 0,$(shell id -u)),setpriv --bounding-set=-all --inh-caps=-all --no-new-privs)

# A command in the zero-copy test machine, which finds this tree at the same path. No KVM is needed.
IN_MACHINE = mkdir -p build/reports && .venv/bin/python -m mpassthru.testing.zerocopy_machine $$(tools/zerocopy-machine) \
    --share build/reports --timeout 1800 --

.PHONY: help setup check test test-unit test-netns test-guest test-virtio-user test-zerocopy test-zerocopy-quick test-soak \
    fuzz soak demo bench bench-quick bench-idle microbench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what is missing and build: Debian packages (root), .venv, extension module
	@tools/setup

check: setup ## Formatting, lints and types, Python and Rust
	@$(RUN_STEPS) $@ \
	    '.venv/bin/ruff check . $(SCRIPTS)' \
	    '.venv/bin/ruff format --check . $(SCRIPTS)' \
	    '.venv/bin/mypy' \
	    'MYPYPATH=tools .venv/bin/mypy --scripts-are-modules $(SCRIPTS)' \
	    '.venv/bin/python -m mypy.stubtest mpassthru._core' \
	    'cargo fmt --check' \
	    'cargo clippy --quiet --locked --workspace --all-targets -- -D warnings'

test: ## All of it, set-up included: checks, unit, namespace, QEMU guest, virtio-user and short zero-copy tests
	@$(RUN_STEPS) $@ \
	    '$(MAKE) setup' \
	    '$(MAKE) check' \
	    '$(MAKE) test-unit' \
	    '$(MAKE) test-netns' \
	    '$(MAKE) test-guest' \
	    '$(MAKE) test-virtio-user' \
	    '$(MAKE) test-zerocopy-quick'

test-unit: setup ## Unit tests, Rust then Python; these without any capability
	@$(RUN_STEPS) $@ \
	    'cargo test --quiet --locked --workspace --exclude mpassthru-python' \
	    '$(UNPRIVILEGED) $(PYTEST) -q tests/unit'

test-netns: setup ## AF_XDP over veth in network namespaces (root)
	@$(PYTEST) -q -n 2 --report build/reports/$@.json tests/netns

test-guest: setup ## A Linux guest in QEMU (root)
	@tools/guest-kernel >/dev/null
	@$(PYTEST) -q --report build/reports/$@.json tests/guest

test-virtio-user: setup ## DPDK's virtio-user driver as the guest; FRAMES=N for more frames in each test (root)
	@$(PYTEST) -q --report build/reports/$@.json $(if $(FRAMES),--frames $(FRAMES)) tests/virtio_user

test-zerocopy: setup ## Zero-copy drivers (virtio_net, igb) in a machine of QEMU's, with 200,000 frames and 200 stops each
	@tools/guest-kernel >/dev/null
	@$(IN_MACHINE) $(PYTEST) -v -p no:cacheprovider --report build/reports/$@.json tests/zerocopy

test-zerocopy-quick: setup ## The short form of test-zerocopy
	@$(IN_MACHINE) $(PYTEST) -q -p no:cacheprovider --report build/reports/$@.json -m 'not long and not soak' tests/zerocopy

fuzz: setup ## Ten million cases of descriptor rings, one million of vhost-user messages; fuzz/README.md has shorter runs
	@.venv/bin/python fuzz/run.py

test-soak: setup ## The long forms of all tests that search, those marked soak (root)
	@tools/guest-kernel >/dev/null
	@$(PYTEST) -v -m soak --report build/reports/$@.json tests/unit tests/netns tests/guest tests/virtio_user

soak: setup ## Everything that takes hours: test-soak, fuzz, ten million virtio-user frames, long zero-copy tests (root)
	@$(RUN_STEPS) $@ \
	    '$(MAKE) test-soak' \
	    '$(MAKE) test-virtio-user FRAMES=10000000' \
	    '$(MAKE) test-zerocopy' \
	    '$(MAKE) fuzz'

demo: setup ## Real traffic through a port, with the built-in guest; GUEST=qemu for a Linux guest (root)
	@$(if $(filter qemu,$(GUEST)),tools/guest-kernel >/dev/null)
	@mkdir -p build/reports
	@.venv/bin/mpassthru demo $(if $(GUEST),--guest $(GUEST)) --report build/reports/$@.json

bench: setup ## Throughput, CPU and loss beside DPDK and the limit of AF_XDP; half an hour; see bench/README.md (root)
	@.venv/bin/python -m bench

bench-quick: setup ## The short form of bench: under three minutes (root)
	@.venv/bin/python -m bench --quick

bench-idle: setup ## CPU time of 16 idle ports, and round trips through one that sleeps; a minute (root)
	@.venv/bin/python -m bench.idle

microbench: setup ## Instructions and time of the pump's loop for a frame, without kernel and driver; two minutes
	@.venv/bin/python -m bench.micro

clean: ## Remove what was built; .venv and Debian packages stay
	rm -rf build target python/mpassthru/_core*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
