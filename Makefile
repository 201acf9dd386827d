# `make demo` and `make test` need nothing but python3 (3.11 or newer): they make .venv first.
# uv is used when it is on the PATH; pip otherwise.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup demo test quick clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --seed --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV) && \
		uv pip install --python $(RUN) --constraint constraints.txt --editable '.[test]'; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(RUN) -m pip install --constraint constraints.txt --editable '.[test]'; \
	fi
	@touch $(STAMP)

demo: setup
	$(RUN) -m experiments.train_draft cpu --output runs/demo --overwrite

quick: SELECTION := -m "not slow"
test quick: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(RUN) -m pytest -n 2 --dist loadfile $(SELECTION)

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist
