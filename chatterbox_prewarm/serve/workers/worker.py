"""The worker process: load the model, check it, then handle one request at a time until the front stops it.

The front starts it with a socket, over which it sends the configuration. The worker reports each phase of its start, so
that the front can answer probes while this process imports packages and loads weights.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import queue
import socket
import sys
import threading
import time
import wave
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import ModelError, PrewarmError, as_prewarm_error, first_line, is_out_of_threads
from chatterbox_prewarm.model.warmup.adaptive import plan_for
from chatterbox_prewarm.model.warmup.settings import switched_off
from chatterbox_prewarm.proof.probes import status_field
from chatterbox_prewarm.redaction import print_traceback
from chatterbox_prewarm.serve.workers import log_lines, messages
from chatterbox_prewarm.serve.workers.fatal_errors import is_fatal
from chatterbox_prewarm.serve.workers.messages import PROGRESS_SECONDS, PreemptedError, RequestQueue, Usage
from chatterbox_prewarm.serve.workers.speech_options import ConversionOptions, SpeechOptions
from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig
from chatterbox_prewarm.start.attach import attach, checked
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.system.json_subprocess import DEBUG, claim_stdout, describe
from chatterbox_prewarm.system.metrics import StartMetrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chatterbox_prewarm.model.chunk import Chunk
    from chatterbox_prewarm.model.conversion import Converter
    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.model.warmup.adaptive import WarmupStep
    from chatterbox_prewarm.serve.workers.speech_options import AudioOptions
    from chatterbox_prewarm.serve.workers.worker_voices import VoiceCache
    from chatterbox_prewarm.start.attach import Attached

logger = logging.getLogger(__name__)

#: After this many seconds without a request, a worker is idle and continues its warm-up.
_IDLE_SECONDS = 2.0
#: Chunk size when the caller needs all audio at once: 10 s of audio. The vocoder reports no progress within a chunk, so
#: chunks must not be longer.
_LONG_CHUNK_TOKENS = 250


def main() -> None:
    """Run a worker. If its start fails, report the error to the front and exit with the exit code of the error.

    The argument of the process is the file descriptor of its end of the socket pair.
    """
    claim_stdout().close()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        message = messages.receive(connection)
        if message is None:
            return  # the front ended before it had a configuration
        config = WorkerConfig.from_json(message[1])
        log_lines.install(config.log_format, process=config.name, level=logging.INFO)
        worker = Worker(config, connection)
        threading.Thread(target=worker.report_alive, name="alive", daemon=True).start()
        try:
            worker.start()
        except Exception as error:  # noqa: BLE001 - the front reports every error
            if os.environ.get(DEBUG):
                print_traceback()
            failure = as_prewarm_error(error)
            worker.send({"type": "failed", "transient": is_fatal(error), **describe(failure)})
            sys.exit(failure.exit_code)
        worker.serve()


class Worker:
    """A model with its voices, and the connection to the front."""

    def __init__(self, config: WorkerConfig, connection: socket.socket) -> None:
        self._config = config
        self._connection = connection
        self._metrics = StartMetrics(
            origin=config.origin,
            on_phase=lambda name: self.send({"type": "phase", "name": name, "metrics": self._metrics.to_dict()}),
        )
        self._attached: Attached | None = None
        self._converter: Converter | None = None
        self._added_voices: VoiceCache | None = None
        self._progress_sent = 0.0
        self._send_lock = threading.Lock()
        self._warmup_steps: list[WarmupStep] = []
        # Not a daemon: the process must not end while this thread imports.
        self._reader = threading.Thread(target=self._read_text_data)

    def start(self) -> None:
        """Load the model and its warm state, then run every stage of a synthesis once.

        Raises:
            PrewarmError: the model cannot be loaded, or the policy forbids a cold start.
        """
        config = self._config
        plan = plan_for(config.requests_per_minute)
        prepared = prepare(config.start, metrics=self._metrics)
        attached = attach(prepared, threads=config.threads, voices=config.voices)
        from chatterbox_prewarm.serve.workers.worker_voices import VoiceCache, voice_sizes

        sizes = voice_sizes(attached.synthesizer)
        self.send({"type": "attached", "voices": sizes, "metrics": self._metrics.to_dict()})
        with self._metrics.phase("first synthesis"):
            attached = self._attached = checked(attached)
            if config.start.converts:
                self._converter = _checked_converter(attached)
        if config.voice_directory is not None:
            self._added_voices = VoiceCache(attached, config.voice_directory)
        self._metrics.mark("ready")
        if not switched_off():
            self._warmup_steps = [step for step in plan.steps(attached.synthesizer) if step.name not in config.skipped]
        self.send({"type": "ready", **self._report()})
        self._reader.start()

    def _read_text_data(self) -> None:
        """Read the data of all languages after the start, because the first text of a language would wait for it."""
        try:
            self._loaded.synthesizer.model.text.load()
        except Exception as error:  # noqa: BLE001 - a request that needs the data reports it
            logger.warning("the data of a language cannot be read: %s", first_line(error))

    def serve(self) -> None:
        """Handle requests until the front closes the connection or sends `stop`. Warm up while idle."""
        requests = RequestQueue(self._connection)
        while True:
            try:
                message = requests.get(_IDLE_SECONDS if self._warmup_steps else None)
            except queue.Empty:
                if self._warm_up(self._warmup_steps[0], requests):
                    del self._warmup_steps[0]
                continue
            if message is None or message[0]["type"] == "stop":
                return
            self._handle(requests, *message)
            message = None  # its payload has up to 29 MB, and the next message may come much later

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send a message to the front. Any thread may call this."""
        with self._send_lock:
            self._connection.sendall(messages.encode(header, payload))

    def report_alive(self) -> None:
        """Tell the front every second that this process runs, until the connection is closed."""
        with contextlib.suppress(OSError):
            while True:
                self.send({"type": "alive"})
                time.sleep(PROGRESS_SECONDS)

    def _handle(self, requests: RequestQueue, header: dict[str, Any], payload: bytes) -> None:
        """Handle a request and send its answer or its error.

        Raises:
            SystemExit: the process can do no more work, for example after a fault of the GPU.
        """
        request_id = header["id"]
        log_lines.REQUEST_ID.set(header["request"])
        try:
            if header["type"] == "convert":
                self._convert(requests, request_id, ConversionOptions(**header["options"], source=payload))
            else:
                self._speak(requests, request_id, SpeechOptions(**header["options"]))
        except PrewarmError as error:
            self.send({"type": "error", "id": request_id, "fatal": False, **describe(error)})
        except Exception as error:
            logger.exception("request %d failed", request_id)
            fatal = is_fatal(error)
            if is_out_of_threads(error):
                # Not the error's own class: the server would take a ModelError for a part without speech.
                reason = as_prewarm_error(error)
                failure = PrewarmError(reason.message, next_step=reason.next_step)
            else:
                failure = (ModelError if fatal else PrewarmError)(
                    f"the worker's device failed: {first_line(error)}" if fatal else f"a fault: {type(error).__name__}",
                    next_step="try again; if the error stays, see the server's log",
                )
            self.send({"type": "error", "id": request_id, "fatal": fatal, **describe(failure)})
            if fatal:
                sys.exit(failure.exit_code)

    def _speak(self, requests: RequestQueue, request_id: int, options: SpeechOptions) -> None:
        from chatterbox_prewarm.model.streaming import generate_stream

        synthesizer = self._synthesizer(options)
        limit = self._config.max_new_tokens
        started = time.monotonic()
        stream = generate_stream(
            synthesizer,
            options.text,
            voice=options.voice,
            language=options.language,
            seed=options.seed,
            max_new_tokens=min(options.max_new_tokens or limit, limit),
            sampling=replace(synthesizer.model.sampling, **options.sampling()),
            chunk_tokens=options.chunk_tokens or _LONG_CHUNK_TOKENS,
            look_ahead=options.look_ahead,
            stopped=lambda: self._is_cancelled(requests, request_id),
        )
        self._send_audio(stream, request_id, started)

    def _convert(self, requests: RequestQueue, request_id: int, options: ConversionOptions) -> None:
        import numpy as np

        if self._converter is None:
            raise AssertionError("a worker that speaks texts was asked to convert speech")
        started = time.monotonic()
        with wave.open(io.BytesIO(options.source)) as file:
            rate, frames = file.getframerate(), file.readframes(file.getnframes())
        stream = self._converter.stream(
            np.frombuffer(frames, "<i2").astype(np.float32) / np.float32(32768),
            rate,
            self._synthesizer(options).voice(options.voice),
            seed=options.seed,
            chunk_tokens=options.chunk_tokens or _LONG_CHUNK_TOKENS,
            look_ahead=options.look_ahead,
            stopped=lambda: self._is_cancelled(requests, request_id),
        )
        self._send_audio(stream, request_id, started)

    def _synthesizer(self, options: AudioOptions) -> Synthesizer:
        """Return a synthesizer with the voice of a request, if the voice exists."""
        if options.voice_digest is not None and self._added_voices is not None:
            return self._added_voices.synthesizer(options.voice, options.voice_digest)
        return self._loaded.synthesizer

    def _send_audio(self, stream: Iterable[Chunk], request_id: int, started: float) -> None:
        """Send the chunks of a request, or that it was cancelled."""
        finished = False
        for chunk in stream:
            finished = chunk.is_last
            header = {
                "type": "audio",
                "id": request_id,
                "tokens": int(chunk.tokens.size),
                "truncated": chunk.is_truncated,
                "last": finished,
            }
            if finished:
                header |= {"seconds": time.monotonic() - started, **self._report()}
            self.send(header, chunk.pcm.astype("<i2").tobytes())
        if not finished:
            self.send({"type": "cancelled", "id": request_id})

    def _is_cancelled(self, requests: RequestQueue, request_id: int) -> bool:
        """Return whether the front cancelled a request, and send `progress` every second."""
        if time.monotonic() - self._progress_sent > PROGRESS_SECONDS:
            self._progress_sent = time.monotonic()
            self.send({"type": "progress", "id": request_id})
        return requests.is_cancelled(request_id)

    def _warm_up(self, step: WarmupStep, requests: RequestQueue) -> bool:
        """Run a step of the idle warm-up. Return False when a request preempted it, True when it need not run again.

        Raises:
            SystemExit: the step made this process unusable. The front knows the step, and the next worker skips it.
        """
        started = time.monotonic()
        self.send({"type": "warming", "step": step.name})
        try:
            step.run(requests.check_preempted)
        except PreemptedError:
            self.send({"type": "warming", "step": None})
            return False
        except Exception as error:
            if is_fatal(error):
                logger.exception("the warm-up of %s made this worker unusable", step.name)
                sys.exit(ModelError.exit_code)
            logger.exception("the warm-up of %s failed and is skipped", step.name)
            self.send({"type": "warming", "step": None})
            return True
        self._metrics.add_seconds(f"warm-up of {step.name}", time.monotonic() - started)
        self.send({"type": "warmed", **self._report()})
        return True

    @property
    def _loaded(self) -> Attached:
        if self._attached is None:
            raise AssertionError("a request arrived before the start was complete")
        return self._attached

    def _report(self) -> dict[str, Any]:
        """Return the event log, the counters and the resource usage of this process, for a message header."""
        import torch

        device = self._config.device
        on_gpu = device.startswith("cuda")
        usage = Usage(
            rss_bytes=1024 * (status_field(os.getpid(), "VmRSS") or 0),
            vram_bytes=torch.cuda.memory_reserved(device) if on_gpu else 0,
            vram_peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else 0,
            voices=self._added_voices.voices if self._added_voices else 0,
            voice_bytes=self._added_voices.size if self._added_voices else 0,
            **(self._attached.synthesizer.model.decoder.prefix_usage() if self._attached else {}),
        )
        return {"metrics": self._metrics.to_dict(), "usage": asdict(usage)}


def _checked_converter(attached: Attached) -> Converter:
    """Return a converter for the model of a start, after a check of its speech tokenizer."""
    from chatterbox_prewarm.model.conversion import load_converter

    converter = load_converter(attached.synthesizer.model, attached.prepared.options.weights)
    converter.check()
    return converter
