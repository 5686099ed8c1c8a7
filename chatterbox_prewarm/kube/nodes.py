"""Nodes: which of them a pod is to run on, from what the states of its image were baked for.

Nodes are told apart by the labels of NVIDIA's GPU Feature Discovery
(https://github.com/NVIDIA/k8s-device-plugin/blob/main/docs/gpu-feature-discovery/README.md). A compute capability is
required, since nothing compiled for another one runs. A product is preferred: on a relative of it a start misses, is
slow, and works.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.compose import platform_of
from chatterbox_prewarm.system.fingerprint import ABSENT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_prewarm.image.labels import StateLabel

GPU = "nvidia.com/gpu"
#: How the device plugin offers parts of GPUs (MIG): under the GPU's own name, or each kind of part under its own.
MIG_STRATEGIES = ("single", "mixed")
#: What GPU Feature Discovery adds to the product of a GPU that several pods share by time.
_SHARED = "-SHARED"
#: What a state says that was baked for a GPU where there was none.
_NO_GPU = ("none", ABSENT)
_MIG = re.compile(r".+ MIG (?P<profile>\S+)")
_CAPABILITY = re.compile(r"(\d+)\.(\d+)")
_ARCH = "kubernetes.io/arch"
#: Weights of what is preferred, of at most 100: the product decides, and the driver between two of one product.
_PRODUCT_WEIGHT, _DRIVER_WEIGHT = 100, 50

Expression = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How the nodes of a cluster are labelled.

    Attributes:
        feature_discovery: they have the labels of GPU Feature Discovery.
        mig_strategy: one of `MIG_STRATEGIES`.
        labels: of our nodes, beside those; all are required.
        runtime_class: that gives containers a GPU, where it is not the default; or empty.
    """

    feature_discovery: bool = True
    mig_strategy: str = "single"
    labels: Mapping[str, str] = field(default_factory=dict)
    runtime_class: str = ""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a node must have: the type of its GPU, empty where it does not matter, and its processor architecture.

    `driver` is empty unless something of the state depends on it. `capability` is "major.minor".
    """

    product: str = ""
    capability: str = ""
    driver: str = ""
    arch: str = ""


def wanted_of(state: StateLabel) -> Wanted:
    """What a node must have for a hit with this state, as far as nodes are labelled with it."""
    required = {name: value for family in state.families for name, value in family.requires.items()}
    on_gpu = state.device == "cuda" and state.gpu not in _NO_GPU
    return Wanted(
        product=state.gpu if on_gpu else "",
        capability=state.compute_capability if on_gpu else "",
        driver=required.get("driver", "") if on_gpu else "",
        arch=required.get("arch", ""),
    )


def gpu_resource(products: Sequence[str], cluster: Cluster) -> str:
    """The resource that a pod requests to get a GPU of one of these products, such as "nvidia.com/mig-1g.10gb".

    Raises:
        BadInputError: they are different resources, and a pod can request but one.
    """
    found = sorted({_resource(product, cluster) for product in products}) or [GPU]
    if len(found) > 1:
        raise BadInputError(
            f"the states are for GPUs that are requested as {' and '.join(found)}, and a pod can request but one",
            next_step="name those of one kind with --gpu, and render a deployment for each",
        )
    return found[0]


def affinity(
    wanted: Sequence[Wanted], cluster: Cluster, *, require_product: bool = False, gpu_memory_mib: int = 0
) -> dict[str, Any] | None:
    """The affinity of a pod that is at home on any of these nodes; None if nothing is known that tells them apart.

    Args:
        wanted: of the states, each.
        cluster: how nodes are labelled.
        require_product: no other product will do, since a start that misses does not go on.
        gpu_memory_mib: that a GPU must have, in MiB; 0 if it is not known.
    """
    terms: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in wanted:
        terms[one.arch, one.capability if cluster.feature_discovery else ""].append(one.product)
    required = []
    for (arch, capability), products in terms.items():
        term = [
            *([_among(_ARCH, [platform_of(arch).partition("/")[2]])] if arch else []),
            *_capability(capability),
            *(_among(name, [value]) for name, value in sorted(cluster.labels.items())),
        ]
        if cluster.feature_discovery and any(products):
            if require_product:
                term += _products(products, cluster)
            if gpu_memory_mib:
                key = _label(products[0], cluster, "memory")
                term.append({"key": key, "operator": "Gt", "values": [str(gpu_memory_mib - 1)]})
        if term and term not in required:
            required.append(term)
    preferred = _preferred(wanted, cluster) if cluster.feature_discovery else []
    found: dict[str, Any] = {}
    if required:
        terms_of = [{"matchExpressions": term} for term in required]
        found["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms_of}
    if preferred:
        found["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
    return {"nodeAffinity": found} if found else None


def product_label(product: str) -> str:
    """A product as NVML names it, as GPU Feature Discovery writes it into a label."""
    return "-".join(re.sub(r"[^A-Za-z0-9_. -]", "", product.replace("+", ".")).split())


def _preferred(wanted: Sequence[Wanted], cluster: Cluster) -> list[dict[str, Any]]:
    products = dict.fromkeys(one.product for one in wanted if one.product)
    found = [_preference(_PRODUCT_WEIGHT, _products([product], cluster)) for product in products]
    for one in wanted:
        if one.driver and one.product:
            names = zip(("major", "minor", "rev"), one.driver.split("."), strict=False)
            driver = [_among(f"nvidia.com/cuda.driver.{name}", [value]) for name, value in names]
            preference = _preference(_DRIVER_WEIGHT, [*_products([one.product], cluster), *driver])
            if preference not in found:
                found.append(preference)
    return found


def _preference(weight: int, expressions: list[Expression]) -> dict[str, Any]:
    return {"weight": weight, "preference": {"matchExpressions": expressions}}


def _capability(capability: str) -> list[Expression]:
    """None for what is no capability, as of a bake that saw no GPU."""
    found = _CAPABILITY.fullmatch(capability)
    if not found:
        return []
    return [
        _among(f"{GPU}.compute.{name}", [value]) for name, value in zip(("major", "minor"), found.groups(), strict=True)
    ]


def _products(products: Sequence[str], cluster: Cluster) -> list[Expression]:
    """One expression for each label that these products stand in."""
    by_label: dict[str, list[str]] = defaultdict(list)
    for product in dict.fromkeys(products):
        value = product_label(product)
        by_label[_label(product, cluster, "product")] += [value, value + _SHARED]
    return [_among(label, values) for label, values in by_label.items()]


def _label(product: str, cluster: Cluster, name: str) -> str:
    return f"{_resource(product, cluster)}.{name}"


def _resource(product: str, cluster: Cluster) -> str:
    part = _MIG.fullmatch(product)
    if part and cluster.mig_strategy == "mixed":
        return f"nvidia.com/mig-{part['profile'].replace('+', '.')}"
    return GPU


def _among(key: str, values: list[str]) -> Expression:
    return {"key": key, "operator": "In", "values": values}
