# The commands of this project. Each installs what it needs into .venv. Requires Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
SUITE ?= tests
DATA ?= cifar100

.PHONY: install demo test check serve paper bench

install: .venv/.installed ## install everything, in the versions of constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --compile-bytecode --editable '.[dev]'
	touch $@

demo: install ## train teacher and students, export a certified bundle, classify one image
	$(BIN)/ltkd pipeline

test: install ## run all tests in two processes; the tests of one file stay in one
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(SUITE)

check: install ## check format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

serve: install ## serve the bundle of make demo
	$(BIN)/ltkd serve bundles/demo

paper: install ## reproduce the published table on a GPU; DATA is cifar100 or a directory of CIFAR-100 images
	$(BIN)/ltkd compare --data $(DATA) --gammas 100 --teacher-model resnet32x4 --student-model resnet8x4 \
		--methods kd,dkd,ltkd,ltkd_plus --seeds 0,1,2 --recipe paper --device cuda --compile --out runs/paper

bench: install ## run all benchmarks and compare the results with their limits
	$(BIN)/python -m benchmarks.journey
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.gates
	$(BIN)/python -m benchmarks.confidence
	$(BIN)/python -m benchmarks.export
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.reliability
	$(BIN)/python -m benchmarks.attacks
