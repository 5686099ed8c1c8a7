"""Decoding of uploaded clips, including hostile clips.

The rules for clips are tested in this process with `to_wav`, because the start of a process takes longer than decoding.
The isolation is tested with `decode`, in real subprocesses.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import REFERENCE, SOURCE, ClipKind
from chatterbox_prewarm.serve.http.decode_clip import UploadLimits, decode, to_wav
from tests.conftest import ROOT
from tests.helpers.added_voices import children, sound_file, tone

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def decoded(clip: bytes) -> tuple[NDArray[np.int16], int]:
    """Decode a clip in this process. Returns the samples and the sampling rate."""
    return read(to_wav(clip))


def read(wav: bytes) -> tuple[NDArray[np.int16], int]:
    with soundfile.SoundFile(io.BytesIO(wav)) as file:
        assert (file.format, file.subtype, file.channels) == ("WAV", "PCM_16", 1)
        return file.read(dtype="int16"), file.samplerate


def test_the_samples_of_a_mono_clip_with_16_bits_do_not_change() -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 48_000).astype(np.int16)
    for kind in ("WAV", "FLAC", "AIFF"):
        samples_out, rate = decoded(sound_file(samples, 22_050, kind))
        assert rate == 22_050
        assert np.array_equal(samples_out, samples)
    samples_out, rate = read(asyncio.run(decode(sound_file(samples, 22_050, "FLAC"))))
    assert rate == 22_050
    assert np.array_equal(samples_out, samples)


@pytest.mark.parametrize(
    ("kind", "subtype", "rate"),
    [
        ("WAV", "FLOAT", 24_000),
        ("WAV", "PCM_24", 96_000),
        ("WAV", "ULAW", 16_000),
        ("FLAC", "PCM_24", 44_100),
        ("OGG", "VORBIS", 44_100),
        ("OGG", "OPUS", 48_000),
        ("MP3", "MPEG_LAYER_III", 44_100),
        ("CAF", "PCM_16", 192_000),
    ],
)
def test_common_formats_are_decoded(kind: str, subtype: str, rate: int) -> None:
    samples, decoded_rate = decoded(sound_file(tone(rate=rate), rate, kind, subtype))
    assert decoded_rate == rate
    assert abs(len(samples) / rate - 2.0) < 0.1
    loudest_hz = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * rate / len(samples)
    assert abs(loudest_hz - 200) < 2
    assert 0.15 < np.sqrt(np.mean((samples / 32768) ** 2)) < 0.25


def test_two_channels_are_mixed_to_mono() -> None:
    samples = np.stack([tone(), np.zeros(48_000)], axis=1)
    assert np.abs(decoded(sound_file(samples, subtype="FLOAT"))[0] - tone() * 16384).max() <= 1


def test_a_clip_above_full_scale_is_scaled_down() -> None:
    samples, _ = decoded(sound_file(tone() * 1e4, subtype="FLOAT"))
    assert np.abs(samples - tone() / np.abs(tone()).max() * 32768).max() <= 1


def with_rate(rate: int) -> bytes:
    """Return a WAV file with a wrong sampling rate in its header."""
    data = bytearray(sound_file(tone()))
    data[24:28] = struct.pack("<I", rate)
    return bytes(data)


def with_length(length: int) -> bytes:
    """Return a WAV file of half a second with a wrong length in its header, in bytes."""
    data = bytearray(sound_file(tone(0.5)))
    data[40:44] = struct.pack("<I", length)
    data[4:8] = struct.pack("<I", (length + 36) % 2**32)
    return bytes(data)


def silence(hours: float, rate: int, kind: str, subtype: str) -> bytes:
    """Return hours of silence, which is a small file in a compressed format."""
    data = io.BytesIO()
    with soundfile.SoundFile(data, "w", rate, 1, subtype, format=kind) as file:
        for _ in range(int(hours * 60)):
            file.write(np.zeros(60 * rate, np.float32))
    return data.getvalue()


#: Functions that make a clip, because some clips are large, and a pattern for the error message.
UNUSABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not audio that can be read"),
    "one byte": (lambda: b"x", "not audio that can be read"),
    "text": (lambda: b"This is a text about a fox. " * 1000, "not audio that can be read"),
    "half a header": (lambda: b"RIFF\x24\x00\x00\x00WAVEfmt ", "not audio that can be read"),
    "cut header": (lambda: sound_file(tone())[:30], "not audio that can be read"),
    "no samples": (lambda: sound_file(np.zeros(0, np.float32)), "0.00 s long"),
    "half a second": (lambda: sound_file(tone(0.5)), "0.50 s long; 1 to 300 s are needed"),
    "8 kHz": (lambda: sound_file(tone(rate=8_000), 8_000), "sampled at 8000 Hz"),
    "0 Hz": (lambda: with_rate(0), "Hz|not audio"),
    "1 Hz": (lambda: with_rate(1), "sampled at 1 Hz"),
    "2 GHz": (lambda: with_rate(2**31 - 1), "sampled at 2147483647 Hz"),
    "4 GHz": (lambda: with_rate(2**32 - 1), "Hz|not audio"),
    "longest length": (lambda: with_length(2**32 - 1), "0.50 s long"),
    "long length": (lambda: with_length(2**31 - 1), "0.50 s long"),
    "255 channels": (lambda: sound_file(tone(1.2, channels=255), subtype="PCM_16"), "has 255 channels; at most 2"),
    "6 channels": (lambda: sound_file(tone(channels=6), kind="FLAC"), "has 6 channels; at most 2"),
    "silence": (lambda: sound_file(np.zeros(48_000, np.float32)), "is silent"),
    "two channels that cancel": (lambda: sound_file(np.stack([tone(), -tone()], axis=1), subtype="FLOAT"), "is silent"),
    "not a number": (
        lambda: sound_file(np.full(48_000, np.nan, np.float32), subtype="FLOAT"),
        "contains NaN or infinity",
    ),
    "infinite": (
        lambda: sound_file(np.append(tone(), np.float32(np.inf)), subtype="FLOAT"),
        "contains NaN or infinity",
    ),
    "too large to add": (
        lambda: sound_file(np.full((48_000, 2), [3e38, 3e38], np.float32), subtype="FLOAT"),
        "contains NaN or infinity",
    ),
    "cut FLAC": (lambda: sound_file(tone(), kind="FLAC")[:600], "can be read|s long"),
    "six minutes": (lambda: silence(0.1, 16_000, "WAV", "PCM_16"), "360.00 s long"),
    "many samples": (
        lambda: sound_file(np.zeros(80 * 192_000, np.int16), 192_000, "FLAC"),
        "more than 14400000 samples",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_clip_is_refused_with_the_same_message_as_in_a_bake(kind: str) -> None:
    make_clip, pattern = UNUSABLE[kind]
    with pytest.raises(BadInputError, match=pattern) as caught:
        to_wav(make_clip())
    assert caught.value.message.startswith("the clip ")
    assert "object at" not in caught.value.message
    assert caught.value.next_step


def test_the_process_reports_an_unusable_clip_and_ends() -> None:
    before = children()
    for clip in (Path(sys.executable).resolve().read_bytes()[: 4 << 20], b""):
        with pytest.raises(BadInputError, match="not audio that can be read") as caught:
            asyncio.run(decode(clip))
        assert caught.value.next_step
    assert children() == before


def test_the_message_for_an_unsupported_format_names_the_supported_ones_and_a_converter_that_reads_it() -> None:
    clip = b"\x00\x00\x00\x1cftypM4A \x00\x00\x00\x00M4A mp42isom" + bytes(5000)
    with pytest.raises(BadInputError, match="not audio that can be read") as caught:
        asyncio.run(decode(clip))
    for word in ("WAV", "FLAC", "OGG", "MP3", "M4A", "WebM", "ffmpeg -i IN -ac 1 -ar 24000 OUT.wav"):
        assert word in caught.value.next_step


def test_an_executable_is_refused() -> None:
    with pytest.raises(BadInputError, match="not audio that can be read"):
        asyncio.run(decode(Path(sys.executable).resolve().read_bytes()[: 4 << 20]))


@pytest.mark.parametrize("clip_kind", [REFERENCE, SOURCE], ids=["reference", "source"])
@pytest.mark.parametrize(
    ("kind", "subtype", "hours"),
    [("FLAC", "PCM_16", 1.0), ("OGG", "OPUS", 0.1), ("OGG", "VORBIS", 0.1), ("MP3", "MPEG_LAYER_III", 0.1)],
)
def test_hours_of_silence_are_refused_without_decoding(
    kind: str, subtype: str, hours: float, clip_kind: ClipKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = silence(hours, 16_000, kind, subtype)
    assert len(clip) < hours * 4e6

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the clip was decoded")

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    needed = f"{clip_kind.min_seconds:g} to 300 s are needed"
    with pytest.raises(BadInputError, match=rf"is {hours * 3600:.0f}\.\d\d s long; {needed}") as caught:
        to_wav(clip, clip_kind)
    assert caught.value.next_step == clip_kind.length_step


def test_decoding_has_limits_on_bytes_time_and_memory() -> None:
    before = children()
    clip = sound_file(tone(250), kind="FLAC")
    assert len(asyncio.run(decode(clip))) == 44 + 2 * 250 * 24_000
    with pytest.raises(BadInputError, match=f"has {len(clip)} bytes, more than the limit of 1000"):
        asyncio.run(decode(clip, UploadLimits(clip_bytes=1000)))
    with pytest.raises(BadInputError, match="longer than 0 s"):
        asyncio.run(decode(clip, UploadLimits(wall_seconds=0.02)))
    with pytest.raises(BadInputError, match="too much memory"):
        asyncio.run(decode(clip, UploadLimits(address_space=140 << 20)))
    assert children() == before


def test_a_cancelled_decode_ends_its_process() -> None:
    before = children()

    async def cancel() -> None:
        decoding = asyncio.create_task(decode(sound_file(tone(250), kind="FLAC")))
        while children() == before:
            await asyncio.sleep(0.005)
        decoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding

    asyncio.run(cancel())
    assert children() == before


_SERVER = """
import asyncio
from chatterbox_prewarm.serve.http import decode_clip
async def main():
    process = await asyncio.create_subprocess_exec(
        *(decode_clip.sys.executable, "-m", decode_clip.__name__, str(1 << 30), "20", "reference"),
        stdin=asyncio.subprocess.PIPE, env=decode_clip._environment(),
    )
    print(process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_the_process_ends_with_its_server_and_does_not_get_its_secrets() -> None:
    secret = {"CHATTERBOX_PREWARM_TOKEN": "secret-of-the-server"}
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, env=os.environ | secret) as server:
        assert server.stdout is not None
        child = Path(f"/proc/{int(server.stdout.readline())}")
        deadline = time.monotonic() + 20
        while b"decode_clip" not in (child / "cmdline").read_bytes():
            assert time.monotonic() < deadline
        assert b"secret-of-the-server" not in (child / "environ").read_bytes()
        while "soundfile" not in (child / "maps").read_text():
            assert time.monotonic() < deadline
        limits = (child / "limits").read_text()
        assert f"Max address space         {1 << 30}" in limits
        assert "Max core file size        0 " in limits
        server.send_signal(signal.SIGKILL)
    while child.exists() and (child / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline


#: Damage clips of each format and decode them. A fault of the decoder would end this process with a signal.
_DAMAGE = """
import contextlib
import numpy as np
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.http.decode_clip import to_wav
from tests.helpers.added_voices import sound_file, tone
random = np.random.default_rng(0)
for kind in ("WAV", "FLAC", "OGG", "MP3"):
    clip = sound_file(tone(1.2), kind=kind)
    for _ in range(10):
        data = bytearray(clip)
        for _ in range(int(random.integers(1, 20))):
            data[int(random.integers(min(len(data), 2000)))] = int(random.integers(256))
        with contextlib.suppress(BadInputError):
            assert to_wav(bytes(data))[:4] == b"RIFF"
"""


def test_damaged_clips_give_audio_or_an_error() -> None:
    completed = subprocess.run([sys.executable, "-c", _DAMAGE], capture_output=True, text=True, cwd=ROOT)
    assert completed.returncode == 0, completed.stderr
