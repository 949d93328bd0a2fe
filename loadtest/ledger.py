"""The ledger: what was sent, and what was answered; and messages that show whether they are whole.

In: a line for each message, written when its outcome is known: "acked" only behind the 250 that was read, "unknown"
where the connection ended before an answer. Out: JSON lines, one write each, so that several processes share a file and
a line is whole or not there; and the same lines read back as entries.
A message carries its id in its first field and its sender's local-part, so that it is known again also where it is too
short for a field. Its header says how long it is, each line ends with a checksum of itself; some lines begin with dots,
some hold 8-bit octets. `split_trace` parts what servers put before a message (RFC 5321 4.4) from what was sent.
Not here: whether mailboxes agree with the ledger (verify), envelopes (content). On failure: LoadError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol
from zlib import crc32

from . import LoadError

DOMAIN = "ledger.test"
FIELD = "X-Ledger"
SHORT = 64  # octets below which a message is bare lines
WHOLE = 600  # octets from which it has all fields that some servers would add
LINE = 998  # octets of a line, RFC 5321 4.5.3.1.6

_MARK = re.compile(rb"^X-Ledger: (?P<id>\S+) (?P<size>[0-9]{8})\r?$", re.MULTILINE)
_FIELDS = (
    b"From: Ledger <%s@ledger.test>\r\nTo: undisclosed-recipients:;\r\nSubject: ledger\r\n"
    b"Date: Thu, 01 Jan 2026 00:00:00 +0000\r\nMessage-ID: <%s@ledger.test>\r\nMIME-Version: 1.0\r\n"
    b"Content-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n"
)
# What servers put before a message; nothing that was sent has these names.
_TRACE = re.compile(
    rb"(?:return-path|delivered-to|received(?:-spf)?|envelope-to|delivery-date|authentication-results|arc-[a-z-]+"
    rb"|dkim-signature|x-(?!ledger:)[a-z0-9-]+):",
    re.IGNORECASE,
)


class Outcome(StrEnum):
    """What the client knows."""

    ACKED = "acked"
    TEMPORARY = "4xx"
    REFUSED = "5xx"
    UNKNOWN = "unknown"


_OUTCOMES = {2: Outcome.ACKED, 4: Outcome.TEMPORARY, 5: Outcome.REFUSED}


def outcome_of(code: int) -> Outcome:
    """Of the reply to a message; 0 where none was read."""
    return _OUTCOMES.get(code // 100, Outcome.UNKNOWN)


class Sent(Protocol):
    """What the ledger has to know of a message: content.Mail is one."""

    id: str
    sender: str
    recipients: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A message that was sent. `recipients` are those that were accepted, `refused` those that were not."""

    id: str
    sha256: str
    sender: str
    recipients: tuple[str, ...]
    outcome: Outcome
    code: int = 0
    refused: tuple[str, ...] = ()


