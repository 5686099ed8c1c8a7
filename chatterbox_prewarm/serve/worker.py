"""The worker process: prepare, attach, one real synthesis, then one request after the other until told to stop.

Started by the front with a socket as its file descriptor `fd` and one JSON argument. It reports every phase, so that
the front can answer probes while this process is busy importing.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.child import DEBUG, claim_stdout, describe, die_with_parent
from chatterbox_prewarm.clips import DEFAULT_VOICE
from chatterbox_prewarm.errors import PrewarmError, as_prewarm_error
from chatterbox_prewarm.load import attach, prepare
from chatterbox_prewarm.save import REFERENCE_TOKENS
from chatterbox_prewarm.serve import frames
from chatterbox_prewarm.warmup.inputs import SHORT_TEXT
from chatterbox_prewarm.warmup.metrics import WarmupMetrics

if TYPE_CHECKING:
    from chatterbox_prewarm.load import Attached
    from chatterbox_prewarm.synthesis import Speech

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a worker needs to know; travels as JSON.

    `fd` is its end of the socket pair. `origin` is when the start began, in seconds since boot: for the first worker
    the moment the front was executed, since that is the clock a user waits by; None for a replacement.
    """

    fd: int = -1
    origin: float | None = None
    warm: str
    weights: str
    cache: str
    policy: str
    profile: str | None
    key: str | None
    signature: str | None
    expect_digest: str | None
    device: str
    voices: dict[str, str]
    threads: int | None
    max_new_tokens: int

    def to_argument(self) -> str:
        """The configuration as a command-line argument."""
        return json.dumps(asdict(self))


def main() -> None:
    """Run a worker to its end; a failure before ready is reported to the front and ends with its exit code."""
    die_with_parent()  # a front that was killed must not leave a model behind
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s", stream=sys.stderr)
    claim_stdout().close()
    config = WorkerConfig(**json.loads(sys.argv[1]))
    with socket.socket(fileno=config.fd) as connection:
        worker = Worker(config, connection)
        try:
            worker.start()
        except Exception as error:  # noqa: BLE001 - whatever it is, the front is to say it
            if os.environ.get(DEBUG):
                traceback.print_exc()
            found = as_prewarm_error(error)
            worker.send({"type": "failed", **describe(found)})
            sys.exit(found.exit_code)
        worker.serve()


class Worker:
    """A model, its voices, and the connection to the front."""

    def __init__(self, config: WorkerConfig, connection: socket.socket) -> None:
        self._config = config
        self._connection = connection
        self._metrics = WarmupMetrics(
            origin=config.origin,
            on_phase=lambda name: self.send({"type": "phase", "name": name, "metrics": self._metrics.to_dict()}),
        )
        self._attached: Attached | None = None

    def start(self) -> None:
        """Become ready: prepare, attach, and one real synthesis.

        Raises:
            PrewarmError: the model cannot be loaded, or the policy forbids a cold start.
        """
        config = self._config
        prepared = prepare(
            Path(config.warm),
            Path(config.weights),
            cache=Path(config.cache),
            device=config.device,
            policy=config.policy,
            profile=config.profile,
            metrics=self._metrics,
            key=Path(config.key) if config.key else None,
            signature=Path(config.signature) if config.signature else None,
            expected_digest=config.expect_digest,
        )
        attached = self._attached = attach(
            prepared,
            threads=config.threads,
            voices={name: Path(clip) for name, clip in config.voices.items()},
        )
        voices = sorted(attached.synthesizer.voices)
        self.send({"type": "attached", "voices": voices, "metrics": self._metrics.to_dict()})
        reference = prepared.manifest.reference if prepared.manifest else None
        with self._metrics.phase("first synthesis"):
            attached.synthesizer.synthesize(
                reference.text if reference else SHORT_TEXT,
                voice=reference.voice if reference else DEFAULT_VOICE,
                seed=reference.seed if reference else 0,
                max_new_tokens=reference.max_new_tokens if reference else REFERENCE_TOKENS,
            )
        self._metrics.mark("ready")
        self.send({"type": "ready", "metrics": self._metrics.to_dict()})

    def serve(self) -> None:
        """Answer requests until the front closes or says stop."""
        while (message := frames.receive(self._connection)) is not None:
            header, _ = message
            if header["type"] == "stop":
                return
            try:
                wav = encode_wav(self._speak(header["request"]))
            except PrewarmError as error:
                self.send({"type": "error", "id": header["id"], **describe(error)})
            except Exception as error:
                logger.exception("request %s failed", header["id"])
                fault = PrewarmError(f"the synthesis failed: {type(error).__name__}", next_step="see the server's log")
                self.send({"type": "error", "id": header["id"], **describe(fault)})
            else:
                self.send({"type": "speech", "id": header["id"], "metrics": self._metrics.to_dict()}, wav)

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send a message to the front."""
        self._connection.sendall(frames.encode(header, payload))

    def _speak(self, request: dict[str, Any]) -> Speech:
        from chatterbox_prewarm.synthesis import Sampling

        if self._attached is None:
            raise AssertionError("requests come after start")
        fields = {name: request[name] for name in ("temperature", "cfg_weight", "exaggeration") if name in request}
        return self._attached.synthesizer.synthesize(
            request["text"],
            voice=request["voice"],
            seed=request.get("seed"),
            max_new_tokens=min(request.get("max_new_tokens", self._config.max_new_tokens), self._config.max_new_tokens),
            sampling=Sampling(**fields),
        )


def encode_wav(speech: Speech) -> bytes:
    """Speech as a WAV file: mono, 16-bit PCM."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, speech.pcm, speech.sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
