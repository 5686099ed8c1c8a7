# An image for the nodes of a Ray cluster: the server's image, with Ray in a folder of its own. The interpreter and the
# packages of the server stay as they were baked, so the state fits. It finds Ray's packages after its own.
#
#   docker build -f docs/examples/ray.Dockerfile --build-arg BASE=chatterbox:l4 -t chatterbox-ray:l4 .
ARG BASE=chatterbox:warm
# hadolint ignore=DL3006
FROM ${BASE}
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv wget \
 && rm -rf /var/lib/apt/lists/*
COPY build/locks/ray.txt build/locks/uv.txt build/sync /opt/ray-build/
# The optional secrets of the project's Dockerfile: a CA bundle, and a pip configuration.
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip \
    sh /opt/ray-build/sync /opt/ray-build/uv.txt /opt/ray-build/ray.txt /opt/ray \
 && /opt/ray/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
    >"$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/ray.pth" \
 && sed --in-place '1s|^#!/opt/ray/bin/|#!/opt/venv/bin/|' /opt/ray/bin/*
COPY docs/examples/ray_serve_app.py /opt/ray-app/
ENV PATH=$PATH:/opt/ray/bin \
    PYTHONPATH=/opt/chatterbox-prewarm/app:/opt/ray-app \
    RAY_USAGE_STATS_ENABLED=0 \
    HOME=/tmp
USER 12345:12345
# KubeRay sets the command of each container.
ENTRYPOINT []
CMD ["bash"]
