"""The options of the tests."""

from __future__ import annotations

import ast
import gc
import signal
from pathlib import Path
from typing import Any

import pytest

import fastsmtp

# Files of half a minute and more, the longest first: what begins last must be short, or the other processes wait.
LONGEST = (
    *("test_crash.py", "test_serve.py", "test_files.py", "test_loadtest.py", "test_queue_command.py", "test_kill.py"),
    *("test_config.py", "test_load_generator.py", "test_load_sink.py", "test_load_peers.py", "test_load_compare.py"),
    *("test_reload.py", "test_odmr.py", "test_tls.py", "test_load_content.py", "test_cli.py", "test_sendmail.py"),
    *("test_spool.py", "test_maildir.py"),
)

_parse = ast.parse


def _parse_undisturbed(*source: Any, **options: Any) -> Any:
    collects = gc.isenabled()
    gc.disable()
    try:
        return _parse(*source, **options)
    finally:
        if collects:
            gc.enable()


def pytest_configure() -> None:
    """Python prefers a compiled module to its source, so an edit of that would not be tested. A shell's background job
    ignores SIGINT, and so would every server that a test starts. Where garbage is collected while CPython 3.11 makes a
    syntax tree, and another is made for it, the first one fails ("recursion depth mismatch")."""
    ast.parse = _parse_undisturbed
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def long(request: pytest.FixtureRequest) -> None:
    """For tests that run only by --long."""
    if not request.config.getoption("--long"):
        pytest.skip("runs with --long")
