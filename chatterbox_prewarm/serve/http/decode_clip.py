"""Decode uploaded audio clips in a sandboxed subprocess.

libsndfile and its decoders process data from untrusted clients here. So they run in a separate process for each clip,
which has limits on memory, CPU time and output size, cannot open files after its imports, does not get the server's
environment, and ends with the server. It reads the clip from standard input. It writes a WAV file, or an error as JSON,
to standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import logging
import os
import resource
import signal
import sys
import wave
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from chatterbox_prewarm.errors import BadInputError, PrewarmError, as_prewarm_error
from chatterbox_prewarm.model.clips import CONVERT_STEP, KINDS, MAX_SECONDS, REFERENCE, ClipKind, read_clip
from chatterbox_prewarm.system.children import PARENT, die_with_parent
from chatterbox_prewarm.system.json_subprocess import claim_stdout, describe, rebuild

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

#: Five minutes at 48 kHz. A clip with a higher sampling rate must be shorter.
MAX_SAMPLES = int(MAX_SECONDS) * 48_000
_MAX_OUTPUT = 2 * MAX_SAMPLES + 1024
_MAX_CHANNELS = 2
#: The variables that a Python process needs to find its packages. The rest of the environment may contain secrets.
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "LANG")


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """Limits on uploaded clips.

    Attributes:
        concurrent: the number of uploads that are received or processed at a time. Each holds its clip in memory.
            Further uploads get status 429. The server decodes one clip at a time.
        receive_seconds: the time limit for receiving the form.
        clip_bytes: the size of the uploaded clip.
        address_space: memory of the decoding process in bytes. Five minutes at 48 kHz need 300 MB.
        cpu_seconds: CPU time of the decoding process, including its start.
        wall_seconds: the time limit for decoding.
    """

    concurrent: int = 4
    receive_seconds: float = 60.0
    clip_bytes: int = 20 << 20
    address_space: int = 512 << 20
    cpu_seconds: int = 20
    wall_seconds: float = 60.0


async def decode(clip: bytes, limits: UploadLimits | None = None, *, kind: str = "reference") -> bytes:
    """Decode a clip in a subprocess.

    Args:
        clip: a file in a format that libsndfile reads (WAV, FLAC, OGG, MP3), with one or two channels.
        limits: limits on the size of the clip, and on the resources of the subprocess.
        kind: what the clip is for, a name in `clips.KINDS`.

    Returns:
        a WAV file: mono, 16 bits, with the sampling rate of the clip and at most `MAX_SAMPLES` samples. The samples of
        a mono clip with 16 bits do not change.

    Raises:
        BadInputError: the clip cannot be used, as for `clips.read_clip`, or exceeds a limit.
        PrewarmError: the subprocess failed for a reason other than the clip.
    """
    limits, what = limits or UploadLimits(), KINDS[kind].what
    if len(clip) > limits.clip_bytes:
        raise BadInputError(
            f"{what} has {len(clip)} bytes, more than the limit of {limits.clip_bytes}",
            next_step=f"{KINDS[kind].length_step}, or send it as FLAC or MP3",
        )
    # Started from the event loop's thread, because the kernel ends a child with the thread that started it.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chatterbox_prewarm.serve.http.decode_clip"),
        *(str(limits.address_space), str(limits.cpu_seconds), kind),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(),
        start_new_session=True,  # Ctrl-C in the terminal should reach only the server
    )
    try:
        output, log = await asyncio.wait_for(_communicate(process, clip), limits.wall_seconds)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise BadInputError(
            f"{what} takes longer than {limits.wall_seconds:.0f} s to decode", next_step=CONVERT_STEP
        ) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        status = await process.wait()
    if status == 0:
        return output
    raise _failure(status, output, log, what)


def _environment() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    # Each thread of NumPy's libraries would reserve address space, and decoding needs only one.
    return {**inherited, PARENT: str(os.getpid()), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


async def _communicate(process: asyncio.subprocess.Process, clip: bytes) -> tuple[bytes, bytes]:
    """Send the clip to the process. Returns its output, and the end of its standard error."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("standard input, output and error must be pipes")
    output, log, _, _ = await asyncio.gather(
        _read_output(process.stdout, process),
        _read_tail(process.stderr),
        _write(process.stdin, clip),
        process.wait(),
    )
    return output, log


