"""The configuration of worker processes, one for each device, and how to start them with it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.workers import messages
from chatterbox_prewarm.serve.workers.worker_process import start_process
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.state.signature import Trust
from chatterbox_prewarm.system.cpus import usable_cpus
from chatterbox_prewarm.system.devices import ALL_GPUS, check_device_names
from chatterbox_prewarm.system.metrics import exec_time
from chatterbox_prewarm.weights.variants import CONVERSION_MODEL, DEFAULT_VARIANT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chatterbox_prewarm.serve.workers.worker_process import WorkerProcess


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Configuration of a worker; the front passes it as JSON.

    Attributes:
        model: the variant of the checkpoint.
        start: which warm state, weights and device the worker uses, and whether it converts speech.
        voices: names and reference clips of voices to compute at start unless they are baked.
        threads: torch threads; None uses the cores of the machine, divided among the workers on a CPU.
        max_new_tokens: upper bound on the speech tokens of each part of a text; 25 tokens are one second of audio.
        requests_per_minute: expected load. It decides how much the worker warms up while it is idle, see
            `AdaptiveWarmup`.
        skipped: names of idle warm-up steps that ended a previous worker.
        voice_directory: directory of added voices.
        log_format: one of `log_lines.FORMATS`.
        origin: when the start began, in seconds since boot. For the first worker it is the time when the front was
            executed, because a user waits from then on. None for a replacement.
    """

    model: str = DEFAULT_VARIANT.name
    start: StartOptions
    voices: Mapping[str, Path] = field(default_factory=dict)
    threads: int | None = None
    max_new_tokens: int = 1000
    requests_per_minute: float = 0.0
    skipped: tuple[str, ...] = ()
    voice_directory: Path | None = None
    log_format: str = "text"
    origin: float | None = None

    @property
    def device(self) -> str:
        """The torch device."""
        return self.start.device

    @property
    def pool(self) -> str:
        """The name of the model in requests: `model`, or `CONVERSION_MODEL`."""
        return CONVERSION_MODEL if self.start.converts else self.model

    @property
    def name(self) -> str:
        """What log lines call the worker."""
        return f"worker {self.pool} {self.device}"

    def to_json(self) -> str:
        """Return the configuration as JSON."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerConfig:
        """Parse the JSON that `to_json` returned."""
        fields = json.loads(text)
        start = fields["start"]
        start["plain_text"] = tuple(start["plain_text"])
        start["trust"] = Trust(**_with_paths(start["trust"], "key", "signature"))
        fields["start"] = StartOptions(**_with_paths(start, "warm", "weights", "cache"))
        fields["voices"] = {name: Path(clip) for name, clip in fields["voices"].items()}
        fields["skipped"] = tuple(fields["skipped"])
        return cls(**_with_paths(fields, "voice_directory"))


def _with_paths(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return fields | {name: Path(fields[name]) for name in names if fields[name] is not None}


def parse_devices(text: str) -> list[str]:
    """Parse a comma-separated list of devices. A device that is named twice gets two workers.

    Raises:
        BadInputError: as `check_device_names`, or the list names all GPUs on a machine that has no GPU.
    """
    devices: list[str] = []
    for name in check_device_names(text):
        devices += _all_gpus() if name == ALL_GPUS else [name]
    return devices


def _all_gpus() -> list[str]:
    from chatterbox_prewarm.system.fingerprint import visible_gpus  # here, because most servers do not need it

    if count := visible_gpus():
        return [f"cuda:{number}" for number in range(count)]
    raise BadInputError("this machine has no GPU", next_step="choose the device cpu, or use a machine with a GPU")


def for_devices(
    devices: Sequence[str],
    worker: WorkerConfig,
    checkpoints: Mapping[str, Path] | None = None,
    *,
    convert: bool = False,
) -> list[WorkerConfig]:
    """Return one configuration for each model and device, those of the first model first.

    Workers on the CPU divide the usable CPUs unless `threads` is set.

    Args:
        devices: of each model.
        worker: what all workers have in common.
        checkpoints: the directory of each model's checkpoint by its variant; by default the one of `worker`.
        convert: add workers that convert speech, with the checkpoint of the first model.
    """
    checkpoints = checkpoints or {worker.model: worker.start.weights}
    models = [(model, weights, False) for model, weights in checkpoints.items()]
    if convert:
        models.append((*next(iter(checkpoints.items())), True))
    on_cpu = len(models) * sum(device.startswith("cpu") for device in devices)
    share = max(1, usable_cpus() // on_cpu) if on_cpu > 1 else None
    return [
        replace(
            worker,
            model=model,
            start=replace(worker.start, device=device, weights=weights, converts=converts),
            threads=worker.threads or (share if device.startswith("cpu") else None),
        )
        for model, weights, converts in models
        for device in devices
    ]


def spawn(config: WorkerConfig, waiting: WorkerProcess | None = None) -> WorkerProcess:
    """Start a worker process, or give a process that waits for its configuration this one.

    Raises:
        OSError: the process could not be started.
    """
    process, connection = waiting or start_process()
    with contextlib.suppress(ConnectionError):  # it has ended already, which its supervisor notices
        connection.sendall(messages.encode({"type": "configure"}, config.to_json().encode()))
    return process, connection


def spawn_all(
    configs: Sequence[WorkerConfig], waiting: WorkerProcess | None = None
) -> list[tuple[WorkerConfig, WorkerProcess]]:
    """Start a worker process for each configuration.

    Args:
        configs: one for each worker.
        waiting: a process that waits for its configuration, and gets the first one.

    Raises:
        OSError: a process could not be started. The other processes are terminated.
    """
    started: list[tuple[WorkerConfig, WorkerProcess]] = []
    try:
        for config in configs:
            started.append((config, spawn(config, None if started else waiting)))
    except OSError:
        for _, (process, _) in started:
            process.terminate()
        raise
    return started


@contextlib.contextmanager
def running(
    configs: Sequence[WorkerConfig], waiting: WorkerProcess | None = None
) -> Iterator[list[tuple[WorkerConfig, WorkerProcess]]]:
    """Start worker processes as `spawn_all`, and terminate those that still run at the end of the block.

    The start of the workers counts from the moment when this process was executed.

    Raises:
        OSError: a process could not be started.
    """
    origin = exec_time()
    started = spawn_all([replace(config, origin=origin) for config in configs], waiting)
    try:
        yield started
    finally:
        for _, (process, _) in started:
            if process.poll() is None:
                process.terminate()
