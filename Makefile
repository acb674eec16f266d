# `make demo` and `make test` are all a fresh machine needs: both install first. PYTHON names the interpreter to start from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'ranksearch needs Python 3.11 or later: make PYTHON=python3.12 ...'; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); echo 'no virtual environment could be made; on Debian: apt install python3-venv'; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

demo: install
	$(BIN)/ranksearch demo $(DEMO)

test: install lint
	$(BIN)/pytest -m 'not slow and not gpu and not network' $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo dist test-artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis
