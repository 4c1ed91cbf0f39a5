# make setup | demo | demo-scenes | demo-emoji | science | test | test-page | test-all | lint        PYTHON=... uses that Python's environment as it is, without .venv
VENV := .venv
PYTHON ?= $(VENV)/bin/python
BASE_PYTHON ?= python3
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/.ready)

.PHONY: setup demo demo-scenes demo-emoji science test test-page test-all lint
setup: $(READY)

$(VENV)/.ready: pyproject.toml
	@echo "installing into $(VENV): about 6 GB on Linux, two to five minutes"
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python $(BASE_PYTHON) $(VENV) && uv pip install --python $(VENV)/bin/python ".[demo,dev]"; \
	else \
		$(BASE_PYTHON) -m venv $(VENV) && $(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off ".[demo,dev]"; \
	fi
	@rm -rf build *.egg-info
	@touch $@

# LLM=llm-jp/llm-jp-3-150m draws with a real language model instead of the small one trained here.
demo: $(READY)
	$(PYTHON) -m demo.run digits $(if $(LLM),--llm $(LLM))

demo-scenes: $(READY)
	$(PYTHON) -m demo.run scenes $(if $(LLM),--llm $(LLM))

demo-emoji: $(READY)
	$(PYTHON) -m demo.run emoji $(if $(LLM),--llm $(LLM))

# The paper's two small experiments, short; all of them: make science FULL=1, which goes on where it was stopped.
science: $(READY)
	$(PYTHON) -m benchmarks.science $(if $(FULL),--full)

test: $(READY)
	$(PYTHON) -m pytest

# The page in a real browser, Debian's chromium.
test-page: $(READY)
	@if ! command -v chromium >/dev/null; then \
		if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
			echo "error: make test-page needs chromium: sudo apt-get install chromium fonts-noto-cjk" >&2; exit 1; \
		fi; \
		apt-get update -qq && apt-get install -y -qq chromium fonts-noto-cjk >/dev/null; \
	fi
	$(PYTHON) -m pytest -m page -n 0 tests/test_page.py

# Many more fuzzed inputs, and runs killed at random moments.
test-all: $(READY)
	FUZZ_EXAMPLES=2000 $(PYTHON) -m pytest -m "not page"

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
