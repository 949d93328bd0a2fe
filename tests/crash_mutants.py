"""Copies of the package with one mistake in each, which the crash kit has to see.

In: a mistake's name, a folder. Out: the folder of a package that runs from its sources, but for the C extensions, with
the mistake put in by replacing text. Always: a text that is to be replaced stands there exactly once, so that a mistake
whose place has changed is noticed. The Maildir's files are written in C; the mistakes that concern them put a few lines
of Python in its place, with the same steps but for the one that is left out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import fastsmtp

PACKAGE = Path(fastsmtp.__file__).parent

# The steps of _files.write_batch; %s are the first and the second flush.
_WRITE_BATCH = """\
import ctypes, os

_libc = ctypes.CDLL(None)


def write_batch(directory, items, *, each=False, probe=-1):
    names = []
    for temporary, mailbox, name, parts, strip in items:
        octets = b""
        for part in parts:
            if not isinstance(part, bytes):
                source, offset, length = part
                with open(source, "rb") as file:
                    file.seek(offset)
                    part = file.read(length)
            octets += part
        if strip:
            octets = octets.replace(b"\\r", b"")
        fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=directory)
        os.write(fd, octets)
        os.close(fd)
        names.append((temporary, mailbox, b"%%s/new/%%s,S=%%d" %% (mailbox, name, len(octets))))
    %s
    for temporary, mailbox, name in names:
        for folder in (b"tmp", b"cur", b"new"):
            os.makedirs(os.path.join(mailbox, folder), exist_ok=True)
        os.rename(temporary, name, src_dir_fd=directory)
    %s
    return [0] * len(names)
"""
_FLUSH = "_libc.syncfs(directory)"
_DELIVER = "    def _deliver(self, transport: Transport, batch: Batch) -> Outcomes | Awaitable[Outcomes]:\n"
_IMPORT = "from .._files import confirm, make_dirs, write_batch\n"


def _maildir(first: str, second: str) -> tuple[tuple[str, str, str], ...]:
    replaced = _IMPORT.replace(", write_batch", "") + _WRITE_BATCH % (first, second)
    return (("delivery/maildir.py", _IMPORT, replaced),)


# File, what stands there, what stands there instead.
MISTAKES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "none": _maildir(_FLUSH, _FLUSH),
    "spool-fsync": (("store.py", "PRAGMA synchronous = FULL;", "PRAGMA synchronous = OFF;"),),
    "mailbox-fsync": _maildir("pass", "pass"),
    "directory-fsync": _maildir(_FLUSH, "pass"),
    "full-taken": (
        (
            "room.py",
            "        return (\n            self.ballast.there\n",
            "        return (\n            True or self.ballast.there\n",
        ),
    ),
    "full-lost": (
        (
            "commit.py",
            "        self._answer(work.entries, refused)\n        work.entries = []\n        self._waiting.give_back",
            "        self._answer(work.entries, STORED)\n        work.entries = []\n        self._waiting.give_back",
        ),
        ("commit.py", "self._answer(work.entries, Refused(UNDECIDED, None))", "self._answer(work.entries, STORED)"),
    ),
    "mark-first": (
        (
            "queue.py",
            _DELIVER,
            f"{_DELIVER}        self._backlog.finish([Mark(job.key, n) for job, one in batch for n in one.numbers])\n",
        ),
        (
            "spool.py",
            "            if job is not None:\n",
            "            if job is not None and mark.number in job.pending:\n",
        ),
        # Long enough for the mark's commit to be there first.
        (
            "delivery/maildir.py",
            "        errors: list[int] = []\n",
            "        errors: list[int] = []\n        __import__('time').sleep(0.02)\n",
        ),
    ),
}


def make_mutant(mistake: str, folder: Path) -> Path:
    """The folder that holds the package with this mistake."""
    sources = {file.stem for file in PACKAGE.rglob("*.py")}
    compiled = [file.name for file in PACKAGE.rglob("*.so") if file.name.partition(".")[0] in sources]
    shutil.copytree(PACKAGE, folder / "fastsmtp", ignore=shutil.ignore_patterns("__pycache__", "*.c", *compiled))
    for name, old, new in MISTAKES[mistake]:
        file = folder / "fastsmtp" / name
        text = file.read_text()
        assert text.count(old) == 1, f"{name} does not hold {old!r} once"
        file.write_text(text.replace(old, new))
    return folder
