# demo, test and lint install what they need into .venv, again only when pyproject.toml or constraints.txt changed.
# gpu-demo, gpu-test and bench use the current Python: a GPU machine has its own torch, triton and vLLM.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# One release of torch for every machine: PyPI's wheel has CUDA (gigabytes), a CPU wheel serves as well.
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
# value of attn_implementation in the demos; "path" stands for the absolute path of triton_attention_sink_hf
ATTN ?= triton_attention_sink
STEPS ?= 3
# ranks that share every row of the demos (Ulysses sequence parallelism)
SP ?= 1
# models of gpu-demo
MODEL ?= gpt_oss llama
PYTEST_ARGS ?=
BENCH_ARGS ?=

PIP_LOG := $(VENV)/install.log
PIP_INSTALL = $(VENV)/bin/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

# trainers of `make hosts`, all by default, and the folder of their environments
HOSTS ?=
HOST_ENVIRONMENTS ?= .venv-hosts

# checkouts of peer-tests, any of them, and options of tests/peers/run.py
FLASH_ATTENTION ?=
FLA ?=
TRANSFORMERS ?=
PEER_ARGS ?=

.PHONY: help demo test nightly arch-table hosts peer-tests lint gpu-demo gpu-test bench clean
help:
	@echo "make demo      verl's trainer with this attention, by one config line (2 minutes; ATTN=name|path, STEPS=3, SP=1|2)"
	@echo "make test      all tests that need no GPU"
	@echo "make nightly   and what make test samples: every kernel on every architecture, thousands of random calls (hours)"
	@echo "make arch-table  registers, spills and shared memory of every kernel on every architecture (half an hour a Triton)"
	@echo "make hosts     other trainers with this attention, each in an environment of its own (40 minutes; HOSTS=\"TRL Axolotl\")"
	@echo "make peer-tests  other packages' test suites against this one (FLASH_ATTENTION=, FLA=, TRANSFORMERS=checkout, PEER_ARGS=)"
	@echo "make lint      ruff check and ruff format --check"
	@echo "make gpu-demo  verl's trainer with vLLM on a GPU, against eager (10 minutes; MODEL=\"gpt_oss llama\", ATTN, STEPS, SP)"
	@echo "make gpu-test  the tests that need a GPU, with the current Python (PYTEST_ARGS=\"-n 8 --dist loadgroup\" in parallel)"
	@echo "make bench     benchmark on this machine's GPU, with the current Python"
	@echo "make clean     remove .venv and the outputs"

demo: $(VENV)/installed
	@$(VENV)/bin/python examples/verl/demo/demo.py --attn "$(ATTN)" --steps $(STEPS) --sp "$(SP)"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests -m "not gpu and not exhaustive" -n 2 --dist loadgroup -rs $(PYTEST_ARGS)

nightly: test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests -m "exhaustive and not gpu" -n 2 --dist loadgroup -rs $(PYTEST_ARGS)

arch-table: $(VENV)/installed
	$(VENV)/bin/python benchmarks/architectures.py

hosts:
	$(PYTHON) tests/hosts/run.py $(HOSTS) --environments $(HOST_ENVIRONMENTS)

peer-tests:
	$(PYTHON) tests/peers/run.py $(if $(FLASH_ATTENTION),--flash-attention $(FLASH_ATTENTION)) $(if $(FLA),--fla $(FLA)) \
	  $(if $(TRANSFORMERS),--transformers $(TRANSFORMERS)) $(PEER_ARGS)

lint: $(VENV)/ruff
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

gpu-demo:
	@$(PYTHON) examples/verl/demo/gpu_demo.py --model $(MODEL) --attn $(ATTN) --steps $(STEPS) --sp $(SP)

gpu-test:
	$(PYTHON) -m pytest tests -m gpu $(PYTEST_ARGS)

bench:
	$(PYTHON) -c "from triton_attention_sink_hf.cli import main; main()" bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(HOST_ENVIRONMENTS) outputs

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/ruff: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(PIP_INSTALL) "ruff>=0.8" > $(PIP_LOG) 2>&1 || { tail -n 30 $(PIP_LOG); exit 1; }
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing torch, verl and this package into $(VENV) (2 to 3 minutes the first time; log: $(PIP_LOG))"
	@$(PIP_INSTALL) $(TORCH) -e ".[hf,verl,bench,test]" > $(PIP_LOG) 2>&1 || { tail -n 30 $(PIP_LOG); exit 1; }
	@# apart from the rest: where TRL 1.16 can be imported, verl 0.9.1's actor imports a class that it no longer has
	@$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/trl trl >> $(PIP_LOG) 2>&1 || { tail -n 30 $(PIP_LOG); exit 1; }
	@# apart, too: transformers behaves otherwise where kernels can be imported
	@$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/kernels kernels kernels-data tomlkit >> $(PIP_LOG) 2>&1 || { tail -n 30 $(PIP_LOG); exit 1; }
	@touch $@
