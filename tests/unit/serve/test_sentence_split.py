# ruff: noqa: RUF001 - texts in several scripts
"""Splitting long texts: no character is lost, no part is too long, and cuts are where a reader would pause."""

from __future__ import annotations

import random
import time

import pytest

from chatterbox_prewarm.model.text import MAX_CHARACTERS, check_text
from chatterbox_prewarm.serve.workers.sentence_split import LIMIT, split
from chatterbox_prewarm.weights.variants import MULTILINGUAL

regex = pytest.importorskip("regex")
pytest.importorskip("sentencex")


def visible_characters(text: str) -> str:
    return "".join(text.split())


def graphemes(text: str) -> list[str]:
    return [cluster for cluster in regex.findall(r"\X", text) if not cluster.isspace()]


def check(text: str, limit: int = LIMIT) -> list[str]:
    """Split a text, check the rules that apply to every text, and return the parts."""
    parts = split(text, limit=limit)
    assert visible_characters("".join(parts)) == visible_characters(text)
    assert all(0 < len(part) <= limit for part in parts)
    for part in parts if len(text) > limit else ():
        clusters = regex.findall(r"\X", part)
        assert not clusters[0].isspace()
        assert not clusters[-1].isspace()
    if max(map(len, graphemes(text)), default=0) <= limit:
        assert [cluster for part in parts for cluster in graphemes(part)] == graphemes(text)
    return parts


@pytest.mark.parametrize("text", ["Hi.", "x" * LIMIT, "One. Two!\nThree?  ", "  spaced  ", "。" * LIMIT])
def test_a_text_within_the_limit_is_not_changed(text: str) -> None:
    assert check(text) == [text]


def test_short_sentences_are_combined_in_order() -> None:
    sentences = [f"This is sentence number {number}, and it is short." for number in range(40)]
    parts = check(" ".join(sentences))
    assert " ".join(parts) == " ".join(sentences)
    assert all(part.endswith("short.") for part in parts)
    longest = max(map(len, sentences))
    assert all(len(part) > LIMIT - longest - 1 for part in parts[:-1])


@pytest.mark.parametrize(
    "sentence",
    [
        "Dr. Smith and Mrs. Jones met at 5 p.m. on Main St. near the old mill.",
        "It rose by 3.14 percent to 1,000.50 dollars, i.e. less than in the U.S. in 1999.",
        "See example.com or fig. 3 on p. 12 for vol. 2 of it, e.g. the first line.",
        "J. R. R. Tolkien wrote it, etc. and so on and so forth until the very end.",
    ],
)
def test_abbreviations_and_numbers_do_not_end_a_sentence(sentence: str) -> None:
    parts = check(f"{sentence} " * 20, limit=len(sentence) + 10)
    assert parts == [sentence] * 20


@pytest.mark.parametrize(
    ("sentence", "separator"),
    [
        ("这是一个句子，它有一个逗号。", ""),
        ("これは文です。", ""),
        ("「これは文ですか？」", ""),
        ("Это предложение, и оно короткое.", " "),
        ("هل هذه جملة قصيرة؟", " "),
        ("यह एक छोटा वाक्य है।", " "),
        ("Ist das ein Satz?", " "),
        ("«Est-ce une phrase ?»", " "),
        ("Αυτή είναι μια πρόταση.", " "),
    ],
)
def test_sentences_in_other_scripts_are_recognized(sentence: str, separator: str) -> None:
    text = separator.join([sentence] * 60)
    for part in check(text):
        assert part.endswith(sentence)
        assert part.startswith(sentence)


def test_a_long_sentence_is_cut_after_a_clause() -> None:
    text = ", ".join(f"and then there came clause number {number}" for number in range(30)) + "."
    parts = check(text)
    assert all(part.endswith(",") for part in parts[:-1])
    assert all(part.startswith("and then") for part in parts)


def test_a_clause_is_not_cut_inside_a_number() -> None:
    text = "1,000,000:30 " * 60
    assert {part.replace("1,000,000:30", "").strip() for part in check(text)} == {""}


def test_a_long_clause_is_cut_at_a_space() -> None:
    text = "word " * 800
    parts = check(text)
    assert {word for part in parts for word in part.split(" ")} == {"word"}
    assert all(len(part) > LIMIT - 5 for part in parts[:-1])


