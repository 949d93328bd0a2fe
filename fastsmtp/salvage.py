"""A spool's database that is damaged: what can be read of it goes into a new one, the rest is named.

In: the directory of a spool that is locked and not open. Out: a new database in the place of the damaged one, with
every message that could be read together with its recipients; beside it a folder `damaged-TIME` with what was found,
and with the body files of messages that are not in the new one; and what is known of those, for the log.
Whatever stands in the database's place, the server starts. Where its first page, which says what and where everything
is, does not say what that of each spool says, that of an empty spool takes its place: tables begin at the same pages in
every spool. What the log still holds is read too.
Always: nothing is deleted, and a crash in the midst leaves either the old database or the new one in place: the new one
is whole and flushed before it takes its name. A message of which a part cannot be read is not kept in part.
Not here: bodies that do not have their checksums (spool). A database of another program, or of a newer version, is left
alone: the server does not start on it. On failure: SpoolError, apsw.Error, OSError; then the old database stays.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from ._files import fsync_dir, make_dirs
from .ids import begin_of, is_id, key_of
from .record import parse_envelope
from .store import APPLICATION_ID, FORMAT, PAGE, SCHEMA, TABLES, Store

CHECKED_OCTETS = 128 << 20  # a larger database is not read through at each start: a second for each GB
ROWS = 100

_INSERT = {
    "message": "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "recipient": "INSERT INTO recipient VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "broken": "INSERT INTO broken VALUES (?, ?, ?, ?)",
}
_FROM = {"message": "key", "recipient": "message", "broken": "message"}
# What SQLite takes in a column and nobody has written: a bit of a record's head makes another type of a value.
_TYPES = {
    "message": "id text, arrived real, envelope blob, prefix blob, cuts text, content integer, header_end integer,"
    " size integer, crc integer, body blob null",
    "recipient": "message integer, n integer, domain text, due integer null, attempts integer, reason text,"
    " arrived integer, reported integer, held integer",
    "broken": "why text, since real, pending text",
}
_FIRST, _LAST = -(1 << 63), (1 << 63) - 1
_LOGS = ("-wal", "-shm", "-journal")
# Of the file format's header: place, and what stands there in each spool. SQLite believes most of it, such as that four
# octets of each page are not its own.
_HEADER = (
    (0, b"SQLite format 3\0"),
    (16, PAGE.to_bytes(2)),
    (20, b"\0\x40\x20\x20"),  # octets of pages that are another's, fractions of pages
    (56, b"\0\0\0\1"),  # UTF-8
    (68, APPLICATION_ID.to_bytes(4)),
)
_HEADER_OCTETS = 100


class Salvaged(NamedTuple):
    """`folder`: where what was found is now. `kept`: messages that could be read. `lost`: of others the id, or the
    characters with which it begins, and why."""

    folder: Path
    kept: int
    lost: list[tuple[str, str]]


def find_damage(directory: Path) -> str:
    """What is wrong with what stands in the place of the database; "" for a file, and for nothing where nothing was."""
    path = directory / "spool.db"
    if os.path.lexists(path) and not _is_file(path):
        return "it is no regular file"
    if _size(path):
        header = _read_header(path)
        is_ours = _says(header, _HEADER[:1]) and _says(header, _HEADER[-1:])  # else the store says whose it is
        return "its header is damaged" if is_ours and not _says(header, _HEADER) else ""
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


def move_bodies(bodies: Path, folder: Path, known: set[str]) -> list[str]:
    """Body files of messages that are not known go where the damaged database is; their names. Raises OSError."""
    names = [name for name in sorted(os.listdir(bodies)) if is_id(name) and name not in known]
    for name in names:
        os.rename(bodies / name, folder / name)
    fsync_dir(folder)
    fsync_dir(bodies)
    return names


def is_sound(store: Store) -> bool:
    """Whether its tables are those of a spool, its pages hang together, and its recipients' values are of their types.
    Of a database that is too large to be looked through only the first."""
    try:
        second = apsw.Connection(str(store.path))  # beside the first, which keeps the log
        try:
            if _describe(second) != _known()[0]:
                return False
            if store.path.stat().st_size > CHECKED_OCTETS:
                return True
            return store.check() and not any(_find_mistyped(second, table) for table in ("recipient", "broken"))
        finally:
            second.close(True)
    except (apsw.CorruptError, apsw.SQLError, UnicodeDecodeError):
        return False


def find_records(store: Store) -> list[int]:
    """Keys of messages that are not set aside yet and whose records are damaged so that whoever reads several of them
    would get none. Raises apsw.Error."""
    second = apsw.Connection(str(store.path))
    try:
        aside = {key for (key,) in second.execute("SELECT message FROM broken")}
        return [key for key in _find_mistyped(second, "message") if key not in aside]
    finally:
        second.close(True)


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


def _read_header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADER_OCTETS)


def _says(header: bytes, parts: Iterable[tuple[int, bytes]]) -> bool:
    return all(header.startswith(octets, place) for place, octets in parts)


def _describe(db: apsw.Connection) -> list[Any]:
    """Its tables and indexes, without the words that made them: a column that came later stands otherwise there."""
    columns = 'SELECT name, type, "notnull", dflt_value, pk FROM pragma_table_xinfo(?)'
    kinds = "SELECT type, wr FROM pragma_table_list WHERE schema = 'main' AND name = ?"
    tables = [[*db.execute(kinds, (name,)), *db.execute(columns, (name,))] for name in TABLES]
    indexes = "SELECT name, tbl_name, sql FROM sqlite_schema WHERE type = 'index' ORDER BY name"
    return [*tables, *((name, table, " ".join(str(sql).split())) for name, table, sql in db.execute(indexes))]


def _is_id_of(key: Any, message_id: Any) -> bool:
    """A message of another's id would take its place in a mailbox."""
    return is_id(message_id) and key_of(message_id) == key


