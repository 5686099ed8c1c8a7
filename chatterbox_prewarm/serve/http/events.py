"""Server-sent events for streamed audio, in the format of OpenAI's speech API.

Each event is one `data:` line of JSON and an empty line. There is no `event:` line and no `[DONE]`: the JSON contains
the type, and the last event is `speech.audio.done` or an error.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatterbox_prewarm.serve.http.schemas import ErrorFields, FinishReason, SpeechEvent, SpeechUsage

MEDIA_TYPE = "text/event-stream"


def delta(audio: bytes) -> bytes:
    """Return an event with the next bytes of the audio file."""
    return _event({"type": "speech.audio.delta", "audio": base64.b64encode(audio).decode("ascii")})


def done(*, input_tokens: int, output_tokens: int, finish_reason: FinishReason, skipped_parts: int) -> bytes:
    """Return the event that ends the audio of a request that did not fail.

    Args:
        input_tokens: number of characters in the text.
        output_tokens: number of speech tokens, 25 per second of audio.
        finish_reason: "length" if a part of the text reached the token limit.
        skipped_parts: number of parts of the text that were left out.
    """
    total = input_tokens + output_tokens
    usage: SpeechUsage = {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": total}
    return _event(
        {"type": "speech.audio.done", "usage": usage, "finish_reason": finish_reason, "skipped_parts": skipped_parts}
    )


def failed(error: ErrorFields) -> bytes:
    """Return the event that ends incomplete audio, when a failure occurs after the response has begun.

    OpenAI's clients raise an exception for each event that contains an `error`.
    """
    return _event({"type": "error", "error": error})


def _event(event: SpeechEvent) -> bytes:
    # Escaped to ASCII, because some readers treat other line separators than \n as the end of the event.
    return b"data: " + json.dumps(event, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n\n"
