# The verbs of this project. Each does all the set-up it needs, in .venv; a machine needs Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
SUITE ?= tests
DATA ?= cifar100

.PHONY: install demo test check serve paper bench

install: .venv/.installed ## everything, at the exact versions of constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --compile-bytecode --editable '.[dev]'
	touch $@

demo: install ## teacher, students, certified bundle, one answer
	$(BIN)/ltkd pipeline

test: install ## every test, the slow ones too
	$(BIN)/pytest $(SUITE)

check: install ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

serve: install ## the bundle that make demo left
	$(BIN)/ltkd serve bundles/demo

paper: install ## the published table, on a GPU: DATA=tree of CIFAR-100 or cifar100
	$(BIN)/ltkd compare --data $(DATA) --gammas 100 --teacher-model resnet32x4 --student-model resnet8x4 \
		--methods kd,dkd,ltkd,ltkd_plus --seeds 0,1,2 --recipe paper --device cuda --compile --out runs/paper

bench: install ## everything that is measured, against its limits
	$(BIN)/python -m benchmarks.journey
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.gates
	$(BIN)/python -m benchmarks.confidence
	$(BIN)/python -m benchmarks.export
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.reliability
