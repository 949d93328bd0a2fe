"""The spool's database: its tables, the statements that write, and what keeps SQLite's promises true.

A `Store` is the writing connection. `write` puts a batch into a transaction, `commit` makes it durable; both may
be called from different threads, never at the same time. WAL, synchronous=FULL, checkpoints only when asked. Only
reader.py opens these files too. A database of an older format is brought to today's when it is opened.

After an error of `write` or `commit` the batch is undecided: its rows may be back after the next start. `recover`
ends that. Pages that a failed flush left behind pass for clean in the kernel, so whatever is appended to such a log
could be lost with them: the log's octets are written and flushed once more before SQLite reads them again, at
each start too. Errors are apsw's and OSError; `open` raises SpoolError with one line for people.

No flush is believed before the file system has confirmed it (_files.confirm). The log's index is what it is asked for:
all of it is allocated, and it is never flushed itself. One confirmation stands for every flush before it, here and of
body files: they lie on the same file system.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import apsw

from ._files import confirm
from .record import Row

FORMAT = 2
LATEST_FORMAT = 100  # what says that it is of a later one is damaged, not newer
APPLICATION_ID = 0x66736D71  # "fsmq"
OLDEST_SQLITE = (3, 51, 3)  # before it, two connections could corrupt the log by checkpointing at one instant
TABLES = ("message", "recipient", "broken")
ROWS = 1000  # of a bulk change, in one transaction
PAGE = 4096
CHECKPOINT_PAGES = (4 << 20) // PAGE  # p99 of a commit over 1,000,000 rows: 29 ms at 4 MB, 182 ms at 64 MB
INDEX_OCTETS = 128 << 10  # for a log of 64 MB
VACUUM_PAGES = 64  # given back in one step: some milliseconds
SPARE_PAGES = (16 << 20) // PAGE  # free pages that are kept for what comes next
LATEST_DUE = 86_400  # seconds; no back-off is longer, so what is due later was written by a clock that was wrong

# Before anything else in a new file. In an old one the second would write to it.
_NEW_FILE = f"PRAGMA page_size = {PAGE}; PRAGMA auto_vacuum = INCREMENTAL"
_PRAGMAS = f"""
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    PRAGMA wal_autocheckpoint = 0;
    PRAGMA journal_size_limit = {16 << 20};
    PRAGMA secure_delete = OFF;
    PRAGMA temp_store = MEMORY;
    PRAGMA cache_size = -8192;
"""

# What is on hold is not found in it.
_DUE_INDEX = "CREATE INDEX recipient_due ON recipient (due) WHERE due IS NOT NULL AND held = 0"

# `body` stands last: the columns before it are read without its overflow pages. Due times are milliseconds, and
# NULL for new mail: inserts at a million rows drop to a fifth when each has its place in the index of due times.
# `arrived`, in seconds, is the message's: the age of a million recipients is told without reading their messages.
SCHEMA = f"""
    CREATE TABLE message (
        key INTEGER PRIMARY KEY, id TEXT NOT NULL, arrived REAL NOT NULL, envelope BLOB NOT NULL,
        prefix BLOB NOT NULL, cuts TEXT NOT NULL, content INTEGER NOT NULL, header_end INTEGER NOT NULL,
        size INTEGER NOT NULL, crc INTEGER NOT NULL, body BLOB
    );
    CREATE INDEX message_in_file ON message (id, size) WHERE body IS NULL;
    CREATE TABLE recipient (
        message INTEGER NOT NULL, n INTEGER NOT NULL, domain TEXT NOT NULL, due INTEGER,
        attempts INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '', arrived INTEGER NOT NULL DEFAULT 0,
        reported INTEGER NOT NULL DEFAULT 0, held INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (message, n)
    ) WITHOUT ROWID;
    {_DUE_INDEX};
    CREATE TABLE broken (
        message INTEGER PRIMARY KEY, why TEXT NOT NULL, since REAL NOT NULL, pending TEXT NOT NULL
    );
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {FORMAT};
"""

# From the format that is the key to the next one; each in one transaction.
_MIGRATIONS = {
    1: f"""
        ALTER TABLE recipient ADD COLUMN arrived INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE recipient ADD COLUMN reported INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE recipient ADD COLUMN held INTEGER NOT NULL DEFAULT 0;
        UPDATE recipient SET arrived = coalesce((SELECT CAST(arrived AS INTEGER) FROM message WHERE key = message), 0);
        DROP INDEX recipient_due;
        {_DUE_INDEX};
        PRAGMA user_version = 2;
    """
}

_INSERT_MESSAGE = "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_RECIPIENT = "INSERT INTO recipient (message, n, domain, arrived) VALUES (?, ?, ?, ?)"
# Ranges of consecutive keys: 1.9 µs of CPU a message in batches of 64, one by one 3.1, IN carray() 4.8.
_DELETE_RECIPIENTS = "DELETE FROM recipient WHERE message BETWEEN ? AND ?"
_DELETE_MESSAGES = "DELETE FROM message WHERE key BETWEEN ? AND ?"
_DELETE_RECIPIENT = "DELETE FROM recipient WHERE message = ? AND n = ?"
_UPDATE_RECIPIENT = "UPDATE recipient SET due = ?, attempts = ?, reason = ?, reported = ? WHERE message = ? AND n = ?"
_HOLD_RECIPIENT = "UPDATE recipient SET held = 1 WHERE message = ? AND n = ?"
_WAKE_RECIPIENT = "UPDATE recipient SET held = 0, due = ? WHERE message = ? AND n = ?"
_DELETE_BROKEN = "DELETE FROM broken WHERE message BETWEEN ? AND ?"
# OR IGNORE: tried again after an undecided batch, it must not note that nobody is pending.
_INSERT_BROKEN = """
    INSERT OR IGNORE INTO broken
    SELECT ?1, ?2, ?3, json_group_array(n) FROM recipient WHERE message = ?1
