"""The hot modules do the same without being compiled: the tests of the protocol, once more on their sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastsmtp

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastsmtp.__file__).parent
# Long series of commands by chance: they find what the code does wrong, not what compiling changes.
LONG = "any_sequence_of_commands or as_many_replies_as_ends"
TESTS = ("session", "dialogs", "connection", "commands", "reply", "message", "dialogue", "destinations", "memory_spool")


def compiled() -> list[Path]:
    """Compiled forms of modules that have a source in Python."""
    return [file for file in PACKAGE.rglob("*.so") if (file.parent / f"{file.name.partition('.')[0]}.py").exists()]


def test_the_tests_pass_without_compiled_modules(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fastsmtp", ignore=shutil.ignore_patterns(*[file.name for file in compiled()]))
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", f"not ({LONG})"]
    done = subprocess.run(
        [*command, *(f"tests/test_{name}.py" for name in TESTS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


def test_it_is_compiled() -> None:
    """Unless it was built without: then the figures of the documentation do not hold."""
    assert compiled() or os.environ.get("FASTSMTP_PURE", "") not in ("", "0")
