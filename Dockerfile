# Chatterbox TTS with its warm state baked in.
#
#   docker build -t chatterbox:warm .
#   docker run --read-only --network none --user 12345:12345 --cap-drop ALL \
#     --tmpfs /tmp --tmpfs /var/cache/chatterbox-prewarm:exec,mode=1777 chatterbox:warm
#
# The build needs BuildKit (Docker 20.10 with DOCKER_BUILDKIT=1, or newer). It does not need a GPU; without one, and
# without TARGET, the warm state has no families that depend on a GPU. The layers of the result, from the most stable one
# to the one that changes most often: system, dependencies, weights, code, warm state.
#
# Optional secrets: ca (a PEM bundle for package indexes and the hub), pip (a pip configuration), hf_token.

ARG BASE=debian:bookworm-slim
# The source of the weights: hub (the published weights), synthetic (random weights, whose speech is noise), or none
# (the weights are appended or mounted later).
ARG WEIGHTS=hub
# The Python packages of the image: lean (what speech with baked voices needs), or full (also upstream's model, which
# makes voices, and Triton, which the profile `compiled` needs). A bake always has the full set.
ARG PACKAGES=lean
# The source of the Python packages: the stages that install them, or NAME for the images NAME-lean and NAME-full that
# were built from the stages `deps-lean` and `deps-full`.
ARG DEPS=packages

# ---- base: the operating system --------------------------------------------------------------------------------------
FROM ${BASE} AS base
# Regions that are compiled for a CPU link to libgomp1.
# Here and below, the release of the base image pins the versions of its packages.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libgomp1 python3 \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

# ---- deps: the Python packages of one software stack, from its hashed locks ------------------------------------------
# uv and the locks are only mounted in the steps below, so they are in no layer of the image.
FROM base AS uv
ARG STACK=torch-2.6
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY build/locks/uv.txt build/sync /opt/uv/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip \
    UV_TOOLS=/opt/uv sh /opt/uv/sync /opt/uv/uv.txt
COPY build/locks/${STACK}-lean.txt /opt/lean/lock.txt
COPY build/locks/${STACK}.txt /opt/full/lock.txt

FROM base AS packages-lean
RUN --mount=type=cache,target=/var/cache/uv \
    --mount=type=secret,id=ca --mount=type=secret,id=pip \
    --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,from=uv,source=/opt/lean,target=/opt/lock \
    UV_TOOLS=/opt/uv UV_CACHE_DIR=/var/cache/uv sh /opt/uv/sync /opt/uv/uv.txt /opt/lock/lock.txt /opt/venv

# The lean packages stay as they are, and the others are added: state that was baked with these serves an image without
# them. All stages below start from one of these two, so a build with DEPS set to images does not copy gigabytes.
FROM packages-lean AS packages-full
RUN --mount=type=cache,target=/var/cache/uv \
    --mount=type=secret,id=ca --mount=type=secret,id=pip \
    --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,from=uv,source=/opt/full,target=/opt/lock \
    UV_TOOLS=/opt/uv UV_CACHE_DIR=/var/cache/uv sh /opt/uv/sync /opt/uv/uv.txt /opt/lock/lock.txt /opt/venv

# DEPS begins the name of a stage of this file or of an image.
# hadolint ignore=DL3006
FROM ${DEPS}-lean AS deps-lean
# hadolint ignore=DL3006
FROM ${DEPS}-full AS deps-full

# ---- weights: downloaded at a pinned commit, or random ---------------------------------------------------------------
# Copy only the packages that the download uses, so that a change of other code does not download the weights again.
FROM deps-lean AS weights-hub
ARG VARIANT=english
ARG REVISION=
# URL of a mirror of the hub; empty for the hub itself.
ARG HF_ENDPOINT=
COPY chatterbox_prewarm/__init__.py chatterbox_prewarm/errors.py chatterbox_prewarm/redaction.py chatterbox_prewarm/version.py /build/chatterbox_prewarm/
COPY chatterbox_prewarm/system /build/chatterbox_prewarm/system
COPY chatterbox_prewarm/weights /build/chatterbox_prewarm/weights
COPY build/fetch.py /build/
# The cache mount keeps complete files for the next run of this step, also after a failure.
RUN --mount=type=cache,target=/var/cache/weights,sharing=locked \
    --mount=type=secret,id=ca --mount=type=secret,id=hf_token \
    PYTHONPATH=/build python /build/fetch.py /var/cache/weights /opt/chatterbox-prewarm/weights

FROM deps-full AS weights-synthetic
ARG VARIANT=english
ARG SIZE=full
COPY chatterbox_prewarm/__init__.py chatterbox_prewarm/errors.py chatterbox_prewarm/redaction.py chatterbox_prewarm/version.py /build/chatterbox_prewarm/
COPY chatterbox_prewarm/system /build/chatterbox_prewarm/system
COPY chatterbox_prewarm/weights /build/chatterbox_prewarm/weights
COPY chatterbox_prewarm/model /build/chatterbox_prewarm/model
COPY build/fetch.py /build/
RUN PYTHONPATH=/build python /build/fetch.py --synthetic "${SIZE}" /opt/chatterbox-prewarm/weights