async def _write(stream: asyncio.StreamWriter, clip: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # the process may exit before it has read the complete clip
        stream.write(clip)
        await stream.drain()
    stream.close()


async def _read_output(stream: asyncio.StreamReader, process: asyncio.subprocess.Process) -> bytes:
    output = bytearray()
    while chunk := await stream.read(1 << 16):
        output += chunk
        if len(output) > _MAX_OUTPUT:
            process.kill()
            return b""
    return bytes(output)


async def _read_tail(stream: asyncio.StreamReader, length: int = 2000) -> bytes:
    tail = b""
    while chunk := await stream.read(1 << 12):
        tail = (tail + chunk)[-length:]
    return tail


def _failure(status: int, output: bytes, log: bytes, what: str) -> PrewarmError:
    """Return the error that the process reported, or one that explains its exit status."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return rebuild(json.loads(output))
    logger.warning("decoding a clip ended with status %d: %s", status, log.decode(errors="replace"))
    if status in {-signal.SIGXCPU, -signal.SIGKILL}:
        return BadInputError(f"{what} takes too much time or memory to decode", next_step=CONVERT_STEP)
    if status < 0:
        return BadInputError(f"{what} is not audio that can be read (the decoder crashed)", next_step=CONVERT_STEP)
    return PrewarmError("the decoding process failed to start", next_step="see the server's log")


def main() -> None:
    """Run the subprocess. Its arguments are the limits on address space and CPU time, and the kind of the clip."""
    die_with_parent()
    kind = KINDS[sys.argv[3]]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower_limit(resource.RLIMIT_AS, int(sys.argv[1]))
    _lower_limit(resource.RLIMIT_CPU, int(sys.argv[2]))
    with claim_stdout() as out:
        try:
            importlib.import_module("soundfile")  # this also imports NumPy; afterwards no file can be opened
            clip = sys.stdin.buffer.read()
            _lower_limit(resource.RLIMIT_FSIZE, 0)
            _lower_limit(resource.RLIMIT_NOFILE, 0)
            wav = to_wav(clip, kind)
        except MemoryError:
            _fail(out, BadInputError(f"{kind.what} takes too much memory to decode", next_step=CONVERT_STEP))
        except Exception as error:  # noqa: BLE001 - the server reports every error to the client
            _fail(out, as_prewarm_error(error))
        else:
            out.buffer.write(wav)


def _fail(out: Any, error: PrewarmError) -> NoReturn:
    json.dump(describe(error), out)
    out.flush()
    sys.exit(error.exit_code)


def _lower_limit(kind: int, limit: int) -> None:
    """Set the soft and the hard limit, unless the hard limit is lower already."""
    _, hard = resource.getrlimit(kind)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def to_wav(clip: bytes, kind: ClipKind = REFERENCE) -> bytes:
    """Decode a clip in this process. `decode` documents the result.

    Raises:
        BadInputError: the clip cannot be used.
    """
    samples, rate = read_clip(
        io.BytesIO(clip), what=kind.what, channels=_MAX_CHANNELS, max_samples=MAX_SAMPLES, kind=kind
    )
    output = io.BytesIO()
    with wave.open(output, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(_as_pcm(samples).tobytes())
    return output.getvalue()


def _as_pcm(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Convert to 16-bit little-endian samples, scaled as in libsndfile. A clip above full scale is made quieter."""
    import numpy as np

    peak = np.abs(samples).max()
    if peak > 1.0:
        samples = samples / peak
    scaled: NDArray[np.float32] = np.clip(np.round(samples * np.float32(32768)), -32768, 32767)
    return scaled.astype("<i2").view(np.int16)


if __name__ == "__main__":
    main()
