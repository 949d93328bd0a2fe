"""A spool's database whose pages are damaged: what can be read of it goes into a new one, the rest is named.

In: the directory of a spool that is locked and not open. Out: a new database in the place of the damaged one, with
every message that could be read together with its recipients; beside it a folder `damaged-TIME` with the old database,
and with the body files of messages that are not in the new one; and what is known of those, for the log.
Always: nothing is deleted, and a crash in the midst leaves either the old database or the new one in place: the new one
is whole and flushed before it takes its name. A message of which a part cannot be read is not kept in part.
Not here: bodies that do not have their checksums (spool). A file that is no database at all, or another program's, is
left alone: the server does not start on it. On failure: SpoolError, apsw.Error, OSError; then the old database stays.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import apsw

from ._files import fsync_dir, make_dirs
from .store import FORMAT, SpoolError, Store

CHECKED_OCTETS = 128 << 20  # a larger database is not read through at each start: a second for each GB
ROWS = 100

_INSERT = {
    "message": "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "recipient": "INSERT INTO recipient VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "broken": "INSERT INTO broken VALUES (?, ?, ?, ?)",
}
_FROM = (("message", "key"), ("recipient", "message"), ("broken", "message"))
_FIRST, _LAST = -(1 << 63), (1 << 63) - 1


def salvage(directory: Path, now: float) -> tuple[Path, list[tuple[str, str]]]:
    """Where the damaged database is now; of each message that is not in the new one its id, or `key N`, and why."""
    path = directory / "spool.db"
    fresh = directory / "spool.db.new"
    folder = directory / time.strftime("damaged-%Y%m%dT%H%M%SZ", time.gmtime(now))
    for end in ("", "-wal", "-shm"):
        Path(f"{fresh}{end}").unlink(missing_ok=True)
    source = apsw.Connection(str(path))
    try:
        source.execute("PRAGMA writable_schema = ON")  # also a file that is too short is read then
        if source.execute("PRAGMA user_version").get != FORMAT:
            raise SpoolError(f"{path}: damaged, and not of this version's format")
        # A log that stayed would be taken for the new one's.
        source.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        lost = _copy(source, fresh, now)
    finally:
        source.close(True)
    make_dirs(folder)
    os.link(path, folder / path.name)
    fsync_dir(folder)
    for one in (path, fresh):
        for end in ("-wal", "-shm"):
            Path(f"{one}{end}").unlink(missing_ok=True)
    os.rename(fresh, path)
    fsync_dir(directory)
    return folder, lost


def move_bodies(bodies: Path, folder: Path, known: set[str]) -> None:
    """Body files of messages that are not known go where the damaged database is. Raises OSError."""
    for name in os.listdir(bodies):
        if name not in known:
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


def _copy(source: apsw.Connection, fresh: Path, now: float) -> list[tuple[str, str]]:
    """Makes the new database; what could not be copied."""
    store = Store(fresh)
    store.open(now)
    store.close()
    target = apsw.Connection(str(fresh))
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
            except (apsw.Error, ValueError) as error:
                for table, column in _FROM:
                    target.execute(f"DELETE FROM {table} WHERE {column} = ?", (key,))
                lost.append((name, f"its record cannot be read: {error}"))
        target.execute("COMMIT")
        target.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    finally:
        target.close(True)
    return lost


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
