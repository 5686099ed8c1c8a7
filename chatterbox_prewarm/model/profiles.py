"""Profiles: how the model executes. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from chatterbox_prewarm.errors import BadInputError

#: `eager` runs regions as they are written, `compiled` through `torch.compile` with a persisted cache, `aot` from
#: packages that were compiled ahead of time.
PROFILES = ("eager", "compiled", "aot")
#: What T3's transformer may compute in; S3Gen stays in float32.
T3_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model executes: a profile, and what goes on top of it.

    Attributes:
        profile: one of `PROFILES`.
        t3_dtype: one of `T3_DTYPES`.
        graphs: T3's step is captured as a CUDA graph, which a CPU does not have.
    """

    profile: str = "eager"
    t3_dtype: str = "float32"
    graphs: bool = False

    def __post_init__(self) -> None:
        _choose("profile", self.profile, PROFILES)
        _choose("T3 dtype", self.t3_dtype, T3_DTYPES)
        if not isinstance(self.graphs, bool):
            raise BadInputError(f"graphs is {self.graphs!r}", next_step="give true or false")


def default_execution(
    device: str, *, profile: str | None = None, t3_dtype: str = "float32", graphs: bool | None = None
) -> Execution:
    """What a bake takes when nothing is said; the figures behind it stand in docs/profiles.md.

    Args:
        device: as upstream takes it, a string.
        profile: asked for, or None.
        t3_dtype: of T3's transformer.
        graphs: asked for, or None: on a GPU.

    Raises:
        BadInputError: an unknown profile or type, or graphs for a CPU.
    """
    on_gpu = device.startswith("cuda")
    if graphs and not on_gpu:
        raise BadInputError(f"the device {device!r} has no CUDA graphs", next_step="leave out --graphs")
    return Execution(profile=profile or "aot", t3_dtype=t3_dtype, graphs=on_gpu if graphs is None else graphs)


def _choose(what: str, value: object, among: tuple[str, ...]) -> None:
    if value not in among:
        raise BadInputError(f"there is no {what} {value!r}", next_step=f"choose one of: {', '.join(among)}")
