# Everything a person or CI does with this repository. Bare `make` explains itself.
#
# Variables, given on the command line or in the environment:
#   PYTHON       the interpreter that makes the virtual environment        (python3.11)
#   VENV         where the virtual environment goes                        (.venv)
#   TORCH_INDEX  a package index to take torch from, and nothing else      (empty: what pip takes by default)
#   PIP_ARGS     more arguments for pip, for example --find-links DIR      (empty)
#   KAFKA_HOME   a folder with libs/*.jar of Apache Kafka 4.x              (../shared/kafka if it is there)
#   KAFKA_JVM_PERFORMANCE_OPTS   options for the Java of an Apache Kafka that is started; the tests' own are below    (empty)
#   SEED, MINUTES, BROKER   of make chaos: BROKER is embedded, apache or cluster   (7, 5, embedded)
#   TEST_JOBS    how many files of tests run at once, each with servers of its own    (3)
#   DEMO_ARGS, BENCH_ARGS, CHAOS_ARGS, PYTEST_ARGS   passed through

PYTHON ?= python3.11
VENV ?= .venv
TORCH_INDEX ?=
PIP_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
SEED ?= 7
MINUTES ?= 5
BROKER ?= embedded
CHAOS_ARGS ?=
PYTEST_ARGS ?=
TEST_JOBS ?= 3

KAFKA_BESIDE := $(wildcard ../shared/kafka)
KAFKA_HOME ?= $(abspath $(KAFKA_BESIDE))
ifneq ($(KAFKA_HOME),)
KAFKA_JARS := $(wildcard $(KAFKA_HOME)/libs/kafka_*.jar)
endif

BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
REPORTS := out/tests
FAULT_REPORTS := out/faults
# Brokers of tests live too short for the optimising compiler to pay.
APACHE := RERANK_TEST_BROKER=apache KAFKA_HOME='$(KAFKA_HOME)' \
    KAFKA_JVM_PERFORMANCE_OPTS='-XX:TieredStopAtLevel=1 -XX:+UseSerialGC'
# The integration tests mostly wait for servers. A file stays in one process, in the order of names: a long one begins early.
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-kafka faults integration replay bench chaos check format lint types arch up clean

help: ## Show this list
	@echo "stream-rerank: a click is in the user's next list. First: make demo, then: make test"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@sed -n '/^# Variables/,/^$$/ s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# ---- set up ----------------------------------------------------------------------------------------------------

setup: $(STAMP) ## Make .venv and install everything, pinned; quick when nothing changed

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch
endif
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[local,train,dev]'
	touch $@

# ---- see it work -----------------------------------------------------------------------------------------------

demo: $(STAMP) ## Train, start a broker, Redis and a worker, replay real data, print what updating is worth
	$(BIN)/rerank demo $(DEMO_ARGS)

up: $(STAMP) ## Run a broker and a Redis on this machine until Ctrl-C
	$(BIN)/rerank up

bench: $(STAMP) ## Measure against a plain Faust application
	$(BIN)/python -m tests.bench.bench_throughput $(BENCH_ARGS)

chaos: $(STAMP) ## Break broker, Redis and workers at random under load, heal, compare with the oracle
	KAFKA_HOME='$(KAFKA_HOME)' $(BIN)/rerank chaos --seed $(SEED) --minutes $(MINUTES) --broker $(BROKER) $(CHAOS_ARGS)

# ---- tests -----------------------------------------------------------------------------------------------------

test: $(STAMP) ## Run every test; integration tests on the embedded broker, then again on Apache Kafka
	rm -rf $(REPORTS)
	$(PYTEST) -m "not kafka" --junit-xml=$(REPORTS)/embedded.xml $(PYTEST_ARGS)
ifneq ($(KAFKA_JARS),)
	@$(MAKE) --no-print-directory test-kafka
else
	@echo "skipped: the integration tests on Apache Kafka; KAFKA_HOME='$(KAFKA_HOME)' holds no libs/kafka_*.jar;" \
	      "set KAFKA_HOME to a folder with Apache Kafka 4.x to run them"
endif

test-kafka: $(STAMP) ## Run the integration tests on Apache Kafka from KAFKA_HOME
	$(APACHE) $(PYTEST) tests/integration --junit-xml=$(REPORTS)/apache.xml $(PYTEST_ARGS)

faults: $(STAMP) ## Run the tests of the fault matrix and write docs/faults.md from what came of them
	rm -rf $(FAULT_REPORTS)
	-$(PYTEST) -m "not kafka" -k "$$($(BIN)/python -m tests.fault_table select)" \
	    --junit-xml=$(FAULT_REPORTS)/embedded.xml $(PYTEST_ARGS)
ifneq ($(KAFKA_JARS),)
	-$(APACHE) $(PYTEST) tests/integration \
	    -k "$$($(BIN)/python -m tests.fault_table select)" --junit-xml=$(FAULT_REPORTS)/apache.xml $(PYTEST_ARGS)
endif
	$(BIN)/python -m tests.fault_table write docs/faults.md $(FAULT_REPORTS)/*.xml

integration: $(STAMP) ## Run the tests that start a real broker and a real Redis, on the embedded broker
	$(PYTEST) -m "integration and not kafka" $(PYTEST_ARGS)

replay: $(STAMP) ## Run the tests that replay recorded logs
	$(PYTEST) tests/replay $(PYTEST_ARGS)

# ---- what CI asks ----------------------------------------------------------------------------------------------

check: lint types arch ## Run lint, types and arch

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) ## mypy --strict over everything
	$(BIN)/mypy

arch: $(STAMP) ## import-linter: who may import whom
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## Sort imports, format
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

clean: ## Remove what was built and cached; .venv and artefacts stay
	rm -rf out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