"""
_CLAMP_DUE = f"""
    UPDATE recipient SET due = ?1 WHERE (message, n) IN
    (SELECT message, n FROM recipient WHERE due > ?1 + {LATEST_DUE * 1000} AND held = 0 LIMIT {ROWS})
"""


class SpoolError(Exception):
    """The spool cannot be opened; one line says why."""


class DamagedError(SpoolError):
    """The database is not as it was left: there may be mail in it all the same."""


class SpoolLockedError(SpoolError):
    """Another process has the spool."""


class Batch:
    """What one transaction changes."""

    __slots__ = ("aside", "done", "erased", "hold", "later", "messages", "partly", "recipients", "wake")

    def __init__(self) -> None:
        self.messages: list[Row] = []
        self.recipients: list[tuple[int, int, str, int]] = []  # key, number, domain, arrived
        self.done: list[int] = []  # keys
        self.partly: list[tuple[int, int]] = []  # key, number
        self.later: list[tuple[int, int, str, bool, int, int]] = []  # due (ms), attempts, reason, reported, key, number
        self.aside: list[tuple[int, str, float]] = []  # key, why, since
        self.hold: list[tuple[int, int]] = []  # key, number
        self.wake: list[tuple[int, int, int]] = []  # due (ms), key, number; on hold no longer
        self.erased: list[int] = []  # keys of what was set aside

    def __bool__(self) -> bool:
        done = self.done or self.partly or self.later or self.aside
        return bool(self.messages or done or self.hold or self.wake or self.erased)


class Store:
    """The writing connection to the database at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = 0  # pages, when the log was last checkpointed
        self._index = -1  # descriptor of the log's index
        self._db: apsw.Connection
        self._run: apsw.Cursor

    # --- opening and closing ---

    def open(self, now: float) -> None:
        """Opens or creates it and makes it fit for use. Raises SpoolError, DamagedError."""
        if tuple(map(int, apsw.sqlite_lib_version().split(".")[:3])) < OLDEST_SQLITE:
            raise SpoolError(f"SQLite {apsw.sqlite_lib_version()} is too old; 3.51.3 is needed (package apsw)")
        try:
            # Made by us, so that nobody else can read it from its first moment; the log inherits the mode.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            self._connect()
            try:
                self._prepare(now)
            except apsw.Error:
                self.drop()
                raise
        # The last two: of a header that says nonsense.
        except (apsw.NotADBError, apsw.CorruptError, apsw.SQLError, apsw.ReadOnlyError) as error:
            raise DamagedError(str(error)) from None
        except apsw.Error as error:
            raise SpoolError(f"{self.path}: {error}") from error
        except OSError as error:
            raise SpoolError(f"{error.filename or self.path}: {error.strerror}") from error

    def _connect(self) -> None:
        self._find_room()
        _flush_again(Path(f"{self.path}-wal"))
        self._db = db = apsw.Connection(str(self.path))
        self._run = db.cursor()
        self._written = 0
        try:
            # A close must not checkpoint by itself: not what is undecided, and not on the loop.
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            db.set_busy_timeout(0)
            self._check_format()  # before anything is changed in what may be another program's
            if not self._tables():
                self._run.execute(_NEW_FILE)
            self._run.execute(_PRAGMAS).fetchall()
            if self._number("PRAGMA journal_mode") != "wal":
                raise SpoolError(f"{self.path}: the file system does not allow a write-ahead log")
            self._tables()  # opens the log
            self._allocate_index()
        except (apsw.Error, OSError, SpoolError):
            self.drop()
            raise

    def _find_room(self) -> None:
        """SQLite begins the log's index anew and maps it. Where a block is less than a page (small ext4) it leaves
        holes, and to write to one on a full disk is SIGBUS: so it is not opened there. Raises OSError."""
        state = os.statvfs(self.path.parent)
        if state.f_bavail * state.f_frsize < 2 * INDEX_OCTETS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _allocate_index(self) -> None:
        """Fills those holes, also of what the index may grow to. Closing this descriptor takes SQLite's locks away
        (fcntl), so it is open as long as the connections are."""
        self._index = os.open(f"{self.path}-shm", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        os.posix_fallocate(self._index, 0, INDEX_OCTETS)

    def _check_format(self) -> None:
        application = int(self._number("PRAGMA application_id"))
        version = int(self._number("PRAGMA user_version"))
        if application != APPLICATION_ID and (application or version or self._tables()):
            if not self._number(f"SELECT count(*) FROM sqlite_schema WHERE name IN {TABLES}"):
                raise SpoolError(f"{self.path}: a database of another program")
            raise DamagedError("it does not say that it is a spool")
        if not 0 <= version <= LATEST_FORMAT:
            raise DamagedError(f"it says that its format is {version}")
        if version not in (0, FORMAT, *_MIGRATIONS):
            raise SpoolError(f"{self.path}: format {version} was made by a newer version; known here is {FORMAT}")

    def _prepare(self, now: float) -> None:
        if not self._tables():
            self._run.execute(f"BEGIN IMMEDIATE; {SCHEMA}; COMMIT")
        while (version := int(self._number("PRAGMA user_version"))) in _MIGRATIONS:
            self._run.execute("BEGIN IMMEDIATE")
            self._run.execute(_MIGRATIONS[version])
            self._run.execute("COMMIT")
        while self._change(_CLAMP_DUE, [(int(now * 1000),)]) == ROWS:
            pass
        try:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:
            pass  # somebody reads it from outside: the log only stays longer

    def recover(self, keys: Sequence[int], told: Sequence[int] = ()) -> bool:
        """Opens it anew and makes sure that the messages `keys` are gone for good, before anyone is told. Whether those
        of `told`, of the same batch, are there: they stay."""
        self.drop()
        self._connect()
        durable = bool(told) and self._run.execute("SELECT 1 FROM message WHERE key = ?", told[:1]).get is not None
        for start in range(0, len(keys), ROWS // 2):
            chunk = [(key, key) for key in keys[start : start + ROWS // 2]]
            self._run.execute("BEGIN IMMEDIATE")
            self._run.executemany(_DELETE_RECIPIENTS, chunk)
            self._run.executemany(_DELETE_MESSAGES, chunk)
            self._run.execute("COMMIT")
        # The log's old pages are of no trust: after this the database holds all, and the log is empty.
        self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        self._confirm()
        return durable

    def close(self) -> None:
        """Empties the log into the database, when nobody reads it, and closes."""
        try:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:
            pass
        finally:
            self.drop()

    def drop(self) -> None:
        """Closes, and nothing else; also twice. A Reader must be closed before."""
        self._db.close(True)
        index, self._index = self._index, -1
        if index >= 0:
            os.close(index)

    # --- a batch ---

    def write(self, batch: Batch) -> None:
        """Runs the statements of a batch; some microseconds for each message."""
        run = self._run
        run.execute("BEGIN IMMEDIATE")
        if batch.messages:
            run.executemany(_INSERT_MESSAGE, batch.messages)
            run.executemany(_INSERT_RECIPIENT, batch.recipients)
        if batch.later:
            run.executemany(_UPDATE_RECIPIENT, batch.later)
        if batch.partly:
            run.executemany(_DELETE_RECIPIENT, batch.partly)
        if batch.aside:
            run.executemany(_INSERT_BROKEN, batch.aside)
            run.executemany(_DELETE_RECIPIENTS, [(key, key) for key, _, _ in batch.aside])
        if batch.hold:
            run.executemany(_HOLD_RECIPIENT, batch.hold)
        if batch.wake:
            run.executemany(_WAKE_RECIPIENT, batch.wake)
        if batch.erased:
            runs = list(consecutive(batch.erased))
            for statement in (_DELETE_BROKEN, _DELETE_RECIPIENTS, _DELETE_MESSAGES):
                run.executemany(statement, runs)
        if batch.done:
            runs = list(consecutive(batch.done))
            run.executemany(_DELETE_RECIPIENTS, runs)
            run.executemany(_DELETE_MESSAGES, runs)

    def commit(self) -> bool:
        """Makes it durable. Whether the log has grown enough for a checkpoint."""
        self._run.execute("COMMIT")
        self._confirm()
        return self._pages() - self._written >= CHECKPOINT_PAGES

    def checkpoint(self) -> int:
        """Writes the log into the database; how many pages stayed in it because of a reader. After an OSError the next
        commit would be written over what the database may not hold: `recover` is next."""
        self._written = self._pages()
        try:
            log, done = self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.BusyError:  # somebody else is at it
            log, done = CHECKPOINT_PAGES, 0
        self._confirm()
        return log - done

    def _confirm(self) -> None:
        confirm(self._index, INDEX_OCTETS - 1)  # its last octet: the first ones change all the time

    def vacuum(self) -> bool:
        """Gives some free pages back; whether there is more to give."""
        before = int(self._number("PRAGMA freelist_count"))
        if before <= SPARE_PAGES:
            return False
        self._run.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
        return SPARE_PAGES < int(self._number("PRAGMA freelist_count")) < before

    # --- at start ---

    def newest(self) -> int:
        """The greatest key."""
        return int(self._number("SELECT coalesce(max(key), 0) FROM message"))

    def count(self) -> tuple[int, int]:
        """Messages that are not finished, and those set aside."""
        return (
            int(self._number("SELECT count(DISTINCT message) FROM recipient")),
            int(self._number("SELECT count(*) FROM broken")),
        )

    def check(self) -> bool:
        """Whether its pages hang together, and indexes with their tables: reads all of them. Raises apsw.Error."""
        return bool(self._number("PRAGMA integrity_check(1)") == "ok")

    def torn(self) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """What is damaged although its pages hang together: key and id of messages without a recipient, key and domain
        of recipients without a message. Neither is ever committed."""
        rows = self._run.execute(
            "SELECT key, id FROM message WHERE NOT EXISTS (SELECT 1 FROM recipient WHERE message = key)"
            " AND NOT EXISTS (SELECT 1 FROM broken WHERE message = key)"
        )
        alone = [(key, message_id) for key, message_id in rows]
        rows = self._run.execute(
            "SELECT message, domain FROM recipient WHERE NOT EXISTS (SELECT 1 FROM message WHERE key = message)"
        )
        return alone, [(key, domain) for key, domain in rows]

    def erase(self, keys: Sequence[int]) -> None:
        """Deletes all rows of these keys."""
        batch = Batch()
        batch.erased = list(keys)
        self.write(batch)
        self.commit()

    def in_files(self) -> list[tuple[int, str, int, bool]]:
        """Key, id, size of each message whose body is in a file, and whether it was set aside."""
        rows = self._run.execute(
            "SELECT key, id, size, broken.message IS NOT NULL FROM message INDEXED BY message_in_file"
            " LEFT JOIN broken ON broken.message = key WHERE body IS NULL"
        )
        return [(key, message_id, size, bool(aside)) for key, message_id, size, aside in rows]

    def set_aside(self, rows: Sequence[tuple[int, str, float]]) -> None:
        """Key, why and since of messages that are not to be delivered."""
        for start in range(0, len(rows), ROWS // 2):
            batch = Batch()
            batch.aside = list(rows[start : start + ROWS // 2])
            self.write(batch)
            self.commit()

    def is_full(self, error: Exception) -> bool:
        """Whether it was for lack of space. To be asked before `recover`."""
        full = (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError):
            return error.errno in full
        if isinstance(error, apsw.IOError):  # a quota's end is one to SQLite
            return self._db.system_errno in full  # of the last such error
        return isinstance(error, apsw.FullError)

    def _tables(self) -> bool:
        return bool(self._number("SELECT count(*) FROM sqlite_schema"))

    def _pages(self) -> int:
        return self._db.status(apsw.SQLITE_DBSTATUS_CACHE_WRITE)[0]

    def _number(self, query: str) -> int | str:
        value: int | str = self._run.execute(query).get
        return value

    def _change(self, statement: str, rows: Iterable[tuple[int, ...]]) -> int:
        before = self._db.total_changes()
        self._run.executemany(statement, rows)
        return self._db.total_changes() - before


def consecutive(keys: list[int]) -> Iterator[tuple[int, int]]:
    """The first and last of each run of consecutive keys; sorts `keys`."""
    keys.sort()
    first = last = keys[0]
    for key in keys:
        if key > last + 1:
            yield first, last
            first = key
        last = key
    yield first, last


def _flush_again(path: Path) -> None:
    """Writes a file's octets over themselves and flushes them. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        place = 0
        while piece := os.pread(fd, 1 << 20, place):
            place += os.pwrite(fd, piece, place)
        os.fdatasync(fd)
    finally:
        os.close(fd)
