# The commands of the README. The environment is made from hashed locks on first use.
PYTHON ?= python3
# The software stack: torch-2.6, or torch-2.11 for Blackwell and newer GPUs, in an environment of its own.
STACK ?= torch-2.6
VENV := $(if $(filter torch-2.6,$(STACK)),.venv,.venv-$(STACK))
BIN := $(VENV)/bin
# Processes that share the tests: one has those with containers. Each may take 6 GB; JOBS=0 is a run without any.
JOBS ?= 2
DOCKER ?= docker
TAG ?= chatterbox:warm
LOCKS := build/locks/$(STACK).txt build/locks/dev.txt
export PYTHONPATH := $(CURDIR)

CHECKS := .venv-checks
RAY := .venv-ray

.PHONY: demo test lint format checks ray image bench lock clean

demo: $(VENV)/.complete  ## bake, pack, prove and serve on this machine, with random weights
	$(BIN)/python -m chatterbox_prewarm.bench.demo

test: $(VENV)/.complete  ## every test that this machine can run; each skipped one says what it lacks
	PATH="$$PATH:$(CURDIR)/$(CHECKS)/bin" OMP_WAIT_POLICY=passive $(BIN)/python -m pytest \
	    -n $(JOBS) --no-loadscope-reorder

lint: $(VENV)/.complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

checks: $(CHECKS)/.complete  ## hadolint for the Dockerfile; checkov, an environment of its own, for tests/kube
	$(CHECKS)/bin/hadolint Dockerfile

ray: $(RAY)/.complete  ## Ray, beside the environment of the tests, for docs/examples/ray_serve_app.py

format: $(VENV)/.complete
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

image:  ## needs network, or a base image made by build/base-image; pass BUILD_ARGS="--build-arg WEIGHTS=synthetic"
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD_ARGS) -t $(TAG) .

bench: $(VENV)/.complete  ## needs out/ from `make demo`
	$(BIN)/python -m chatterbox_prewarm bench startup --weights out/weights-full --warm out/warm-full \
	    --output benchmarks/results/startup-cpu.json --rounds 3 --cold-pages

# Ray 2.55 calls what protobuf 7 dropped; a newer Ray brings a numpy that torch's packages here do not know.
lock:  ## renew the locks; commit what changes
	uv pip compile -q --python-version 3.11 --extra model --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --no-header --constraint build/locks/torch-2.6.in pyproject.toml -o build/locks/torch-2.6.txt
	uv pip compile -q --python-version 3.11 --extra model --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --no-header --override build/locks/torch-2.11.in pyproject.toml -o build/locks/torch-2.11.txt
	uv pip compile -q --python-version 3.11 --extra dev --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --no-header --constraint build/locks/torch-2.6.txt pyproject.toml -o build/locks/dev.txt
	printf 'checkov\nhadolint-bin\n' | uv pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-emit-find-links --no-header - -o build/locks/checks.txt
	constraints=$$(mktemp) && grep -ho '^[a-z0-9._-]*==[^ ]*' build/locks/torch-2.6.txt build/locks/dev.txt | \
	    grep -v '^protobuf==' | sort -u >"$$constraints" && printf 'ray[serve]\nprotobuf<7\n' | \
	    uv pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header \
	    --constraint "$$constraints" - -o build/locks/ray.txt && rm "$$constraints"
	echo uv | uv pip compile -q --generate-hashes --no-emit-index-url --no-header - -o build/locks/uv.txt

# Made anew whenever a lock changes; `build/sync` is what the image uses as well. All bytecode is made at once: where
# PYTHONDONTWRITEBYTECODE is set, every process would compile what it imports anew, for six seconds.
$(VENV)/.complete: $(LOCKS) build/locks/uv.txt build/sync
	rm -rf $(VENV)
	UV_LINK_MODE=hardlink sh build/sync build/locks/uv.txt $(LOCKS) $(VENV)
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib
	touch $@

$(CHECKS)/.complete: build/locks/checks.txt build/locks/uv.txt build/sync
	rm -rf $(CHECKS)
	UV_LINK_MODE=hardlink sh build/sync build/locks/uv.txt build/locks/checks.txt $(CHECKS)
	touch $@

# What Ray does not bring comes from the environment of the tests. Not the other way round: it has uvloop and httptools,
# which uvicorn prefers where they are, and no image has them.
$(RAY)/.complete: build/locks/ray.txt build/locks/uv.txt build/sync $(VENV)/.complete
	rm -rf $(RAY)
	UV_LINK_MODE=hardlink sh build/sync build/locks/uv.txt build/locks/ray.txt $(RAY)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	    >"$$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/tests.pth"
	$(RAY)/bin/python -m compileall -q -j 0 $(RAY)/lib
	touch $@

clean:
	rm -rf dist out
