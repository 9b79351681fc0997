PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread a process: the tests' models are tiny, and waiting threads would only spin.
ONE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.PHONY: demo test test-slow soak test-wheel check bench wheel clean

demo: $(READY)
	$(BIN)/tarsia demo

test: $(READY)
	$(ONE) $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: $(READY)
	$(ONE) $(BIN)/python -m pytest -q -n 2 -m slow

# Ten minutes of mixed load on a server while everything happens to it; the report is runs/soak/soak.json.
soak: $(READY)
	$(ONE) $(BIN)/python tests/serve/soak.py --minutes 10 --out runs/soak

# A wheel for this machine, with the kernel compiled in, where a C compiler is found.
wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .

test-wheel: $(READY)
	$(ONE) $(BIN)/python -m pytest -q tests/quant/test_wheel.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.render

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/tarsia/*/kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# constraints.txt pins torch to a build for the CPU where one is offered; unpinned, several GB of CUDA would come.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "Tarsia needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	@echo "Setting up $(VENV) (once, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
