"""Encoding into each format, as a stream and as a complete file, checked by decoding it again."""

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
# In samples: the delay of LAME and its decoder, and the size of a frame.
MP3_DELAY, MP3_FRAME = 1105, 576


def chirp(seconds: float = 2.0) -> NDArray[np.int16]:
    """Return a chirp with a changing volume, so that no two parts are equal."""
    time = np.arange(int(seconds * SAMPLE_RATE) + 137) / SAMPLE_RATE
    swell = 0.6 + 0.4 * np.sin(2 * np.pi * 3 * time)
    samples: NDArray[np.int16] = (0.3 * 32767 * swell * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype("<i2")
    return samples


def encode_in_parts(audio_format: str, pcm: bytes, *, one_shot: bool, size: int = 9601) -> list[bytes]:
    """Encode `pcm` in parts of `size` bytes. The default is a fifth of a second and half a sample."""
    encoding = encoder(audio_format, one_shot=one_shot)
    parts = [encoding.encode(pcm[start : start + size]) for start in range(0, len(pcm), size)]
    return [*parts, encoding.finish()]


def decoded(audio_format: str, data: bytes, samples: int) -> NDArray[np.int16]:
    """Decode a file. The number of samples is needed for a streamed FLAC file, which does not contain it."""
    if audio_format == "pcm":
        return np.frombuffer(data, dtype="<i2")
    if data.startswith(b"fLaC") and int.from_bytes(data[21:26], "big") & 0xFFFFFFFFF == 0:
        # libsndfile does not read a file of unknown length to its end. Other decoders do.
        length = (int.from_bytes(data[21:26], "big") | samples).to_bytes(5, "big")
        data = data[:21] + length + data[26:]
    result: NDArray[np.int16]
    result, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == SAMPLE_RATE
    assert result.ndim == 1
    return result


def correlation(left: NDArray[np.int16], right: NDArray[np.int16]) -> float:
    return float(np.corrcoef(left, right)[0, 1])


@pytest.mark.parametrize("size", [9601, 1, 48_000, 1_000_000])
@pytest.mark.parametrize("one_shot", [True, False])
@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_decoding_returns_the_encoded_audio(audio_format: str, one_shot: bool, size: int) -> None:
    samples = chirp(0.3 if size == 1 else 2.0)
    data = b"".join(encode_in_parts(audio_format, samples.tobytes(), one_shot=one_shot, size=size))
    result = decoded(audio_format, data, len(samples))
    if audio_format == "mp3" and not one_shot:
        assert 0 <= len(result) - len(samples) - MP3_DELAY <= 2 * MP3_FRAME
        result = result[MP3_DELAY : MP3_DELAY + len(samples)]
    assert len(result) == len(samples)
    if audio_format in {"opus", "mp3"}:
        assert correlation(result, samples) > {"opus": 0.95, "mp3": 0.999}[audio_format]
    else:
        assert np.array_equal(result, samples)


@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_a_stream_is_at_most_1_1_seconds_behind_its_input(audio_format: str) -> None:
    """Check after each part of the input, before the next part is encoded."""
    samples = chirp(4.0)
    given, received = 0, b""
    for part in encode_in_parts(audio_format, samples.tobytes(), one_shot=False, size=9600)[:-1]:
        given += 4800
        received += part
        expected = given - int(1.1 * SAMPLE_RATE)
        if expected > 0:
            if audio_format == "flac":
                with soundfile.SoundFile(io.BytesIO(received)) as file:
                    available = len(file.read(expected, dtype="int16"))
            else:
                available = len(decoded(audio_format, received, 0))
            assert available >= expected
    assert given > len(samples)


@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_a_one_shot_file_is_returned_at_its_end(audio_format: str) -> None:
    *parts, last = encode_in_parts(audio_format, chirp().tobytes(), one_shot=True)
    assert any(parts) == (audio_format == "pcm")
    assert bool(last) == (audio_format != "pcm")


@pytest.mark.parametrize("audio_format", COMPRESSED)
def test_a_one_shot_file_contains_its_length(audio_format: str) -> None:
    samples = chirp()
    info = soundfile.info(io.BytesIO(b"".join(encode_in_parts(audio_format, samples.tobytes(), one_shot=True))))
    assert info.frames == len(samples)


def test_the_standard_library_reads_a_one_shot_wav_file() -> None:
    samples = chirp()
    with wave.open(io.BytesIO(b"".join(encode_in_parts("wav", samples.tobytes(), one_shot=True)))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE)
        assert file.getnframes() == len(samples)
        assert file.readframes(len(samples)) == samples.tobytes()


def test_a_streamed_wav_file_has_an_unknown_length() -> None:
    data = b"".join(encode_in_parts("wav", chirp().tobytes(), one_shot=False))
    assert data[4:8] == data[40:44] == b"\xff\xff\xff\xff"


def test_a_streamed_mp3_file_begins_with_chirp() -> None:
    """Check that the silent placeholder frame of libsndfile is removed."""
    data = b"".join(encode_in_parts("mp3", chirp().tobytes(), one_shot=False))
    assert data[0] == 0xFF
    assert any(data[4:288])
    assert b"Info" not in data[:288]
    assert b"Info" in b"".join(encode_in_parts("mp3", chirp().tobytes(), one_shot=True))[:288]


@pytest.mark.parametrize("one_shot", [True, False])
@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_empty_audio_gives_a_valid_file(audio_format: str, one_shot: bool) -> None:
    data = b"".join(encode_in_parts(audio_format, b"", one_shot=one_shot))
    result = decoded(audio_format, data, 1)
    assert len(result) <= (MP3_DELAY + 2 * MP3_FRAME if audio_format == "mp3" else 1)
    assert not result.any()


def test_compressed_formats_are_smaller() -> None:
    seconds = 4.0
    sizes = {
        name: len(b"".join(encode_in_parts(name, chirp(seconds).tobytes(), one_shot=False))) for name in MEDIA_TYPES
    }
    assert 11_500 < sizes["mp3"] / seconds < 12_500  # 96 kbit/s
    assert 5_000 < sizes["opus"] / seconds < 7_500  # 48 kbit/s
    assert sizes["flac"] < sizes["pcm"]


def test_an_unfinished_encoder_leaks_nothing() -> None:
    samples = chirp().tobytes()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def drop(times: int) -> None:
        for _ in range(times):
            for audio_format in MEDIA_TYPES:
                for one_shot in (True, False):
                    encoder(audio_format, one_shot=one_shot).encode(samples)

    drop(3)
    gc.collect()
    gc.disable()  # the encoders must not depend on the garbage collector
    try:
        files, before = len(list(Path("/proc/self/fd").iterdir())), resident()
        drop(20)
        assert len(list(Path("/proc/self/fd").iterdir())) == files
        assert resident() - before < 4 << 20  # less than the audio of 200 encoders, 100 kB each
    finally:
        gc.enable()


def test_memory_does_not_grow_with_a_stream() -> None:
    import tracemalloc

    second = chirp(1.0).tobytes()
    for audio_format in MEDIA_TYPES:
        encoding = encoder(audio_format, one_shot=False)
        encoding.encode(second)
        tracemalloc.start()
        for _ in range(30):
            encoding.encode(second)
        assert tracemalloc.get_traced_memory()[0] < 100_000
        tracemalloc.stop()
        encoding.finish()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(BadInputError, match="unknown audio format 'aac'") as caught:
        encoder("aac", one_shot=True)
    assert "mp3, opus, flac, wav, pcm" in caught.value.next_step


def test_wav_and_pcm_import_no_numpy() -> None:
    program = (
        "import sys; from chatterbox_prewarm.serve.http.encoding import encoder\n"
        "for name in ('wav', 'pcm'):\n"
        "    for one_shot in (True, False): e = encoder(name, one_shot=one_shot); e.encode(b'ab'); e.finish()\n"
        "assert not {'numpy', 'soundfile', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
