# Needs Python (>= 3.10) and make. Everything is installed into .venv, in the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

SECONDS ?= 600
SEED ?= 0

.PHONY: demo test lint fuzz families card constraints clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
# mypy checks the package as it is installed, with callbacks and model_cards inside it, and the tests' shared code.
	rm -rf build/typed && mkdir -p build/typed/neuromerge_hf
	ln -s $(addprefix $(CURDIR)/,$(wildcard neuromerge_hf/*) callbacks model_cards) build/typed/neuromerge_hf
	$(BIN)/mypy build/typed/neuromerge_hf tests/support tests/typing tests/conftest.py tests/*/conftest.py

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

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo,fast,lightning]'
	touch $@
