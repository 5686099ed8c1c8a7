"""The worker process: prepare, attach, one real synthesis, then one request after the other until told to stop.

Started by the front with a socket as its file descriptor `fd` and one JSON argument. It reports every phase, so that
the front can answer probes while this process is busy importing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bake.save import REFERENCE_TOKENS
from chatterbox_prewarm.errors import ModelError, PrewarmError, as_prewarm_error, first_line
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.warmup.adaptive import AdaptiveWarmup
from chatterbox_prewarm.model.warmup.inputs import SHORT_TEXT
from chatterbox_prewarm.model.warmup.levels import switched_off
from chatterbox_prewarm.serve.workers import frames, log_lines
from chatterbox_prewarm.serve.workers.fatal_errors import is_broken
from chatterbox_prewarm.serve.workers.inbox import Inbox, LeftError
from chatterbox_prewarm.serve.workers.messages import PROGRESS_SECONDS, PartOrder, Usage
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.system.json_subprocess import DEBUG, claim_stdout, describe, die_with_parent
from chatterbox_prewarm.system.metrics import WarmupMetrics

if TYPE_CHECKING:
    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.model.warmup.adaptive import WarmupStep
    from chatterbox_prewarm.serve.workers.worker_voices import VoiceCache
    from chatterbox_prewarm.start.attach import Attached

logger = logging.getLogger(__name__)

#: A worker counts as idle, and warms up what is left, when no request came for so long.
_IDLE_SECONDS = 2.0
#: A voice is made in a few long steps that cannot report: 1 to 8 s on a CPU. For so long the process is believed.
_VOICE_SECONDS = 60.0
#: Chunks where nobody waits for them, ten seconds each: a vocoder at work on more would say nothing for too long.
_WHOLE_TOKENS = 250


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a worker needs to know; travels as JSON.

    `fd` is its end of the socket pair. `origin` is when the start began, in seconds since boot: for the first worker
    the moment the front was executed, since that is the clock a user waits by; None for a replacement.
    `requests_per_minute` is the load to warm up for, beyond what is needed to be ready, while idle; `skipped` names the
    steps of that which a worker before this one died of.
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
    voice_directory: str | None = None
    threads: int | None
    max_new_tokens: int
    requests_per_minute: float = 0.0
    skipped: tuple[str, ...] = ()
    log_format: str = "text"

    def to_argument(self) -> str:
        """The configuration as a command-line argument."""
        return json.dumps(asdict(self))


def main() -> None:
    """Run a worker to its end; a failure before ready is reported to the front and ends with its exit code."""
    die_with_parent()  # a front that was killed must not leave a model behind
    claim_stdout().close()
    config = WorkerConfig(**json.loads(sys.argv[1]))
    log_lines.install(config.log_format, process=f"worker {config.device}", level=logging.INFO)
    with socket.socket(fileno=config.fd) as connection:
        worker = Worker(config, connection)
        threading.Thread(target=worker.report_alive, name="alive", daemon=True).start()
        try:
            worker.start()
        except Exception as error:  # noqa: BLE001 - whatever it is, the front is to say it
            if os.environ.get(DEBUG):
                traceback.print_exc()
            found = as_prewarm_error(error)
            worker.send({"type": "failed", "passing": is_broken(error), **describe(found)})
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
        self._added: VoiceCache | None = None
        self._reported = 0.0
        self._sending = threading.Lock()
        self._steps: list[WarmupStep] = []
        #: A request whose work cannot report by itself, and until when it is believed to be at work.
        self._vouched = (0, 0.0)

    def start(self) -> None:
        """Become ready: prepare, attach, and one real synthesis.

        Raises:
            PrewarmError: the model cannot be loaded, or the policy forbids a cold start.
        """
        config = self._config
        plan = AdaptiveWarmup.plan_for(config.requests_per_minute)
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
        from chatterbox_prewarm.serve.workers.worker_voices import VoiceCache, voice_sizes

        if config.voice_directory is not None:
            self._added = VoiceCache(attached, Path(config.voice_directory))
        sizes = voice_sizes(attached.synthesizer)
        self.send({"type": "attached", "voices": sizes, "metrics": self._metrics.to_dict()})
        reference = prepared.manifest.reference if prepared.manifest else None
        with self._metrics.phase("first synthesis"):
            attached.synthesizer.synthesize(
                reference.text if reference else SHORT_TEXT,
                voice=reference.voice if reference else DEFAULT_VOICE,
                seed=reference.seed if reference else 0,
                max_new_tokens=reference.max_new_tokens if reference else REFERENCE_TOKENS,
            )
        self._metrics.mark("ready")
        if not switched_off():
            self._steps = [step for step in plan.steps(attached.synthesizer) if step.name not in config.skipped]
        self.send({"type": "ready", **self._report()})

    def serve(self) -> None:
        """Answer requests until the front closes or says stop; between them, warm up what is left."""
        inbox = Inbox(self._connection)
        while True:
            try:
                message = inbox.take(_IDLE_SECONDS if self._steps else None)
            except queue.Empty:
                if self._warm_up(self._steps[0], inbox):
                    del self._steps[0]
                continue
            if message is None or message[0]["type"] == "stop":
                return
            self._answer(inbox, *message)

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send a message to the front; from any thread."""
        with self._sending:
            self._connection.sendall(frames.encode(header, payload))

    def report_alive(self) -> None:
        """Tell the front every second that this process runs, until the connection is closed."""
        with contextlib.suppress(OSError):
            while True:
                number, until = self._vouched
                if time.monotonic() < until:
                    self.send({"type": "progress", "id": number})
                else:
                    self.send({"type": "alive"})
                time.sleep(PROGRESS_SECONDS)

    def _answer(self, inbox: Inbox, header: dict[str, Any], payload: bytes) -> None:
        """Do what a message asks for, and say how it went.

        Raises:
            SystemExit: the process can do no more work, as after a fault of the device.
        """
        number = header["id"]
        log_lines.REQUEST_ID.set(header["request"])
        try:
            if header["type"] == "speak":
                self._speak(inbox, number, PartOrder(**header["part"]))
            else:
                self._prepare_voice(number, payload)
        except PrewarmError as error:
            self.send({"type": "error", "id": number, "broken": False, **describe(error)})
        except Exception as error:
            logger.exception("request %d failed", number)
            broken = is_broken(error)
            what = f"the worker's device failed: {first_line(error)}" if broken else f"a fault: {type(error).__name__}"
            kind = ModelError if broken else PrewarmError
            fault = kind(what, next_step="try again; if it stays so, see the server's log")
            self.send({"type": "error", "id": number, "broken": broken, **describe(fault)})
            if broken:
                sys.exit(fault.exit_code)

    def _speak(self, inbox: Inbox, number: int, part: PartOrder) -> None:
        from chatterbox_prewarm.model.sampling import Sampling
        from chatterbox_prewarm.model.streaming import generate_stream

        fields = {
            name: value
            for name in ("temperature", "cfg_weight", "exaggeration")
            if (value := getattr(part, name)) is not None
        }
        bound = min(part.max_new_tokens, self._config.max_new_tokens)
        started = time.monotonic()
        stream = generate_stream(
            self._synthesizer(part),
            part.text,
            voice=part.voice,
            seed=part.seed,
            max_new_tokens=bound,
            sampling=Sampling(**fields),
            chunk_tokens=part.chunk_tokens or _WHOLE_TOKENS,
            look_ahead=part.look_ahead,
            stopped=lambda: self._wanted_no_more(inbox, number),
        )
        finished = False
        for chunk in stream:
            finished = chunk.is_last
            header = {"type": "audio", "id": number, "tokens": int(chunk.tokens.size), "last": finished}
            if finished:
                header |= {"seconds": time.monotonic() - started, **self._report()}
            self.send(header, chunk.pcm.astype("<i2").tobytes())
        if not finished:
            self.send({"type": "cancelled", "id": number})

    def _synthesizer(self, part: PartOrder) -> Synthesizer:
        """What speaks with a part's voice."""
        if self._attached is None:
            raise AssertionError("requests come after start")
        if part.voice_digest is None or self._added is None:
            return self._attached.synthesizer
        return self._added.synthesizer(part.voice, part.voice_digest)

    def _prepare_voice(self, number: int, clip: bytes) -> None:
        from chatterbox_prewarm.serve.workers.worker_voices import voice_bytes

        if self._attached is None:
            raise AssertionError("requests come after start")
        self._vouched = (number, time.monotonic() + _VOICE_SECONDS)
        try:
            voice = voice_bytes(self._attached, clip)
        finally:
            self._vouched = (0, 0.0)
        self.send({"type": "voice", "id": number}, voice)

    def _wanted_no_more(self, inbox: Inbox, number: int) -> bool:
        """Whether a request was called off; on the way, tell the front that this process does not hang."""
        if time.monotonic() - self._reported > PROGRESS_SECONDS:
            self._reported = time.monotonic()
            self.send({"type": "progress", "id": number})
        return inbox.cancelled(number)

    def _warm_up(self, step: WarmupStep, inbox: Inbox) -> bool:
        """Take a step of the warm-up, or give it up; False when a request came before it was done.

        Raises:
            SystemExit: it left this process without use. The front knows the step, and has the next worker skip it.
        """
        started = time.monotonic()
        self.send({"type": "warming", "step": step.name})
        try:
            step.run(inbox.leave_for_others)
        except LeftError:
            self.send({"type": "warming", "step": None})
            return False
        except Exception as error:
            if is_broken(error):
                logger.exception("the warm-up of %s broke this worker", step.name)
                sys.exit(ModelError.exit_code)
            logger.exception("the warm-up of %s is given up", step.name)
            self.send({"type": "warming", "step": None})
            return True
        self._metrics.add_seconds(f"warm-up of {step.name}", time.monotonic() - started)
        self.send({"type": "warmed", **self._report()})
        return True

    def _report(self) -> dict[str, Any]:
        """The log and counters of this process, and what it holds."""
        return {"metrics": self._metrics.to_dict(), "usage": asdict(self._usage())}

    def _usage(self) -> Usage:
        import torch

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        device = self._config.device
        on_gpu = device.startswith("cuda")
        return Usage(
            rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            vram_bytes=torch.cuda.memory_reserved(device) if on_gpu else 0,
            vram_peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else 0,
            hooks=self._hooks(),
            voices=self._added.voices if self._added else 0,
            voice_bytes=self._added.size if self._added else 0,
        )

    def _hooks(self) -> int:
        if self._attached is None:
            return 0
        model = self._attached.synthesizer.model
        modules = (module for part in (model.t3, model.s3gen, model.ve) for module in part.modules())
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


if __name__ == "__main__":
    main()
