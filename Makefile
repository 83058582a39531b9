# Needs Python (>= 3.10) and make. Everything is installed into .venv, in the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test lint families card constraints clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
# mypy sees the package as it is installed: callbacks and model_cards inside it.
	rm -rf build/typed && mkdir -p build/typed/neuromerge_hf
	ln -s $(addprefix $(CURDIR)/,$(wildcard neuromerge_hf/*) callbacks model_cards) build/typed/neuromerge_hf
	$(BIN)/mypy build/typed/neuromerge_hf

# docs/families.md
families: $(VENV)/.test
	$(BIN)/python tests/support/make_families_table.py

# model_cards/example.md, after `examples/demo.py --results examples/results.json` where the measurements have changed
card: $(VENV)/.test
	$(BIN)/python tests/support/make_example_card.py

# The versions that are installed now. All but torch are for Python >= 3.11: some have no release for 3.10, where pip
# is left to choose.
constraints: $(VENV)/.test
	grep '^#' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip freeze --exclude-editable | sed -e 's/+cpu$$//' -e '/^nvidia-\|^cuda-\|^triton=/d' \
	  -e '/^torch=/!s/$$/ ; python_version >= "3.11"/' >> $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and alone, so that an interrupted install need not fetch it again.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo,lightning]'
	touch $@
