"""The voices of reference clips that callers of the embedded server give with a text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.voices import prompt_voices
from chatterbox_prewarm.serve.voices.prompt_voices import PromptVoices, read_prompt
from chatterbox_prewarm.serve.voices.voice_file import SUFFIX, digest_of

if TYPE_CHECKING:
    from pathlib import Path


def test_a_voice_is_kept_until_others_replace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_voices, "_MAX_VOICES", 2)
    voices = PromptVoices()
    assert voices.find(b"one") is None
    one = voices.add(b"one", b"voice one")
    assert one.digest == digest_of(b"voice one")
    assert (voices.directory / f"{one.name}{SUFFIX}").read_bytes() == b"voice one"
    two = voices.add(b"two", b"voice two")
    assert voices.find(b"one") == one
    voices.add(b"three", b"voice three")
    assert voices.find(b"two") is None, "it was not used for the longest time"
    assert not (voices.directory / f"{two.name}{SUFFIX}").exists()
    assert voices.find(b"one") == one
    voices.close()
    assert not voices.directory.exists()


def test_a_clip_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "nowhere.wav", "No such file"), (tmp_path, "it is a directory"), (3.5, "is 3.5")):
        with pytest.raises(BadInputError, match=problem) as refused:
            read_prompt(path)  # type: ignore[arg-type]
        assert refused.value.next_step == "give the path of an audio file"


@pytest.mark.timeout(20)
def test_a_pipe_does_not_block_the_server(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.wav")
    with pytest.raises(BadInputError, match="it is a pipe and not a regular file"):
        read_prompt(tmp_path / "clip.wav")
