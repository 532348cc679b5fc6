# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs on a fresh machine; a second run starts at once.
#
#   make demo        see it work (CPU or GPU)
#   make test        build, then the C++ and Python tests
#   make gpu-check   on a GPU machine: build in place, tests, sanitizer, benchmarks -> bench/results
#   make bench       benchmarks only, printed
#   make lint        formatting and style, changing nothing;  make format applies it
#   make wheel       dist/*.whl
#   make sdist       dist/*.tar.gz, and a wheel without CUDA kernels made of it, in dist/of_sdist
#   make clean       remove everything built, the virtual environment too
#
# PYTHON (python3), VENV (.venv), TORCH_SPEC (tools/setup_env.sh), SEER_ARCHS, SEER_CUDA, MAX_JOBS
# and CMAKE_ARGS (setup.py) are taken from the command line or the environment.
PYTHON ?= python3
VENV ?= .venv
export PYTHON TORCH_SPEC SEER_ARCHS SEER_CUDA MAX_JOBS CMAKE_ARGS

python := $(VENV)/bin/python
# The build tools of the environment come first.
in_venv := PATH="$(abspath $(VENV))/bin:$$PATH"
pip_install := $(in_venv) $(python) -m pip --disable-pip-version-check install --quiet

native := $(shell find csrc cmake bench/cpp examples -type f ! -name '*.pyc') CMakeLists.txt setup.py pyproject.toml
python_code := seer_cuda python_tests bench tools cmake examples setup.py
cpp_code := $(shell find csrc bench examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test gpu-check bench lint format wheel sdist clean
.DELETE_ON_ERROR:

demo: $(VENV)/.stamp-demo
	$(python) -m seer_cuda demo

test: $(VENV)/.stamp-test
	ctest --test-dir "$$($(python) tools/build_dir.py)" --output-on-failure --no-tests=error
	$(python) -m pytest

# The machine's own python3 is used as it is when it can build and test on its GPU: a CUDA
# container needs no second torch and no network. Otherwise the environment of `make test` is.
# Looked up when first used, then kept: the look imports torch.
gpu_python = $(eval gpu_python := $(shell $(PYTHON) tools/build_dir.py --ready \
	&& command -v $(PYTHON) || echo $(abspath $(python))))$(gpu_python)

gpu-check: in-place
	$(gpu_python) -m bench.record --sanitize

bench: in-place
	$(gpu_python) -m bench.record --no-tests

.PHONY: in-place own-python
in-place:
	$(MAKE) --no-print-directory \
	  $(if $(filter $(abspath $(python)),$(gpu_python)),$(VENV)/.stamp-test,own-python)

own-python: build = $(shell $(PYTHON) tools/build_dir.py)
own-python:
	cmake -S . -B $(build) -G Ninja -DPython_EXECUTABLE="$(gpu_python)" \
	  -DSEER_ARCHS="$(or $(SEER_ARCHS),80;90a)" -DSEER_CUDA="$(or $(SEER_CUDA),AUTO)" \
	  -DSEER_TORCH=ON -DSEER_PYTHON=ON $(CMAKE_ARGS)
	cmake --build $(build) $(if $(MAX_JOBS),-j$(MAX_JOBS))
	cmake --install $(build) --prefix .

lint: $(VENV)/.stamp-dev
	@set -x; bad=0; \
	$(VENV)/bin/ruff check $(python_code) || bad=1; \
	$(VENV)/bin/ruff format --check $(python_code) || bad=1; \
	$(VENV)/bin/clang-format --dry-run --Werror $(cpp_code) || bad=1; \
	$(python) tools/check_dependencies.py || bad=1; \
	exit $$bad

format: $(VENV)/.stamp-dev
	$(VENV)/bin/ruff check --fix $(python_code)
	$(VENV)/bin/ruff format $(python_code)
	$(VENV)/bin/clang-format -i $(cpp_code)

wheel: $(VENV)/.stamp-base
	rm -rf build/lib.* build/bdist.*
	$(in_venv) $(python) -m pip wheel --no-build-isolation --no-deps -w dist .

sdist: $(VENV)/.stamp-base
	rm -rf dist/*.tar.gz dist/of_sdist
	$(in_venv) PYTHONPATH=cmake $(python) -c \
	  "import build_backend; build_backend.build_sdist('dist')" > /dev/null
	$(in_venv) SEER_CUDA=OFF $(python) -m pip wheel --quiet --no-build-isolation --no-deps \
	  -w dist/of_sdist dist/*.tar.gz

clean:
	rm -rf build dist *.egg-info "$(VENV)"
	rm -f seer_cuda/*.so

# Stamps. The package is installed editable: tests, demo and benchmarks see the tree as it is, and
# only a change of native code builds again.
$(VENV)/.stamp-base: tools/setup_env.sh tools/build_requirements.py \
    cmake/build_backend.py pyproject.toml
	tools/setup_env.sh "$(VENV)"
	touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-base $(native)
	@echo "== building the package and its tests (compiling the kernels takes minutes)"
	CMAKE_ARGS="-DSEER_TESTS=ON -DSEER_BENCH=AUTO $$CMAKE_ARGS" $(pip_install) --no-build-isolation -e '.[test]'
	@cat "$$($(python) tools/build_dir.py)/summary.txt"
	touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-base $(native)
	@echo "== building the package (compiling the kernels takes minutes)"
	$(pip_install) --no-build-isolation -e '.[demo]'
	@cat "$$($(python) tools/build_dir.py)/summary.txt"
	touch $@

# The tools alone: style is checked without building anything.
$(VENV)/.stamp-dev: $(VENV)/.stamp-base
	$(python) tools/build_requirements.py --dev > $(VENV)/dev-requirements.txt
	$(pip_install) -r $(VENV)/dev-requirements.txt
	touch $@
