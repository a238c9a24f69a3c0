# make demo   trains a small model through the compiler and checks it   (about two minutes on two cores)
# make test   runs every test that this machine can run
# make lint   ruff and mypy
# make clean  removes the environment and what the tools cached
#
# Each target makes .venv and installs what it needs; a second run installs nothing. No GPU is needed.
#
# The default torch is pinned, so that every checkout tests the same thing. Another one:
#   make test TORCH=torch==2.15.0

PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
# A CPU build of torch does not bring Triton, whose interpreter and compiler the tests use: 3.7 belongs to torch
# 2.13. For any other torch, torch's own pin and the range in pyproject.toml decide.
TRITON  ?= $(if $(filter torch==2.13.0,$(TORCH)),"triton==3.7.*")
WORKERS ?= 2

BIN    := $(VENV)/bin
STAMPS := $(VENV)/.installed

# One thread a worker: on two cores, more threads only wait for one another.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
PYTEST   := $(BIN)/python -m pytest -n $(WORKERS) --timeout 900

# Threads that spin while they wait made a step 7 times slower on two busy cores (3.0 s; 0.43 s when they sleep).
# torch warns when numpy is not installed, and the demo does not need it.
DEMO_ENV := OMP_WAIT_POLICY=passive PYTHONWARNINGS='ignore:Failed to initialize NumPy:UserWarning'

.PHONY: demo test lint clean force

demo: $(STAMPS)/package
	@$(DEMO_ENV) $(BIN)/python -m tools.demo

# Triton reads TRITON_INTERPRET when a kernel is defined, so one process either interprets kernels or compiles
# them: two runs, and make fails if either did.
test: $(STAMPS)/test
	@status=0; \
	$(TEST_ENV) TRITON_INTERPRET=1 $(PYTEST) tests/interpreter || status=$$?; \
	$(TEST_ENV) $(PYTEST) tests --ignore tests/interpreter || status=$$?; \
	exit $$status

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache

# Rewritten only when the wanted versions change, so that a stamp is out of date exactly then.
$(STAMPS)/wanted: force
	@[ -x $(BIN)/pip ] || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@mkdir -p $(STAMPS)
	@echo '$(TORCH) $(TRITON)' | cmp -s - $@ || echo '$(TORCH) $(TRITON)' > $@

$(STAMPS)/torch: $(STAMPS)/wanted
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(STAMPS)/package: $(STAMPS)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e . "$(TORCH)"
	@touch $@

$(STAMPS)/test: $(STAMPS)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test]' "$(TORCH)" $(TRITON)
	@touch $@ $(STAMPS)/package

$(STAMPS)/dev: $(STAMPS)/test pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test,dev]' "$(TORCH)" $(TRITON)
	@touch $@ $(STAMPS)/package $(STAMPS)/test
