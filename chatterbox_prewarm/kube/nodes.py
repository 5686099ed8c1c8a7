"""Select the nodes of a cluster that fit the states of an image.

Nodes are selected by the labels of NVIDIA's GPU Feature Discovery
(https://github.com/NVIDIA/k8s-device-plugin/blob/main/docs/gpu-feature-discovery/README.md). The compute capability is
required, because compiled code does not run on another one. The product is only preferred: on another product with the
same capability, a start has misses and is slow, but works.
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
    from collections.abc import Collection, Mapping, Sequence

    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.kube.documents import Document

GPU = "nvidia.com/gpu"
#: How the device plugin offers MIG slices: as the resource of a GPU ("single"), or each size as its own ("mixed").
MIG_STRATEGIES = ("single", "mixed")
#: Suffix of the product label of a GPU with time-slicing.
_SHARED = "-SHARED"
#: GPU of a state that was baked on a machine without a GPU.
_NO_GPU = ("none", ABSENT)
_MIG = re.compile(r".+ MIG (?P<profile>\S+)")
_CAPABILITY = re.compile(r"(\d+)\.(\d+)")
#: Weights of preferences, at most 100. The driver decides only between nodes with the same product.
_PRODUCT_WEIGHT, _DRIVER_WEIGHT = 100, 50

#: A node selector requirement of Kubernetes.
Expression = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Labels and resources of the nodes of a cluster.

    Attributes:
        feature_discovery: nodes have the labels of GPU Feature Discovery.
        mig_strategy: one of `MIG_STRATEGIES`.
        labels: additional labels that a node must have.
        runtime_class: runtime class that gives containers a GPU; empty for the default runtime.
    """

    feature_discovery: bool = True
    mig_strategy: str = "single"
    labels: Mapping[str, str] = field(default_factory=dict)
    runtime_class: str = ""


def gpu_product(state: StateLabel) -> str:
    """Return the GPU that a state was baked on, or "" if there was no GPU."""
    return state.gpu if state.device == "cuda" and state.gpu not in _NO_GPU else ""


def gpu_fields(products: Sequence[str], cluster: Cluster) -> tuple[Document, str]:
    """Return the fields of a pod that needs a GPU, and the resource to request, such as "nvidia.com/mig-1g.10gb".

    Args:
        products: acceptable products as NVML names them.
        cluster: the cluster.

    Raises:
        BadInputError: the products need different resources, but a pod can request only one.
    """
    resources = sorted({_resource(product, cluster) for product in products}) or [GPU]
    if len(resources) > 1:
        raise BadInputError(
            f"the states are for GPUs that are requested as {' and '.join(resources)}, but a pod can request only one",
            next_step="select GPUs of one kind with --gpu, and render a deployment for each kind",
        )
    # Nodes with GPUs often have this taint, which keeps other pods away.
    fields: Document = {"tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]}
    if cluster.runtime_class:
        fields["runtimeClassName"] = cluster.runtime_class
    return fields, resources[0]


def state_affinity(
    states: Sequence[StateLabel], cluster: Cluster, *, require_product: bool = False, gpu_memory_mib: int = 0
) -> Document:
    """Return the field `affinity` of a pod that can run on any node that fits one of the states; {} if all nodes fit.

    Args:
        states: states of the image.
        cluster: the cluster.
        require_product: require the product of a state, for pods that must not have a miss.
        gpu_memory_mib: memory that the GPU must have, in MiB; 0 if it is unknown.

    Raises:
        BadInputError: no type of node fits a state of each model.
    """
    variants = {state.variant for state in states}
    states_by_term: dict[tuple[str, str], list[StateLabel]] = defaultdict(list)
    for state in states:
        on_gpu = state.device == "cuda" and cluster.feature_discovery
        capability = state.compute_capability if on_gpu else ""
        states_by_term[_requirement(state, "arch"), capability].append(state)
    required = []
    for (arch, capability), found in states_by_term.items():
        products = _products_of_all_variants(found, variants)
        if not products:
            continue  # a model has no state for such a node
        term = [_in("kubernetes.io/arch", platform_of(arch).partition("/")[2])] if arch else []
        # The capability of a state that was baked without a GPU does not match.
        if match := _CAPABILITY.fullmatch(capability):
            term += [_in(f"{GPU}.compute.major", match[1]), _in(f"{GPU}.compute.minor", match[2])]
        term += _cluster_labels(cluster)
        if cluster.feature_discovery and (capability or any(products)):
            if require_product and all(products):  # a state for an architecture is for every product of it
                term += _products(products, cluster)
            if gpu_memory_mib:
                key = f"{_resource(products[0], cluster)}.memory"
                term.append({"key": key, "operator": "Gt", "values": [str(gpu_memory_mib - 1)]})
        required.append(term)
    if not required:
        raise BadInputError(
            f"no type of node fits a state of each of the models {', '.join(sorted(variants))}",
            next_step="bake the missing states, or render a deployment for each model from an image with one",
        )
    return _node_affinity(required, _preferences(states, cluster) if cluster.feature_discovery else [])


def _products_of_all_variants(states: Sequence[StateLabel], variants: Collection[str]) -> list[str]:
    """Return the products for which each variant has one of the states; "" is any product.

    A state without a product, such as one that was compiled for an architecture, is for every product.
    """
    products = list(dict.fromkeys(gpu_product(state) for state in states))
    return [
        product
        for product in products
        if {state.variant for state in states if gpu_product(state) in {product, ""}} >= set(variants)
    ]


def product_affinity(product: str, cluster: Cluster) -> Document:
    """Return the field `affinity` of a pod that requires a product, or any if it is ""; {} if all nodes fit."""
    term = _cluster_labels(cluster)
    if product and cluster.feature_discovery:
        term += _products([product], cluster)
    return _node_affinity([term], [])


def product_label(product: str) -> str:
    """Return the label value that GPU Feature Discovery gives to a product that NVML names like this."""
    return "-".join(re.sub(r"[^A-Za-z0-9_. -]", "", product.replace("+", ".")).split())


def _node_affinity(required: Sequence[list[Expression]], preferred: list[Document]) -> Document:
    affinity: Document = {}
    terms: list[Document] = []
    for expressions in required:
        term = {"matchExpressions": expressions}
        if expressions and term not in terms:
            terms.append(term)
    if terms:
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}
    if preferred:
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
    return {"affinity": {"nodeAffinity": affinity}} if affinity else {}


