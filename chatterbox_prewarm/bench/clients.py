"""A client of the speech API under measurement: what it asks for, and what it saw of the answer."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.warmup.inputs import TEXTS
from chatterbox_prewarm.serve.http.access import TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

KINDS = ("short", "medium", "long")
#: Of sound as the API gives it: 24 kHz, mono, 16 bits.
_BYTES_PER_SECOND = 48_000
#: A stream of bare samples, so that the first bytes are sound; a whole file, which is sent when it is complete.
_STREAMED = {"response_format": "pcm", "stream_format": "audio"}
_WHOLE = {"response_format": "wav"}
#: What a player waits for before it begins, so that the next chunk need not be there to the millisecond, in seconds.
_LEAD = 0.1
_TIMEOUT = 600.0
#: Often enough to see a stalled front, seldom enough to leave the worker its cores.
_PROBE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server by its address, and the token that it is shown, if it demands one."""

    secure: bool
    host: str
    port: int
    token: str = field(default_factory=lambda: os.environ.get(TOKEN, ""), repr=False)

    @classmethod
    def parse(cls, url: str) -> Target:
        """The server of an address such as `http://localhost:8000`.

        Raises:
            BadInputError: it is none.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1 or parts.path.strip("/"):
            raise BadInputError(f"{url!r} is no server's address", next_step="write it as http://localhost:8000")
        secure = parts.scheme == "https"
        return cls(secure=secure, host=parts.hostname, port=port or (443 if secure else 80))

    def connect(self, timeout: float = _TIMEOUT) -> http.client.HTTPConnection:
        """A connection of its own, as each client has."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=timeout)

    @property
    def headers(self) -> dict[str, str]:
        """Those of every request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
        """Status and body of a GET.

        Raises:
            OSError: there was no answer.
            http.client.HTTPException: it was none of HTTP.
        """
        connection = self.connect(timeout)
        try:
            connection.request("GET", path, headers=self.headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """The body of `/startupz`.

        Raises:
            ModelError: the server gave none.
        """
        try:
            found: dict[str, Any] = json.loads(self.get("/startupz")[1])
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ModelError(
                f"{self.host} port {self.port} does not say how it stands: {error}", next_step="see whether it runs"
            ) from error
        return found


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one request, as its client saw it; times are seconds since it was sent.

    Attributes:
        status: of HTTP; 0 when there was none.
        outcome: "sound" for a whole answer, "refused" for 429 and 503 in OpenAI's shape with Retry-After, "cut" for
            sound that broke off, "failed" for any other status, "lost" for no answer.
        first_chunk: when the first bytes of sound came.
        sound_seconds: how much came, the header of a whole file counted in.
        digest: SHA-256 of it.
        behind: how long a player that began 0.1 s after the first chunk would have waited for others, at the most.
        text: what a refusal or failure said.
    """

    status: int
    outcome: str
    latency: float
    first_chunk: float = 0.0
    sound_seconds: float = 0.0
    digest: str = ""
    behind: float = 0.0
    text: str = ""


def mix(tokens: Sequence[int], seeds: int, *, voice: str, look_ahead: int | None = None) -> list[dict[str, Any]]:
    """Requests for a short, a medium and a long text in turn, each with every seed.

    Args:
        tokens: the most speech tokens of each kind, 25 a second; of each part of a text that is spoken in parts.
        seeds: how many.
        voice: of all.
        look_ahead: of all, as in the API; None leaves it out.

    Raises:
        BadInputError: there is not one bound for each kind.
    """
    if len(tokens) != len(KINDS):
        raise BadInputError(
            f"{len(tokens)} bounds on tokens for {len(KINDS)} kinds of text", next_step="give three, as 25,75,200"
        )
    common = {"voice": voice, **({} if look_ahead is None else {"look_ahead": look_ahead})}
    return [
        {"input": text, "seed": seed, "max_new_tokens": most, **common}
        for seed in range(seeds)
        for text, most in zip(TEXTS, tokens, strict=True)
    ]


def ask(target: Target, request: dict[str, Any], *, streamed: bool, leave: bool = False) -> Answer:
    """Ask for speech and take the answer in.

    Args:
        target: the server.
        request: fields of the body.
        streamed: have the sound sent while it is made.
        leave: go away after the first chunk.
    """
    fields = {**request, **(_STREAMED if streamed else _WHOLE)}
    connection = target.connect()
    started = time.monotonic()
    try:
        headers = {**target.headers, "Content-Type": "application/json"}
        connection.request("POST", "/v1/audio/speech", json.dumps(fields), headers)
        response = connection.getresponse()
        if response.status != 200:
            return _refusal(response, started)
        return _sound(response, started, leave=leave)
    except (OSError, http.client.HTTPException) as error:
        return Answer(
            status=0,
            outcome="lost",
            latency=time.monotonic() - started,
            text=f"{type(error).__name__}: {error}",
        )
    finally:
        connection.close()


def _sound(response: http.client.HTTPResponse, started: float, *, leave: bool) -> Answer:
    digest, received, first, behind, cut = hashlib.sha256(), 0, 0.0, 0.0, False
    try:
        while chunk := response.read1(1 << 16):
            at = time.monotonic() - started
            if not received:
                first = at
            behind = max(behind, at - (first + _LEAD + received / _BYTES_PER_SECOND))
            received += len(chunk)
            digest.update(chunk)
            if leave:
                break
        else:
            cut = bool(response.length)  # of a body whose length was given; a chunked one raises
    except (OSError, http.client.HTTPException):
        cut = True
    return Answer(
        status=200,
        outcome="cut" if cut else "sound",
        latency=time.monotonic() - started,
        first_chunk=first,
        sound_seconds=received / _BYTES_PER_SECOND,
        digest=digest.hexdigest(),
        behind=behind,
    )


def _refusal(response: http.client.HTTPResponse, started: float) -> Answer:
    body = response.read()
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = ""
    clean = response.status in {429, 503} and bool(message) and bool(response.headers["Retry-After"])
    return Answer(
        status=response.status,
        outcome="refused" if clean else "failed",
        latency=time.monotonic() - started,
        text=message or body[:200].decode(errors="replace"),
    )


class LivezProbe:
    """Asks `/livez` all the while, on a connection of its own each time, as a kubelet does.

    Attributes:
        seconds: how long each answer took, as far as it was 200.
        failed: how many were not.
    """

    def __init__(self, target: Target) -> None:
        self.seconds: list[float] = []
        self.failed = 0
        self._target = target
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LivezProbe:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_PROBE_SECONDS):
            started = time.monotonic()
            try:
                status, _ = self._target.get("/livez")
            except (OSError, http.client.HTTPException):
                status = 0
            if status == 200:
                self.seconds.append(time.monotonic() - started)
            else:
                self.failed += 1
