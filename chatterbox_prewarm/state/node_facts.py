"""The facts of a node that decide whether a warm state fits: one machine writes them, and another reads them.

They describe only the hardware and the driver, because the software is part of the image.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.system.fingerprint import MACHINE, describe_fact, device_kind, read_fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_WRITE_HINT = "write it on the node with `chatterbox-prewarm facts --output FILE`"


def node_facts(device: str | None = None) -> dict[str, str]:
    """Return the facts of this machine.

    Args:
        device: the torch device of a start. It selects one of several GPUs, and its kind becomes a fact.
    """
    fingerprint = read_fingerprint(device or "cpu").fields()
    kind = {} if device is None else {"device": device_kind(device)}
    return {name: fingerprint[name] for name in MACHINE} | kind


def node_facts_to_json(facts: Mapping[str, str]) -> str:
    """Return facts as JSON text, one per line."""
    return json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_node_facts(path: Path) -> dict[str, str]:
    """Read facts that `node_facts_to_json` wrote. Facts that this version does not know are ignored.

    Raises:
        BadInputError: the file is missing, is not JSON, or lacks a fact.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise from_os_error(error, "reading the facts of the node") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not JSON: {error}", next_step=_WRITE_HINT) from error
    if not isinstance(raw, dict):
        raise BadInputError(
            f"{path} holds a {type(raw).__name__} instead of the facts of a node", next_step=_WRITE_HINT
        )
    facts = {name: raw[name] for name in (*MACHINE, "device") if name in raw}
    if missing := [name for name in MACHINE if name not in facts]:
        raise BadInputError(f"{path} lacks {missing[0]!r}, the {describe_fact(missing[0])}", next_step=_WRITE_HINT)
    if wrong := [name for name, value in facts.items() if not isinstance(value, str)]:
        raise BadInputError(
            f"{path}: {wrong[0]!r} is {facts[wrong[0]]!r}, which is not a string", next_step=_WRITE_HINT
        )
    return facts
