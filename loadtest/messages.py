"""Messages as they are sent: made of a size, or read from a folder.

In: a number of octets or a folder. Out: Message: `text` is for DATA, dots stuffed and the final dot behind it (RFC 5321
4.5.2), `raw` is the same without either, for BDAT (RFC 3030). Always: both consist of whole lines ended by CRLF. A made
message has the size asked for, header included; below the header's own length it is lines alone. A file is sent as it
stands, but that LF becomes CRLF and a last line gets its end; a bare CR stays, and so does what is no mail at all.
Not here: which message comes when (content), those of a ledger. On failure: LoadError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from email.utils import formatdate
from pathlib import Path
from random import Random

from . import LoadError

HELD = 512 << 20  # octets of all messages that a process holds
LINE = 72  # octets of a made line, with its CRLF

_BARE_LF = re.compile(rb"(?<!\r)\n")
_LETTERS = b"abcdefghijklmnopqrstuvwxyz          "


class Message:
    """What goes between the envelope and the reply. `eight_bit`: BODY=8BITMIME is due (RFC 6152)."""

    __slots__ = ("eight_bit", "raw", "text")

    def __init__(self, raw: bytes, keep_raw: bool) -> None:
        self.text = stuff(raw)
        self.raw = raw if keep_raw else b""
        self.eight_bit = not raw.isascii()


def stuff(raw: bytes) -> bytes:
    """`raw`, which is empty or ends with CRLF, as DATA sends it, with the end of data."""
    text = raw.replace(b"\r\n.", b"\r\n..") + b".\r\n"
    return b"." + text if raw.startswith(b".") else text


def as_lines(octets: bytes) -> bytes:
    """With CRLF where LF stood alone, and at the end of what is not empty."""
    lines = _BARE_LF.sub(b"\r\n", octets)
    return lines if not lines or lines.endswith(b"\r\n") else lines + b"\r\n"


def make_message(size: int) -> bytes:
    """So many octets; for 1, which is no line, 2. There is no Message-ID: what has one twice, some servers drop."""
    header = (
        b"From: Load Test <load@x.test>\r\nTo: undisclosed-recipients:;\r\nSubject: load\r\nDate: %s\r\n"
        b"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\n"
    ) % formatdate().encode()
    rest = size - len(header)
    return header + make_lines(rest) if rest == 0 or rest > 1 else make_lines(size)


def make_lines(size: int) -> bytes:
    """So many octets of words in lines, always the same; for 1, which is no line, 2."""
    if size == 0:
        return b""
    whole = (_BLOCK * (size // len(_BLOCK) + 1))[: max(size - 2, 0)]
    # A cut between CR and LF would leave a bare CR.
    return (whole[:-1] + b"x" if whole.endswith(b"\r") else whole) + b"\r\n"


def _make_block() -> bytes:
    """About 64 KB without repetition: a file system that compresses shall not gain by it."""
    rng = Random(72)
    return b"".join([b"x%s\r\n" % bytes(rng.choices(_LETTERS, k=LINE - 3)) for _ in range(900)])


_BLOCK = _make_block()


def make_messages(sizes: Iterable[int], keep_raw: bool) -> list[Message]:
    """One of each size. Raises LoadError."""
    wanted = list(sizes)
    _check_held(sum(wanted), keep_raw, "the sizes")
    return [Message(make_message(size), keep_raw) for size in wanted]


def read_messages(folder: Path, keep_raw: bool) -> list[Message]:
    """All files of a folder and its folders in the order of their names, hidden ones aside. Raises LoadError."""
    messages: list[Message] = []
    held = 0
    try:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                held += path.stat().st_size
                _check_held(held, keep_raw, f"the files of {folder}")
                messages.append(Message(as_lines(path.read_bytes()), keep_raw))
    except OSError as error:
        raise LoadError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not messages:
        raise LoadError(f"{folder} is no folder with files to send")
    return messages


def _check_held(octets: int, keep_raw: bool, what: str) -> None:
    if octets * (2 if keep_raw else 1) > HELD:
        raise LoadError(f"{what} are more than {HELD >> 20} MB together, and each process holds them all")
