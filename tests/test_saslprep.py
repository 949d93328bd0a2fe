"""SASLprep: the examples of RFC 4013 3, and what holds for every text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scramp import core  # type: ignore[import-untyped]

from fastsmtp.saslprep import saslprep


@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("I\u00adX", "IX"),
        ("user", "user"),
        ("USER", "USER"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        # Other spaces, marks that are composed, forms that only look different, and what is newer than Unicode 3.2.
        ("a\u00a0b\u2003c", "a b c"),
        ("u\u0308", "\u00fc"),
        ("\uff41\u00bd", "a1\u20442"),
        ("\U0001f434", "\U0001f434"),
        ("\u0627\u0628", "\u0627\u0628"),
        ("\u06271\u0628", "\u06271\u0628"),
        (" ", " "),
        ("a,b=c\\", "a,b=c\\"),
    ],
)
def test_prepared(text: str, prepared: str) -> None:
    assert saslprep(text) == prepared


@pytest.mark.parametrize(
    "text",
    [
        "", "\u00ad", "\u0007", "\u007f", "a\0", "a\n", "\u0627\u0031", "\u0627a\u0628", "a\u0627",
        "\u0085", "\u2028", "\ue000", "\ufffe", "\ud800", "\u2ff0", "\u200e", "\U000e0001",
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is empty|not allowed|directions"):
        saslprep(text)


def test_each_character_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup takes up to 10 µs, and this becomes 5,400 characters."""
    looked: list[str] = []
    monkeypatch.setattr("fastsmtp.saslprep._PROHIBITED", (lambda each: looked.append(each) is not None,))
    prepared = saslprep("\ufdfa" * 300)
    assert len(prepared) == 5400
    assert sorted(looked) == sorted(set(prepared))


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), min_size=1))
def test_ascii_stays_as_it_is(text: str) -> None:
    assert saslprep(text) == text


@given(st.text(alphabet=st.characters(max_codepoint=0x2FFFF), min_size=1, max_size=6))
def test_as_another_implementation(text: str) -> None:
    """Where that knows the characters: it refuses what Unicode 3.2 has not, and normalises as Unicode does now."""
    try:
        expected = core.saslprep(text)
    except core.ScramException:
        return
    if unicodedata.normalize("NFKC", text) == unicodedata.ucd_3_2_0.normalize("NFKC", text) and expected:
        assert saslprep(text) == expected
