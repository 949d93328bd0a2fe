"""The spool's reading connection: what is looked up in its database while it is written to.

In: keys, places in an order, filters. Out: numbers, octets, or JSON with many rows in one answer. Every statement is
short: one that reads for long keeps the write-ahead log from being emptied, and a person's question about a million
recipients must not delay a claim of the queue. Whoever wants all asks slice by slice. Used in one thread only.
Nothing is written here (store.py). Every method raises apsw.Error, also when it is closed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import apsw

from .record import Loaded

LAST = (1 << 63) - 1

# Answers are one row of JSON: a row at a time takes the GIL for each, and waits 0.5 ms for it under load.
_SELECT_NEW = """
    SELECT json_group_array(json_array(message, n, due IS NULL AND held = 0)) FROM
    (SELECT message, n, due, held FROM recipient WHERE (message, n) > (?, ?) ORDER BY message, n LIMIT ?)
"""
_SELECT_DUE = """
    SELECT json_group_array(json_array(due, message, n)) FROM
    (SELECT due, message, n FROM recipient WHERE (due, message, n) > (?, ?, ?) AND due <= ? AND held = 0
     ORDER BY due, message, n LIMIT ?)
"""
_SELECT_NEXT_DUE = """
    SELECT due FROM recipient WHERE (due, message, n) > (?, ?, ?) AND due IS NOT NULL AND held = 0
    ORDER BY due, message, n LIMIT 1
"""
_SELECT_MESSAGES = """
    SELECT json_group_array(json_array(
        key, id, arrived, hex(envelope), hex(prefix), cuts, content, header_end, size, body IS NULL,
        json((SELECT json_group_array(json_array(n, due, attempts, reason, reported, held))
              FROM recipient WHERE message = key))
    )) FROM message WHERE key IN (SELECT value FROM json_each(?))
"""

# A slice is some thousand recipients, whole messages: what lies behind one key, up to another.
_SLICE = "message > ?1 AND message <= ?2"
# The states that a person may ask for; "" for all.
STATES = {
    "": "1",
    "new": "due IS NULL AND held = 0",
    "deferred": "due IS NOT NULL AND held = 0",
    "waiting": "held = 0",
    "held": "held = 1",
    "due": "held = 0 AND (due IS NULL OR due <= unixepoch('subsec') * 1000)",
}
_SELECT_SLICE_END = "SELECT message FROM recipient WHERE message > ? ORDER BY message, n LIMIT 1 OFFSET ?"
_SELECT_LAST = "SELECT message FROM recipient ORDER BY message DESC LIMIT 1"
_SELECT_RECIPIENTS = f"""
    SELECT json_group_array(json_array(message, n)) FROM recipient
    WHERE {_SLICE} AND (?3 = '' OR domain = ?3) AND
"""
_SELECT_RECIPIENTS_OF = """
    SELECT json_group_array(json_array(message, n)) FROM recipient
    WHERE message IN (SELECT value FROM json_each(?)) AND
"""
_SELECT_KEYS = f"""
    SELECT json_group_array(message) FROM
    (SELECT DISTINCT message FROM recipient WHERE {_SLICE} AND (?3 = '' OR domain = ?3) AND %s
     ORDER BY message LIMIT ?4)
"""
# What a reply said is the peer's: of what is longer the beginning tells enough.
_SELECT_GROUPS = f"""
    SELECT json_group_array(json_array(domain, reason, age, recipients, held, new, oldest, due)) FROM
    (SELECT domain, substr(reason, 1, 200) AS reason,
     (SELECT count(*) FROM json_each(?4) WHERE value < ?3 - arrived) AS age,
     count(*) AS recipients, sum(held) AS held, sum(due IS NULL AND held = 0) AS new, min(arrived) AS oldest,
     min(due) FILTER (WHERE held = 0) AS due
     FROM recipient WHERE {_SLICE} GROUP BY 1, 2, 3)
"""
_SELECT_KNOWN = """
    SELECT json_group_array(json_array(message.id, broken.why, broken.since)) FROM message
    LEFT JOIN broken ON broken.message = message.key WHERE key IN (SELECT value FROM json_each(?))
