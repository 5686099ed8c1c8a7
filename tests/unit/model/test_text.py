"""Test the checks of texts and voice names."""

from __future__ import annotations

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.text import MAX_CHARACTERS, check_text, check_voice_name, decode_text


@pytest.mark.parametrize(
    "text", ["Hello.", "x", "Grüße, 世界! 👋", "two\nlines\tand a tab\r\n", "  spaced  ", "x" * MAX_CHARACTERS]
)
def test_valid_text_is_returned_unchanged(text: str) -> None:
    assert check_text(text) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (" \t\r\n\u00a0\u2003", "is empty"),
        ("x" * (MAX_CHARACTERS + 1), f"has {MAX_CHARACTERS + 1} characters, more than the limit of {MAX_CHARACTERS}"),
        ("word " * 20_000, "has 100000 characters"),
        ("nul\0", r"U\+0000"),
        ("bell\x07", r"U\+0007"),
        ("escape\x1b[31m", r"U\+001B"),
        ("delete\x7f", r"U\+007F"),
        ("next line\x85", r"U\+0085"),
        ("lone \ud800 surrogate", r"U\+D800"),
        ("lone \udfff", r"U\+DFFF"),
        (None, "NoneType, not a string"),
        (5, "int, not a string"),
        (b"bytes", "bytes, not a string"),
        (["a"], "list, not a string"),
    ],
)
def test_invalid_text_is_refused_with_a_reason(text: object, reason: str) -> None:
    with pytest.raises(BadInputError, match=reason) as caught:
        check_text(text)
    assert caught.value.exit_code == 16
    assert caught.value.next_step
    assert len(str(caught.value)) < 300  # the message does not contain the complete text


def test_limit_can_be_set() -> None:
    assert check_text("12345", limit=5) == "12345"
    with pytest.raises(BadInputError, match="more than the limit of 4"):
        check_text("12345", limit=4)


def test_utf_8_is_decoded() -> None:
    assert decode_text("Grüße 👋".encode()) == "Grüße 👋"


@pytest.mark.parametrize(
    ("data", "position"), [(b"caf\xe9", 3), (b"\xff\xfeH\x00", 0), (b"ok \xed\xa0\x80", 3), (b"cut \xe2\x82", 4)]
)
def test_invalid_utf_8_is_refused_with_its_position(data: bytes, position: int) -> None:
    with pytest.raises(BadInputError, match=f"at byte {position}\n") as caught:
        decode_text(data)
    assert caught.value.exit_code == 16


@pytest.mark.parametrize("name", ["default", "a", "7", "Anna-2_b", "x" * 64])
def test_valid_voice_name_is_accepted(name: str) -> None:
    assert check_voice_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 65,
        "../x",
        "..",
        ".",
        ".hidden",
        "a/b",
        "a\\b",
        "/etc",
        "-rf",
        "_x",
        "a b",
        "a\n",
        "a\0",
        "ä",
        "a.b",
        "a%2e",
    ],
)
def test_invalid_voice_name_is_refused(name: str) -> None:
    with pytest.raises(BadInputError, match="cannot name a voice") as caught:
        check_voice_name(name)
    assert caught.value.exit_code == 16
