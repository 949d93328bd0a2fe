"""The users file: a line for each user, which `fastsmtp user` writes and a server reads when it has changed.

    # fastsmtp users 1
    ann@example.org:$argon2id$v=19$...:{SCRAM-SHA-256}10000,...:@example.org,sales@example.net

In: the file. Out: records: name, password, SCRAM keys or nothing, senders. It is replaced as a whole, under a lock of
its folder, so that a reader sees the old one or the new one; lines that are not meant stay as they are. Only its owner
may read it: a file that others can read is refused. A file that has become unreadable makes its users UnavailableError.
A user's stamp is his line: who has a new password, or is deleted, is nowhere remembered.
On failure: UsersError with one line.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from . import UnavailableError
from .directory import Record
from .hashes import check_form
from .scram import USUAL, Shape, parse_keys, render_keys
from .senders import parse_senders

HEADER = "# fastsmtp users 1"
_WITH_KEYS = re.compile(r"^[^:#\n][^:\n]*:[^:\n]*:\{SCRAM-SHA-256\}([0-9]{1,7}),([A-Za-z0-9+/]*)", re.MULTILINE)


class UsersError(OSError):
    """The file cannot be used; one line says why."""


class Users:
    """A source. `load` is called once at the start; then a change is seen when somebody is looked for."""

    label = "auth.users_file"

    def __init__(self, path: Path, domain: str) -> None:
        self._path = path
        self._domain = domain
        self._lines: Mapping[str, str] = {}
        self._seen: tuple[int, ...] = ()
        self._trouble = ""
        self._shapes: Mapping[Shape, int] = {}

    @property
    def shapes(self) -> Mapping[Shape, int]:
        self._refresh()
        return self._shapes

    def load(self) -> None:
        """Raises UsersError."""
        with _open(self._path) as descriptor:
            self._seen = _identity(os.fstat(descriptor))
            text = _read(self._path, descriptor)
        self._lines = split_lines(self._path, text)
        # Offered when everybody can do it: a client that is offered it tries nothing else.
        found = _WITH_KEYS.findall(text)
        shapes = Counter((int(count), len(salt) * 3 // 4) for count, salt in found)
        self._shapes = (shapes or {USUAL: 1}) if len(found) == len(self._lines) else {}

    def stamp(self, name: str) -> object:
        self._refresh()
        return self._trouble or self._lines.get(name)

    def find(self, name: str) -> Record | None:
        """Raises UnavailableError."""
        self._refresh()
        if self._trouble:
            raise UnavailableError(self._trouble)
        line = self._lines.get(name)
        try:
            return parse_line(line, self._domain) if line is not None else None
        except ValueError as error:
            raise UnavailableError(f"{self._path}: user {name}: {error}") from None

    async def close(self) -> None:
        pass

    def _refresh(self) -> None:
        try:
            now = _identity(self._path.stat())
        except OSError as error:
            self._seen, self._trouble = (), f"{self._path} cannot be read: {error.strerror}"
            return
        if now == self._seen:
            return
        try:
            self.load()
            self._trouble = ""
        except UsersError as error:
            self._seen, self._trouble = now, str(error)


def read_users(path: Path, domain: str = "") -> dict[str, Record]:
    """All users. Raises UsersError."""
    with _open(path) as descriptor:
        lines = split_lines(path, _read(path, descriptor))
    records = {}
    for name, line in lines.items():
        try:
            records[name] = parse_line(line, domain)
        except ValueError as error:
            raise UsersError(f"{path}: user {name}: {error}") from None
    return records


def parse_line(line: str, domain: str) -> Record:
    """Raises ValueError."""
    words = line.split(":")
    if len(words) != 4:
        raise ValueError("a line is name:password:scram:senders")
    name, password, scram, senders = map(str.strip, words)
    password = check_form(password) if password else ""
    return Record(name.lower(), password, parse_keys(scram) if scram else None, parse_senders(senders, name, domain))


def render_line(record: Record, senders: str) -> str:
    return f"{record.name}:{record.password}:{render_keys(record.keys) if record.keys else ''}:{senders}"


def split_lines(path: Path, text: str) -> dict[str, str]:
    """The line of each user, by the name. Raises UsersError."""
    first, _, rest = text.partition("\n")
    if first.rstrip() != HEADER:
        raise UsersError(f"{path} is no users file: its first line is not {HEADER!r}")
    lines: dict[str, str] = {}
    for number, line in enumerate(rest.split("\n"), 2):
        name, colon, _ = line.partition(":")
        name = name.strip().lower()
        if name in lines:
            raise UsersError(f"{path}:{number}: user {name} stands twice")
        if colon and name[:1] != "#":
            lines[name] = line
        elif line.strip() and line[0] != "#":
            raise UsersError(f"{path}:{number}: a line is name:password:scram:senders")
    return lines


def change_users(path: Path, change: Callable[[Mapping[str, str]], Mapping[str, str | None]], owner: int = -1) -> None:
    """Replaces lines: `change` is given those that there are, by name, and says which become what; None: removed. A
    file that does not exist yet is made, for the user `owner`. Raises UsersError, and what `change` raises."""
    path = path.resolve()
    try:
        with _locked(path.parent):
            text, status = HEADER + "\n", None
            if path.exists():
                with _open(path) as descriptor:
                    text, status = _read(path, descriptor), os.fstat(descriptor)
            present = split_lines(path, text)
            changed = dict(change(present))
            kept = []
            for line in text.rstrip("\n").split("\n"):
                name = line.partition(":")[0].strip().lower()
                new = changed.pop(name, line) if name in present else line
                kept += [] if new is None else [new]
            kept += [line for line in changed.values() if line is not None]
            _replace(path, "\n".join(kept) + "\n", status, owner)
    except UsersError:
        raise
    except OSError as error:
        raise UsersError(f"{path} cannot be written: {error.strerror}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str, before: os.stat_result | None, owner: int) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            if os.geteuid() == 0:
                uid, gid = (before.st_uid, before.st_gid) if before is not None else (owner, -1)
                os.fchown(descriptor, uid, gid)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _open(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UsersError(f"there is no {path}; `fastsmtp user add` makes it") from None
    except OSError as error:
        raise UsersError(f"{path} cannot be read: {error.strerror}") from None
    try:
        if os.fstat(descriptor).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsersError(f"{path} can be read by others: chmod 600 {path}")
        yield descriptor
    finally:
        os.close(descriptor)


def _read(path: Path, descriptor: int) -> str:
    try:
        with open(descriptor, "rb", closefd=False) as file:
            return file.read().decode()
    except OSError as error:
        raise UsersError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsersError(f"{path} is not UTF-8") from None


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode)
