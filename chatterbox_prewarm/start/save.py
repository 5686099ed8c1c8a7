"""Save the persistent state of a warmed-up model, with its manifest, into a directory."""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.families.registry import BYTECODE, FAMILIES, applicable
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.reference_clip import reference_clip
from chatterbox_prewarm.model.warmup.settings import SHORT_TEXT
from chatterbox_prewarm.start.attach import Attached
from chatterbox_prewarm.start.upstream import attach_upstream, is_upstream_attached
from chatterbox_prewarm.state.compatibility import current_facts, machine_facts
from chatterbox_prewarm.state.manifest import FamilyEntry, Manifest, Reference, WeightsEntry
from chatterbox_prewarm.state.manifest_file import write_manifest
from chatterbox_prewarm.state.places import check_output_place
from chatterbox_prewarm.state.provenance import read_provenance
from chatterbox_prewarm.system.digests import scan, set_digest
from chatterbox_prewarm.system.fingerprint import read_fingerprint
from chatterbox_prewarm.system.gpu_stand_in import stand_in_target
from chatterbox_prewarm.system.paths import as_path
from chatterbox_prewarm.version import __version__
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

#: Half a second of audio: long enough to run every part of the model, short enough for a CPU.
REFERENCE_TOKENS = 12
_REFERENCE_SEED = 20240


@dataclass(frozen=True, kw_only=True)
class WarmupRecord:
    """Facts about the warm-up for the manifest.

    Attributes:
        levels: the levels that the warm-up ran.
        texts: the texts that it synthesized.
        reference: the synthesis that a proof repeats; by default it is made now.
        sources: the source files of the modules that a start imports; by default of all modules imported so far.
        parameters: the parameters of the bake.
    """

    levels: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    reference: Reference | None = None
    sources: Collection[str] | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)


class HasAttached(Protocol):
    """A model that knows its start, such as a `PrewarmedChatterbox`."""

    @property
    def attached(self) -> Attached: ...  # noqa: D102


def save_warmup_cache(
    model: Attached | HasAttached,
    cache_path: str | Path,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    record: WarmupRecord | None = None,
) -> Manifest:
    """Write the warm state of a loaded and warmed-up model into a new or empty directory.

    The manifest is written last, so a directory without a manifest is not a warm state. `bake` does more: it checks the
    result in a fresh process and replaces an older state atomically.

    Example:
        >>> model = PrewarmedChatterbox.from_pretrained_with_warmup("cuda")
        >>> save_warmup_cache(model, "warm")

    Args:
        model: a model loaded by this project, after its warm-up.
        cache_path: a directory that is empty or does not exist yet.
        families: the cache families to save. Families that the model does not use are left out.
        record: facts about the warm-up for the manifest.

    Raises:
        BadInputError: the model was not loaded by this project or only converts speech, or the directory is not empty
            or cannot be made.
    """
    attached = model if isinstance(model, Attached) else getattr(model, "attached", None)
    if not isinstance(attached, Attached):
        raise BadInputError(
            f"{type(model).__name__} is not a model that this project loaded",
            next_step="load it with from_pretrained_with_warmup or load_warmup_cache",
        )
    if attached.prepared.options.converts:
        raise BadInputError(
            "a model that only converts speech cannot make a warm state",
            next_step="save the state of a model that speaks texts; a conversion uses it, too",
        )
    directory = _empty_directory(cache_path)
    record = record or WarmupRecord()
    options, execution = attached.prepared.options, attached.prepared.execution
    weights = read_record(options.weights)
    families = [name for name in families if name in applicable(execution.profile, options.device)]
    # The reference and a voice come first, because they load things that belong into the families.
    reference = record.reference or make_reference(attached)
    if any(FAMILIES[name].for_upstream for name in families) and not is_upstream_attached(attached.prepared):
        from chatterbox_prewarm.model.voices import prepare_voice

        upstream = attach_upstream(attached.prepared, lean=attached.synthesizer.model)
        with reference_clip() as clip:
            prepare_voice(upstream, clip)
    entries = _save_families(attached, directory, families, record.sources)
    manifest = Manifest(
        tool=f"chatterbox-prewarm {__version__}",
        created=_created(),
        variant=weights.variant,
        execution=execution,
        levels=record.levels,
        warmup_texts=record.texts,
        weights=WeightsEntry.from_record(weights),
        fingerprint=read_fingerprint(options.device).fields(),
        families=entries,
        voices=tuple(sorted(attached.synthesizer.voices)) if "conditionals" in families else (),
        reference=reference,
        provenance=read_provenance(record.parameters),
        cross_compiled=stand_in_target() is not None,
        set_digest=set_digest(file for entry in entries for file in entry.files),
    )
    write_manifest(manifest, directory)
    return manifest


def _empty_directory(path: str | Path) -> Path:
    """Make a directory if it does not exist, and refuse one that is not empty.

    Raises:
        BadInputError: see above, or the directory cannot be made or is inside a state or a checkpoint.
    """
    directory = as_path(path, "the path")
    check_output_place(directory.parent)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        empty = not any(directory.iterdir())
    except OSError as error:
        raise from_os_error(error, f"making the directory {directory}") from error
    if not empty:
        raise BadInputError(f"{directory} is not empty", next_step="give the path of a new or empty directory")
    return directory


def _save_families(
    attached: Attached, directory: Path, families: Sequence[str], sources: Collection[str] | None
) -> tuple[FamilyEntry, ...]:
    """Save each family into a folder of its name, and return their manifest entries, without costs."""
    options = attached.prepared.options
    facts = machine_facts(options.weights, options.cache, options.device)
    imported = BYTECODE.start_sources()
    context = replace(
        attached.prepared.family_context(attached.synthesizer.voices),
        sources=frozenset(imported if sources is None else sources),
        upstream_sources=imported,
    )
    entries = []
    for name in families:
        (directory / name).mkdir()
        required = FAMILIES[name].save(directory / name, context)
        files = scan(directory, below=name)
        if not files:
            (directory / name).rmdir()  # a state has no empty folders
        entries.append(
            FamilyEntry(
                name=name,
                requires=current_facts(required, facts),
                files=files,
                seconds_spent=0.0,
                seconds_saved=0.0,
            )
        )
    return tuple(entries)


def make_reference(attached: Attached) -> Reference:
    """Synthesize the reference that a proof repeats. On a stand-in for a GPU, which computes nothing, only name it."""
    import torch

    reference = Reference(
        text=SHORT_TEXT,
        voice=DEFAULT_VOICE,
        seed=_REFERENCE_SEED,
        max_new_tokens=REFERENCE_TOKENS,
        threads=torch.get_num_threads(),
        device=attached.synthesizer.model.device,
        sample_rate=attached.synthesizer.model.sample_rate,
        samples=0,
        tokens_sha256="",
        pcm_sha256="",
    )
    if stand_in_target() is not None:
        return reference
    speech = attached.synthesizer.synthesize(
        SHORT_TEXT, voice=DEFAULT_VOICE, seed=_REFERENCE_SEED, max_new_tokens=REFERENCE_TOKENS
    )
    return replace(
        reference,
        samples=len(speech.samples),
        tokens_sha256=speech.tokens_sha256,
        pcm_sha256=speech.pcm_sha256,
    )


def _created() -> str:
    """Return the present time in ISO 8601, or SOURCE_DATE_EPOCH, with which a repeated build gives the same bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = dt.datetime.fromtimestamp(int(epoch), tz=dt.timezone.utc) if epoch else dt.datetime.now(tz=dt.timezone.utc)
    return moment.isoformat(timespec="seconds")
