# make demo    watch the embedded model write, in a light environment
# make test    the whole suite, with every backend that this machine can run
# make lint types wheel clean
# make triton-next    a newer Triton, with which the tests compile what is Blackwell's, too
#
# One virtual environment in two strengths: each stamp stands for one `pip install`, and both are redone
# when pyproject.toml changes. `demo` leaves out PyTorch, which is most of the download.

PYTHON ?= python3
# Installed before everything else, so that the range in the `cuda` extra is met and nothing resolves
# PyTorch a second time. Name a path or a local version to take another build.
TORCH ?= torch==2.13.0

# Its assembler knows Blackwell's own conversions. Compiled with, never run: nothing else imports it.
TRITON_NEXT ?= triton==3.9.0

VENV := .venv
BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/demo.stamp
TEST_STAMP := $(VENV)/test.stamp

# macOS has its backend in the base install; elsewhere MLX's CPU build is an extra.
ifeq ($(shell uname -s),Darwin)
DEMO_EXTRAS :=
else
DEMO_EXTRAS := [mlx]
endif

DEMO_PROMPT ?= Reverse "diffusion".
DEMO_FLAGS ?= --live
export DEMO_PROMPT
# Two workers; the tests of a file stay together, as they share what is slow to make.
PYTEST_FLAGS ?= -n 2 --dist loadfile

PACKAGES := dgemma,dgemma_convert,dgemma_mlx,dgemma_cuda
SMOKE := build/smoke
NO_FRAMEWORK := import importlib.util as u, sys; \
	came = [m for m in ("torch", "mlx") if u.find_spec(m) and (m, sys.platform) != ("mlx", "darwin")]; \
	assert not came, f"the base install brought {came}"

.PHONY: help demo test lint types wheel triton-next clean
.NOTPARALLEL:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(DEMO_STAMP)
	$(BIN)/python -m dgemma_mlx.generate $(DEMO_FLAGS) --prompt "$$DEMO_PROMPT"

test: $(TEST_STAMP)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TEST_STAMP)
	$(BIN)/mypy

# What a user installs, tried where neither the repository nor a framework can stand in for what the
# wheel lacks: a fresh environment, and a folder that is not this one.
wheel: $(TEST_STAMP)
	rm -rf dist $(SMOKE)
	$(BIN)/python -m build --wheel --outdir dist
	$(BIN)/check-wheel-contents --toplevel $(PACKAGES) dist
	$(PYTHON) -m venv $(SMOKE)
	$(SMOKE)/bin/pip install --quiet dist/*.whl
	cd $(SMOKE) && bin/python -c '$(NO_FRAMEWORK)'
	cd $(SMOKE) && bin/dgemma --help
	cd $(SMOKE) && bin/dgemma generate --backend numpy --prompt "$$DEMO_PROMPT"

# Where Triton has wheels; elsewhere the tests that need it say that it is not there.
ifeq ($(shell uname -sm),Linux x86_64)
triton-next: $(VENV)/triton-next
endif

$(VENV)/triton-next: | $(TEST_STAMP)
	rm -rf $@.part
	$(BIN)/pip install --quiet --no-deps --target $@.part '$(TRITON_NEXT)'
	mv $@.part $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A folder that exists already is brought up to date, not emptied: the other stamp stays true enough
# until its own turn.
$(DEMO_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.$(DEMO_EXTRAS)'
	touch $@

$(TEST_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[mlx,cuda,test,dev]'
	touch $@
