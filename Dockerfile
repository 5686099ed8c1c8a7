# Chatterbox TTS with its warm state baked in.
#
#   docker build -t chatterbox:warm .
#   docker run --read-only --network none --user 12345:12345 --cap-drop ALL \
#     --tmpfs /tmp --tmpfs /var/cache/chatterbox-prewarm:exec,mode=1777 chatterbox:warm
#
# Needs BuildKit (Docker 20.10 with DOCKER_BUILDKIT=1, or newer), and no GPU: without one, what depends on a GPU is left
# out. Layers of the result, from the one that changes least: system, dependencies, weights, code, warm state.
#
# Optional secrets: ca (a PEM bundle for package indexes and the hub), pip (a pip configuration), hf_token.

ARG BASE=debian:bookworm-slim
# Where the weights come from: hub (the published ones), synthetic (random ones, whose speech is noise), or none (they
# are appended, or mounted).
ARG WEIGHTS=hub
# Where the packages come from: the stage that installs them, or an image that was made of the stage `deps` before.
ARG DEPS=packages

# ---- base: the system that everything runs on ------------------------------------------------------------------------
FROM ${BASE} AS base
# libgomp1 is what compiled regions are linked with on a CPU.
# The release of the base image pins the versions of its packages, here and below.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libgomp1 python3 \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

# ---- deps: the Python packages of one software stack, from its hashed lock -------------------------------------------
FROM base AS installed
ARG STACK=torch-2.6
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY build/sync build/locks/uv.txt build/locks/${STACK}.txt /build/
RUN --mount=type=cache,target=/var/cache/uv \
    --mount=type=secret,id=ca --mount=type=secret,id=pip \
    UV_CACHE_DIR=/var/cache/uv sh /build/sync /build/uv.txt "/build/${STACK}.txt" /opt/venv

# Without what installed them. Everything below stands on it, so that whoever names an image of it copies no gigabyte.
FROM base AS packages
COPY --from=installed /opt/venv /opt/venv

# A stage of this file, or an image that is named.
# hadolint ignore=DL3006
FROM ${DEPS} AS deps

# ---- weights: fetched at a pinned commit, or random ------------------------------------------------------------------
# Only the modules that fetch are copied, so that other changes of the code download nothing.
FROM deps AS weights-hub
ARG VARIANT=english
ARG REVISION=
# A mirror of the hub; empty for the hub itself.
ARG HF_ENDPOINT=
COPY chatterbox_prewarm/__init__.py chatterbox_prewarm/errors.py chatterbox_prewarm/version.py /build/chatterbox_prewarm/
COPY chatterbox_prewarm/system /build/chatterbox_prewarm/system
COPY chatterbox_prewarm/weights /build/chatterbox_prewarm/weights
COPY build/fetch.py /build/
# The cache mount keeps the files that are complete, for when this step broke off or has to run again.
RUN --mount=type=cache,target=/var/cache/weights,sharing=locked \
    --mount=type=secret,id=ca --mount=type=secret,id=hf_token \
    PYTHONPATH=/build python /build/fetch.py /var/cache/weights /opt/chatterbox-prewarm/weights

FROM deps AS weights-synthetic
ARG SIZE=full
COPY chatterbox_prewarm/__init__.py chatterbox_prewarm/errors.py chatterbox_prewarm/version.py /build/chatterbox_prewarm/
COPY chatterbox_prewarm/system /build/chatterbox_prewarm/system
COPY chatterbox_prewarm/weights /build/chatterbox_prewarm/weights
COPY chatterbox_prewarm/model /build/chatterbox_prewarm/model
COPY build/fetch.py /build/
RUN PYTHONPATH=/build python /build/fetch.py --synthetic "${SIZE}" /opt/chatterbox-prewarm/weights

FROM base AS weights-none
RUN mkdir -p /opt/chatterbox-prewarm/weights

# A stage of this file.
# hadolint ignore=DL3006
FROM weights-${WEIGHTS} AS weights

