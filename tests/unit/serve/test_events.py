"""Events of a streamed sound, read as a client reads them."""

from __future__ import annotations

import base64
import json
from typing import Any

from chatterbox_prewarm.serve.http import events


def read(stream: bytes) -> list[dict[str, Any]]:
    """Events by the rules of the HTML standard, as far as there are only `data` fields."""
    blocks = stream.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block and "\r" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_a_sound_comes_in_openais_events() -> None:
    sound = bytes(range(256)) * 20
    stream = events.delta(sound[:1001]) + events.delta(sound[1001:]) + events.done(input_tokens=3, output_tokens=50)
    first, second, last = read(stream)
    assert first.keys() == second.keys() == {"type", "audio"}
    assert first["type"] == second["type"] == "speech.audio.delta"
    assert base64.b64decode(first["audio"]) + base64.b64decode(second["audio"]) == sound
    assert last == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": 3, "output_tokens": 50, "total_tokens": 53},
    }


def test_a_failure_in_the_middle_is_an_event_with_an_error() -> None:
    error = {"message": "two\nlines\r\u2028\x85", "type": "server_error", "code": "worker_gone", "param": None}
    stream = events.failed(error)
    assert stream.count(b"\n") == 2
    assert stream.isascii()
    assert read(stream) == [{"type": "error", "error": error}]