def _find_mistyped(db: apsw.Connection, table: str, first: int = _FIRST, last: int = _LAST) -> list[Any]:
    """Keys of rows in which a value is not of its column's type."""
    words = [part.split() for part in _TYPES[table].split(", ")]
    wrong = " OR ".join(f"typeof({name}) NOT IN ({str(types)[1:-1]})" for name, *types in words)
    column = _FROM[table]
    return [
        key
        for (key,) in db.execute(
            f"SELECT {column} FROM {table} WHERE {column} BETWEEN ? AND ? AND ({wrong})", (first, last)
        )
    ]


def _roots(db: apsw.Connection) -> list[int]:
    """Where its tables and indexes begin."""
    return [page for (page,) in db.execute("SELECT rootpage FROM sqlite_schema ORDER BY name")]


def _recreate_index(db: apsw.Connection) -> None:
    """What a migration from the first format has done: the last table and this index have changed places."""
    (sql,) = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'recipient_due'").fetchall()[0]
    db.execute("DROP INDEX recipient_due")
    db.execute(str(sql))


@functools.cache
def _known() -> tuple[list[Any], tuple[list[int], list[int]]]:
    """What a spool's first page describes, and where it may say that it begins."""
    db = apsw.Connection(":memory:")
    try:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute(SCHEMA)
        description, fresh = _describe(db), _roots(db)
        _recreate_index(db)
        return description, (fresh, _roots(db))
    finally:
        db.close(True)


def _is_readable(path: Path) -> bool:
    """Whether its first page says what it must."""
    if not _size(path):
        return False
    header = _read_header(path)
    if not _says(header, _HEADER):
        return False
    pages = int.from_bytes(header[28:32])  # that count where the change counter is that of the version
    if header[24:28] == header[92:96] and pages * PAGE != _size(path) and not _size(Path(f"{path}-wal")):
        return False
    source = apsw.Connection(str(path))
    try:
        source.execute("PRAGMA writable_schema = ON")
        said = [source.execute(f"PRAGMA {name}").get for name in ("application_id", "user_version")]
        description, roots = _known()
        return said == [APPLICATION_ID, FORMAT] and _describe(source) == description and _roots(source) in roots
    except (apsw.Error, UnicodeDecodeError):
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
    if _was_migrated(path):
        target = apsw.Connection(str(scratch))
        _recreate_index(target)
        target.close(True)  # and so is the log emptied
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


