"""Status codes in plain words."""

from __future__ import annotations

import re

import pytest

from fastsmtp.reasons import OTHER, REASONS, reason_of


@pytest.mark.parametrize(
    ("status", "what"),
    [
        ("5.1.1", "no such mailbox"),
        ("4.2.2", "is full"),
        ("5.2.3", "larger than the recipient may receive"),
        ("5.3.4", "too big"),
        ("5.1.2", "no such domain"),
        ("5.4.4", "No mail server was found"),
        ("5.1.10", "takes no mail at all"),
        ("5.7.1", "by its own rules"),
        ("5.7.26", "could not verify"),
        ("4.4.1", "did not answer"),
        ("5.4.6", "in a circle"),
        ("5.6.7", "characters"),
    ],
)
def test_the_usual_ones(status: str, what: str) -> None:
    assert what in reason_of(status).what


def test_a_code_without_a_row_is_told_by_its_subject() -> None:
    assert reason_of("5.7.999") is REASONS["7"]
    assert reason_of("5.1.11") is REASONS["1"]


@pytest.mark.parametrize("status", ["5.0.0", "5.9.1", "", "nonsense", "5"])
def test_any_other(status: str) -> None:
    assert reason_of(status) is OTHER


def test_rows_are_codes_and_whole_sentences() -> None:
    for code, reason in REASONS.items():
        assert re.fullmatch(r"[1-7](\.[0-9]{1,3})?", code)
        for sentence in reason:
            assert re.fullmatch(r"[A-Z][ -~]+\.", sentence)
