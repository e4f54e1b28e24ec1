# The first of these makes the environment (.venv) and builds kdfast in it; after that only what changed is built again.
#   make demo [QUICK=1] [FULL=1]   distil a teacher into half its layers on real data, of which a thousand rows have labels (in
#                          three to five minutes on 2 cores, behind the environment's three); FULL=1: on the labels of all;
#                          QUICK=1: a short run of that
#   make test [ARGS=...]   run all tests; ARGS goes to pytest
#   make gpu [OUT=folder] [STAGES="smoke tests …"] [ONLY=name]   build for the GPU at hand, show that kdfast is right and how
#                          fast it is, in some eight minutes (docs/gpu.md); downloads nothing
#   make gpu-library [ARCHITECTURE=90a-real]   the library for that GPU, built without one and brought along
#   make packages [LOCAL=+cu130] [TORCH="2.10.0 2.14.1"]   source distribution and wheel in dist/, checked and used in a
#                          fresh environment, and in one for each release of torch that is named
#   make docs              the documentation as a site, in build/site
#   make lint, make format check, and mend, the form of the code
#   make clean             remove the environment and everything built; trained models in runs/ stay
# PYTHON= names the interpreter (default python3); tools/environment.sh tells the rest.
.PHONY: help environment demo test gpu gpu-library packages docs lint format clean

# Threads that wait give up their core after a while: at once, small matrix products wait to be woken; never, training
# beside another job is many times slower.
export GOMP_SPINCOUNT ?= 100000

PY := .venv/bin/python
# Not .venv/bin/clang-format: where the interpreter brings its own packages, theirs have no program there.
CLANG_FORMAT := $(PY) -c 'import clang_format; clang_format.clang_format()'
NATIVE = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# After eight epochs the loss of the student on the labels alone is 0: benchmarks/recipes.py has twice as many, for nothing.
FEW = --train-rows 1000 --unlabeled movie_reviews --teacher-epochs 4 --epochs 2 --baseline-epochs 8 --output runs/few-labels

help:
	@sed -n 's/^#   //p' Makefile

environment:
	@tools/environment.sh

demo: environment
	.venv/bin/kdfast distill hinton $(if $(QUICK),--quick --output runs/hinton-quick,$(if $(FULL),--output runs/hinton,$(FEW)))

# As many processes as cores: their threads must not wait for one another.
test: environment
	OMP_NUM_THREADS=2 GOMP_SPINCOUNT=1000 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile -p no:benchmark $(ARGS)

gpu:
	@OUT="$(OUT)" STAGES="$(STAGES)" ONLY="$(ONLY)" WHEELS="$(WHEELS)" tools/gpu.sh

gpu-library: environment
	@ARCHITECTURE="$(ARCHITECTURE)" JOBS="$(JOBS)" tools/gpu_library.sh

packages: environment
	@LOCAL="$(LOCAL)" TORCH="$(TORCH)" tools/packages.sh

docs: environment
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo build/site/index.html

lint: environment
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(NATIVE)

format: environment
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(NATIVE)

clean:
	rm -rf .venv build gpu-library dist *.egg-info kdfast/*.so .mypy_cache .ruff_cache .pytest_cache
	find kdfast tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
