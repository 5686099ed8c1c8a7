"""Test the marks that a text needs for its pronunciation."""

from __future__ import annotations

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.marks import check_marks


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("שָׁלוֹם עוֹלָם", "he"),
        ("12 + 3", "he"),
        ("Приве\u0301т, как дела\u0301?", "ru"),
        ("Да. Нет. Вот дом.", "ru"),
        ("Ещё всё.", "ru"),
        ("Зелёный дом стоит.", "ru"),
        ("Hello.", "ru"),
        ("שלום", "en"),
    ],
)
def test_a_text_with_its_marks_or_without_need_of_them_is_accepted(text: str, language: str) -> None:
    check_marks(text, language)


@pytest.mark.parametrize(
    ("text", "language", "lacking"), [("שלום עולם", "he", "points"), ("Привет, как дела?", "ru", "stress")]
)
def test_a_text_without_its_marks_is_refused_unless_that_is_allowed(text: str, language: str, lacking: str) -> None:
    with pytest.raises(BadInputError, match=lacking) as caught:
        check_marks(text, language)
    assert f"--plain-text {language}" in (caught.value.next_step or "")
    check_marks(text, language, plain=(language,))
