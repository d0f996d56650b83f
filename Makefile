# `make demo` and `make test` each work alone on a machine with Python 3.10+, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FRAMEWORKS := $(VENV)/.frameworks
# Two processes, each with whole modules, whose fixtures are made once; in the order of testpaths, slow ones first.
TWO := -n 2 --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo browser test lint format docs picture bench rules schema clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bnprobe needs Python 3.10 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group dev --editable .
	@touch $@

$(FRAMEWORKS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group frameworks
	@touch $@

demo: $(READY) ## install, scan the digits sample and print its report
	$(BIN)/bnprobe scan sample_configs/digits/sorted.yaml || [ $$? -eq 1 ]  # 1: findings, which it is to show

browser: $(READY) ## install what the tests of pages drive: Playwright, and on Debian, as root, Chromium
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group browser
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=20 update && \
		  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || \
		echo "Chromium could not be installed: the tests of pages in a browser will be skipped."

test: $(FRAMEWORKS) ## install, run the test suite: the package, the command as users run it, the benchmarks
	@$(BIN)/python -m compileall -q bnprobe  # or each of the processes that tests start would do it
	$(BIN)/python -m pytest $(TWO)

lint: $(FRAMEWORKS) ## ruff, mypy and the import contracts
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

format: $(READY) ## rewrite the code in the house format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(READY) ## build the documentation as a site, strictly: site/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

picture: $(READY) ## rewrite the picture of a report in README.md
	$(BIN)/python docs/picture.py

bench: $(READY) ## run the benchmarks (minutes; see benchmarks/README.md)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group bench
	$(BIN)/python -m benchmarks

rules: $(READY) ## rewrite the pages of the rules in docs/rules, from their docstrings
	$(BIN)/python -m bnprobe.rules.docs docs/rules

schema: $(READY) ## rewrite the JSON schemas of reports, records of repairs and sweeps
	$(BIN)/python -c "from bnprobe.report.json import write_schemas; write_schemas()"

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