def _preferences(states: Sequence[StateLabel], cluster: Cluster) -> list[Document]:
    """Prefer the product of a state, and its driver if one of its families depends on the driver."""
    products = dict.fromkeys(product for state in states if (product := gpu_product(state)))
    preferences = [_preference(_PRODUCT_WEIGHT, _products([product], cluster)) for product in products]
    for state in states:
        driver, product = _requirement(state, "driver"), gpu_product(state)
        if driver and product:
            parts = zip(("major", "minor", "rev"), driver.split("."), strict=False)
            labels = [_in(f"nvidia.com/cuda.driver.{part}", value) for part, value in parts]
            preference = _preference(_DRIVER_WEIGHT, [*_products([product], cluster), *labels])
            if preference not in preferences:
                preferences.append(preference)
    return preferences


def _preference(weight: int, expressions: list[Expression]) -> Document:
    return {"weight": weight, "preference": {"matchExpressions": expressions}}


def _requirement(state: StateLabel, name: str) -> str:
    """Return the value that a family of the state requires for a fact, or ""."""
    return next((family.requires[name] for family in state.families if name in family.requires), "")


def _products(products: Sequence[str], cluster: Cluster) -> list[Expression]:
    """Return one expression for each label that contains some of these products."""
    by_label: dict[str, list[str]] = defaultdict(list)
    for product in dict.fromkeys(products):
        value = product_label(product)
        by_label[f"{_resource(product, cluster)}.product"] += [value, value + _SHARED]
    return [_in(label, *values) for label, values in by_label.items()]


def _cluster_labels(cluster: Cluster) -> list[Expression]:
    return [_in(name, value) for name, value in sorted(cluster.labels.items())]


def _resource(product: str, cluster: Cluster) -> str:
    mig_slice = _MIG.fullmatch(product)
    if mig_slice and cluster.mig_strategy == "mixed":
        return f"nvidia.com/mig-{mig_slice['profile'].replace('+', '.')}"
    return GPU


def _in(key: str, *values: str) -> Expression:
    return {"key": key, "operator": "In", "values": list(values)}
