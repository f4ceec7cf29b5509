# Each target sets up .venv first; nothing needs root. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help setup quick demo test bare slow bench lint clean
SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
ARGS ?=
# glibc backs large tensors by huge pages: a sixth off a training step on a CPU.
HUGE := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

help:             ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):[^#]*## ?/  make \1\t/' | expand -t 16

setup: .venv/ready  ## create .venv with the exact versions of constraints.txt

# Without a GPU the CPU build of torch is asked for by name, so that no CUDA package is pulled.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; run make PYTHON=python3.12 ..."; exit 2; }
	@echo "setting up .venv (about a minute)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
ifeq ($(GPU),)
	@$(PIP) install -q "torch==$(TORCH)+cpu" 2>/dev/null || { \
	  echo "no CPU build of torch at your package index; taking the default build (set PIP_EXTRA_INDEX_URL to PyTorch's CPU index to avoid its size)"; \
	  $(PIP) install -q "torch==$(TORCH)"; }
	@$(PIP) install -q -c constraints.txt -e ".[dev]"
else
	@$(PIP) install -q "torch==$(TORCH)"
	@$(PIP) install -q -c constraints.txt -e ".[dev]"
	@echo "building transformer-engine (some minutes)"
	@{ $(PIP) install -q -c constraints.txt "setuptools>=77" wheel ninja pybind11 && \
	  $(PIP) install -q -c constraints.txt --no-build-isolation -e ".[gpu]"; } >.venv/transformer-engine.log 2>&1 || \
	  echo "transformer-engine did not build (.venv/transformer-engine.log says why); going on without it (docs/gpu.md)"
endif
	@touch $@

quick: .venv/ready  ## the whole line at toy length, about 3 minutes on 2 cores (DATA=folder for your own pictures)
	@$(HUGE) exec $(PY) demo/line.py --recipe quick $(if $(DATA),--data "$(DATA)") $(ARGS)

demo: .venv/ready   ## the same line, long enough to learn something, about half an hour on 2 cores
	@$(HUGE) exec $(PY) demo/line.py --recipe demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: .venv/ready   ## the tests CI runs, at most 12 minutes on 2 cores
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

bare: .venv/ready   ## those of them that use the machine's fonts or Tesseract, with these hidden
	@env PATH="$(CURDIR)/.venv/bin" XDG_DATA_DIRS=/nonexistent XDG_DATA_HOME=/nonexistent \
	  $(PY) -m pytest -m "machine and not slow" $(ARGS)

slow: .venv/ready   ## the tests that take minutes each
	@$(PY) -m pytest -m slow $(ARGS)

bench: .venv/ready  ## the benchmarks of docs/ at their default sizes
	@for script in bench/*.py; do echo "== $$script"; $(PY) "$$script" || exit 1; done

lint: .venv/ready
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

clean:            ## delete .venv (runs/ stays)
	rm -rf .venv
