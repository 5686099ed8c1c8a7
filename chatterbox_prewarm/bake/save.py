"""Save: write the persistent state of a warmed-up model, manifest and all, into a directory."""

from __future__ import annotations

import datetime as dt
import os
from typing import TYPE_CHECKING

from chatterbox_prewarm.families.registry import BYTECODE, FAMILIES, applicable
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.warmup.inputs import SHORT_TEXT
from chatterbox_prewarm.state.compatibility import current_facts, facts
from chatterbox_prewarm.state.manifest import FamilyEntry, Manifest, Reference, WeightsEntry, write_manifest
from chatterbox_prewarm.state.provenance import read_provenance
from chatterbox_prewarm.system.digests import scan, set_digest
from chatterbox_prewarm.system.fingerprint import read_fingerprint
from chatterbox_prewarm.version import __version__
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.start.attach import Attached

#: Half a second of audio: long enough that every part of the model shows in it, short enough for a CPU.
REFERENCE_TOKENS = 12
_REFERENCE_SEED = 20240


def save_warmup_cache(
    attached: Attached,
    directory: Path,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    levels: Sequence[int] = (),
    texts: Sequence[str] = (),
    reference: Reference | None = None,
    sources: Collection[str] | None = None,
    parameters: Mapping[str, str] | None = None,
) -> Manifest:
    """Write the warm state of a loaded and warmed-up model into an empty directory.

    The manifest is written last, so a directory without one is not a warm state. `bake` does more: it checks the
    result in a fresh process and puts it in place at once.

    Args:
        attached: a model loaded by this project, after its warm-up.
        directory: an existing, empty directory.
        families: which cache families to save, as far as they apply to how the model executes.
        levels: which levels the warm-up ran, for the record.
        texts: what it synthesised, for the record.
        reference: the synthesis that a proof repeats; made now by default.
        sources: source files of the modules that a start imports; of all that were imported by default.
        parameters: what was asked for, for the record.
    """
    prepared = attached.prepared
    record = read_record(prepared.weights)
    known = facts(prepared.weights, prepared.cache, prepared.device)
    families = [name for name in families if name in applicable(prepared.execution.profile, prepared.device)]
    # The reference comes first: what it still loads belongs into the families.
    reference = reference or make_reference(attached)
    session = prepared.session(
        attached.synthesizer, sources=frozenset(BYTECODE.start_sources() if sources is None else sources)
    )
    entries = []
    for name in families:
        (directory / name).mkdir()
        keys = FAMILIES[name].save(directory / name, session)
        files = scan(directory, below=name)
        if not files:
            (directory / name).rmdir()  # a state has no folders without files
        entries.append(
            FamilyEntry(
                name=name,
                requires=current_facts(keys, known),
                files=files,
                seconds_spent=0.0,
                seconds_saved=0.0,
            )
        )
    manifest = Manifest(
        tool=f"chatterbox-prewarm {__version__}",
        created=_created(),
        variant=record.variant,
        execution=prepared.execution,
        levels=tuple(levels),
        warmup_texts=tuple(texts),
        weights=WeightsEntry.from_record(record),
        fingerprint=read_fingerprint(prepared.device).fields(),
        families=tuple(entries),
        voices=tuple(sorted(attached.synthesizer.voices)) if "conditionals" in families else (),
        reference=reference,
        provenance=read_provenance(parameters or {}),
        set_digest=set_digest(file for entry in entries for file in entry.files),
    )
    write_manifest(manifest, directory)
    return manifest


def make_reference(attached: Attached) -> Reference:
    """Synthesise what a proof will repeat."""
    import torch

    speech = attached.synthesizer.synthesize(
        SHORT_TEXT, voice=DEFAULT_VOICE, seed=_REFERENCE_SEED, max_new_tokens=REFERENCE_TOKENS
    )
    return Reference(
        text=SHORT_TEXT,
        voice=DEFAULT_VOICE,
        seed=_REFERENCE_SEED,
        max_new_tokens=REFERENCE_TOKENS,
        threads=torch.get_num_threads(),
        device=attached.synthesizer.model.device,
        sample_rate=speech.sample_rate,
        samples=len(speech.samples),
        tokens_sha256=speech.tokens_sha256,
        pcm_sha256=speech.pcm_sha256,
    )


def _created() -> str:
    """The time of the bake in ISO 8601, or `SOURCE_DATE_EPOCH`, so that a repeated build can give the same bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = dt.datetime.fromtimestamp(int(epoch), tz=dt.timezone.utc) if epoch else dt.datetime.now(tz=dt.timezone.utc)
    return moment.isoformat(timespec="seconds")