# ---- bake: the warm-up, on the device that is named ------------------------------------------------------------------
FROM deps AS bake
# What compiles; none of it is in the result.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev \
 && rm -rf /var/lib/apt/lists/*
# What the bake runs, and nothing that only serves: a change of the server bakes nothing.
COPY chatterbox_prewarm/__init__.py chatterbox_prewarm/errors.py chatterbox_prewarm/version.py /build/chatterbox_prewarm/
COPY chatterbox_prewarm/system /build/chatterbox_prewarm/system
COPY chatterbox_prewarm/weights /build/chatterbox_prewarm/weights
COPY chatterbox_prewarm/model /build/chatterbox_prewarm/model
COPY chatterbox_prewarm/families /build/chatterbox_prewarm/families
COPY chatterbox_prewarm/state /build/chatterbox_prewarm/state
COPY chatterbox_prewarm/start /build/chatterbox_prewarm/start
COPY chatterbox_prewarm/proof /build/chatterbox_prewarm/proof
COPY chatterbox_prewarm/bake /build/chatterbox_prewarm/bake
COPY build/bake.py /build/
ARG DEVICE=cpu
ARG LEVELS=1,2,3
ARG PROFILE=aot
ARG T3_DTYPE=float32
# The builder's GPU is not part of BuildKit's cache key: name it, so that another one bakes anew.
ARG GPU=none
ARG SOURCE_DATE_EPOCH=
# What the state's provenance says that a build cannot see: the commit of this project, the digest of BASE, the builder.
ARG SOURCE_REVISION=
ARG BASE_DIGEST=
ARG BUILDER=
RUN --mount=type=bind,from=weights,source=/opt/chatterbox-prewarm/weights,target=/opt/chatterbox-prewarm/weights \
    echo "baking for GPU: ${GPU}" \
 && CHATTERBOX_PREWARM_REVISION="${SOURCE_REVISION}" CHATTERBOX_PREWARM_BASE_DIGEST="${BASE_DIGEST}" \
    CHATTERBOX_PREWARM_BUILDER="${BUILDER}" PYTHONPATH=/build python /build/bake.py --device "${DEVICE}" \
    --levels "${LEVELS}" --profile "${PROFILE}" --t3-dtype "${T3_DTYPE}"

# ---- cold: all but the warm state ------------------------------------------------------------------------------------
FROM deps AS cold
ARG STACK=torch-2.6
ARG VARIANT=english
LABEL org.opencontainers.image.title="chatterbox-prewarm" \
      org.opencontainers.image.description="Chatterbox TTS with its warm state baked in" \
      org.opencontainers.image.licenses="MIT" \
      io.chatterbox-prewarm.variant="${VARIANT}" \
      io.chatterbox-prewarm.torch="${STACK}"
COPY --from=weights /opt/chatterbox-prewarm/weights /opt/chatterbox-prewarm/weights
COPY chatterbox_prewarm /opt/chatterbox-prewarm/app/chatterbox_prewarm
# Our own modules are not in the warm state, so that a change of them needs no bake; they are compiled here, and (-B)
# nothing of the environment is, whose files keep their time. A named volume at /data/voices takes over its rights, so that
# any user may add voices.
RUN python -B -m compileall -q /opt/chatterbox-prewarm/app \
 && mkdir -m 1777 /var/cache/chatterbox-prewarm \
 && mkdir -p /data && mkdir -m 1777 /data/voices
ENV PYTHONPATH=/opt/chatterbox-prewarm/app \
    HF_HUB_OFFLINE=1 \
    CHATTERBOX_PREWARM_HOST=0.0.0.0 \
    CHATTERBOX_PREWARM_PORT=8000
EXPOSE 8000
STOPSIGNAL SIGTERM
USER 12345:12345
ENTRYPOINT ["python", "-m", "chatterbox_prewarm"]
CMD ["serve"]

# ---- tools: cold with what compiles; `chatterbox-prewarm build` bakes in a container of it, with a GPU ---------------
FROM cold AS tools
# It bakes, and is not shipped.
# hadolint ignore=DL3002
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev \
 && rm -rf /var/lib/apt/lists/*

# ---- runtime ---------------------------------------------------------------------------------------------------------
FROM cold AS runtime
ARG DEVICE=cpu
ARG PROFILE=aot
ARG GPU=none
LABEL io.chatterbox-prewarm.schema="5" \
      io.chatterbox-prewarm.profile="${PROFILE}" \
      io.chatterbox-prewarm.gpu="${GPU}"
ENV CHATTERBOX_PREWARM_DEVICE=${DEVICE}
COPY --from=bake /opt/chatterbox-prewarm/warm /opt/chatterbox-prewarm/warm
