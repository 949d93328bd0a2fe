"""A spool's database that is damaged: what can be read of it goes into a new one, the rest is named.

In: the directory of a spool that is locked and not open. Out: a new database in the place of the damaged one, with
every message that could be read together with its recipients; beside it a folder `damaged-TIME` with what was found,
and with the body files of messages that are not in the new one; and what is known of those, for the log.
Whatever stands in the database's place, the server starts. Where its first page cannot be read, which says what and
where everything is, that of an empty spool takes its place: tables begin at the same pages in every spool. What the log
still holds is read too.
Always: nothing is deleted, and a crash in the midst leaves either the old database or the new one in place: the new one
is whole and flushed before it takes its name. A message of which a part cannot be read is not kept in part.
Not here: bodies that do not have their checksums (spool). A database of another program, or of a newer version, is left
alone: the server does not start on it. On failure: SpoolError, apsw.Error, OSError; then the old database stays.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import apsw

from ._files import fsync_dir, make_dirs
from .ids import is_id
from .store import APPLICATION_ID, FORMAT, PAGE, TABLES, Store

CHECKED_OCTETS = 128 << 20  # a larger database is not read through at each start: a second for each GB
ROWS = 100

_INSERT = {
    "message": "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "recipient": "INSERT INTO recipient VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "broken": "INSERT INTO broken VALUES (?, ?, ?, ?)",
}
_FROM = (("message", "key"), ("recipient", "message"), ("broken", "message"))
_FIRST, _LAST = -(1 << 63), (1 << 63) - 1
_LOGS = ("-wal", "-shm", "-journal")


class Salvaged(NamedTuple):
    """`folder`: where what was found is now. `kept`: messages that could be read. `lost`: of others the id, or `key N`,
    and why."""

    folder: Path
    kept: int
    lost: list[tuple[str, str]]


def find_damage(directory: Path) -> str:
    """What is wrong with what stands in the place of the database; "" for a file, and for nothing where nothing was."""
    path = directory / "spool.db"
    if os.path.lexists(path) and not _is_file(path):
        return "it is no regular file"
    if _size(path):
        return ""
    # SQLite would take an empty file for a new database, and remove the log with all that it holds.
    if _size(Path(f"{path}-wal")) or any((directory / "body").iterdir()):
        return "it is gone"
    return ""


def clear(directory: Path, was_closed: bool, now: float) -> tuple[Path | None, list[str]]:
    """Puts aside what stands beside the database and cannot be its own. `was_closed`: the last to have it has ended in
    order, and left an empty log. Where it is now, and what it was. Raises OSError."""
    path = directory / "spool.db"
    found = []
    for end in _LOGS:
        log = Path(f"{path}{end}")
        if os.path.lexists(log) and not _is_file(log):
            found.append((log, "is no regular file"))
        elif end == "-wal" and was_closed and _size(log):
            found.append((log, "was empty when the server ended"))
    if not found:
        return None, []
    folder = make_folder(directory, now)
    for log, _ in found:
        os.rename(log, folder / log.name)
    fsync_dir(folder)
    fsync_dir(directory)
    return folder, [f"{log.name} {why}" for log, why in found]


def salvage(directory: Path, now: float, folder: Path | None = None) -> Salvaged:
    """Puts a new database in the place of the damaged one. `folder` is where something was put before."""
    path = directory / "spool.db"
    fresh = directory / "spool.db.new"
    folder = folder or make_folder(directory, now)
    if not _is_readable(path):
        _renew_first_page(directory, folder, now)
    _remove(fresh)
    source = apsw.Connection(str(path))
    try:
        source.execute("PRAGMA writable_schema = ON")  # also a file that is too short is read then
        # A log that stayed would be taken for the new one's.
        source.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        kept, lost = _copy(source, fresh, now)
    finally:
        source.close(True)
    if not os.path.lexists(folder / path.name):
        os.link(path, folder / path.name)
        fsync_dir(folder)
    _remove(path, _LOGS)
    _remove(fresh, _LOGS)
    os.rename(fresh, path)
    fsync_dir(directory)
    return Salvaged(folder, kept, lost)


def move_bodies(bodies: Path, folder: Path, known: set[str]) -> None:
    """Body files of messages that are not known go where the damaged database is. Raises OSError."""
    for name in os.listdir(bodies):
        if is_id(name) and name not in known:
            os.rename(bodies / name, folder / name)
    fsync_dir(folder)
    fsync_dir(bodies)


def is_sound(store: Store) -> bool:
    """Whether the pages of a database hang together; True for one that is too large to be looked through."""
    if store.path.stat().st_size > CHECKED_OCTETS:
        return True
    try:
        return store.check()
    except apsw.CorruptError:
        return False


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(os.lstat(path).st_mode)


def _size(path: Path) -> int:
    """0 for what is not there, or no file."""
    return os.lstat(path).st_size if os.path.lexists(path) and _is_file(path) else 0


def make_folder(directory: Path, now: float) -> Path:
    """A new one."""
    name = time.strftime("damaged-%Y%m%dT%H%M%SZ", time.gmtime(now))
    number = 1
    folder = directory / name
    while os.path.lexists(folder):
        number += 1
        folder = directory / f"{name}-{number}"
    make_dirs(folder)
    return folder


def _remove(path: Path, ends: Iterable[str] = ("", *_LOGS)) -> None:
    for end in ends:
        Path(f"{path}{end}").unlink(missing_ok=True)


def _is_readable(path: Path) -> bool:
    """Whether its first page says what it must."""
    if not _size(path):
        return False
    source = apsw.Connection(str(path))
    try:
        source.execute("PRAGMA writable_schema = ON")
        said = [source.execute(f"PRAGMA {name}").get for name in ("application_id", "user_version")]
        tables = source.execute(f"SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name IN {TABLES}").get
        return said == [APPLICATION_ID, FORMAT] and tables == len(TABLES)
    except apsw.Error:
        return False
    finally:
        source.close(True)


def _renew_first_page(directory: Path, folder: Path, now: float) -> None:
    """Puts a copy with another first page in the place of the database; what was there goes into the folder. Whenever
    this ends early, it can be done again."""
    path = directory / "spool.db"
    log, scratch = Path(f"{path}-wal"), directory / "spool.db.new"
    for with_log in (True, False):  # a log that belongs to something else would bring its own first page
        _make_copy(path, log if with_log else None, scratch, now)
        if _is_readable(scratch):
            break
    _remove(scratch, _LOGS)
    if _size(path):
        os.link(path, folder / path.name)
    elif os.path.lexists(path):
        os.rename(path, folder / path.name)
    if _size(log):
        os.link(log, folder / log.name)
    fsync_dir(folder)
    os.rename(scratch, path)  # what the log holds is in it already; read once more, it does no harm
    fsync_dir(directory)
    _remove(path, _LOGS)


def _make_copy(path: Path, log: Path | None, scratch: Path, now: float) -> None:
    """The first page of an empty spool, the others of the database, and what the log says of any of them; flushed."""
    _remove(scratch)
    store = Store(scratch)
    store.open(now)
    store.close()
    _remove(scratch, _LOGS)
    with scratch.open("r+b") as copy:
        head = bytearray(copy.read(PAGE))
        head[24:40] = bytes(16)  # change counter, size, free pages: SQLite takes the file's size
        head[92:96] = b"\0\0\0\1"  # of which change counter the size is
        copy.seek(0)
        copy.write(head)
        if _size(path):
            with path.open("rb") as source:
                source.seek(PAGE)
                shutil.copyfileobj(source, copy, 1 << 20)
        copy.truncate(-(-copy.seek(0, os.SEEK_END) // PAGE) * PAGE)
        copy.flush()
        os.fsync(copy.fileno())
    if log is None or not _size(log):
        return
    shutil.copyfile(log, f"{scratch}-wal")
    target = apsw.Connection(str(scratch))
    try:
        target.execute("PRAGMA synchronous = FULL")
        target.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.Error:
        pass  # then it is not readable, or holds what it holds
    finally:
        target.close(True)


def _copy(source: apsw.Connection, fresh: Path, now: float) -> tuple[int, list[tuple[str, str]]]:
    """Makes the new database; how many messages are in it, and what could not be copied."""
    store = Store(fresh)
    store.open(now)
    store.close()
    target = apsw.Connection(str(fresh))
    kept = 0
    lost: list[tuple[str, str]] = []
    try:
        target.execute("PRAGMA synchronous = FULL; BEGIN IMMEDIATE")
        keys = {key for table, column in _FROM for key in _keys(source, table, column)}
        for key in sorted(keys):
            name = f"key {key}"
            try:
                messages = source.execute("SELECT * FROM message WHERE key = ?", (key,)).fetchall()
                name = str(messages[0][1]) if messages else name
                recipients = source.execute("SELECT * FROM recipient WHERE message = ?", (key,)).fetchall()
                broken = source.execute("SELECT * FROM broken WHERE message = ?", (key,)).fetchall()
                if not messages or not (recipients or broken):
                    lost.append((name, "its recipients are gone" if messages else "its record is gone"))
                    continue
                for table, rows in (("message", messages), ("recipient", recipients), ("broken", broken)):
                    target.executemany(_INSERT[table], rows)
                kept += 1
            except (apsw.Error, ValueError) as error:
                for table, column in _FROM:
                    target.execute(f"DELETE FROM {table} WHERE {column} = ?", (key,))
                lost.append((name, f"its record cannot be read: {error}"))
        target.execute("COMMIT")
        target.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    finally:
        target.close(True)
    return kept, lost


def _keys(source: apsw.Connection, table: str, column: str) -> Iterator[int]:
    """All that can be reached from either end: between them lies what cannot be read."""
    for order, beyond, place in (("ASC", ">", _FIRST), ("DESC", "<", _LAST)):
        statement = f"SELECT DISTINCT {column} FROM {table} WHERE {column} {beyond} ? ORDER BY {column} {order} LIMIT ?"
        rows = ROWS
        while rows:
            try:
                found: Iterable[int] = [key for (key,) in source.execute(statement, (place, rows))]
            except apsw.Error:
                rows //= 10  # 100, 10, 1: up to the last that can be read
                continue
            for key in found:
                place = key
                yield key
            if not found:
                break
