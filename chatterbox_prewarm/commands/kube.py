"""The command `k8s`."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import PATH, Form, check_output, insecure_option, note, usage_error
from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.image.matrix import MATRIX_NAME
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.kube.budgets import PRE_STOP_SECONDS, QUEUE_LIMIT, Measured
from chatterbox_prewarm.kube.documents import NAME, check_name
from chatterbox_prewarm.kube.nodes import MIG_STRATEGIES, Cluster
from chatterbox_prewarm.start.options import POLICIES
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.kube.documents import Rendering

_POSITIVE = click.FloatRange(0, min_open=True)
_MIB = click.IntRange(1)
#: Keys and values of labels (https://kubernetes.io/docs/concepts/overview/working-with-objects/labels).
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_KEY = re.compile(rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL_VALUE.pattern}")
_LOGIN_TYPE = "of type kubernetes.io/dockerconfigjson"


@click.group()
def k8s() -> None:
    """Render manifests for Kubernetes. Pipe them to `kubectl apply -f -`."""


def _common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of both renderings. The command gets the options of the nodes as `cluster`."""

    @wraps(command)
    def with_cluster(
        *, feature_discovery: bool, mig_strategy: str, node_labels: tuple[str, ...], runtime_class: str, **options: Any
    ) -> None:
        cluster = Cluster(
            feature_discovery=feature_discovery,
            mig_strategy=mig_strategy,
            labels=dict(_parse_label(text) for text in node_labels),
            runtime_class=runtime_class,
        )
        command(cluster=cluster, **options)

    for add in (
        click.option(
            "--name",
            type=Form("name", check_name),
            default=NAME,
            show_default=True,
            help="Name of the deployment. Deployments in the same namespace need different names.",
        ),
        click.option("--output", type=PATH, help="Write to this file instead of standard output."),
        click.option(
            "--runtime-class", default="", help="Runtime class that gives containers a GPU, if the default does not."
        ),
        click.option(
            "--node-label",
            "node_labels",
            multiple=True,
            metavar="KEY=VALUE",
            help="Label that a node must have; repeatable.",
        ),
        click.option(
            "--mig-strategy",
            type=click.Choice(MIG_STRATEGIES),
            default="single",
            show_default=True,
            help="How the device plugin offers MIG slices.",
        ),
        click.option(
            "--feature-discovery/--no-feature-discovery",
            default=True,
            show_default=True,
            help="Nodes have the labels of GPU Feature Discovery.",
        ),
    ):
        with_cluster = add(with_cluster)
    return with_cluster


