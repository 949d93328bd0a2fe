"""What arrived: each copy of a message in Maildirs and in the records of a sink.

In: a folder with Maildirs at any depth (each is a folder with new/ or cur/), or a file of a sink's records. Out: one
Delivery for each copy and recipient, read one after the other, so that a million of them need no memory. A file that
cannot be understood is a Delivery too, with its fault.
Always: it is read with the standard library only, and nothing is changed. What stands in tmp/ is nobody's mail; it is
listed apart. Not here: whether it had to arrive (rules). On failure: LoadError.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import LoadError
from .ledger import split_trace, trace_recipient, trace_sender
from .notifications import Fate, Notification, read_notification


@dataclass(slots=True)
class Delivery:
    """One copy for one recipient. `kept` is False where a sink did not answer 250."""

    place: str  # the file, or file and line
    when: float  # epoch seconds
    recipient: str | None  # of the envelope; None: it is not said
    mailbox: str = ""  # whose mailbox it is by its folders DOMAIN/LOCAL, if they are such
    sender: str | None = None
    id: str = ""  # "": the message does not say
    sha256: bytes = b""  # of what was sent, trace fields aside
    kept: bool = True
    file: Path | None = None  # where its octets are
    notification: Notification | None = None
    fault: str = ""  # why it cannot be understood


def find_maildirs(folder: Path) -> Iterator[Path]:
    """All below `folder`, itself included, in the order of their names. Raises LoadError."""
    try:
        with os.scandir(folder) as entries:
            below = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        raise LoadError(f"{folder} cannot be read: {error.strerror}") from None
    is_maildir = "new" in below or "cur" in below
    if is_maildir:
        yield folder
    for name in below:
        if not (is_maildir and name in ("new", "cur", "tmp")):
            yield from find_maildirs(folder / name)


def read_maildirs(folder: Path) -> Iterator[Delivery]:
    """What a reader finds in new/ and cur/. Raises LoadError."""
    for maildir in find_maildirs(folder):
        parts = [part for part in maildir.relative_to(folder).parts if not part.startswith(".")]  # Maildir++
        mailbox = f"{parts[-1]}@{parts[-2]}" if len(parts) >= 2 else ""
        for name in ("new", "cur"):
            for path in _files(maildir / name):
                yield _read_file(path, mailbox)


def temporary_files(folder: Path) -> Iterator[Path]:
    """What is left in the tmp/ of Maildirs, and in hidden folders beside them. Raises LoadError."""
    for maildir in find_maildirs(folder):
        yield from _files(maildir / "tmp")
    for hidden in sorted(folder.glob(".*/")):
        if not any(find_maildirs(hidden)):
            yield from (path for path in sorted(hidden.rglob("*")) if path.is_file())


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LoadError(f"{folder} cannot be read: {error.strerror}") from None


def _read_file(path: Path, mailbox: str) -> Delivery:
    place = str(path)
    try:
        facts = path.lstat()
        octets = path.read_bytes() if stat.S_ISREG(facts.st_mode) else b""
    except FileNotFoundError:
        raise LoadError(f"{path} went away while it was read: nothing may use the mailboxes meanwhile") from None
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}") from None
    found = Delivery(place, facts.st_mtime, None, mailbox, file=path)
    if not stat.S_ISREG(facts.st_mode):
        found.fault = "it is no file"
    elif not octets:
        found.fault = "it is empty"
    else:
        _understand(found, octets)
    return found


def _understand(found: Delivery, octets: bytes) -> None:
    """Fills in what the message itself says."""
    try:
        found.id, trace, sent = split_trace(octets)
        found.sender = trace_sender(trace)
        found.recipient = trace_recipient(trace)
        found.sha256 = hashlib.sha256(sent).digest()
        if not found.id:
            found.notification = read_notification(octets)
    except ValueError as error:
        found.fault = str(error)
        found.sender, found.recipient = trace_sender(octets), trace_recipient(octets)


def read_sink(path: Path) -> Iterator[Delivery]:
    """What a sink recorded. Raises LoadError."""
    number = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                number += 1
                yield from _read_record(json.loads(line), path, number)
    except OSError as error:
        raise LoadError(f"the record {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"the record {path}, line {number}, is none of a sink: {error!r}") from None


def _read_record(record: dict[str, Any], path: Path, number: int) -> Iterator[Delivery]:
    told = record.get("notification")
    notification = None
    if told is not None:
        notification = Notification(told["id"], tuple(Fate(*fate) for fate in told["fates"]))
    for recipient in record["recipients"]:
        yield Delivery(
            place=f"{path}:{number}",
            when=float(record["time"]),
            recipient=recipient["address"],
            sender=record["sender"],
            id=record["id"],
            sha256=bytes.fromhex(record["sha256"]),
            kept=recipient["answer"][:1] == "2",
            file=Path(record["file"]) if record.get("file") else None,
            notification=notification,
            fault=record.get("fault", ""),
        )


def sent_octets(found: Delivery) -> bytes | None:
    """What was sent, as it is there; None where only its digest is."""
    if found.file is None:
        return None
    try:
        return split_trace(found.file.read_bytes()).octets
    except (OSError, ValueError):
        return None
