"""Compute the time limits and the memory of a pod from measurements.

The user can pass measurements of running pods. Otherwise those of the bake are used, which are in the labels of an
image. Without a measurement, the defaults are those of k8s/base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox_prewarm.image.labels import StateLabel

#: Smallest limit of the startup probe in seconds (docs/kubernetes.md, "Probes").
STARTUP_SECONDS = 360
#: Factor for the measured cold start, because a node may have fewer cores or a slower disk.
_COLD_MARGIN = 3.0
#: Seconds of the phases of a shutdown: preStop, in which the proxies learn that the pod ends; drain (the default of the
#: server); and exit, which contains 5 s for the worker, 5 s for clients that do not read, and a margin.
PRE_STOP_SECONDS, DRAIN_SECONDS, EXIT_SECONDS = 5, 100, 15
QUEUE_LIMIT = 32
#: Factors for the measured resident memory: for the request, and for the limit, which includes a cold start.
_REQUEST_MARGIN, _LIMIT_MARGIN = 1.1, 1.5
_DEFAULT_MEMORY_MIB = (6 * 1024, 8 * 1024)
#: A bake measures only the worker process. Add the memory of the front process, and on a GPU that of the CUDA context.
_FRONT_MIB, _CUDA_MIB = 256, 1024
#: Memory of a worker that converts speech, which no bake measures: 1 GiB for the weights of S3Gen and of the speech
#: tokenizer, and 1 GiB for the process, or for what it allocates on a GPU.
_CONVERSION_MIB = 2048
#: Factor for the size of a state: the cache holds the caches of the state and those that a cold start compiles, and
#: temporary copies of both.
_CACHE_MARGIN = 4
CACHE_MIB = 1024
_STEP_MIB = 256
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of running pods; None if a value was not measured.

    Attributes:
        cold_seconds: exec to attached without a usable state; the metric `chatterbox_prewarm_since_exec_seconds`.
        request_seconds: duration of the longest request that an update must not interrupt.
        rss_mib: peak resident memory of a pod in MiB.
        gpu_memory_mib: peak GPU memory in MiB.
    """

    cold_seconds: float | None = None
    request_seconds: float | None = None
    rss_mib: int | None = None
    gpu_memory_mib: int | None = None


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Time limits and memory of a pod.

    Attributes:
        startup_seconds: limit of the startup probe.
        drain_seconds: time for running requests to finish.
        pre_stop_seconds: time before the drain.
        grace_seconds: termination grace period: preStop, drain and exit.
        memory_request_mib, memory_limit_mib: memory of the container.
        cache_mib: size limit of the cache volume.
    """

    startup_seconds: int
    drain_seconds: int
    pre_stop_seconds: int
    grace_seconds: int
    memory_request_mib: int
    memory_limit_mib: int
    cache_mib: int


def budgets(
    states: Sequence[StateLabel],
    measured: Measured,
    *,
    queue_limit: int = QUEUE_LIMIT,
    pre_stop: int = PRE_STOP_SECONDS,
    cache_mib: int | None = None,
    converts: bool = False,
) -> Budgets:
    """Compute the budgets of a pod.

    Args:
        states: states of the image, whose sizes determine the size of the cache.
        measured: measurements of such a pod.
        queue_limit: maximum number of requests in the pod. It processes them one after the other, so the last one waits
            for all others.
        pre_stop: seconds in which the proxies learn that a pod ends.
        cache_mib: size of the cache; None to compute it.
        converts: the pod also has a worker that converts speech, which `measured` includes.

    Raises:
        BadInputError: the cache is too small for the content that a start writes to it.
    """
    drain = DRAIN_SECONDS
    if measured.request_seconds is not None:
        drain = math.ceil(measured.request_seconds * queue_limit)
    request, limit = (mib + _CONVERSION_MIB * converts for mib in _DEFAULT_MEMORY_MIB)
    if measured.rss_mib is not None:
        request, limit = _round_up(measured.rss_mib * _REQUEST_MARGIN), _round_up(measured.rss_mib * _LIMIT_MARGIN)
    return Budgets(
        startup_seconds=max(STARTUP_SECONDS, math.ceil(_COLD_MARGIN * (measured.cold_seconds or 0))),
        drain_seconds=drain,
        pre_stop_seconds=pre_stop,
        grace_seconds=pre_stop + drain + EXIT_SECONDS,
        memory_request_mib=request,
        memory_limit_mib=limit,
        cache_mib=_cache_mib(states, cache_mib),
    )


def with_baked_values(measured: Measured, states: Sequence[StateLabel], *, converts: bool = False) -> Measured:
    """Replace missing measurements of pods by what the bakes of these states measured.

    A pod holds a model of each variant, and the largest state of each counts.

    Args:
        measured: measurements of pods.
        states: states of the image.
        converts: a pod also has a worker that converts speech.
    """
    cold = max((state.measured.cold_seconds for state in states), default=0.0)
    resident = _sum_over_variants(states, lambda state: state.measured.resident_bytes)
    device = _sum_over_variants(states, lambda state: state.measured.device_bytes)
    contexts = _CUDA_MIB * (len({state.variant for state in states}) + converts)
    more = _CONVERSION_MIB * converts
    return replace(
        measured,
        cold_seconds=measured.cold_seconds or cold or None,
        rss_mib=measured.rss_mib or (math.ceil(resident / _MIB) + _FRONT_MIB + more if resident else None),
        gpu_memory_mib=measured.gpu_memory_mib or (math.ceil(device / _MIB) + contexts + more if device else None),
    )


def _sum_over_variants(states: Sequence[StateLabel], size: Callable[[StateLabel], int]) -> int:
    """Return the sum of the largest size of each variant."""
    largest: dict[str, int] = {}
    for state in states:
        largest[state.variant] = max(largest.get(state.variant, 0), size(state))
    return sum(largest.values())


def _cache_mib(states: Sequence[StateLabel], given: int | None) -> int:
    largest = _sum_over_variants(states, lambda state: sum(family.size for family in state.families)) / _MIB
    if given is None:
        return max(CACHE_MIB, _round_up(_CACHE_MARGIN * largest))
    if given < 2 * largest:
        raise BadInputError(
            f"a cache of {given} MiB is too small: the states of a pod have {largest:.0f} MiB, a start may copy all of "
            "them and compile as much again, and a pod that exceeds the limit is evicted",
            next_step=f"leave out --cache-size, or set it to {_round_up(_CACHE_MARGIN * largest)} or more",
        )
    return given


def _round_up(mib: float) -> int:
    return math.ceil(mib / _STEP_MIB) * _STEP_MIB
