"""Client of the speech API that measures the responses."""

from __future__ import annotations

import contextlib
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
from chatterbox_prewarm.model.warmup.settings import TEXTS
from chatterbox_prewarm.system.children import TOKEN
from chatterbox_prewarm.system.metrics import now

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: The API returns 16-bit mono samples at 24 kHz.
_BYTES_PER_SECOND = 48_000
#: A streamed response contains only samples, so its first bytes are already audio.
_STREAMED = {"response_format": "pcm", "stream_format": "audio"}
_ONE_SHOT = {"response_format": "wav"}
#: Seconds that a player buffers before it begins, so that small delays between chunks are not audible.
_PLAYER_BUFFER_SECONDS = 0.1
_TIMEOUT = 600.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """Address of a server, and the token to send if the server demands one."""

    secure: bool = False
    host: str = "127.0.0.1"
    port: int
    token: str = field(default_factory=lambda: os.environ.get(TOKEN, ""), repr=False)

    @classmethod
    def parse(cls, url: str) -> Target:
        """Parse a base URL such as `http://localhost:8000`.

        Raises:
            BadInputError: the URL is invalid.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1 or parts.path.strip("/"):
            raise BadInputError(
                f"{url!r} is not the address of a server", next_step="write it as http://localhost:8000"
            )
        secure = parts.scheme == "https"
        return cls(secure=secure, host=parts.hostname, port=port or (443 if secure else 80))

    def connect(self, timeout: float = _TIMEOUT) -> http.client.HTTPConnection:
        """Create a new connection, which is opened by its first request."""
        connection_class = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        return connection_class(self.host, self.port, timeout=timeout)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that every request needs."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
        """Send a GET request on a new connection; return the status and the body.

        Raises:
            OSError: the server did not respond.
            http.client.HTTPException: the response is not valid HTTP.
        """
        with contextlib.closing(self.connect(timeout)) as connection:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            return response.status, response.read()

    def status(self) -> dict[str, Any]:
        """Return the body of `/startupz`.

        Raises:
            ModelError: the server did not return JSON.
        """
        try:
            status: dict[str, Any] = json.loads(self.get("/startupz")[1])
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ModelError(
                f"{self.host} port {self.port} did not report its status: {error}",
                next_step="check that the server runs",
            ) from error
        return status


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Result of one speech request as the client saw it. All times are seconds since the request was sent.

    Attributes:
        status: HTTP status; 0 if there was no response.
        outcome: "sound" for complete audio, "refused" for a 429 or 503 with OpenAI's error shape and Retry-After, "cut"
            for audio that broke off, "failed" for any other status, "lost" for no response.
        first_chunk: time of the first bytes of audio.
        sound_seconds: seconds of audio received; the header of a WAV file is counted as audio.
        digest: SHA-256 of the received bytes.
        behind: longest wait for data, in seconds, of a player that began 0.1 s after the first chunk.
        text: message of a refusal or failure.
    """

    status: int
    outcome: str
    latency: float
    first_chunk: float = 0.0
    sound_seconds: float = 0.0
    digest: str = ""
    behind: float = 0.0
    text: str = ""


def make_requests(
    tokens: Sequence[int], seeds: int, *, voice: str, look_ahead: int | None = None
) -> list[dict[str, Any]]:
    """Make request bodies: a short, a medium and a long text in turn, each with every seed.

    Args:
        tokens: limit of speech tokens for each of the three texts, at 25 tokens per second of audio. A text that is
            spoken in parts has this limit for each part.
        seeds: number of seeds.
        voice: voice of all requests.
        look_ahead: look-ahead of all requests in tokens; None leaves it out.

    Raises:
        BadInputError: `tokens` does not contain three limits.
    """
    if len(tokens) != len(TEXTS):
        raise BadInputError(f"got {len(tokens)} token limits for {len(TEXTS)} texts", next_step="give three: 25,75,200")
    common = {"voice": voice, **({} if look_ahead is None else {"look_ahead": look_ahead})}
    return [
        {"input": text, "seed": seed, "max_new_tokens": limit, **common}
        for seed in range(seeds)
        for text, limit in zip(TEXTS, tokens, strict=True)
    ]


def request_speech(target: Target, body: dict[str, Any], *, streamed: bool, disconnect: bool = False) -> Answer:
    """Request speech and read the response.

    Args:
        target: server to send the request to.
        body: request body without the response format.
        streamed: stream the audio while the server generates it.
        disconnect: close the connection after the first chunk.
    """
    fields = {**body, **(_STREAMED if streamed else _ONE_SHOT)}
    started = time.monotonic()
    try:
        with contextlib.closing(target.connect()) as connection:
            headers = {**target.headers, "Content-Type": "application/json"}
            connection.request("POST", "/v1/audio/speech", json.dumps(fields), headers)
            response = connection.getresponse()
            if response.status != 200:
                return _read_error(response, started)
            return _read_audio(response, started, disconnect=disconnect)
    except (OSError, http.client.HTTPException) as error:
        message = f"{type(error).__name__}: {error}"
        return Answer(status=0, outcome="lost", latency=time.monotonic() - started, text=message)


def _read_audio(response: http.client.HTTPResponse, started: float, *, disconnect: bool) -> Answer:
    digest, received, first, behind, cut = hashlib.sha256(), 0, 0.0, 0.0, False
    try:
        while chunk := response.read1(1 << 16):
            at = time.monotonic() - started
            if not received:
                first = at
            behind = max(behind, at - (first + _PLAYER_BUFFER_SECONDS + received / _BYTES_PER_SECOND))
            received += len(chunk)
            digest.update(chunk)
            if disconnect:
                break
        else:
            # read1 does not raise if a body with Content-Length is too short. A truncated chunked body raises.
            cut = bool(response.length)
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


def _read_error(response: http.client.HTTPResponse, started: float) -> Answer:
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


@contextlib.contextmanager
def livez_probe(target: Target, period: float = 0.05) -> Iterator[list[tuple[float, float | None]]]:
    """Request `/livez` repeatedly from a thread, each time on a new connection as a kubelet does.

    The default period is short enough to see a front process that stalls, and long enough to leave the cores to the
    worker.

    Yields:
        a list that grows by one entry per probe: the end of the probe in seconds since boot, and the seconds that a
        200 took, or None if the probe failed.
    """
    probes: list[tuple[float, float | None]] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(period):
            started = time.monotonic()
            try:
                status, _ = target.get("/livez")
            except (OSError, http.client.HTTPException):
                status = 0
            probes.append((now(), time.monotonic() - started if status == 200 else None))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield probes
    finally:
        stop.set()
        thread.join()