class Ledger:
    """The writer; several threads and processes may have one on the same file. Raises LoadError."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise LoadError(f"the ledger {path} cannot be written: {error.strerror}") from None

    def write(self, mail: Sent, outcome: str, code: int, refused: Collection[str] = ()) -> None:
        """`code` is that of the last reply, 0 for none; `refused` are recipients that were answered 4xx or 5xx."""
        values = {
            "id": mail.id,
            "sha256": mail.sha256,
            "sender": mail.sender,
            "recipients": [recipient for recipient in mail.recipients if recipient not in refused],
            "refused": list(refused),
            "outcome": outcome,
            "code": code,
            "time": round(time.time(), 6),
        }
        line = json.dumps(values).encode() + b"\n"
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            raise LoadError(f"the ledger {self.path} cannot be written: {error.strerror}") from None
        if written != len(line):
            raise LoadError(f"the ledger {self.path} cannot be written: a line is cut")

    def close(self) -> None:
        os.close(self._fd)


def read_ledger(path: Path | str) -> Iterator[Entry]:
    """Entry for entry. Raises LoadError."""
    number = 0
    try:
        with Path(path).open("rb") as lines:
            for line in lines:
                number += 1
                values = json.loads(line)
                yield Entry(
                    values["id"],
                    values["sha256"],
                    values["sender"],
                    tuple(values["recipients"]),
                    Outcome(values["outcome"]),
                    int(values.get("code", 0)),
                    tuple(values.get("refused", ())),
                )
    except OSError as error:
        raise LoadError(f"the ledger {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"the ledger {path}, line {number}, is no entry: {error!r}") from None


def digest(octets: bytes) -> str:
    return hashlib.sha256(octets).hexdigest()


_SIZES = (0, 2, 64, 1000, 5000, 40_000, 70_000, 300_000, 1 << 20)
_WEIGHTS = (20, 20, 100, 400, 250, 100, 80, 20, 5)


def any_size(chance: Random) -> int:
    """From nothing to 1 MiB, most of them as large as mail is."""
    size = chance.choices(_SIZES, _WEIGHTS)[0]
    return size if size < 1000 else chance.randrange(size // 2, size + 1)


def _top(message_id: bytes, size: int) -> bytes:
    """The header of a message of so many octets."""
    fields = _FIELDS % (message_id, message_id) if size >= WHOLE else b""
    return b"X-Ledger: %s %08d\r\n%s\r\n" % (message_id, size, fields)


_DOTS = (b"", b"", b"", b".", b"..")
_EIGHT_BIT = (b"", b"", b"gr\xfc\xdfe \xff\x80 ")
_FILLINGS = (0, 10, 60, 60, 60, 900)


def make_body(message_id: str, size: int, chance: Random) -> bytes:
    """A message of `size` octets, header included, in whole lines that end with CRLF. Below SHORT it is bare lines (an
    octet less where `size` is odd); a little above, it is as large as its header and a line."""
    if size < SHORT:
        return b"\r\n" * (size // 2)
    ident = message_id.encode()
    least = len(ident) + 19  # of a line without filling
    top = _top(ident, size)
    if len(top) > WHOLE - least:
        raise LoadError(f"{message_id!r} is too long for an id")
    size = max(size, len(top) + least)
    top = _top(ident, size)
    lines = [top]
    left = size - len(top)
    number = 0
    while left:
        text = b"%s%s:%06d:%s" % (chance.choice(_DOTS), ident, number, chance.choice(_EIGHT_BIT))
        filling = chance.choice(_FILLINGS)
        if left - len(text) - filling - 11 < least:  # the next line would have no room: this one is the last
            text = b"%s:%06d:" % (ident, number)
            filling = left - len(text) - 11
            if filling + len(text) + 9 > LINE:
                filling = 0
        text += b"x" * filling
        lines.append(b"%s:%08x\r\n" % (text, crc32(text)))
        left -= len(text) + 11
        number += 1
    return b"".join(lines)


def find_fault(message_id: str, body: bytes) -> str:
    """Where a body is not what `make_body` made; empty when it is, or when it is too short to tell."""
    if not body.strip(b"\r\n"):
        return ""
    mark = _MARK.match(body)
    if mark is None:
        return f"its beginning is {body[:60]!r}"
    if mark["id"].decode("ascii", "replace") != message_id:
        return f"it is the body of {mark['id'].decode('ascii', 'replace')}"
    top = _top(mark["id"], int(mark["size"]))
    if not body.startswith(top):
        return f"{len(body)} octets of {int(mark['size'])}" if top.startswith(body) else "its header is altered"
    *lines, rest = body[len(top) :].split(b"\r\n")
    for number, line in enumerate(lines):
        text, _, checksum = line.rpartition(b":")
        if checksum != b"%08x" % crc32(text):
            return f"line {number} is altered: {line[:60]!r}"
        if text.lstrip(b".").split(b":", 2)[1] != b"%06d" % number:
            return f"another line stands in the place of line {number}"
    if len(body) != int(mark["size"]):
        return f"{len(body)} octets of {int(mark['size'])}"
    return f"its last line is altered: {rest[-60:]!r}" if rest else ""


class Arrived(NamedTuple):
    """A message as it was found: `trace` is what servers put before it, `octets` what was sent, with CRLF."""

    id: str  # "" where its header does not say
    trace: bytes
    octets: bytes


def split_trace(found: bytes) -> Arrived:
    """Parts a message from its trace fields. Raises ValueError where the trace fields are cut or none."""
    mark = _MARK.search(found, at - 1) if (at := found.find(b"X-Ledger: ") + 1) else None  # a search alone takes 3 µs
    end = mark.start() if mark is not None else 0
    if mark is None or b"\n\n" in found[:end] or b"\n\r\n" in found[:end]:
        mark, end = None, _end_of_trace(found)
    trace = found[:end]
    for line in trace.split(b"\n")[:-1]:
        if not (line.startswith((b" ", b"\t")) or _TRACE.match(line)):
            raise ValueError(f"{line[:60]!r} stands before it")
    octets = found[end:]
    if b"\r" not in octets:  # a mailbox: its line ends are LF
        octets = octets.replace(b"\n", b"\r\n")
    return Arrived("" if mark is None else mark["id"].decode("ascii", "replace"), trace, octets)


def _end_of_trace(found: bytes) -> int:
    """Where the trace fields end in a message that has no mark."""
    end = 0
    while _TRACE.match(found, end) or (end and found.startswith((b" ", b"\t"), end)):
        following = found.find(b"\n", end) + 1
        if not following:
            raise ValueError(f"it ends in its trace fields: {found[end : end + 60]!r}")
        end = following
    return end


_RETURN_PATH = re.compile(rb"^return-path:\s*<(?P<path>[^>\r\n]*)>", re.IGNORECASE | re.MULTILINE)
_DELIVERED_TO = re.compile(
    rb"^(?:delivered-to|envelope-to|x-original-to|x-rcptto):\s*<?(?P<path>[^>\r\n]*)>?\s*$",
    re.IGNORECASE | re.MULTILINE,
)


def trace_sender(trace: bytes) -> str | None:
    """The envelope's sender, as the final delivery noted it; None where it did not."""
    match = _RETURN_PATH.search(trace)
    return None if match is None else match["path"].decode("utf-8", "replace")


def trace_recipient(trace: bytes) -> str | None:
    """The envelope's recipient, as the final delivery noted it; None where it did not."""
    match = _DELIVERED_TO.search(trace)
    return None if match is None else match["path"].decode("utf-8", "replace").strip()


def names(addresses: Sequence[str]) -> str:
    """Addresses, for people."""
    return ", ".join(f"<{address}>" for address in addresses)
