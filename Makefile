# SPDX-License-Identifier: Apache-2.0
# Every task a person runs. Each target sets up what it needs below .venv and build/.

PYTHON ?= python3
# The virtual environment holds what we install, so its torch says nothing about this
# machine; setup.py asks an installed torch first, this asks the machine.
VLLM_TARGET_DEVICE ?= $(shell command -v nvidia-smi >/dev/null && echo cuda || \
    { command -v rocm-smi >/dev/null && echo rocm || echo cpu; })
export VLLM_TARGET_DEVICE
# A base wheel of the user's: where it is, and its sha256 if that is given.
HASH := \#
OWN_BASE := $(subst $(HASH)sha256=, ,$(VLLM_PRECOMPILED_WHEEL_LOCATION))
# Groups of patches to build: GROUPS="fix kernels", or VLLM_QUARK_GROUPS as pip has it.
# Some targets take GROUPS for what they are about.
ifeq ($(filter mails check-groups test-mutants,$(MAKECMDGOALS)),)
ifdef GROUPS
export VLLM_QUARK_GROUPS := $(GROUPS)
endif
endif
SPACE := $(subst ,, )
# What is built; another base is another build, and so are other groups.
TARGET := $(VLLM_TARGET_DEVICE)$(VLLM_BASE_VERSION)$(notdir $(firstword $(OWN_BASE)))$(word \
    2,$(OWN_BASE))$(addprefix -,$(subst $(SPACE),-,$(strip $(VLLM_QUARK_GROUPS))))
PYTEST_FLAGS ?= -n auto --maxprocesses=4