def _parse_label(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (separator and _LABEL_KEY.fullmatch(key) and (not value or _LABEL_VALUE.fullmatch(value))):
        raise usage_error(
            f"--node-label {text!r} is not a label",
            "write --node-label KEY=VALUE, as `kubectl get nodes --show-labels` prints it",
        )
    return key, value


def _pullable(image: str) -> str:
    """Return the name by which nodes pull an image.

    Raises:
        BadInputError: the image is not in a registry.
    """
    if parse(image).kind != "registry":
        raise BadInputError(
            f"{image} is not in a registry, so no node can pull it",
            next_step="pass the name that nodes pull with --image, and the labels with --labels",
        )
    return image.removeprefix("docker://")


@k8s.command()
@click.option("--image", required=True, help="Image of the pods. Its labels are read from the registry.")
@click.option("--pull-secret", default="", help=f"Secret with the login to pull the image, {_LOGIN_TYPE}.")
@click.option("--platform", default="linux/amd64", show_default=True, help="Platform of a multi-platform image.")
@click.option("--labels", type=PATH, help="Read the labels from this JSON file, written by docker inspect.")
@click.option(
    "--device", default="", type=click.Choice(["", "cuda", "cpu"]), help="Default: cuda if there is a state for it."
)
@click.option("--gpu", "gpus", multiple=True, help="Use only states for this GPU, such as L4; repeatable.")
@click.option("--convert", "converts", is_flag=True, help="The pods also convert speech, see `serve --convert`.")
@click.option("--policy", default="fallback", show_default=True, type=click.Choice(POLICIES), help="Policy of a start.")
@click.option("--replicas", type=click.IntRange(0), help="Number of pods. Default: 1, or the current number.")
@click.option(
    "--queue-limit", default=QUEUE_LIMIT, show_default=True, type=click.IntRange(1), help="Maximum requests in a pod."
)
@click.option(
    "--pre-stop",
    default=PRE_STOP_SECONDS,
    show_default=True,
    type=click.IntRange(1),
    help="Seconds in which load balancers learn that a pod ends, before it refuses requests.",
)
@click.option("--cold-seconds", type=_POSITIVE, help="Measured: exec to attached without a usable state.")
@click.option("--request-seconds", type=_POSITIVE, help="Measured: longest request that must not be interrupted.")
@click.option("--rss", "rss_mib", type=_MIB, help="Measured: peak resident memory of a pod, MiB.")
@click.option("--gpu-memory", "gpu_memory_mib", type=_MIB, help="Measured: peak GPU memory, MiB.")
@click.option("--cache-size", "cache_mib", type=_MIB, help="Size of the cache volume, MiB. Default: computed.")
@click.option("--pre-pull", is_flag=True, help="Also pull the image on all matching nodes before a pod starts.")
@click.option("--helm-values", is_flag=True, help="Write values for the chart charts/chatterbox instead of manifests.")
@_common_options
@insecure_option
def render(
    *,
    image: str,
    platform: str,
    labels: Path | None,
    helm_values: bool,
    output: Path | None,
    insecure: bool | None,
    **fields: Any,
) -> None:
    """Render the deployment of an image for the nodes that fit its states, with probes that allow a cold start.

    Measurements of a pod replace those of the bake, which are in the labels of the image.

    The manifests contain the digest of an image in a registry, so that the pods run the image whose labels were read.
    """
    from chatterbox_prewarm.kube.render import Request
    from chatterbox_prewarm.kube.render import render as render_deployment
    from chatterbox_prewarm.kube.values import to_values

    if output is not None:
        check_output(output)
    image = _pullable(image)
    image, states = _states(image, labels, platform=platform, insecure=insecure)
    measured = Measured(**{field.name: fields.pop(field.name) for field in dataclasses.fields(Measured)})
    request = Request(image=image, states=states, measured=measured, **fields)
    rendering = render_deployment(request)
    _write(to_values(rendering) if helm_values else rendering, output)


_signing_secret_option = click.option(
    "--signing-secret",
    default="",
    help="Secret with the keys private.pem and passphrase, if it has one, to sign the results of the proofs.",
)


@k8s.command("render-bake")
@click.option("--matrix", type=PATH, default=Path(MATRIX_NAME), show_default=True, help="File with the bakes.")
@click.option("--image", required=True, help="Image of the stage `tools`, which the jobs run.")
@click.option("--registry-secret", default="", help=f"Secret with the login of the registry, {_LOGIN_TYPE}.")
@_signing_secret_option
@click.option(
    "--pull-secret",
    default="",
    help="Secret with the login to pull the image. Default: the secret of --registry-secret.",
)
@click.option("--parallelism", default=1, show_default=True, type=click.IntRange(1), help="Concurrent pods of a job.")
@click.option("--cpu", default=4, show_default=True, type=click.IntRange(1), help="CPU request of a bake.")
@click.option("--memory", "memory_mib", default=16384, show_default=True, type=_MIB, help="Memory of a bake, MiB.")
@click.option(
    "--deadline", default=7200, show_default=True, type=click.IntRange(1), help="Time limit of a job, seconds."
)
@_common_options
@insecure_option
def render_bake(*, matrix: Path, image: str, output: Path | None, **fields: Any) -> None:
    """Render an Indexed Job for each type of GPU in a matrix. It bakes on a node with that GPU, proves, and appends."""
    from chatterbox_prewarm.image.matrix import read_matrix
    from chatterbox_prewarm.kube.bake import Request, render_bakes

    if output is not None:
        check_output(output)
    image = _pullable(image)
    request = Request(matrix=read_matrix(matrix), image=image, **fields)
    _write(render_bakes(request), output)


@k8s.command("render-proof")
@click.option("--image", required=True, help="Image to prove. Its labels are read from the registry.")
@click.option("--platform", default="linux/amd64", show_default=True, help="Platform of a multi-platform image.")
@click.option("--registry-secret", default="", help=f"Secret with a login that may write, {_LOGIN_TYPE}.")
@_signing_secret_option
@click.option(
    "--pull-secret",
    default="",
    help="Secret with the login to pull the image. Default: the secret of --registry-secret.",
)
@click.option(
    "--deadline", default=3600, show_default=True, type=click.IntRange(1), help="Time limit of a job, seconds."
)
@_common_options
@insecure_option
def render_proof(*, image: str, platform: str, output: Path | None, **fields: Any) -> None:
    """Render a Job for each state of an image that was compiled without its GPU.

    It proves the state on a node with that GPU, and attaches the evidence to the image. Run it before the deployment.
    """
    from chatterbox_prewarm.kube.proof import Request, render_proofs

    if output is not None:
        check_output(output)
    image, states = _states(_pullable(image), None, platform=platform, insecure=fields["insecure"])
    if "@" not in image:
        raise BadInputError(
            f"the registry does not have {image}, so its evidence cannot be attached", next_step="push the image first"
        )
    _write(render_proofs(Request(image=image, states=states, **fields)), output)


def _write(rendering: Rendering, output: Path | None) -> None:
    for line in rendering.notes[1:]:
        note(f"note: {line}")
    if output is None:
        click.echo(rendering.to_yaml(), nl=False)
    else:
        write_whole(output, rendering.to_yaml())
        click.echo(f"wrote {output}")


def _states(
    image: str, labels: Path | None, *, platform: str, insecure: bool | None
) -> tuple[str, tuple[StateLabel, ...]]:
    """Return the image that the pods run, with its digest if it is in a registry, and its states."""
    from chatterbox_prewarm.image.image_states import image_with_states
    from chatterbox_prewarm.image.labels import read_states

    if labels is not None:
        return image, read_states(_read_labels(labels))
    digest, found = image_with_states(parse(image), platform=platform, insecure=insecure)
    return f"{image.partition('@')[0]}@{digest}" if digest else image, read_states(found.labels)


def _read_labels(path: Path) -> dict[str, str]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise from_os_error(error, "reading the labels") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not JSON: {error}", next_step=_INSPECT) from error
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise BadInputError(f"{path} does not contain labels, that is a JSON object of strings", next_step=_INSPECT)
    return raw


_INSPECT = "write it with docker inspect --format '{{json .Config.Labels}}' IMAGE"
