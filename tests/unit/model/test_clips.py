"""Clips whose headers have no length, or a wrong one, are read to their end."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import decoded_clip, read_clip
from tests.helpers.added_voices import sound_file, tone
from tests.helpers.clips import DELAY, SECONDS, mp3, without_tag

if TYPE_CHECKING:
    from pathlib import Path


def seconds(file: bytes, channels: int = 2) -> float:
    """Read a clip. Returns its length."""
    samples, rate = read_clip(io.BytesIO(file), what="the clip", channels=channels)
    return len(samples) / rate


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_file_without_a_length_is_read_to_its_end(rate: int, channels: int) -> None:
    for loud_first in (False, True):
        file = without_tag(mp3(rate, channels, loud_first=loud_first))
        estimate = soundfile.info(io.BytesIO(file)).duration
        assert abs(estimate - SECONDS) > 0.5, "otherwise this test shows nothing"
        assert seconds(file) == pytest.approx(SECONDS, abs=DELAY)


def test_the_samples_of_an_mp3_file_without_a_length_are_those_of_the_complete_file() -> None:
    file = mp3(loud_first=True)
    whole, _ = read_clip(io.BytesIO(file), what="the clip")
    rest, _ = read_clip(io.BytesIO(without_tag(file)), what="the clip")
    delay = int(np.argmax(np.correlate(rest[:8000], whole[2000:6000]))) - 2000
    assert 0 <= delay < DELAY * 24_000
    assert np.abs(rest[delay:][2000:100_000] - whole[2000:100_000]).max() < 1e-4


def _id3(size: int, *, footer: bool = False) -> bytes:
    length = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    end = b"3DI\x04\x00\x10" + length if footer else b""
    return b"ID3\x04\x00" + (b"\x10" if footer else b"\x00") + length + bytes(size) + end


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b"TAG" + bytes(125)),
        (_id3(5000), b""),
        (_id3(300, footer=True), b""),
        (_id3(10) + _id3(200_000), b""),
        (b"", b"APETAGEX" + bytes(5000)),
        (b"", mp3()[:100]),
    ],
    ids=["ID3v1", "ID3v2", "ID3v2 with a footer", "two tags", "APE", "cut frame"],
)
def test_tags_and_an_incomplete_frame_do_not_stop_an_mp3_file_without_a_length(before: bytes, after: bytes) -> None:
    assert seconds(before + without_tag(mp3()) + after) == pytest.approx(SECONDS, abs=DELAY)


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT", "AVERAGE"])
def test_an_mp3_file_with_a_length_has_exactly_this_length(mode: str) -> None:
    assert seconds(mp3(mode=mode)) == SECONDS
    assert seconds(_id3(100_000) + mp3(mode=mode)) == SECONDS


def test_joined_mp3_files_are_read_to_the_end_of_the_last_one() -> None:
    assert seconds(mp3() + mp3(loud_first=True)) == pytest.approx(2 * SECONDS, abs=2 * DELAY)


def test_a_cut_mp3_file_gives_the_audio_that_it_contains() -> None:
    half = len(mp3()) // 2
    with_length, without = seconds(mp3()[:half]), seconds(without_tag(mp3())[:half])
    assert 3.5 < with_length < 5, "the half with the low bit rate, and a part of the other one"
    assert without == pytest.approx(with_length, abs=DELAY)


def test_a_long_mp3_file_without_a_length_is_refused_after_the_longest_clip() -> None:
    file = without_tag(mp3()) * 51
    with pytest.raises(BadInputError, match="is more than 300 s long; 1 to 300 s are needed"):
        seconds(file)
    with pytest.raises(BadInputError, match="more than 50000 samples"):
        read_clip(io.BytesIO(file), what="the clip", max_samples=50_000)


def test_a_flac_file_from_a_pipe_is_read_to_its_end() -> None:
    data = bytearray(sound_file(tone(SECONDS), kind="FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # the number of samples in the header
    assert seconds(bytes(data)) == SECONDS


def test_a_wav_or_au_file_from_a_pipe_is_read_to_its_end() -> None:
    wav = bytearray(sound_file(tone(SECONDS)))
    wav[4:8] = wav[40:44] = b"\xff" * 4
    au = bytearray(sound_file(tone(SECONDS), kind="AU", subtype="PCM_16"))
    au[8:12] = b"\xff" * 4
    assert seconds(bytes(wav)) == seconds(bytes(au)) == SECONDS


def test_a_bake_gets_the_whole_clip_with_the_same_samples(tmp_path: Path) -> None:
    for samples, kind, subtype in ((tone(2.0), "WAV", "PCM_16"), (tone(2.0), "FLAC", "PCM_24")):
        path = tmp_path / f"clip.{kind.lower()}"
        path.write_bytes(sound_file(samples, kind=kind, subtype=subtype))
        with decoded_clip(path, what="the clip") as decoded:
            again, rate = soundfile.read(decoded, dtype="float32")
        assert rate == 24_000
        assert np.array_equal(again, soundfile.read(path, dtype="float32")[0])
    path = tmp_path / "clip.mp3"
    path.write_bytes(without_tag(mp3()))
    with decoded_clip(path, what="the clip") as decoded:
        assert soundfile.info(decoded).duration == pytest.approx(SECONDS, abs=DELAY)
    assert not decoded.exists()
