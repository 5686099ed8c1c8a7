"""Test the checks of texts and voice names."""

from __future__ import annotations

import string
import sys
from typing import Any

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.text import MAX_CHARACTERS, check_text, check_voice_name, decode_text
from chatterbox_prewarm.model.tokenizer import check_known


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
        ("a control\x80", r"U\+0080"),
        ("\ufeff\u200b \u00ad\f", "is empty"),
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


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("The end of page 1.\fPage 2.", "The end of page 1. Page 2."),
        ("a\vb\x1cc\x1dd\x1ee\x1ff\x85g", "a b c d e f g"),
        ("co\u00adoper\u00adate", "cooperate"),
        ("\ufeffHello\u200b, wo\u200drld\u200c\u2060.", "Hello, world."),
        ("\u202aleft\u202c to \u2066right\u2069\u200e", "left to right"),
        ("I \u2764\ufe0f it", "I \u2764 it"),
    ],
)
def test_invisible_characters_are_removed_and_page_breaks_become_spaces(text: str, spoken: str) -> None:
    assert check_text(text) == spoken


def test_all_characters_that_unicode_calls_ignorable_are_removed_and_no_other_ones() -> None:
    regex = pytest.importorskip("regex")
    everything = "".join(chr(code) for code in range(0xA0, sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF)
    removed = regex.compile(r"[\p{Default_Ignorable_Code_Point}\uFFF9-\uFFFB]")
    assert check_text(everything, limit=None) == removed.sub("", everything)


def test_each_control_character_is_white_space_or_refused() -> None:
    for code in (*range(0x20), *range(0x7F, 0xA0)):
        if chr(code).isspace():
            assert check_text(f"a{chr(code)}b").split() == ["a", "b"]
        else:
            with pytest.raises(BadInputError, match=f"U\\+{code:04X}"):
                check_text(f"a{chr(code)}b")


def test_the_limit_does_not_count_invisible_characters() -> None:
    assert check_text("\ufeff" + "x\u00ad" * MAX_CHARACTERS) == "x" * MAX_CHARACTERS


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


def tokenizer_of_letters() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    letters = ["[UNK]", "[SPACE]", *string.ascii_letters, *string.punctuation]
    vocabulary = {token: index for index, token in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]", "[SPACE]"])
    return tokenizer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("你好世界", "4 of the 4 tokens of this text, mostly CJK characters"),
        ("Say this: Привет, как дела?", "tokens of this text, mostly CYRILLIC characters"),
        ("مرحبا", "mostly ARABIC"),
        ("\ue000\ue000", "mostly unnamed"),
    ],
)
def test_a_text_that_the_tokenizer_mostly_does_not_know_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BadInputError, match=reason):
        check_known(tokenizer_of_letters(), text, step="send another text")


@pytest.mark.parametrize("text", ["Hello.", "A caf\u00e9 in \u4e16\u754c.", "a\u4e16", "a " * 50, "..."])
def test_a_text_with_some_unknown_characters_is_accepted(text: str) -> None:
    check_known(tokenizer_of_letters(), text, step="send another text")
