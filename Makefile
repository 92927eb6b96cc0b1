# make explain                        why does the model say " Mary"? writes out/report.html
# make explain PROMPT='...' ANSWER=word FOIL=word MODEL=name-or-folder OUT=file.html
# make new KEY=... [SPEC=file] [METHOD=ROOM.NAME]   the files of a new paper, begun from the ledger and its specification
# make pages                          the generated pages of the papers, and the table in README
# make setup | test | test-changed | test-all | check | clean   each verb prepares what it needs; Python 3.11+ is all that must be there

PYTHON ?= python3
BIN    := .venv/bin
.PHONY: help setup fetch explain test test-all test-changed bench lint check clean pages families new changes

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

setup: .venv/ready
.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11+ is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

# The real models, once for this user. The warning: the package imports the module that -m then runs.
fetch: setup
	@$(BIN)/python -W ignore::RuntimeWarning -m stratoscope.store.pretrained smollm2 minilm

# What people type may hold quotes and $: it travels in the environment, read neither by make nor by the shell.
# make strips the leading space of ANSWER=' Mary', and a word that continues a prompt has one: it is put back.
# For an answer without it, set the variable before the command: PROMPT=... ANSWER=ing make explain
space := $(subst x,,x x)
typed  = $(if $(filter command,$(firstword $(origin $1))),$(if $(value $1),$(space)))$(value $1)
ifndef PROMPT
PROMPT := When Mary and John went to the store, John gave a drink to
ifndef ANSWER
ANSWER := $(space)Mary
endif
ifndef FOIL
FOIL   := $(space)John
endif
endif
MODEL ?= smollm2
OUT   ?= out/report.html
override ANSWER := $(call typed,ANSWER)
override FOIL   := $(call typed,FOIL)
override PROMPT := $(value PROMPT)
override MODEL  := $(value MODEL)
override OUT    := $(value OUT)
export PROMPT ANSWER FOIL MODEL OUT

explain: setup
	@mkdir -p "$$(dirname "$$OUT")"
	@$(BIN)/stratoscope explain --model="$$MODEL" --out="$$OUT" \
		$${ANSWER:+--answer="$$ANSWER"} $${FOIL:+--foil="$$FOIL"} -- "$$PROMPT"
	@printf 'The report is in %s\n' "$$OUT"

test: fetch
	$(BIN)/python -m pytest -n auto --dist worksteal
# what `make test` leaves for the night too: every family, every architecture of Transformers
test-all: fetch
	$(BIN)/python -m pytest -n auto --dist worksteal -m ''
# what a change since main can reach
test-changed: fetch
	@$(BIN)/python tests/support/changed.py | xargs -r $(BIN)/python -m pytest -n auto --dist worksteal

# The peers' newest releases beside ours, in an environment of their own (the versions that were measured).
.bench/ready: pyproject.toml
	$(PYTHON) -m venv .bench
	.bench/bin/python -m pip install --quiet torch==2.13.0
	.bench/bin/python -m pip install --quiet -e . transformers==5.23.0 transformer-lens==4.3.0 nnsight==0.8.1
	@touch $@
bench: fetch .bench/ready
	.bench/bin/python bench/sweeps.py
	$(BIN)/python bench/picture.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint test

new: setup
	@$(BIN)/python -m stratoscope.claims.skeleton '$(KEY)' $(if $(SPEC),--spec '$(SPEC)') $(if $(METHOD),--method '$(METHOD)')

changes:
	@tail -qn +1 $(filter-out changes/README.md,$(wildcard changes/*.md))

pages: setup
	@$(BIN)/python -W ignore::RuntimeWarning -m stratoscope.results.axes
	@$(BIN)/python -m stratoscope.lab.page
	@$(BIN)/python -m stratoscope.claims.pages

families: setup
	PYTHONPATH=tests $(BIN)/python -m support.families_table

clean:
	rm -rf .venv out build dist src/*.egg-info .ruff_cache .hypothesis
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
