"""The ledger: what was sent and what was answered, and whether the mailboxes agree with it.

In: a line for each message, written when its outcome is known: id, sha256, sender, recipients, outcome. "acked" is
written only behind the 250 that was read; "unknown" where the connection ended before an answer. The id is the
sender's local-part, so that it comes back with every message, also an empty one; a body that is not empty carries
id, length and a checksum in each line. Out: `verify` gives each broken rule with the id it is about:
    A  an acked message is missing in a mailbox         B  what was delivered is not what was sent, or not whole
    C  twice, without a fault between the two           D  delivered, but not sent, not to them, or refused
    F  of one message some recipients have it, others not, though nobody was told so
Nothing of the server is used here: what it reads and writes is what is under test.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from zlib import crc32

from servers import Mail, read_mail

DOMAIN = "ledger.test"
WINDOW = 30.0  # seconds between a delivery and its mark on disk, on a machine that is very busy

_TOP = re.compile(rb"Subject: (?P<id>\S+) (?P<size>[0-9]+)\r\n\r\n")
_SIZES = (0, 2, 64, 1000, 5000, 40_000, 70_000, 300_000, 1 << 20)
_WEIGHTS = (20, 20, 100, 400, 250, 100, 80, 20, 5)


class Outcome(Enum):
    """What the client knows."""

    ACKED = "acked"
    TEMPORARY = "4xx"
    REFUSED = "5xx"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Entry:
    """A message that was sent."""

    id: str
    sha256: str
    recipients: list[str]
    outcome: str

    @property
    def sender(self) -> str:
        return f"{self.id}@{DOMAIN}"


class Ledger:
    """The writer; several threads may use one. A line is whole or not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.Lock()
        self._next = 0

    def next_id(self) -> str:
        with self._lock:
            self._next += 1
            return f"m{self._next:06d}"

    def write(self, message_id: str, body: bytes, recipients: Sequence[str], outcome: Outcome) -> None:
        entry = Entry(message_id, digest(body), list(recipients), outcome.value)
        with self._lock:
            os.write(self._fd, json.dumps({**asdict(entry), "sender": entry.sender}).encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


def read_ledger(path: Path) -> dict[str, Entry]:
    entries = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        entry = Entry(values["id"], values["sha256"], values["recipients"], values["outcome"])
        assert entry.id not in entries, f"{entry.id} stands twice in the ledger"
        entries[entry.id] = entry
    return entries


def outcome_of(reply: str) -> Outcome:
    return {"2": Outcome.ACKED, "4": Outcome.TEMPORARY, "5": Outcome.REFUSED}.get(reply[:1], Outcome.UNKNOWN)


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def any_size(chance: random.Random) -> int:
    """From nothing to 1 MiB, most of them as large as mail is."""
    size = chance.choices(_SIZES, _WEIGHTS)[0]
    return size if size < 1000 else chance.randrange(size // 2, size + 1)


def make_body(message_id: str, size: int, chance: random.Random) -> bytes:
    """A message of about `size` octets, whole lines ended by CRLF, some with leading dots, some with 8-bit octets."""
    if size < 64:
        return b"\r\n" * (size // 2)
    top = f"Subject: {message_id} {size:08d}\r\n\r\n".encode()
    lines: list[bytes] = []
    length = len(top)
    while length < size:
        dots = b"." * chance.choice((0, 0, 0, 1, 2))
        eight_bit = chance.choice((b"", b"", b"gr\xfc\xdfe \xff\x80 "))
        filling = b"x" * min(chance.choice((0, 10, 60, 60, 60, 900)), size - length)
        text = b"%s%s:%06d:%s%s" % (dots, message_id.encode(), len(lines), eight_bit, filling)
        lines.append(b"%s:%08x\r\n" % (text, crc32(text)))
        length += len(lines[-1])
    return top.replace(b"%08d" % size, b"%08d" % length) + b"".join(lines)


def find_fault(message_id: str, body: bytes) -> str:
    """Where a body is not what `make_body` made; empty when it is, or when it is too short to tell."""
    if not body.strip(b"\r\n"):
        return ""
    top = _TOP.match(body)
    if top is None:
        return f"its beginning is {body[:60]!r}"
    if top["id"].decode() != message_id:
        return f"it is the body of {top['id'].decode()}"
    for number, line in enumerate(body[top.end() :].split(b"\r\n")[:-1]):
        text, _, checksum = line.rpartition(b":")
        if checksum != b"%08x" % crc32(text):
            return f"line {number} is altered: {line[:60]!r}"
        if text.lstrip(b".").split(b":")[1] != b"%06d" % number:
            return f"another line stands in the place of line {number}"
    return "" if len(body) == int(top["size"]) else f"{len(body)} octets of {int(top['size'])}"


@dataclass(frozen=True)
class Violation:
    """A broken rule, as durability has them, and what it is about."""

    rule: str
    id: str
    recipient: str
    text: str


def verify(ledger: Path, mailboxes: Path, faults: Sequence[float] = ()) -> list[Violation]:
    """Every broken rule, after everything was delivered. `mailboxes` is the folder of DOMAIN/LOCAL; `faults` are
    the times (epoch seconds) at which something was killed."""
    entries = read_ledger(ledger)
    found: dict[tuple[str, str], list[Path]] = {}
    violations: list[Violation] = []
    for recipient, path in _mailbox_files(mailboxes):
        try:
            mail = read_mail(path)
        except ValueError as error:
            violations.append(Violation("B", "", recipient, str(error)))
            continue
        message_id = mail.sender.removesuffix(f"@{DOMAIN}")
        entry = entries.get(message_id)
        violations += _check_one(entry, message_id, recipient, mail)
        if entry is not None:
            found.setdefault((message_id, recipient), []).append(path)
    for entry in entries.values():
        has = [recipient for recipient in entry.recipients if (entry.id, recipient) in found]
        if entry.outcome == Outcome.ACKED.value:
            violations += [
                Violation("A", entry.id, recipient, "acknowledged, and in no mailbox")
                for recipient in entry.recipients
                if recipient not in has
            ]
        elif entry.outcome == Outcome.UNKNOWN.value and has and len(has) != len(entry.recipients):
            violations.append(Violation("F", entry.id, "", f"kept for {has} of {entry.recipients}"))
    for (message_id, recipient), paths in found.items():
        violations += _check_copies(message_id, recipient, paths, faults)
    return violations


def _mailbox_files(mailboxes: Path) -> Iterator[tuple[str, Path]]:
    for folder in mailboxes.glob("*/*"):
        for path in [*folder.glob("new/*"), *folder.glob("cur/*")]:
            yield f"{folder.name}@{folder.parent.name}", path


def _check_one(entry: Entry | None, message_id: str, recipient: str, mail: Mail) -> Iterator[Violation]:
    if entry is None:
        yield Violation("D", message_id, recipient, f"{mail.path}: nobody sent it (its sender: {mail.sender!r})")
        return
    if recipient not in entry.recipients:
        yield Violation("D", entry.id, recipient, f"{mail.path}: it was for {entry.recipients}")
    if mail.recipient != recipient:
        yield Violation("D", entry.id, recipient, f"{mail.path}: it says that it was delivered to {mail.recipient}")
    if entry.outcome in (Outcome.TEMPORARY.value, Outcome.REFUSED.value):
        yield Violation("D", entry.id, recipient, f"{mail.path}: it was answered {entry.outcome}")
    body = mail.body.replace(b"\n", b"\r\n")
    if digest(body) != entry.sha256:
        fault = find_fault(entry.id, body) or f"{len(body)} octets, not those that were sent"
        yield Violation("B", entry.id, recipient, f"{mail.path}: {fault}")


def _check_copies(
    message_id: str, recipient: str, paths: Sequence[Path], faults: Sequence[float]
) -> Iterator[Violation]:
    """Between two copies there was a fault, shortly behind the first: its mark did not come to the disk any more."""
    written = sorted(path.stat().st_mtime for path in paths)
    for first, second in pairwise(written):
        if not any(first - 0.1 <= fault <= second and fault - first < WINDOW for fault in faults):
            yield Violation("C", message_id, recipient, f"written at {first:.3f} and {second:.3f}, no fault between")