"""
_SELECT_HEAD = "SELECT substr(body, 1, header_end), header_end FROM message WHERE key = ?"


class Reader:
    """The reading connection; used in one thread only. Every method raises apsw.Error, also when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: apsw.Connection | None = None

    def open(self) -> None:
        self._db = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READONLY)
        self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self._db.set_busy_timeout(0)

    def close(self) -> None:
        if self._db is not None:
            self._db.close(True)
            self._db = None

    def new(self, behind: tuple[int, int], limit: int) -> str:
        """JSON: key, number and whether it was never tried, of recipients behind a key and number."""
        return str(self._get(_SELECT_NEW, (*behind, limit)))

    def due(self, behind: tuple[int, int, int], now_ms: int, limit: int) -> str:
        """JSON: due, key and number of recipients behind the same three, up to now."""
        return str(self._get(_SELECT_DUE, (*behind, now_ms, limit)))

    def next_due(self, behind: tuple[int, int, int]) -> int | None:
        """When the next of them is due, in milliseconds."""
        value = self._get(_SELECT_NEXT_DUE, behind)
        return None if value is None else int(value)

    def messages(self, keys: Sequence[int]) -> str:
        """JSON: a list of record.Loaded."""
        return str(self._get(_SELECT_MESSAGES, (json.dumps(keys),)))

    def body(self, key: int) -> tuple[bytes | None, int]:
        """The body (None: it is in a file) and its checksum. Raises LookupError: there is no such message."""
        # All rows are fetched: a statement that stops halfway would keep the log from being reused.
        rows = self._cursor().execute("SELECT body, crc FROM message WHERE key = ?", (key,)).fetchall()
        if not rows:
            raise LookupError(key)
        return cast("tuple[bytes | None, int]", rows[0])

    # What a person asks

    def last(self) -> int:
        """The greatest key of a message that is not finished."""
        return int(self._get(_SELECT_LAST, ()) or 0)

    def slice_end(self, behind: int, recipients: int) -> int:
        """The key up to which a slice of so many recipients reaches."""
        value = self._get(_SELECT_SLICE_END, (behind, recipients))
        return LAST if value is None else int(value)

    def recipients(self, behind: int, until: int, domain: str, state: str) -> str:
        """JSON: key and number of those in a slice that go to a domain ("": any) and are in a state."""
        return str(self._get(_SELECT_RECIPIENTS + STATES[state], (behind, until, domain)))

    def recipients_of(self, keys: Sequence[int], state: str) -> str:
        """JSON: key and number of those of some messages that are in a state."""
        return str(self._get(_SELECT_RECIPIENTS_OF + STATES[state], (json.dumps(keys),)))

    def keys(self, behind: int, until: int, domain: str, state: str, limit: int) -> str:
        """JSON: the keys of messages in a slice with such recipients."""
        return str(self._get(_SELECT_KEYS % STATES[state], (behind, until, domain, limit)))

    def groups(self, behind: int, until: int, now: int, ages: Sequence[int]) -> str:
        """JSON: the recipients of a slice by domain, reason and age (how many of `ages` it is over), a row for each:
        how many, on hold, never tried, the oldest's arrival, the next due time in milliseconds."""
        return str(self._get(_SELECT_GROUPS, (behind, until, now, json.dumps(ages))))

    def known(self, keys: Sequence[int]) -> str:
        """JSON: the id of each of these messages that is there; why and since when it is set aside, or null."""
        return str(self._get(_SELECT_KNOWN, (json.dumps(keys),)))

    def head(self, key: int) -> tuple[bytes | None, int]:
        """The body's header section (None: it is in a file) and its length. Raises LookupError."""
        rows = self._cursor().execute(_SELECT_HEAD, (key,)).fetchall()
        if not rows:
            raise LookupError(key)
        return cast("tuple[bytes | None, int]", rows[0])

    def _get(self, query: str, values: Sequence[int | str]) -> int | str | None:
        value: int | str | None = self._cursor().execute(query, values).get
        return value

    def _cursor(self) -> apsw.Cursor:
        if self._db is None:
            raise apsw.ConnectionClosedError
        return self._db.cursor()


def parse_messages(text: str) -> list[Loaded]:
    """What `Reader.messages` returned. Raises ValueError."""
    rows: list[Loaded] = json.loads(text)
    return rows