# Another release than the default one wants another torch: an environment of its own.
DEFAULT_RELEASE := $(shell sed -n 's/^default_release = "\(.*\)"/\1/p' UPSTREAM.toml)
OTHER_RELEASE := $(filter-out $(DEFAULT_RELEASE),$(VLLM_BASE_VERSION))
VENV := .venv$(addprefix -,$(OTHER_RELEASE))
BIN := $(VENV)/bin
TOOLS_READY := $(VENV)/.tools
LINT_READY := $(VENV)/.lint
FORK_READY := $(VENV)/.fork-$(TARGET)
# The default release's torch; of the others pip knows by the wheel.
REQUIREMENTS := $(if $(OTHER_RELEASE),,-r requirements-$(VLLM_TARGET_DEVICE).txt)
WHEEL := build/wheel-$(TARGET)
# Not the tuned configs: make cannot name files with `=`. After a sweep remove build/wheel-*.
WHEEL_SOURCES := setup.py UPSTREAM.toml $(wildcard tools/*.py) \
    $(shell find patches vllm -type f -not -path '*/__pycache__/*' -not -name '*=*') \
    $(wildcard $(OWN_BASE))
# A ROCm image brings torch, triton and AITER of its own; the environment must see them.
VENV_FLAGS := $(if $(filter rocm,$(VLLM_TARGET_DEVICE)),--system-site-packages)

# What is at a URL may be another wheel next time, unless its sha256 is given.
ifeq ($(words $(OWN_BASE))$(filter-out http://% https://%,$(OWN_BASE)),1)
.PHONY: $(WHEEL)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install wheel demo ask matrix test test-slow test-all test-nightly \
    test-mutants fuzz fuzz-check fixtures architectures \
    fixtures-train tree patches patches-table mails check-patches check-groups \
    new-release lint docs-check \
    bench bench-check \
    bench-load bench-serving stress report no-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | \
	    expand -t 22

install: $(FORK_READY) ## install the fork and what its tests need into .venv

wheel: $(WHEEL) ## build the fork's wheel into dist/; GROUPS="fix kernels": these alone
	@echo "wheel: $$(cat $(WHEEL))"

demo: $(FORK_READY) ## serve a Quark INT8 export: right answers against garbage
	$(BIN)/python -m examples.quark_int8_demo

ask: $(FORK_READY) ## ask two exports, and see that each answer is right: the shortest proof
	$(BIN)/python -m examples.across_releases build/ask.json

matrix: $(FORK_READY) ## run every kind of export, and many families: right, refused or garbage
	$(BIN)/python -m examples.matrix $(if $(STOCK),--stock $(STOCK))
	$(BIN)/python -m examples.families $(if $(STOCK),--stock $(STOCK))

test: $(FORK_READY) ## run the tests that take minutes: docs/maintain/tests.md
	$(BIN)/pytest $(PYTEST_FLAGS) -m "not slow"

test-slow: $(FORK_READY) ## run the others: engines again and again, stress, fuzz
	$(BIN)/pytest $(PYTEST_FLAGS) -m "slow and not long"

test-all: $(FORK_READY) ## run all tests
	$(BIN)/pytest $(PYTEST_FLAGS)

test-nightly: $(FORK_READY) ## run all tests, with over ten times the random examples
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest $(PYTEST_FLAGS)

test-mutants: $(FORK_READY) ## show that named tests fail without each patch; GROUPS=fix
	$(BIN)/python -m tools.mutants $(if $(GROUPS),--groups $(GROUPS))

fuzz: $(FORK_READY) ## damage 10,000 checkpoints and see that none is read wrong
	$(BIN)/python -m tests.fuzz.fuzz_checkpoints

fuzz-check: $(FORK_READY) ## open 10,000 hostile checkpoints with quark-check
	$(BIN)/python -m tests.fuzz.fuzz_quark_check

fixtures: build/quark/.ready ## make the test exports again with the real amd-quark
	build/quark/bin/python -m tests.fixtures.make_exports

architectures: $(FORK_READY) ## ask the models of releases, for quark-check
	$(BIN)/python -m tools.architectures \
	    $(if $(wildcard build/families.json),--families build/families.json)

fixtures-train: build/quark/.ready ## train the small model again: minutes on a GPU
	build/quark/bin/python -m tests.fixtures.train_step3p5

build/quark/.ready: tests/fixtures/requirements.txt
	test -d build/quark || $(PYTHON) -m venv build/quark
	build/quark/bin/python -m pip install -r $<
	@touch $@

tree: $(TOOLS_READY) ## unpack the base to build/tree, one commit a patch, to edit there
	$(BIN)/python -m tools.tree tree

patches: $(TOOLS_READY) ## write patches/ back from build/tree
	$(BIN)/python -m tools.tree patches

patches-table: $(TOOLS_READY) ## write patches/README.md, and sizes in README.md
	$(BIN)/python -m tools.tree table

mails: $(TOOLS_READY) ## write the stack with its new files to build/mails; GROUPS="fix kernels"
	$(BIN)/python -m tools.mails $(GROUPS)

check-patches: $(TOOLS_READY) ## apply the series, and each group on fix, to every release
	$(BIN)/python -m tools.check_patches

check-groups: $(FORK_READY) ## build fix with each other group; import it, load an export
	$(BIN)/python -m tools.check_groups $(GROUPS)

new-release: $(TOOLS_READY) ## try the newest series on vLLM's newest release
	$(BIN)/python -m tools.newest $(RELEASE)

lint: $(LINT_READY) docs-check ## ruff, mypy, the workflows, the docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
	    $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/zizmor --offline --quiet .github/workflows

docs-check: $(TOOLS_READY) ## links, commands, figures and tables of the docs
	$(BIN)/python -m tools.docs_check

bench: $(FORK_READY) ## measure the INT8 fused MoE here
	$(BIN)/python -m benchmarks.kernels.$(if $(filter \
	    cpu,$(VLLM_TARGET_DEVICE)),benchmark_cpu_int8_moe,benchmark_int8_moe --sweep)

bench-check: $(FORK_READY) ## measure quark-check on 200 GB of headers and 2 GB of data
	$(BIN)/python -m benchmarks.benchmark_quark_check

bench-load: $(FORK_READY) ## measure memory and time of loading a 2 GB export
	$(BIN)/python -m benchmarks.benchmark_load_int8

bench-serving: $(FORK_READY) ## serve with stock and with the fork on a GPU: STOCK=folder
	$(BIN)/python -m benchmarks.benchmark_serving_int8 $(if $(STOCK),--stock $(STOCK))

stress: $(FORK_READY) ## serve under stress for MINUTES (10): every answer is judged
	$(BIN)/python -m tests.stress.stress_serving --minutes $(or $(MINUTES),10)

# Of a GPU: on another machine it says so before anything is built.
report: $(if $(filter cpu,$(VLLM_TARGET_DEVICE)),no-gpu,$(FORK_READY)) ## test and measure this GPU, stock beside fork: two files for an issue
	$(BIN)/python -m tools.report

no-gpu:
	@echo "error: make report measures a GPU: expected nvidia-smi or rocm-smi, or" \
	    "VLLM_TARGET_DEVICE=cuda or rocm, found neither" >&2; exit 1

clean: ## remove what was built here, but not the cache of base wheels
	rm -rf build dist .venv .venv-*

$(TOOLS_READY): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install "pip>=25.1" # which knows dependency groups
	$(BIN)/python -m pip install --group build
	@touch $@

$(WHEEL): $(TOOLS_READY) $(WHEEL_SOURCES)
	@mkdir -p build
	$(BIN)/python -m tools.build
	@ls -t dist/vllm-*.whl | head -n 1 > $@

$(FORK_READY): $(WHEEL) requirements-$(VLLM_TARGET_DEVICE).txt
	@# Two builds may have one version, and pip leaves a version that it has already.
	$(BIN)/python -m pip uninstall --yes vllm
	$(BIN)/python -m pip install $(REQUIREMENTS) --group test "$$(cat $(WHEEL))"
	@# The index's torchvision and torchaudio may not load beside this torch, and then neither
	@# does Transformers. vLLM runs without them, but reads no pictures and no sound.
	@test $(VLLM_TARGET_DEVICE) != cpu || for package in torchvision torchaudio torchcodec; do \
	    $(BIN)/python -c "import $$package" 2>/dev/null \
	        || $(BIN)/python -m pip uninstall -y $$package; done
	@rm -f $(VENV)/.fork-* && touch $@

$(LINT_READY): $(FORK_READY)
	$(BIN)/python -m pip install --group lint
	@touch $@
