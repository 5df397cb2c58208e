# Every target makes and reuses .venv. PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: install demo test test-slow browser-test slurm-test check format help clean

install: $(READY)  ## set up .venv

$(READY): pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## the main job: pretrain SimMIM on solar cells and evaluate it
	$(BIN)/python benchmarks/solar_cells.py --out runs/demo --overwrite

test: $(READY)  ## the tests, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not slurm and not browser"

test-slow: $(READY)  ## the long tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "slow and not slurm and not browser"

browser-test: $(READY)  ## the report in a browser; installs Chromium as root on Debian
	command -v chromium >/dev/null || \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)
	REQUIRE_BROWSER=1 $(BIN)/python -m pytest -m browser

slurm-test: $(READY)  ## the tests on a private SLURM; installs it as root on Debian
	$(BIN)/python tests/slurm/cluster.py install
	REQUIRE_SLURM=1 $(BIN)/python -m pytest -m slurm

check: $(READY)  ## all that CI checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry lightly_mim
	$(MAKE) test
	$(MAKE) test-slow
	$(MAKE) browser-test
	$(MAKE) slurm-test
	$(BIN)/python benchmarks/solar_cells.py --quick --out runs/quick --overwrite

format: $(READY)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

help: $(READY)  ## what COMMAND --help says, as the parser says it now
	WRITE_HELP=1 $(BIN)/python -m pytest -q -k is_what_the_parser_says tests/test_cli.py

clean:  ## remove .venv, caches and builds
	rm -rf .venv dist build .*_cache
