"""Server-sent events of streamed audio, parsed as a client parses them."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.serve.http import events

if TYPE_CHECKING:
    from chatterbox_prewarm.serve.http.schemas import ErrorFields


def parse(stream: bytes) -> list[dict[str, Any]]:
    """Parse events with only `data` fields, by the rules of the HTML standard."""
    blocks = stream.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block and "\r" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_audio_is_sent_in_openais_events() -> None:
    audio = bytes(range(256)) * 20
    end = events.done(input_tokens=3, output_tokens=50, finish_reason="length", skipped_parts=2)
    stream = events.delta(audio[:1001]) + events.delta(audio[1001:]) + end
    first, second, last = parse(stream)
    assert first.keys() == second.keys() == {"type", "audio"}
    assert first["type"] == second["type"] == "speech.audio.delta"
    assert base64.b64decode(first["audio"]) + base64.b64decode(second["audio"]) == audio
    assert last == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": 3, "output_tokens": 50, "total_tokens": 53},
        "finish_reason": "length",
        "skipped_parts": 2,
    }


def test_a_failure_during_the_stream_is_sent_as_an_error_event() -> None:
    error: ErrorFields = {
        "message": "two\nlines\r\u2028\x85",
        "type": "server_error",
        "code": "worker_gone",
        "param": None,
    }
    stream = events.failed(error)
    assert stream.count(b"\n") == 2
    assert stream.isascii()
    assert parse(stream) == [{"type": "error", "error": error}]
