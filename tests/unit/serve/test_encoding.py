"""Sound on its way into each format, piece by piece and whole, decoded again."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.http.encoding import MEDIA_TYPES, SAMPLE_RATE, encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMPRESSED = ("flac", "opus", "mp3")
# LAME's delay together with a decoder's, and how much longer than the sound a last frame may be.
MP3_DELAY, MP3_FRAME = 1105, 576


def sound(seconds: float = 2.0) -> NDArray[np.int16]:
    """A chirp that swells and fades, different at each moment."""
    time = np.arange(int(seconds * SAMPLE_RATE) + 137) / SAMPLE_RATE
    swell = 0.6 + 0.4 * np.sin(2 * np.pi * 3 * time)
    samples: NDArray[np.int16] = (0.3 * 32767 * swell * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype("<i2")
    return samples


def pieces(audio_format: str, pcm: bytes, *, whole: bool, size: int = 9601) -> list[bytes]:
    """The file in the pieces in which it came; by default each is of a fifth of a second and half a sample."""
    sink = encoder(audio_format, whole=whole)
    given = [sink.encode(pcm[start : start + size]) for start in range(0, len(pcm), size)]
    return [*given, sink.finish()]


def decoded(audio_format: str, data: bytes, samples: int) -> NDArray[np.int16]:
    """The samples of a file; of a streamed FLAC file as many as are said to be in it."""
    if audio_format == "pcm":
        return np.frombuffer(data, dtype="<i2")
    if data.startswith(b"fLaC") and int.from_bytes(data[21:26], "big") & 0xFFFFFFFFF == 0:
        # libsndfile does not read to the end of a file that does not tell its length; other decoders do.
        length = (int.from_bytes(data[21:26], "big") | samples).to_bytes(5, "big")
        data = data[:21] + length + data[26:]
    found: NDArray[np.int16]
    found, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == SAMPLE_RATE
    assert found.ndim == 1
    return found


def likeness(left: NDArray[np.int16], right: NDArray[np.int16]) -> float:
    return float(np.corrcoef(left, right)[0, 1])


@pytest.mark.parametrize("size", [9601, 1, 48_000, 1_000_000])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_what_was_encoded_is_heard_again(audio_format: str, whole: bool, size: int) -> None:
    samples = sound(0.3 if size == 1 else 2.0)
    data = b"".join(pieces(audio_format, samples.tobytes(), whole=whole, size=size))
    heard = decoded(audio_format, data, len(samples))
    if audio_format == "mp3" and not whole:
        assert 0 <= len(heard) - len(samples) - MP3_DELAY <= 2 * MP3_FRAME
        heard = heard[MP3_DELAY : MP3_DELAY + len(samples)]
    assert len(heard) == len(samples)
    if audio_format in {"opus", "mp3"}:
        assert likeness(heard, samples) > {"opus": 0.95, "mp3": 0.999}[audio_format]
    else:
        assert np.array_equal(heard, samples)


@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_a_stream_comes_before_its_end(audio_format: str) -> None:
    """Of each prefix, all but the last 1.1 s can be heard before more is encoded."""
    samples = sound(4.0)
    given, come = 0, b""
    for piece in pieces(audio_format, samples.tobytes(), whole=False, size=9600)[:-1]:
        given += 4800
        come += piece
        expected = given - int(1.1 * SAMPLE_RATE)
        if expected > 0:
            if audio_format == "flac":
                with soundfile.SoundFile(io.BytesIO(come)) as file:
                    heard = len(file.read(expected, dtype="int16"))
            else:
                heard = len(decoded(audio_format, come, 0))
            assert heard >= expected
    assert given > len(samples)


@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_a_whole_file_comes_at_its_end(audio_format: str) -> None:
    *given, last = pieces(audio_format, sound().tobytes(), whole=True)
    assert any(given) == (audio_format == "pcm")
    assert bool(last) == (audio_format != "pcm")


@pytest.mark.parametrize("audio_format", COMPRESSED)
def test_a_whole_file_tells_its_length(audio_format: str) -> None:
    samples = sound()
    info = soundfile.info(io.BytesIO(b"".join(pieces(audio_format, samples.tobytes(), whole=True))))
    assert info.frames == len(samples)


def test_a_whole_wav_file_is_read_by_the_standard_library() -> None:
    samples = sound()
    with wave.open(io.BytesIO(b"".join(pieces("wav", samples.tobytes(), whole=True)))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE)
        assert file.getnframes() == len(samples)
        assert file.readframes(len(samples)) == samples.tobytes()


def test_a_streamed_wav_file_says_that_its_length_is_unknown() -> None:
    data = b"".join(pieces("wav", sound().tobytes(), whole=False))
    assert data[4:8] == data[40:44] == b"\xff\xff\xff\xff"


def test_a_streamed_mp3_file_begins_with_sound() -> None:
    """Not with the silent frame that libsndfile puts where the header of a complete file will be."""
    data = b"".join(pieces("mp3", sound().tobytes(), whole=False))
    assert data[0] == 0xFF
    assert any(data[4:288])
    assert b"Info" not in data[:288]
    assert b"Info" in b"".join(pieces("mp3", sound().tobytes(), whole=True))[:288]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_no_sound_at_all_is_still_a_file(audio_format: str, whole: bool) -> None:
    data = b"".join(pieces(audio_format, b"", whole=whole))
    heard = decoded(audio_format, data, 1)
    assert len(heard) <= (MP3_DELAY + 2 * MP3_FRAME if audio_format == "mp3" else 1)
    assert not heard.any()


def test_compressed_formats_are_smaller() -> None:
    seconds = 4.0
    sizes = {name: len(b"".join(pieces(name, sound(seconds).tobytes(), whole=False))) for name in MEDIA_TYPES}
    assert 11_500 < sizes["mp3"] / seconds < 12_500  # 96 kbit/s
    assert 5_000 < sizes["opus"] / seconds < 7_500  # 48 kbit/s
    assert sizes["flac"] < sizes["pcm"]


def test_an_encoder_that_is_dropped_leaves_nothing() -> None:
    samples = sound().tobytes()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def drop(times: int) -> None:
        for _ in range(times):
            for audio_format in MEDIA_TYPES:
                for whole in (True, False):
                    encoder(audio_format, whole=whole).encode(samples)

    drop(3)
    gc.collect()
    gc.disable()  # nothing may need it
    try:
        files, before = len(list(Path("/proc/self/fd").iterdir())), resident()
        drop(20)
        assert len(list(Path("/proc/self/fd").iterdir())) == files
        assert resident() - before < 4 << 20  # 200 encoders with 100 kB of sound each
    finally:
        gc.enable()


def test_memory_does_not_grow_with_a_stream() -> None:
    import tracemalloc

    second = sound(1.0).tobytes()
    for audio_format in MEDIA_TYPES:
        sink = encoder(audio_format, whole=False)
        sink.encode(second)
        tracemalloc.start()
        for _ in range(30):
            sink.encode(second)
        assert tracemalloc.get_traced_memory()[0] < 100_000
        tracemalloc.stop()
        sink.finish()


def test_a_format_that_is_not_offered_is_refused() -> None:
    with pytest.raises(BadInputError, match="no format 'aac'") as caught:
        encoder("aac", whole=True)
    assert "mp3, opus, flac, wav, pcm" in caught.value.next_step


def test_wav_and_pcm_import_no_numpy() -> None:
    program = (
        "import sys; from chatterbox_prewarm.serve.http.encoding import encoder\n"
        "for name in ('wav', 'pcm'):\n"
        "    for whole in (True, False): sink = encoder(name, whole=whole); sink.encode(b'ab'); sink.finish()\n"
        "assert not {'numpy', 'soundfile', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
