# Every target sets up what it needs; an existing .venv is used, and completed if something is missing in it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.baton-ready
PACKAGES := baton engine kvtransfer worker prefill_worker decode_worker router bench deploy tests

.PHONY: run serve test kernels check generate proto bench clean
.DEFAULT_GOAL := run

run: $(READY)  ## a cluster on the demo model, a few streamed answers, nothing left behind
	@$(BIN)/python -m deploy.tour

serve: $(READY)  ## the demo model on the default ports, until Ctrl-C
	@$(BIN)/baton serve --model deploy/demo/model --served-model-name demo

test: $(READY)
	@$(BIN)/pytest -q -rs -n 2

# Every Triton kernel for every GPU, without one: registers, spills and shared memory against the recorded ones.
kernels: $(READY)
	@TRITON_CACHE_DIR=build/triton $(BIN)/python -m tests.engine.kernels.compilation

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy $(PACKAGES)
	@$(BIN)/lint-imports
	@.ci/generate_proto.sh --check

# Everything committed that is made from something else.
generate: $(READY)
	@.ci/generate_proto.sh
	@$(BIN)/python .ci/grpc_reference.py --write
	@$(BIN)/python -m deploy.settings.reference
	@$(BIN)/python -m deploy.cli.reference
	@$(BIN)/python -m baton.metrics > docs/metrics.md
	@$(BIN)/python -m deploy.grafana.build
	@$(BIN)/python -m deploy.prometheus.build

proto:
	@.ci/generate_proto.sh

bench: $(READY)
	@$(BIN)/baton bench transfer

clean:
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt tests/node/package-lock.json
	@PYTHON=$(PYTHON) .ci/setup.sh
	@touch $@
