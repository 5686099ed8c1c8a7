"""Parts that the Jobs of this package share: names, retries, and the access to a registry."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import (
    BadInputError,
    FingerprintMismatchError,
    IntegrityError,
    NotWarmError,
    PrewarmError,
    WeightsError,
)
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.state.keys import PASSPHRASE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chatterbox_prewarm.kube.documents import Document

#: Retries of a container that ended with an exit code that is not final.
RETRIES = 3
#: A finished Job is kept for this time, so that its log can be read.
KEPT_SECONDS = 86400
#: Exit codes after which a retry would fail again: usage, weights, wrong GPU, damaged state, miss, bad input, bug. The
#: others are retried: registry (14), model (15, perhaps too little memory), and signals.
_FINAL = sorted(
    {2, *(kind.exit_code for kind in (WeightsError, FingerprintMismatchError, IntegrityError, NotWarmError))}
    | {BadInputError.exit_code, PrewarmError.exit_code}
)
#: Maximum length of the name of a Job. Its pods have the index and a random suffix, and at most 63 characters.
_JOB_NAME = 52
_PRIVATE_KEY = "private.pem"
_LOGIN, _SIGNING_KEY = "/etc/registry-login", "/etc/signing-key"


def job_names(prefix: str, gpus: Iterable[str]) -> dict[str, str]:
    """Return a unique name for the documents of each type of GPU; "" is the CPU."""
    room = _JOB_NAME - len(prefix) - 1
    names: dict[str, str] = {}
    for gpu in gpus:
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "cpu"
        if len(slug) > room or f"{prefix}-{slug}" in names.values():
            slug = f"{slug[: room - 8].strip('-')}-{hashlib.sha256(gpu.encode()).hexdigest()[:7]}"
        names[gpu] = f"{prefix}-{slug}"
    return names


def failure_policy(container: str, action: str) -> Document:
    """Return the field `podFailurePolicy` of a Job.

    Args:
        container: the container whose exit codes count.
        action: what a final exit code does, "FailJob" or "FailIndex".
    """
    return {
        "rules": [
            # A drained node or a preempted pod is not a failure of the work.
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": action, "onExitCodes": {"containerName": container, "operator": "In", "values": _FINAL}},
        ]
    }


def registry_login(secret: str) -> tuple[list[Document], list[Document], list[Document]]:
    """Return the volumes, the mounts and the environment with which a pod logs in to a registry.

    Args:
        secret: of type kubernetes.io/dockerconfigjson; "" for no login.
    """
    if not secret:
        return [], [], []
    login = [{"key": ".dockerconfigjson", "path": "config.json"}]
    source: dict[str, Any] = {"secretName": secret, "defaultMode": 0o440, "items": login}
    return (
        [{"name": "registry-login", "secret": source}],
        [{"name": "registry-login", "mountPath": _LOGIN, "readOnly": True}],
        [{"name": "DOCKER_CONFIG", "value": _LOGIN}],
    )


def signing_key(secret: str) -> tuple[list[Document], list[Document], list[Document], list[str]]:
    """Return the volumes, mounts, environment and arguments with which `publish` signs the result of a proof.

    Args:
        secret: has the private key as `private.pem`, and if that is encrypted, its passphrase as `passphrase`; "" for
            no signature.
    """
    if not secret:
        return [], [], [], []
    key = [{"key": _PRIVATE_KEY, "path": _PRIVATE_KEY}]
    passphrase = {"secretKeyRef": {"name": secret, "key": "passphrase", "optional": True}}
    return (
        [{"name": "signing-key", "secret": {"secretName": secret, "defaultMode": 0o440, "items": key}}],
        [{"name": "signing-key", "mountPath": _SIGNING_KEY, "readOnly": True}],
        [{"name": PASSPHRASE, "valueFrom": passphrase}],
        ["--key", f"{_SIGNING_KEY}/{_PRIVATE_KEY}"],
    )


def registry_egress(references: Iterable[str]) -> list[Document]:
    """Allow DNS and the ports of the registries of some images. A network policy cannot contain host names.

    A policy applies to the port of the pod behind a service, and the DNS pods of OpenShift listen on 5353.

    Raises:
        BadInputError: an image is not in a registry.
    """
    ports = {443, *map(_port, references)}
    dns = [{"port": port, "protocol": protocol} for port in (53, 5353) for protocol in ("UDP", "TCP")]
    return [{"ports": [*dns, *({"port": port, "protocol": "TCP"} for port in sorted(ports))]}]


def _port(reference: str) -> int:
    parsed = parse(reference)
    if parsed.kind != "registry":
        raise BadInputError(
            f"{reference} is not in a registry, but a pod cannot store an image anywhere else",
            next_step="use a repository of a registry in prewarm.toml",
        )
    number = re.search(r":(\d+)$", parsed.api_host)
    return int(number[1]) if number else 443