FROM base AS weights-none
RUN mkdir -p /opt/chatterbox-prewarm/weights

# WEIGHTS selects one of the stages above.
# hadolint ignore=DL3006
FROM weights-${WEIGHTS} AS weights

# ---- bake: the warm-up on the device DEVICE --------------------------------------------------------------------------
FROM deps-full AS bake
# Compilers for the bake. The result does not contain them.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev \
 && rm -rf /var/lib/apt/lists/*
# Copy only the packages that the bake uses, so that a change of the server does not bake again.
COPY chatterbox_prewarm/__init__.py chatterbox_prewarm/errors.py chatterbox_prewarm/redaction.py chatterbox_prewarm/version.py /build/chatterbox_prewarm/
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
# GPUs to compile for with DEVICE=cuda where the builder has no GPU, separated by commas, such as "NVIDIA L4,sm_90".
ARG TARGET=
# BuildKit's cache key does not contain the builder's GPU. Set this to its name, so that another GPU bakes again.
ARG GPU=none
ARG SOURCE_DATE_EPOCH=
# Provenance that a build cannot detect: the commit of this project, the digest of BASE, and the builder.
ARG SOURCE_REVISION=
ARG BASE_DIGEST=
ARG BUILDER=
RUN --mount=type=bind,from=weights,source=/opt/chatterbox-prewarm/weights,target=/opt/chatterbox-prewarm/weights \
    echo "baking for GPU: ${GPU}" \
 && CHATTERBOX_PREWARM_SOURCE_REVISION="${SOURCE_REVISION}" CHATTERBOX_PREWARM_BASE_DIGEST="${BASE_DIGEST}" \
    CHATTERBOX_PREWARM_BUILDER="${BUILDER}" PYTHONPATH=/build python /build/bake.py --device "${DEVICE}" \
    --levels "${LEVELS}" --profile "${PROFILE}" --t3-dtype "${T3_DTYPE}" --target "${TARGET}"

# ---- cold: everything except the warm state --------------------------------------------------------------------------
# PACKAGES selects one of the stages above.
# hadolint ignore=DL3006
FROM deps-${PACKAGES} AS cold
ARG STACK=torch-2.6
ARG VARIANT=english
ARG PACKAGES
ARG PROFILE=aot
RUN if [ "${PROFILE}-${PACKAGES}" = compiled-lean ]; then \
      echo "The profile compiled needs Triton: add --build-arg PACKAGES=full" >&2; exit 1; \
    fi
LABEL org.opencontainers.image.title="chatterbox-prewarm" \
      org.opencontainers.image.description="Chatterbox TTS with its warm state baked in" \
      org.opencontainers.image.licenses="MIT" \
      io.chatterbox-prewarm.variant="${VARIANT}" \
      io.chatterbox-prewarm.torch="${STACK}" \
      io.chatterbox-prewarm.packages="${PACKAGES}"
COPY --from=weights /opt/chatterbox-prewarm/weights /opt/chatterbox-prewarm/weights
COPY LICENSE NOTICE.md /usr/share/doc/chatterbox-prewarm/
COPY chatterbox_prewarm /opt/chatterbox-prewarm/app/chatterbox_prewarm
# Compile this project's modules here and not in the bake, so that a change of them does not bake again. -B keeps Python
# from writing to /opt/venv, whose modification times must not change. A named volume at /data/voices takes over the
# permissions of the folder, so that any user may add voices.
ARG SOURCE_REVISION=
RUN if [ -n "${SOURCE_REVISION}" ]; then \
      echo "${SOURCE_REVISION}" >/opt/chatterbox-prewarm/app/chatterbox_prewarm/commit.txt; \
    fi \
 && python -B -m compileall -q /opt/chatterbox-prewarm/app \
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

# ---- tools: all packages and compilers, for the container in which `chatterbox-prewarm build` bakes ------------------
# The user is root, because this image only bakes and is not shipped.
FROM deps-full AS tools
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir -m 1777 /var/cache/chatterbox-prewarm
COPY --from=cold /opt/chatterbox-prewarm /opt/chatterbox-prewarm
ENV PYTHONPATH=/opt/chatterbox-prewarm/app \
    HF_HUB_OFFLINE=1
ENTRYPOINT ["python", "-m", "chatterbox_prewarm"]

# ---- runtime ---------------------------------------------------------------------------------------------------------
FROM cold AS runtime
ARG DEVICE=cpu
ARG PROFILE=aot
ARG GPU=none
LABEL io.chatterbox-prewarm.schema="6" \
      io.chatterbox-prewarm.profile="${PROFILE}" \
      io.chatterbox-prewarm.gpu="${GPU}"
ENV CHATTERBOX_PREWARM_DEVICE=${DEVICE}
COPY --from=bake /opt/chatterbox-prewarm/warm /opt/chatterbox-prewarm/warm
