# Two commands matter: `make demo` and `make test`. Both make .venv on first use.
#
#   make demo [DATA=path/to/criteo.tsv.xz]   sharded DLRM against ROBE: table, report page, TensorBoard
#   make bench-methods DATA=path/to/movielens
#                                            every method at 10x, 100x and 1000x on MovieLens: table, page
#   make microbench [GRID=paper]             kernels against FBGEMM's and PyTorch's: tables, page; 10 minutes
#   make table1, table3, table4, fig1, placement [DATA=...] [SCALE=...] [TARGET=.75]
#                                            the papers' experiments in miniature, or on your data: tables, page
#   make fig2a, make fig2b                   Figure 2 of the PSS paper: inference by phase, training over compression
#   make validate-timing                     proofs that communication and computing are measured rightly
#   make netlab                              sharded tables against ROBE over emulated networks: root, Linux
#   make project                             the same projected to clusters of GPUs
#   make test [PROCESSES=2]                  every test, so many files at a time
#   make test-slurm                          the jobs on a real Slurm made for it: root, Debian packages; 2 minutes
#   make docs                                the tables of README and docs from docs/results
#   make lint                                ruff and pyright
#   make tensorboard                         the runs in a browser
#
# DEVICE=cpu|cuda overrides the choice, which is cuda where nvidia-smi lists a device.
# PYTHON=python3.12 chooses the interpreter, at least 3.11.

PYTHON ?= python3
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
VENV := .venv
BIN := $(VENV)/bin
PROCESSES ?= 2
INSTALLED := $(VENV)/installed-$(DEVICE)

.PHONY: demo bench-methods microbench table1 table3 table4 fig1 placement fig2a fig2b validate-timing netlab project test test-slurm lint docs tensorboard clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python -m launch.demo --device $(DEVICE) $(if $(DATA),--data $(DATA))

bench-methods: $(INSTALLED)
	$(BIN)/python -m launch.study methods run.device=$(DEVICE) $(if $(DATA),--data $(DATA)) $(if $(RATES),--rates $(RATES))

microbench: $(INSTALLED)
	$(BIN)/python -m launch.microbench --device $(DEVICE) $(if $(GRID),--grid $(GRID))

table1 table3 table4 fig1 placement: $(INSTALLED)
	$(BIN)/python -m launch.study $@ run.device=$(DEVICE) $(if $(DATA),--data $(DATA)) $(if $(SCALE),--scale $(SCALE)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(TARGET),--target $(TARGET))

fig2a fig2b: fig2%: $(INSTALLED)
	$(BIN)/python -m launch.figure2 $*

validate-timing: $(INSTALLED)
	$(BIN)/python -m launch.validate_timing

netlab: $(INSTALLED)
	$(BIN)/python -m launch.netlab

project: $(INSTALLED)
	$(BIN)/python -m launch.project $(wildcard runs/netlab/crossover.json)

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile

test-slurm: $(INSTALLED)
	PSS_BENCH_SLURM=1 $(BIN)/python -m pytest -rs tests/launch/test_slurm.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(INSTALLED)
	$(BIN)/python -m launch.docs

tensorboard: $(INSTALLED)
	$(BIN)/tensorboard --logdir runs

# The one place where CPU and CUDA part (the pins are in pyproject.toml). On a CPU machine "torch==...+cpu" can only be
# the build without CUDA; where pip's index does not hold that build, and the default index does not, uv fetches it from
# where PyTorch publishes it. Then what comes alone: torchrec's requirement on the CUDA package would overwrite the CPU one.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} is too old: 3.11 or newer is needed, set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[$(DEVICE),dev]' || { test $(DEVICE) = cpu \
	  && $(BIN)/python -m pip install --quiet uv \
	  && $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu --editable '.[cpu,dev]'; }
	$(BIN)/python -m pip install --quiet --no-deps --group torchrec --group hta
	rm -f $(VENV)/installed-*
	touch $@

clean:
	rm -rf $(VENV) runs .cache
