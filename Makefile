# One verb a task; each sets up what it needs and is cheap to run again. `make` lists them.

PYTHON ?= python3
PICTURE ?= examples/pictures/cat.jpg
QUESTION ?= What is this?
export TINYALIGN_MODEL := $(CURDIR)/build/default-model

BIN := .venv/bin
MODEL := build/default-model/tinyalign.json
# a model directory is made again when one of these is newer
MODEL_SOURCES := $(wildcard training/weights/* export/*.py) \
	$(addprefix training/,modules.py parts.py vision.py lm.py gguf_reader.py gguf_tokenizer.py) \
	$(addprefix runtime/,manifest.py images.py keys.py memory_text.py prompt.py)

.PHONY: help demo test lint format bench claims-quick train clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    set up, export the default model, ask a question about a picture"
	@echo "             (PICTURE=photo.jpg QUESTION='What colour is it?' to choose both)"
	@echo "make test    set up everything and run the tests"
	@echo "make lint    check format, style and types"
	@echo "make format  put the code into the house format"
	@echo "make bench   measure the default model, beside the same pipeline in torch"
	@echo "make claims-quick"
	@echo "             one small cell of the claims table again, compared with the one that is kept"
	@echo "make train   train the default weights anew (hours; can be stopped and resumed)"
	@echo "make clean   remove the environment and all that was built"

demo: $(MODEL)
	$(BIN)/tinyalign-infer "$(PICTURE)" "$(QUESTION)"

test: .venv/.dev $(MODEL)
	$(BIN)/python -m pytest

lint: .venv/.dev build/typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addprefix -p tinyalign.,bank runtime training export)

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev $(MODEL)
	$(BIN)/python benchmarks/latency.py --torch

claims-quick: .venv/.dev
	$(BIN)/tinyalign-train --until prepare
	$(BIN)/python benchmarks/claims.py --quick

train: .venv/.dev
	$(BIN)/tinyalign-train --install

clean:
	rm -rf .venv build *.egg-info

# ---- what the verbs need

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tinyalign needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "== creating the environment .venv"
	$(PYTHON) -m venv .venv

# HNSWLIB_NO_NATIVE: hnswlib is compiled here; without it, its wheel in pip's cache could reach
# another kind of CPU and crash there.
.venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing tinyalign[$*] into .venv (the first time takes minutes, torch is large)"
	HNSWLIB_NO_NATIVE=1 $(BIN)/python -m pip install -c constraints.txt -e ".[$*]"
	@touch $@

# Any of the two environments can export.
$(MODEL): $(MODEL_SOURCES) | $(if $(wildcard .venv/.dev),,.venv/.export)
	@echo "== exporting the default model to $(@D) (about a minute)"
	$(BIN)/tinyalign-export --out $(@D)

# The folders under the names that they are installed with, for mypy.
build/typing:
	@mkdir -p $@/tinyalign
	@for name in bank runtime training export; do ln -sfn ../../../$$name $@/tinyalign/$$name; done
