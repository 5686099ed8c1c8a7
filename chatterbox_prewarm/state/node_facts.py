"""Hosts: the facts of a node that a warm state's reuse depends on, as one machine writes them and another reads them.

Only what is the machine's own: the software is the image's. Importing this imports no torch.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.system.fingerprint import MACHINE, read_fingerprint, words_for

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_AGAIN = "write it on the node with `chatterbox-prewarm facts --output FILE`"


def host_facts(device: str | None = None) -> dict[str, str]:
    """The facts of this machine.

    Args:
        device: that a start would have, as torch takes it; which of several GPUs is read. It is a fact only if given.
    """
    found = read_fingerprint(device or "cpu").fields()
    kind = {} if device is None else {"device": device.partition(":")[0]}
    return {name: found[name] for name in MACHINE} | kind


def to_json(facts: Mapping[str, str]) -> str:
    """Facts as JSON text, one a line."""
    return json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_host_facts(path: Path) -> dict[str, str]:
    """Read the facts that `to_json` wrote; what this version does not know is left out.

    Raises:
        BadInputError: there is no such file, or it lacks a fact.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise from_os_error(error, "reading the host's facts") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not JSON: {error}", next_step=_AGAIN) from error
    if not isinstance(raw, dict):
        raise BadInputError(f"{path} holds no facts of a host, but a {type(raw).__name__}", next_step=_AGAIN)
    known = {name: raw[name] for name in (*MACHINE, "device") if name in raw}
    if lacking := [name for name in MACHINE if name not in known]:
        raise BadInputError(f"{path} lacks {lacking[0]!r}, the {words_for(lacking[0])}", next_step=_AGAIN)
    if wrong := [name for name, value in known.items() if not isinstance(value, str)]:
        raise BadInputError(f"{path}: {wrong[0]!r} is {known[wrong[0]]!r}, no text", next_step=_AGAIN)
    return known