def _was_migrated(path: Path) -> bool:
    """By the kind of the pages with which the last table and the index begin, one of which may be damaged."""
    if not _size(path):
        return False
    with path.open("rb") as file:
        pages = file.read(7 * PAGE)
    return pages[5 * PAGE : 5 * PAGE + 1] in (b"\x05", b"\x0d") or pages[6 * PAGE : 6 * PAGE + 1] in (b"\x02", b"\x0a")


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
        indexed = _read_index(source)
        names = {key_of(name): name for name in os.listdir(fresh.parent / "body") if is_id(name)} | indexed
        keys = {key for table, column in _FROM.items() for key in _keys(source, table, column)}
        for key in sorted(keys | indexed.keys()):
            try:
                messages = source.execute("SELECT * FROM message WHERE key = ?", (key,)).fetchall()
                recipients = source.execute("SELECT * FROM recipient WHERE message = ?", (key,)).fetchall()
                broken = source.execute("SELECT * FROM broken WHERE message = ?", (key,)).fetchall()
                if not messages or not (recipients or broken):
                    why = "its recipients are gone" if messages else "its record is gone"
                    lost.append(_identify(source, key, names, why))
                    continue
                is_damaged = any(_find_mistyped(source, table, key, key) for table in _FROM)
                if is_damaged or not _is_id_of(key, messages[0][1]):
                    lost.append(_identify(source, key, names, "its record is damaged"))
                    continue
                for table, rows in (("message", messages), ("recipient", recipients), ("broken", broken)):
                    target.executemany(_INSERT[table], rows)
                kept += 1
            except (apsw.Error, ValueError) as error:
                for table, column in _FROM.items():
                    target.execute(f"DELETE FROM {table} WHERE {column} = ?", (key,))
                lost.append(_identify(source, key, names, f"its record cannot be read: {error}"))
        target.execute("COMMIT")
        target.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    finally:
        target.close(True)
    return kept, lost


def _read_index(source: apsw.Connection) -> dict[int, str]:
    """Ids by key of messages whose bodies are in files. It hangs together by itself: their records may be gone."""
    found: dict[int, str] = {}
    statement = "SELECT key, id FROM message INDEXED BY message_in_file WHERE body IS NULL"
    try:
        found.update(source.execute(statement))
    except (apsw.Error, UnicodeDecodeError):
        pass  # what was read before that is there
    return found


def _identify(source: apsw.Connection, key: int, names: dict[int, str], why: str) -> tuple[str, str]:
    """A message that is lost: its id, or how that begins, and why; from whom and for whom, where that can be read."""
    name = names.get(key) or begin_of(key)
    try:
        # They stand in the record's first page; the body may go over many.
        row: Any = source.execute("SELECT id, envelope FROM message WHERE key = ?", (key,)).get
        name = row[0] if _is_id_of(key, row[0]) else name
        envelope = parse_envelope(row[1], name)
        recipients = ", ".join(str(recipient.address) for recipient in envelope.recipients)
        return name, f"{why}; it was from <{envelope.reverse_path}> for {recipients}"
    except (apsw.Error, ValueError, TypeError, AttributeError):
        pass  # it cannot be read, or is not what was written
    try:
        rows = source.execute("SELECT DISTINCT domain FROM recipient WHERE message = ?", (key,)).fetchall()
        why += f"; it was for {', '.join(str(domain) for (domain,) in rows)}" if rows else ""
    except (apsw.Error, UnicodeDecodeError):
        pass
    return name, why


def _keys(source: apsw.Connection, table: str, column: str) -> Iterator[int]:
    """All that can be reached from either end: between them lies what cannot be read. A key may stand where it does not
    belong, and be no number: it leads nowhere, and must not lead in a circle."""
    for order, beyond, place in (("ASC", ">", _FIRST), ("DESC", "<", _LAST)):
        statement = f"SELECT DISTINCT {column} FROM {table} WHERE {column} {beyond} ? ORDER BY {column} {order} LIMIT ?"
        rows = ROWS
        while rows:
            try:
                found = [key for (key,) in source.execute(statement, (place, rows)) if isinstance(key, int)]
            except (apsw.Error, UnicodeDecodeError):
                rows //= 10  # 100, 10, 1: up to the last that can be read
                continue
            yield from found
            before, place = place, (max if order == "ASC" else min)([place, *found])
            if place == before:
                break
