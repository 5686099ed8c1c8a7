"""Profiles: how the model executes. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from chatterbox_prewarm.errors import BadInputError

#: `eager` runs regions as plain PyTorch, `compiled` uses `torch.compile` with a persisted cache, and `aot` uses
#: packages compiled ahead of time.
PROFILES = ("eager", "compiled", "aot")
#: Dtypes of T3's transformer. S3Gen always computes in float32. float16 is for GPUs: on a CPU, PyTorch's kernels for it
#: take ten times as long as those for float32.
T3_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model executes.

    Attributes:
        profile: one of `PROFILES`.
        t3_dtype: one of `T3_DTYPES`.
        graphs: T3's step is captured as a CUDA graph; only for GPUs.
    """

    profile: str = "eager"
    t3_dtype: str = "float32"
    graphs: bool = False

    def __post_init__(self) -> None:
        _check_choice("profile", self.profile, PROFILES)
        _check_choice("T3 dtype", self.t3_dtype, T3_DTYPES)
        if not isinstance(self.graphs, bool):
            raise BadInputError(f"graphs is {self.graphs!r}", next_step="give true or false")


def default_execution(
    device: str, *, profile: str | None = None, t3_dtype: str = "float32", graphs: bool | None = None
) -> Execution:
    """Choose the execution of a bake. docs/profiles.md shows the measurements behind the defaults.

    Args:
        device: a torch device as a string.
        profile: None chooses `aot`.
        t3_dtype: of T3's transformer.
        graphs: None chooses graphs on a GPU only.

    Raises:
        BadInputError: the profile or the dtype is unknown, or a CPU cannot use the dtype or graphs.
    """
    on_gpu = device.startswith("cuda")
    if graphs and not on_gpu:
        raise BadInputError(f"the device {device!r} does not support CUDA graphs", next_step="start without graphs")
    if t3_dtype == "float16" and not on_gpu:
        raise BadInputError("a CPU computes too slowly in float16", next_step="use bfloat16")
    return Execution(profile=profile or "aot", t3_dtype=t3_dtype, graphs=on_gpu if graphs is None else graphs)


def _check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BadInputError(f"unknown {what} {value!r}", next_step=f"choose one of: {', '.join(choices)}")
