# Everything runs in .venv, made on the first use. PYTHON and TORCH can be set from outside:
#   make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint clean

demo: $(VENV)/installed
	$(BIN)/trilemma compare quick-vae quick-gan quick-diffusion --data fashion --budget 3m -n 1000 --out demo
	@echo
	@echo "Look at demo/report.html in a browser; the trained models are in demo/."

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --cov=trilemma --cov-report=term:skip-covered

# Long runs, and parity with published implementations, which are installed for it.
test-slow: $(VENV)/peers
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/peers: benchmarks/requirements.txt | $(VENV)/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps efficientnet-lite-pytorch torch-fidelity
	@touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info demo
