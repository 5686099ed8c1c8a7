"""Budgets: how long a pod may take to start and to go, and how much memory it gets, from what was measured.

The bake measured some of it, and the labels of an image tell that. What nobody measured has a default, which k8s/base
has as well. Every margin stands here once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.image.labels import StateLabel

#: Seconds that a startup probe allows at least, asked once a second (docs/kubernetes.md, "Probes").
STARTUP_SECONDS = 360
#: A cold start may take so many times what was measured: a node may have fewer cores, or a slower disk.
_COLD_MARGIN = 3.0
#: Seconds: before SIGTERM, for proxies to hear of it; the server's own default of the drain; and after the drain, for
#: the worker (5 s), for clients that do not read (5 s), and a margin.
PRE_STOP_SECONDS, DRAIN_SECONDS, EXIT_SECONDS = 5, 100, 15
QUEUE_LIMIT = 32
#: Of the resident memory that was measured: what is requested, and what a cold start may use.
_REQUEST_MARGIN, _LIMIT_MARGIN = 1.1, 1.5
_MEMORY_MIB = (6 * 1024, 8 * 1024)
#: A bake measures a process that speaks. A pod has the server's beside it, and a GPU what CUDA itself takes of it.
_FRONT_MIB, _CUDA_MIB = 256, 1024
#: The cache holds what is seeded from the state, and what a cold start compiles anew; and some of both twice.
_CACHE_MARGIN = 4
CACHE_MIB = 1024
_STEP_MIB = 256
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What somebody measured; None where nobody did.

    Attributes:
        cold_seconds: of a start without a usable state, from exec to attached: `chatterbox_prewarm_since_exec_seconds`.
        request_seconds: that the longest request takes which is to be survived by an update.
        rss_mib: resident memory of a pod at its peak, MiB.
        gpu_memory_mib: GPU memory at its peak, MiB.
    """

    cold_seconds: float | None = None
    request_seconds: float | None = None
    rss_mib: int | None = None
    gpu_memory_mib: int | None = None


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Seconds and MiB of a pod.

    Attributes:
        startup_seconds: that the startup probe allows.
        drain_seconds: that requests have to finish.
        grace_seconds: from the decision to stop a pod until it is killed: preStop, drain, exit.
        memory_request_mib, memory_limit_mib: of the container.
        cache_mib: that the cache's volume may hold.
    """

    startup_seconds: int
    drain_seconds: int
    grace_seconds: int
    memory_request_mib: int
    memory_limit_mib: int
    cache_mib: int


def budgets(
    states: Sequence[StateLabel], measured: Measured, *, queue_limit: int = QUEUE_LIMIT, cache_mib: int | None = None
) -> Budgets:
    """What a pod gets.

    Args:
        states: of its image, for their bytes.
        measured: of a pod like it.
        queue_limit: most requests that it has at a time. It speaks one after the other, so the last of them waits for
            all others.
        cache_mib: of the cache, if it is not to be derived.

    Raises:
        BadInputError: the cache would not hold what a start seeds it with.
    """
    drain = DRAIN_SECONDS
    if measured.request_seconds is not None:
        drain = math.ceil(measured.request_seconds * queue_limit)
    request, limit = _MEMORY_MIB
    if measured.rss_mib is not None:
        request, limit = _up(measured.rss_mib * _REQUEST_MARGIN), _up(measured.rss_mib * _LIMIT_MARGIN)
    return Budgets(
        startup_seconds=max(STARTUP_SECONDS, math.ceil(_COLD_MARGIN * (measured.cold_seconds or 0))),
        drain_seconds=drain,
        grace_seconds=PRE_STOP_SECONDS + drain + EXIT_SECONDS,
        memory_request_mib=request,
        memory_limit_mib=limit,
        cache_mib=_cache(states, cache_mib),
    )


def or_baked(measured: Measured, states: Sequence[StateLabel]) -> Measured:
    """What was measured of pods; where nobody did, the most that the bakes of these states measured."""
    cold = max((state.measured.cold_seconds for state in states), default=0.0)
    resident = max((state.measured.resident_bytes for state in states), default=0)
    of_gpu = max((state.measured.device_bytes for state in states), default=0)
    return replace(
        measured,
        cold_seconds=measured.cold_seconds or cold or None,
        rss_mib=measured.rss_mib or (math.ceil(resident / _MIB) + _FRONT_MIB if resident else None),
        gpu_memory_mib=measured.gpu_memory_mib or (math.ceil(of_gpu / _MIB) + _CUDA_MIB if of_gpu else None),
    )


def quantity(mib: int) -> str:
    """Kubernetes' notation for an amount of memory, "1Gi" where it is whole."""
    return f"{mib // 1024}Gi" if mib % 1024 == 0 else f"{mib}Mi"


def _cache(states: Sequence[StateLabel], given: int | None) -> int:
    largest = max((sum(family.size for family in state.families) for state in states), default=0) / _MIB
    if given is None:
        return max(CACHE_MIB, _up(_CACHE_MARGIN * largest))
    if given < 2 * largest:
        raise BadInputError(
            f"a cache of {given} MiB is too small: a state has {largest:.0f} MiB, a start may seed all of it and "
            "compile as much again, and a pod that goes beyond is evicted",
            next_step=f"leave out --cache-size, or give {_up(_CACHE_MARGIN * largest)} or more",
        )
    return given


def _up(mib: float) -> int:
    return math.ceil(mib / _STEP_MIB) * _STEP_MIB
