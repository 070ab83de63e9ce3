# Two commands do everything: `make demo` (the main job on a real model) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export JAX_PLATFORMS ?= cpu

.PHONY: demo test peers slow slower gpu notebook bench lint types wheel clean

demo: $(VENV)/kvx
	$(BIN)/kvx fetch smollm2-135m-instruct
	$(BIN)/kvx compare smollm2-135m-instruct --out results/compare

test: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not peer"

# The TPU compiler uses every core there is, so what needs it runs by itself.
SLOWER := tests/kvx/test_contracts.py tests/kvx/test_latent_contracts.py tests/kvx/test_mesh.py tests/eval/cost \
	tests/eval/plan
SLOW := tests/kernels tests/kvx tests/models tests/train tests/eval tests/test_wheel.py $(SLOWER:%=--ignore=%)

slow: $(VENV)/aot
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not peer and not aot and not long" $(SLOW)
	$(BIN)/python -m pytest -m "slow and aot and not peer and not long" $(SLOW)

# Every method under every contract and on a mesh, and what is marked long: beyond what .ci/run has time for.
slower: $(VENV)/aot
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not peer and not aot and not long" $(SLOWER)
	$(BIN)/python -m pytest -m "long and not peer"
	$(BIN)/python -m pytest -m "slow and aot and not long and not peer" $(SLOWER)

# Kernels for GPUs need jax 0.11, and that Python 3.12: interpreted, and lowered for CUDA without a GPU.
NEWER ?= python3.13
gpu: .venv-newest/test
	.venv-newest/bin/python -m pytest -n 2 -m "not peer and not aot and not long" -k "triton or gpu or cuda" tests/kernels

peers: $(VENV)/peers
	$(BIN)/python -m pytest -m "peer and not long"

notebook: $(VENV)/notebook
	$(BIN)/python -m pytest -m notebook tests/test_notebook.py

bench: $(VENV)/peers
	$(BIN)/python -m kvx.eval.bench_peers

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright cannot follow sub-packages that live outside kvx/, so it reads the package as a wheel installs it, beside
# the peers that the benchmark imports.
types: $(VENV)/peers
	rm -rf build/types && $(PIP) --no-deps --target build/types .
	$(BIN)/pyright --pythonpath $(BIN)/python build/types/kvx

$(VENV)/kvx: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/test: $(VENV)/kvx
	$(PIP) -e ".[test]"
	touch $@

.venv-newest/test: pyproject.toml
	$(NEWER) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check "jax==0.12.*" -e ".[test]"
	touch $@

$(VENV)/aot: $(VENV)/test
	$(PIP) -e ".[aot]"
	touch $@

$(VENV)/notebook: $(VENV)/test
	$(PIP) -e ".[notebook]"
	touch $@

$(VENV)/peers: $(VENV)/test
	$(PIP) -e ".[peers]"
	touch $@

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info results
