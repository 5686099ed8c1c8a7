"""Server-sent events of a streamed sound, as OpenAI's API has them for speech.

Each is one `data:` line of JSON and an empty line. There is no `event:` line and no `[DONE]`: the type is in the JSON,
and `speech.audio.done` or an error is the last event.
"""

from __future__ import annotations

import base64
import json
from typing import Any

MEDIA_TYPE = "text/event-stream"


def delta(sound: bytes) -> bytes:
    """The next bytes of the sound, in the format that was asked for; all of them in a row are the file."""
    return _event({"type": "speech.audio.delta", "audio": base64.b64encode(sound).decode("ascii")})


def done(*, input_tokens: int, output_tokens: int) -> bytes:
    """The sound is complete.

    Args:
        input_tokens: characters of the text.
        output_tokens: of the speech, 25 to a second of audio.
    """
    usage = {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }
    return _event({"type": "speech.audio.done", "usage": usage})


def failed(error: dict[str, Any]) -> bytes:
    """The sound ends here, incomplete, since something failed after the answer had begun.

    OpenAI's clients raise for an event that holds an `error`, whatever its type.

    Args:
        error: what an answer that fails at once holds under `error`: message, type, code and param.
    """
    return _event({"type": "error", "error": error})


def _event(fields: dict[str, Any]) -> bytes:
    # Escaped to ASCII, since a reader may take other line ends than \n for the end of the event.
    return b"data: " + json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n\n"
