# Two commands on a fresh machine: `make serve` and `make test`. Both keep their environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0+cpu

.PHONY: serve test test-fast check docs format evaluate bench clean

serve: .venv/ready
	@$(BIN)/polylogit serve deploy/demo/polylogit.yaml

test: .venv/ready-to-test
	$(BIN)/python -m pytest -n 2 --durations 20

test-fast: .venv/ready-to-test
	$(BIN)/python -m pytest -n 2 -m "not e2e"

check: .venv/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs

# Into site/, without a network. The variable spares a notice of the theme's makers.
docs: .venv/ready-to-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

evaluate: .venv/ready-to-test
	deploy/demo/evaluate.sh

bench: .venv/ready
	$(BIN)/polylogit bench deploy/demo/polylogit.yaml --experts math,text --json docs/benchmarks/bench.json

format: .venv/ready-to-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What serving needs. torch's CPU build is not on PyPI: take it from where pip is configured to look, else from PyTorch's
# own index.
.venv/ready: docker/requirements/cpu.txt docker/requirements/build.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH) || $(BIN)/pip install -q --index-url https://download.pytorch.org/whl/cpu $(TORCH)
	$(BIN)/pip install -q --no-deps -r docker/requirements/cpu.txt -r docker/requirements/build.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# And what tests, checks and training need.
.venv/ready-to-test: .venv/ready docker/requirements/dev.txt
	$(BIN)/pip install -q --no-deps -r docker/requirements/dev.txt
	$(BIN)/python -c "from server.coordinator.warmup import warm_up; warm_up()"  # or each coordinator would compile it
	touch $@

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find server gate tests deploy docs -name __pycache__ -prune -exec rm -rf {} +