def test_a_text_without_white_space_is_cut_at_the_limit() -> None:
    parts = check("a" * MAX_CHARACTERS)
    assert [len(part) for part in parts] == [LIMIT] * (MAX_CHARACTERS // LIMIT) + [MAX_CHARACTERS % LIMIT]


@pytest.mark.parametrize(("language", "limit"), [("fr", LIMIT), ("zh", 90), ("ja", 110), ("ko", 130), (None, LIMIT)])
def test_a_part_is_shorter_in_a_language_that_says_more_with_a_character(language: str | None, limit: int) -> None:
    parts = split("今天天气很好。" * 100, language)
    assert "".join(parts) == "今天天气很好。" * 100
    assert limit - 7 < max(map(len, parts)) <= limit


@pytest.mark.parametrize("language", MULTILINGUAL.languages)
def test_each_language_has_rules_for_the_ends_of_sentences(language: str) -> None:
    text = f"{MULTILINGUAL.samples[language]} " * 40
    parts = split(text, language)
    assert len(parts) > 1
    assert visible_characters("".join(parts)) == visible_characters(text)


def test_the_number_of_a_list_item_stays_with_its_text() -> None:
    text = "\n".join(f"{number}. An item of a list that has no full stop" for number in range(1, 40))
    assert all(part[0].isdigit() for part in check(text, limit=80))
    assert all(part[0].isdigit() for part in check(text))


def test_texts_are_cut_at_line_ends() -> None:
    lines = [f"a line without a full stop, number {number}" for number in range(30)]
    parts = check("\n".join(lines))
    assert [line for part in parts for line in part.split("\n")] == lines
    paragraphs = ["A paragraph without an end"] * 30
    assert "\n\n".join(check("\n\n".join(paragraphs))) == "\n\n".join(paragraphs)


@pytest.mark.parametrize("tag", ["[clear throat]", "[laugh]"])
@pytest.mark.parametrize("word", ["word ", "word"])
@pytest.mark.parametrize("before", range(LIMIT - 20, LIMIT + 2))
def test_a_tag_is_not_cut_wherever_it_crosses_the_limit(before: int, word: str, tag: str) -> None:
    parts = check((word * LIMIT)[:before] + tag + " and more" * 40)
    assert sum(part.count(tag) for part in parts) == 1
    assert [part for part in parts if part.count("[") != part.count("]")] == []


def test_a_tag_that_begins_exactly_at_the_limit_begins_the_next_part() -> None:
    assert check("x" * LIMIT + "[clear throat] y") == ["x" * LIMIT, "[clear throat] y"]
    assert check("word " * (LIMIT // 5) + "[clear throat] y")[1] == "[clear throat] y"


def test_a_tag_that_ends_exactly_at_the_limit_ends_the_part() -> None:
    before = "x" * (LIMIT - len("[clear throat]"))
    assert check(f"{before}[clear throat]y") == [f"{before}[clear throat]", "y"]


def test_tags_without_spaces_between_them_are_not_cut() -> None:
    parts = check("[clear throat]" * 50)
    assert {part.replace("[clear throat]", "") for part in parts} == {""}
    assert all(len(part) > LIMIT - len("[clear throat]") for part in parts[:-1])


def test_words_in_brackets_that_are_longer_than_the_limit_are_cut_at_a_space() -> None:
    parts = check("[" + "word " * 100 + "]")
    assert {word for part in parts for word in part.strip("[]").split()} == {"word"}
    assert len(check("[" + "x" * LIMIT + "]")) == 2


@pytest.mark.parametrize(
    "cluster",
    [
        "👨‍👩‍👧‍👦",
        "👍🏽",
        "🇩🇪",
        "e\u0301",
        "n\u0303\u0323",
        "각",
        "\u1112\u1161\u11ab",
        "क्षि",
        "❤\ufe0f",
        "1\ufe0f\u20e3",
        "!\ufe0f",
        ",\u0301 ",
        "\r\n.",
        " \u0301",
    ],
)
@pytest.mark.parametrize("limit", [LIMIT, 13, 11])
def test_a_grapheme_cluster_is_not_cut(cluster: str, limit: int) -> None:
    check(cluster * 200, limit=limit)
    check(f"a{cluster}b " * 100, limit=limit)


def test_a_grapheme_cluster_longer_than_the_limit_is_cut() -> None:
    parts = check("a" + "\u0301" * 1000)
    assert len(parts) == 4


@pytest.mark.parametrize("seed", range(30))
def test_no_character_of_a_random_text_is_lost(seed: int) -> None:
    draw = random.Random(seed)
    pieces = [
        *("Hello", "Mr.", "U.S.", "3.14", "...", "?!", "!", ".", "。", "！", ",", "，", ";", ":", "—", "-"),
        *("'", '"', "“", "”", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000", "\u200b", "\ufeff"),
        *("你好", "मैं", "ไทย", "العربية", "e\u0301", "\u0301", "👍🏽", "🇩🇪🇫🇷", "👨‍👩‍👧", "\ufe0f", "İ", "ß", "\ufb01"),
        *("1.", "(a)", "* ", "[1]", "[clear throat]", "<b>", "</p>", "&amp;", "x" * 50, "word " * 20),
    ]  # fmt: skip
    for _ in range(20):
        text = "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 400)))
        for limit in (LIMIT, 40, draw.randrange(1, 60)):
            check(text, limit=limit)


@pytest.mark.parametrize("seed", range(5))
def test_no_character_of_any_unicode_plane_is_lost(seed: int) -> None:
    # Texts with surrogates or control characters are refused before they are split.
    draw = random.Random(seed)
    for _ in range(20):
        points = [draw.randrange(0x20, draw.choice([0x7F, 0x500, 0x3000, 0x10000, 0x110000])) for _ in range(600)]
        check("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))


def test_the_longest_texts_are_split_within_a_few_seconds_of_processor_time() -> None:
    # These texts were chosen to be slow.
    for text in (
        "Mr. " * 1024,
        '"' * 4096,
        "(" * 4096,
        "a. " * 1365,
        ". " * 2048,
        "1. " * 1365,
        "\n" * 4095 + "a",
        "“" * 4096,
    ):
        check_text(text)
        began = time.process_time()  # does not count the time of other processes
        check(text)
        assert time.process_time() - began < 5.0
