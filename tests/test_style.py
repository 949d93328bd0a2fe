"""The code is formatted, linted and typed; nothing in it speaks of the place where it was written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastsmtp", "tests", "bench", "loadtest", "fuzz", "setup.py")


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", *FOLDERS),
        ("ruff", "format", "--check", *FOLDERS),
        ("mypy", "--strict", "-p", "fastsmtp"),
        ("mypy", "--strict", "-p", "loadtest"),
    ],
    ids=" ".join,
)
def test_tools_are_content(command: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_project_speaks_of_itself_only() -> None:
    """No path of a workplace, no notes of debt."""
    wrong = re.compile(r"\bTODO\b|\bFIXME\b|\bXXX\b|/work/|shared/(?!corpus)[a-z]+\.md")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / name for name in listed.stdout.split()] if listed.returncode == 0 else []
    found = []
    for file in files:
        if file == Path(__file__) or not file.is_file():
            continue
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(ROOT)}: {match[0]}" for match in wrong.finditer(text)]
    assert not found
