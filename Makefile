# Everything happens in .venv; the first `make` command makes it.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0

.PHONY: run test check format bench screenshots clean

run: .venv/.installed
	$(BIN)/lora-explorer app $(ARGS)

# Two at a time: more would not speed up two cores, and every worker holds a torch of its own.
test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.installed
	$(BIN)/python tests/benchmarks/run.py $(ARGS)

# torch first and by its exact pin: a bare requirement pulls gigabytes of CUDA packages.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $@

screenshots: .venv/.installed
	$(BIN)/python tests/screenshots.py $(ARGS)

clean:
	rm -rf .venv build dist
