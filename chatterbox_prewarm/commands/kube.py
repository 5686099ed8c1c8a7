"""k8s: manifests for a cluster, from what an image or a matrix says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import PATH, check_place, insecure_option, say
from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.image.matrix import FILE
from chatterbox_prewarm.kube.budgets import QUEUE_LIMIT, Measured
from chatterbox_prewarm.kube.nodes import MIG_STRATEGIES, Cluster
from chatterbox_prewarm.start.prepared import POLICIES
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.kube.documents import Rendering

_POSITIVE = click.FloatRange(0, min_open=True)
_MIB = click.IntRange(1)


@click.group()
def k8s() -> None:
    """Render manifests for Kubernetes; `kubectl apply -f -` takes them."""


def _cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a cluster labels its nodes."""
    for add in (
        click.option("--output", type=PATH, help="Write to this file instead of standard output."),
        click.option("--runtime-class", default="", help="That gives containers a GPU, if it is not the default."),
        click.option("--node-label", "node_labels", multiple=True, metavar="KEY=VALUE", help="Nodes must have it."),
        click.option(
            "--mig-strategy",
            type=click.Choice(MIG_STRATEGIES),
            default="single",
            show_default=True,
            help="How the device plugin offers parts of GPUs.",
        ),
        click.option(
            "--feature-discovery/--no-feature-discovery",
            default=True,
            show_default=True,
            help="Whether nodes have the labels of GPU Feature Discovery.",
        ),
    ):
        command = add(command)
    return command


@k8s.command()
@click.option("--image", required=True, help="That pods run; its labels are read in its registry.")
@click.option("--platform", default="linux/amd64", show_default=True, help="Of the image, where there are several.")
@click.option("--labels", type=PATH, help="Read the labels from this JSON file instead: docker inspect gives them.")
@click.option("--device", default="", type=click.Choice(["", "cuda", "cpu"]), help="cuda if a state is for it.")
@click.option("--gpu", "gpus", multiple=True, help="Only states for this product, as NVML names it; repeatable.")
@click.option("--policy", default="fallback", show_default=True, type=click.Choice(POLICIES), help="Of a start.")
@click.option("--replicas", type=click.IntRange(0), help="How many pods; 1, or as many as there are, by default.")
@click.option("--queue-limit", default=QUEUE_LIMIT, show_default=True, type=click.IntRange(1), help="Of a pod.")
@click.option("--cold-seconds", type=_POSITIVE, help="Measured: from exec to attached, without a state that fits.")
@click.option("--request-seconds", type=_POSITIVE, help="Measured: the longest request that is not to be cut off.")
@click.option("--rss", "rss_mib", type=_MIB, help="Measured: resident memory of a pod at its peak, MiB.")
@click.option("--gpu-memory", "gpu_memory_mib", type=_MIB, help="Measured: GPU memory at its peak, MiB.")
@click.option("--cache-size", "cache_mib", type=_MIB, help="Of the cache's volume, MiB; derived by default.")
@click.option("--pre-pull", is_flag=True, help="Besides, have the image on all those nodes before a pod comes.")
@_cluster_options
@insecure_option
def render(
    *,
    image: str,
    platform: str,
    labels: Path | None,
    cold_seconds: float | None,
    request_seconds: float | None,
    rss_mib: int | None,
    gpu_memory_mib: int | None,
    output: Path | None,
    insecure: bool | None,
    feature_discovery: bool,
    mig_strategy: str,
    node_labels: tuple[str, ...],
    runtime_class: str,
    **fields: Any,
) -> None:
    """Render the deployment of an image: on the nodes that its states fit, with probes sized for a cold start.

    What was measured on a pod goes before what the bake measured, which the image's labels tell.

    An image in a registry is named by its digest from here on, so that what runs is what was looked at.
    """
    from chatterbox_prewarm.kube.render import Request
    from chatterbox_prewarm.kube.render import render as render_deployment

    if output is not None:
        check_place(output)
    cluster = _cluster(feature_discovery, mig_strategy, node_labels, runtime_class)
    name, states = _states(image, labels, platform=platform, insecure=insecure)
    request = Request(
        image=name,
        states=states,
        measured=Measured(
            cold_seconds=cold_seconds,
            request_seconds=request_seconds,
            rss_mib=rss_mib,
            gpu_memory_mib=gpu_memory_mib,
        ),
        cluster=cluster,
        **fields,
    )
    _write(render_deployment(request), output)


