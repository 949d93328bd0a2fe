"""The options of the tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=0, metavar="N", help="how often test_kill.py kills; 0: about 12 times, for 40 s"
    )
