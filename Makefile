# One obvious command each. `make demo`, `make test` and `make bench` make their own virtual environment and install
# everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := out/demo
BENCH := out/bench

.PHONY: demo test load bench check lint types format clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	mkdir -p .typecheck && ln -sfn .. .typecheck/arllm
	touch $@

# The main job on SYNTHETIC outcomes: generate, train, export with verification, route at several betas.
demo: $(VENV)/ready
	rm -rf $(OUT) $(OUT)-run $(OUT)-run.partial $(OUT)-bundle
	$(BIN)/arllm data synthesize $(OUT)/outcomes --queries 2400
	$(BIN)/arllm train $(OUT)/outcomes --pool $(OUT)/outcomes/pool.json --out $(OUT)-run \
		--vocab-size 3000 --max-tokens 96
	$(BIN)/arllm export $(OUT)-run --out $(OUT)-bundle
	@echo "Decisions of a router trained on SYNTHETIC outcomes:"
	$(BIN)/arllm route $(OUT)-bundle --table --beta 0 --beta 0.1 --beta 0.3 --beta 0.5 --beta 1 - \
		--jsonl < $(OUT)/outcomes/samples.jsonl

test: check
	$(BIN)/python -m pytest -q

# What routing adds to LiteLLM and to Envoy, with and without it by turns in one run; the table is tests/benchmarks/LOAD.md.
LOAD_SECONDS ?= 60
load: $(VENV)/ready
	$(BIN)/python tests/benchmarks/load_gateways.py --seconds $(LOAD_SECONDS) --write tests/benchmarks/LOAD.md

# Every comparison behind tests/benchmarks/RESULTS.md, unattended. Not part of CI. Environments of the peers are made on
# demand outside the repository; one that fails is a row that says so. On a machine that others use too:
# make bench ARLLM_BENCH_CLOCK=cpu
bench: $(VENV)/ready
	rm -rf $(BENCH)
	-$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[gemma3-270m]"
	-$(BIN)/python tests/benchmarks/engines.py --out $(BENCH)/engines.json
	-$(BIN)/python tests/benchmarks/bundles.py --out $(BENCH)/bundles.json
	-$(BIN)/python tests/benchmarks/published_path.py --out $(BENCH)/published.json
	-$(BIN)/python tests/benchmarks/peers.py --out $(BENCH)/peers.json
	$(BIN)/python tests/benchmarks/results.py --folder $(BENCH) --out tests/benchmarks/RESULTS.md

check: lint types

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types: $(VENV)/ready
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .typecheck out build dist *.egg-info
