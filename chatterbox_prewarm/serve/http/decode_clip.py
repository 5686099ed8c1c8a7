"""Uploaded clips, decoded in a process of their own that may use little and is gone afterwards.

What libsndfile and the decoders below it read here comes from strangers. So the process that runs them has bounds on
memory, processor time and what it answers, can open no file once it has imported them, is given none of the server's
environment, and dies with the server. It takes the clip on standard input and answers with a WAV file, or with its
error as JSON, on standard output.
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
from chatterbox_prewarm.model.clips import MAX_SECONDS, read_clip
from chatterbox_prewarm.system.json_subprocess import claim_stdout, describe, die_with_parent, rebuild
from chatterbox_prewarm.system.process import PARENT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

#: Five minutes at 48 kHz: a clip sampled at a higher rate must be shorter.
MAX_SAMPLES = int(MAX_SECONDS) * 48_000
_MAX_ANSWER = 2 * MAX_SAMPLES + 1024
_MAX_CHANNELS = 2
_CONVERT = "convert it: sox IN -r 24000 -c 1 OUT.wav"
_WHAT = "the clip"
#: What a Python process needs to find its packages; the rest of the environment may hold secrets.
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "LANG")


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What decoding one clip may take.

    Attributes:
        clip_bytes: size of the clip as uploaded.
        address_space: of the process that decodes, in bytes; five minutes at 48 kHz need 300 MB.
        cpu_seconds: of that process, its start included.
        wall_seconds: until it has answered.
    """

    clip_bytes: int = 20 << 20
    address_space: int = 512 << 20
    cpu_seconds: int = 20
    wall_seconds: float = 60.0


async def decode(clip: bytes, limits: DecodeLimits | None = None) -> bytes:
    """Decode a clip in a process of its own.

    Args:
        clip: a file in a format that libsndfile reads (WAV, FLAC, OGG, MP3), of one or two channels.
        limits: what it may take.

    Returns:
        a WAV file: mono, 16 bits, the clip's own sampling rate, at most `MAX_SAMPLES` long. A clip that was so before
        keeps its samples to the last bit.

    Raises:
        BadInputError: no voice should be made of it, as for `clips.check_clip`, or decoding it takes more than the
            limits allow.
        PrewarmError: the process could not do its work, which is no fault of the clip.
    """
    limits = limits or DecodeLimits()
    if len(clip) > limits.clip_bytes:
        raise BadInputError(
            f"{_WHAT} has {len(clip)} bytes, more than the limit of {limits.clip_bytes}",
            next_step="give 5 to 10 s of clean speech, as FLAC or MP3 if need be",
        )
    # Started from the thread of the event loop: the kernel ends it with the thread that started it, not the process.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chatterbox_prewarm.serve.http.decode_clip"),
        *(str(limits.address_space), str(limits.cpu_seconds)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(),
        start_new_session=True,  # an interrupt from the terminal is for the server
    )
    try:
        answer, complaints = await asyncio.wait_for(_converse(process, clip), limits.wall_seconds)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise BadInputError(
            f"{_WHAT} takes longer than {limits.wall_seconds:.0f} s to decode", next_step=_CONVERT
        ) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        status = await process.wait()
    if status == 0:
        return answer
    raise _failure(status, answer, complaints)


def _environment() -> dict[str, str]:
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # One thread: each of NumPy's would reserve address space, and a clip needs none of them.
    return {**passed, PARENT: str(os.getpid()), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


async def _converse(process: asyncio.subprocess.Process, clip: bytes) -> tuple[bytes, bytes]:
    """Hand the clip over; returns the answer and the end of what was said on standard error."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("all three are pipes")
    answer, complaints, _, _ = await asyncio.gather(
        _take(process.stdout, _MAX_ANSWER, process),
        _tail(process.stderr),
        _give(process.stdin, clip),
        process.wait(),
    )
    return answer, complaints


async def _give(stream: asyncio.StreamWriter, clip: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it may refuse, or die, before it has read all
        stream.write(clip)
        await stream.drain()
    stream.close()


async def _take(stream: asyncio.StreamReader, limit: int, process: asyncio.subprocess.Process) -> bytes:
    data = bytearray()
    while part := await stream.read(1 << 16):
        data += part
        if len(data) > limit:
            process.kill()
            return b""
    return bytes(data)


async def _tail(stream: asyncio.StreamReader, length: int = 2000) -> bytes:
    data = b""
    while part := await stream.read(1 << 12):
        data = (data + part)[-length:]
    return data


def _failure(status: int, answer: bytes, complaints: bytes) -> PrewarmError:
    """What a process that gave no WAV file says, or its end does."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return rebuild(json.loads(answer))
    logger.warning("decoding a clip ended with status %d: %s", status, complaints.decode(errors="replace"))
    if status in {-signal.SIGXCPU, -signal.SIGKILL}:
        return BadInputError(f"{_WHAT} takes too long, or too much memory, to decode", next_step=_CONVERT)
    if status < 0:
        return BadInputError(f"{_WHAT} is not audio that can be read (the decoder crashed)", next_step=_CONVERT)
    return PrewarmError("the decoder of clips does not run", next_step="see the server's log")


def main() -> None:
    """The process: the clip on standard input, its bounds as arguments."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_AS, int(sys.argv[1]))
    _lower(resource.RLIMIT_CPU, int(sys.argv[2]))
    with claim_stdout() as out:
        try:
            importlib.import_module("soundfile")  # with NumPy, before no file can be opened any more
            clip = sys.stdin.buffer.read()
            _lower(resource.RLIMIT_FSIZE, 0)
            _lower(resource.RLIMIT_NOFILE, 0)
            wav = to_wav(clip)
        except MemoryError:
            problem = BadInputError(f"{_WHAT} takes too much memory to decode", next_step=_CONVERT)
            _fail(out, problem)
        except Exception as error:  # noqa: BLE001 - whatever it is, the server is to say it
            _fail(out, as_prewarm_error(error))
        else:
            out.buffer.write(wav)


def _fail(out: Any, error: PrewarmError) -> NoReturn:
    json.dump(describe(error), out)
    out.flush()
    sys.exit(error.exit_code)


def _lower(kind: int, limit: int) -> None:
    """Set a limit for good; a lower one that is in force already stays."""
    _, hard = resource.getrlimit(kind)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def to_wav(clip: bytes) -> bytes:
    """Decode a clip in this process; see `decode`.

    Raises:
        BadInputError: no voice should be made of it.
    """
    samples, rate = read_clip(io.BytesIO(clip), what=_WHAT, channels=_MAX_CHANNELS, max_samples=MAX_SAMPLES)
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(_as_pcm(samples).tobytes())
    return data.getvalue()


def _as_pcm(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """16-bit little-endian samples, scaled as libsndfile does; a clip above full scale is made softer as a whole."""
    import numpy as np

    peak = np.abs(samples).max()
    if peak > 1.0:
        samples = samples / peak
    scaled: NDArray[np.float32] = np.clip(np.round(samples * np.float32(32768)), -32768, 32767)
    return scaled.astype("<i2").view(np.int16)


if __name__ == "__main__":
    main()
