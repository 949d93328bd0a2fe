"""The options of the tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import fastsmtp


def pytest_configure() -> None:
    """Python prefers a compiled module to its source, so an edit of that would not be tested. A shell's background job
    ignores SIGINT, and so would every server that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(fastsmtp.__file__).parent
    for library in folder.rglob("*.so"):
        source = library.parent / f"{library.name.partition('.')[0]}.py"
        if source.exists() and source.stat().st_mtime > library.stat().st_mtime:
            pytest.exit(f"{source.name} is newer than its compiled form: make test builds it anew", 3)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills",
        type=int,
        default=0,
        metavar="N",
        help="how often test_kill*.py kill; 0: a few times, for some seconds",
    )
    parser.addoption("--long", action="store_true", help="also what takes minutes: a comparison of two builds")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> None:
    """For tests that run only by --long."""
    if not request.config.getoption("--long"):
        pytest.skip("runs with --long")