@k8s.command("render-bake")
@click.option("--matrix", type=PATH, default=Path(FILE), show_default=True, help="Which bakes there are.")
@click.option("--image", required=True, help="Of the stage `tools`, that the jobs run.")
@click.option(
    "--registry-secret", default="", help="With the registry's login, of type kubernetes.io/dockerconfigjson."
)
@click.option("--parallelism", default=1, show_default=True, type=click.IntRange(1), help="Pods of a job at a time.")
@click.option("--cpu", default=4, show_default=True, type=click.IntRange(1), help="CPUs that a bake requests.")
@click.option("--memory", "memory_mib", default=16384, show_default=True, type=_MIB, help="Of a bake, MiB.")
@click.option("--deadline", default=7200, show_default=True, type=click.IntRange(1), help="Of a job, seconds.")
@_cluster_options
@insecure_option
def render_bake(
    *,
    matrix: Path,
    output: Path | None,
    insecure: bool | None,
    feature_discovery: bool,
    mig_strategy: str,
    node_labels: tuple[str, ...],
    runtime_class: str,
    **fields: Any,
) -> None:
    """Render an Indexed Job for each type of GPU in a matrix: it bakes on such a node, proves, and adds the state."""
    from chatterbox_prewarm.image import matrix as matrices
    from chatterbox_prewarm.kube.bake import Request, render_bakes

    if output is not None:
        check_place(output)
    cluster = _cluster(feature_discovery, mig_strategy, node_labels, runtime_class)
    request = Request(matrix=matrices.read(matrix), cluster=cluster, insecure=insecure, **fields)
    _write(render_bakes(request), output)


def _write(rendering: Rendering, output: Path | None) -> None:
    for note in rendering.notes[1:]:
        say(f"note: {note}")
    if output is None:
        click.echo(rendering.to_yaml(), nl=False)
    else:
        write_whole(output, rendering.to_yaml())
        click.echo(f"wrote {output}")


def _cluster(feature_discovery: bool, mig_strategy: str, node_labels: tuple[str, ...], runtime_class: str) -> Cluster:
    labels = {}
    for text in node_labels:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise BadInputError(f"--node-label {text!r} has no value", next_step="write --node-label KEY=VALUE")
        labels[key] = value
    return Cluster(
        feature_discovery=feature_discovery, mig_strategy=mig_strategy, labels=labels, runtime_class=runtime_class
    )


def _states(
    image: str, labels: Path | None, *, platform: str, insecure: bool | None
) -> tuple[str, tuple[StateLabel, ...]]:
    """What pods are to run, and its states by its labels."""
    from chatterbox_prewarm.image.compose import resolve
    from chatterbox_prewarm.image.labels import read_states
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.image.stores import reading

    if labels is not None:
        return image, read_states(_read_labels(labels))
    reference = parse(image)
    if reference.kind != "registry":
        raise BadInputError(
            f"{image} is in no registry, so no node can pull it",
            next_step="name what nodes pull with --image, and give the labels with --labels",
        )
    with reading(reference, insecure=insecure) as (store, name):
        digest = store.read_manifest(name).digest
        found = resolve(store, digest, platform=platform)
    return f"{image.partition('@')[0]}@{digest}", read_states(found.labels)


def _read_labels(path: Path) -> dict[str, str]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise from_os_error(error, "reading the labels") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not JSON: {error}", next_step=_INSPECT) from error
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise BadInputError(f"{path} holds no labels: an object of texts", next_step=_INSPECT)
    return raw


_INSPECT = "write it with docker inspect --format '{{json .Config.Labels}}' IMAGE"
