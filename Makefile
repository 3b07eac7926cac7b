# Targets for people and for CI. Everything is installed into .venv, through constraints.txt.
#   make demo          make test          make PYTHON=python3.12 test
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip --disable-pip-version-check --no-input install -qq
LOWEST_TORCH ?= 2.6.0
# How many tests side by side (pytest-xdist): one per core, fewer where memory is short. JOBS=0: one after the other.
JOBS ?= auto
PYTEST  = $(PY) -m pytest -n $(JOBS) --dist worksteal
SOURCES = core llama_index_memsafe langchain_memsafe chroma_memsafe haystack_memsafe

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-all test-hostile test-lowest lint bench dist docs clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-ready ## Index and search real passages through LlamaIndex and LangChain (under two minutes)
	@$(PY) examples/demo.py

test: $(VENV)/.test-ready ## Run what proves every promise, linting and real memory limits included (ten minutes on two cores)
	@$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-fast: $(VENV)/.test-ready ## Run the quick tests, for while you work (under 90 seconds)
	@$(PYTEST) -m "not (alone or hostile or long or peers or slow)" $(PYTEST_ARGS)

test-all: $(VENV)/.engines-ready test ## Run everything: first `make test`, then the long ones, which protect a second time
	@$(PYTEST) -m long $(PYTEST_ARGS)

test-hostile: $(VENV)/.test-ready ## Run the tests under real memory limits only
	@$(PY) -m pytest -m hostile $(PYTEST_ARGS)

test-lowest: $(VENV)-lowest/.ready ## Run the tests on the oldest supported versions (several GB on Linux: see CONTRIBUTING.md)
	@$(VENV)-lowest/bin/python -m pytest -p no:cacheprovider -o filterwarnings=default -m "not hostile" \
	  --ignore=tests/contracts $(PYTEST_ARGS)

lint: $(VENV)/.test-ready ## Check style, types and the import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.test-ready ## Compare with the peers on this machine; writes benchmarks/results/
	@$(PY) -m benchmarks $(BENCH_ARGS)

dist: $(VENV)/.test-ready ## Build the sdist and the wheel into dist/
	@rm -rf dist
	@$(PY) -m hatchling build -t sdist -t wheel

docs: $(VENV)/.docs-ready ## Build the documentation site into build/site, strictly and offline (Python 3.11 or newer)
	@$(PY) scripts/build_docs.py

clean: ## Remove what the other targets made, the virtual environments and built models included
	rm -rf $(VENV) $(VENV)-lowest .models .cache dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache
	find $(SOURCES) tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "memsafe needs Python 3.10 or newer, this is " \
	  + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt pip

$(VENV)/.demo-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing memsafe and what the demo needs into $(VENV) (torch is large: minutes the first time)"
	@$(PIP) -c constraints.txt -e ".[all]" --group demo
	@touch $@

$(VENV)/.test-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing memsafe and what the tests need into $(VENV) (torch is large: minutes the first time)"
	@$(PIP) -c constraints.txt -e ".[all]" --group test
	@touch $(VENV)/.demo-ready $@

$(VENV)/.engines-ready: $(VENV)/.test-ready
	@$(PIP) -c constraints.txt --group engines
	@touch $@

$(VENV)/.docs-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(PIP) -c constraints.txt --group docs
	@touch $@

# LOWEST_TORCH=2.13.0 (say) tests the other lowest versions with a torch that is at hand.
$(VENV)-lowest/.ready: pyproject.toml constraints-lowest.txt
	@test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	@echo "Installing the oldest supported versions into $(VENV)-lowest"
	@sed 's/^torch==.*/torch==$(LOWEST_TORCH)/' constraints-lowest.txt > $(VENV)-lowest/constraints.txt
	@$(VENV)-lowest/bin/python -m pip install -qq "pip>=25.1"
	@$(VENV)-lowest/bin/python -m pip install -qq -c $(VENV)-lowest/constraints.txt -e ".[all]" --group lowest
	@touch $@
