"""needs: a missing program skips and says what to install; in CI it fails."""

from __future__ import annotations

import pytest
from needs import PACKAGES, needs


def test_what_is_there_is_no_reason_to_skip() -> None:
    needs("sh", "python3")


def test_a_missing_program_skips_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setitem(PACKAGES, "no-such-program", "its-package")
    with pytest.raises(pytest.skip.Exception, match="needs no-such-program: apt-get install its-package"):
        needs("sh", "no-such-program")


def test_a_missing_program_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install no-such-program"):
        needs("no-such-program")
