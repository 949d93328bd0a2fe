"""Maildir: a transport that puts each message into a file of its own, as every Unix mail reader expects it.

In: deliveries. Out: an Outcome for each recipient; "delivered" only when file and name are on stable storage, and
the file system has confirmed that (_files.confirm).
A file holds Return-Path, Delivered-To, the message's prefix, and its body without the cuts; line ends are LF,
but a body that is not convertible stays as it is. The loop builds items; C does the rest in one thread.
Temporary files stand in one folder, `.fastsmtp-IDENTITY` at the fixed start of the path (no mailbox's folder
has a leading dot). A mailbox on another file system is reached through its own tmp/.
A name in new/ depends on message, recipient number and host only: what is delivered again after a crash
replaces itself, unless a reader has moved it; then there are two. A mailbox named twice gets two files.
On failure: a recipient's error is its own; a failed flush defers the whole batch. Not here: when to retry.
Formats: https://cr.yp.to/proto/maildir.html, with Dovecot's `,S=` (octets); RFC 5321 4.4; RFC 9228.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from errno import EDQUOT, EINVAL, EIO, EISDIR, ENAMETOOLONG, ENODATA, ENOENT, ENOSPC, EOPNOTSUPP, EROFS, EXDEV
from functools import lru_cache
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING

from .._files import confirm, make_dirs, write_batch
from ..address import Address
from ..message import Message
from . import DELIVERED, Delivery, Outcome, Result, Scope

if TYPE_CHECKING:
    from .._files import Item, Range

BATCH_LIMIT = 512
FOLDER_LIMIT = 200  # octets of a folder name before the rest is hashed; NAME_MAX is 255
HOST_LIMIT = 100  # leaves room in NAME_MAX for the other parts of a file's name
CACHE_SIZE = 16384

_PLAIN = re.compile(rf"[a-z0-9_+=-][a-z0-9._+=-]{{0,{FOLDER_LIMIT - 1}}}")
_UNSAFE = re.compile(rb"[^a-z0-9._+=-]|^\.")
_UNSAFE_IN_FIELD = str.maketrans("\r\n\0", "???")

# The marks in names of temporary files of this process: a reload may open a folder that is being written to.
_tokens: set[str] = set()

_NO_PROBE = (EOPNOTSUPP, EISDIR, EINVAL, ENOSPC, EDQUOT)  # the first three: no such files here
_DEFERRED = (Result.DEFERRED, "4.3.0", Scope.RECIPIENT)
# What an errno means for the queue; what is not here may pass (_DEFERRED).
_MEANING: dict[int, tuple[Result, str, Scope]] = {
    ENOSPC: (Result.DEFERRED, "4.3.1", Scope.HOST),
    EDQUOT: (Result.DEFERRED, "4.2.2", Scope.RECIPIENT),
    ENAMETOOLONG: (Result.FAILED, "5.1.1", Scope.RECIPIENT),
    ENODATA: (Result.DEFERRED, "4.3.0", Scope.MESSAGE),
    EIO: (Result.DEFERRED, "4.3.0", Scope.HOST),
    EROFS: (Result.DEFERRED, "4.3.0", Scope.HOST),
}


def folder_name(text: str) -> str:
    """A local-part or domain as a folder's name: ASCII, never `.`, `..` or hidden, at most 250 octets.

    Two texts have one name only when they are equal; whether case matters is decided by `Address.mailbox`. In an
    encoded name two hexadecimal digits follow every `%`; so `%-`, the mark of a hashed name, and a lone `%`, the
    empty text, are in none.
    """
    if _PLAIN.fullmatch(text):
        return text
    raw = _UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], text.encode("utf-8", "surrogatepass"))
    if len(raw) > FOLDER_LIMIT:
        raw = raw[:FOLDER_LIMIT] + b"%-" + sha256(raw).hexdigest()[:48].encode()
    return raw.decode("ascii") or "%"


@lru_cache(maxsize=CACHE_SIZE)
def mailbox_path(pattern: str, mailbox: str) -> bytes:
    """The folder that `pattern` gives for an `Address.mailbox`. A folder's name holds no brace."""
    local, _, domain = mailbox.rpartition("@")
    return os.fsencode(pattern.replace("{domain}", folder_name(domain)).replace("{local}", folder_name(local)))


def temporary_folder(pattern: str, identity: str) -> str:
    """Where the temporary files of the server `identity` stand: in the last folder before any placeholder."""
    return os.path.join(os.path.dirname(pattern.partition("{")[0]), f".fastsmtp-{identity}")


def remove_leftovers(folder: str, worker: int) -> None:
    """Removes the temporary files that a worker of this number has left in a former life. Raises OSError."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(f"{worker}.") and entry.name.rpartition(".")[2] not in _tokens:
                os.unlink(entry.path)


def open_probe(folder: str | bytes) -> int:
    """A file without a name, for `write_batch` to confirm its flushes with. -1: there can be none. Then no journal is
    known that would give up in silence, or there is no room for it, and none for mail. Raises OSError, also where
    nothing can be confirmed: better before there are names than behind them."""
    try:
        probe = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in _NO_PROBE:
            return -1
        raise
    try:
        confirm(probe, 0)
    except OSError:
        os.close(probe)
        raise
    return probe


class Maildir:
    """The Transport to mailboxes at `path`, such as `/var/mail/{domain}/{local}`.

    `identity` is a short word of the data directory: two servers over one root leave each other's temporary
    files alone. `worker` is unique within the server. `sync`: "batch", or "file" for flushes file by file.
    The constructor makes the root where it is missing and removes this worker's left-overs, so it is called
    before the worker delivers anything; it raises OSError.
    """

    any_octets = True
    needs_body = True
    concurrency = 0

    def __init__(self, path: str, worker: int, hostname: str, identity: str, sync: str = "batch") -> None:
        self._pattern = os.path.abspath(path)
        self._each = sync == "file"
        self._host = hostname.replace("/", "\\057").replace(":", "\\072")[:HOST_LIMIT]
        self._worker = worker
        # Unlike those of this worker's former lives: a mailbox's own tmp/ is never cleaned by us.
        self._token = secrets.token_hex(8)
        _tokens.add(self._token)
        self._counter = count()
        self._temporary = temporary_folder(self._pattern, identity)
        self._executor = ThreadPoolExecutor(1, "maildir")
        # The rest is the thread's own.
        self._elsewhere: set[bytes] = set()  # mailboxes seen on another file system than the root
        self._directory = -1  # kept open: a flush reports the errors since it was opened
        self._probe = -1  # opened when it is first needed, and again when it could not be
        self._open()
        remove_leftovers(self._temporary, worker)

    def destination(self, recipient: Address) -> str:
        """One for all mailboxes: a batch has one flush."""
        return ""

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Sequence[Outcome]]:
        """Puts every message into the mailboxes of its recipients."""
        items = [item for delivery in deliveries for item in self._items(delivery)]
        loop = asyncio.get_running_loop()
        errors = iter(await loop.run_in_executor(self._executor, self._write, items))
        outcomes = []
        for delivery in deliveries:
            group = []
            for recipient in delivery.recipients:
                error = next(errors)
                group.append(self._outcome(error, delivery.message, recipient.address) if error else DELIVERED)
            outcomes.append(group)
        return outcomes

    async def close(self) -> None:
        """Waits for what is under way."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown()
        _tokens.discard(self._token)

    def _items(self, delivery: Delivery) -> Iterator[Item]:
        message = delivery.message
        strip = message.convertible
        prefix = message.prefix if strip else message.prefix.replace(b"\r\n", b"\n")
        content = (prefix, *_body_segments(message))
        reverse_path = _one_line(message.envelope.reverse_path)
        name = f"{int(message.arrived)}.M{message.id}R"
        for number, recipient in zip(delivery.numbers, delivery.recipients, strict=True):
            address = recipient.address
            head = f"Return-Path: <{reverse_path}>\nDelivered-To: {_one_line(address)}\n"
            yield (
                b"%d.%x.%s" % (self._worker, next(self._counter), self._token.encode()),
                mailbox_path(self._pattern, address.mailbox),
                f"{name}{number}.{self._host}".encode(),
                (head.encode("utf-8", "replace"), *content),
                strip,
            )

    def _outcome(self, error: int, message: Message, address: Address) -> Outcome:
        result, status, scope = _MEANING.get(error, _DEFERRED)
        if error == ENODATA:
            return Outcome(result, status, f"{message.file}: missing or shorter than the message", scope)
        mailbox = os.fsdecode(mailbox_path(self._pattern, address.mailbox))
        return Outcome(result, status, f"{mailbox}: {os.strerror(error)}", scope)

    # What follows runs in the thread.

    def _open(self) -> None:
        make_dirs(self._temporary)
        self._directory = os.open(self._temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _close(self) -> None:
        for fd in (self._directory, self._probe):
            if fd >= 0:
                os.close(fd)
        self._directory = self._probe = -1

    def _write(self, items: list[Item]) -> list[int]:
        errors: list[int] = []
        for start in range(0, len(items), BATCH_LIMIT):
            errors += self._write_some(items[start : start + BATCH_LIMIT])
        return errors

    def _write_some(self, items: list[Item]) -> list[int]:
        errors = [EXDEV] * len(items)
        self._write_batch(items, [i for i, item in enumerate(items) if item[1] not in self._elsewhere], errors)
        elsewhere = [i for i, error in enumerate(errors) if error == EXDEV]
        if elsewhere:
            self._write_elsewhere(items, elsewhere, errors)
        return errors

    def _write_batch(self, items: list[Item], chosen: list[int], errors: list[int]) -> None:
        try:
            if self._directory < 0:
                self._open()
            if self._probe < 0:
                self._probe = open_probe(self._temporary)
            found = write_batch(self._directory, [items[i] for i in chosen], each=self._each, probe=self._probe)
        except OSError as failure:
            self._close()
            found = [failure.errno or EIO] * len(chosen)
        for i, error in zip(chosen, found, strict=True):
            errors[i] = error
        if ENOENT in found:
            self._close()  # somebody removed the folder of the temporary files: the next batch makes it anew

    def _write_elsewhere(self, items: list[Item], chosen: list[int], errors: list[int]) -> None:
        """A batch for each other file system, through the mailboxes' own tmp/."""
        systems: dict[int, list[int]] = {}
        if len(self._elsewhere) + len(chosen) > CACHE_SIZE:
            self._elsewhere.clear()
        for i in chosen:
            mailbox = items[i][1]
            self._elsewhere.add(mailbox)
            try:
                make_dirs(mailbox + b"/tmp")
                systems.setdefault(os.stat(mailbox + b"/tmp").st_dev, []).append(i)
            except OSError as failure:
                errors[i] = failure.errno or EIO
        for group in systems.values():
            batch = [(b"%s/tmp/%s" % (items[i][1], items[i][0]), *items[i][1:]) for i in group]
            try:
                folder = os.path.dirname(batch[0][0])
                directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                probe = open_probe(folder)
                try:
                    found = write_batch(directory, batch, each=self._each, probe=probe)
                finally:
                    os.close(directory)
                    if probe >= 0:
                        os.close(probe)
            except OSError as failure:
                found = [failure.errno or EIO] * len(group)
            for i, error in zip(group, found, strict=True):
                errors[i] = error


def _body_segments(message: Message) -> Sequence[bytes | Range]:
    """The body without the cuts: octets in memory, else ranges of its file."""
    if message.parts is not None and not message.cuts:
        return message.parts
    edges = [0, *(edge for cut in message.cuts for edge in cut), message.size]
    kept = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    if message.parts is None:
        path = os.fsencode(message.file)
        return [(path, start, end - start) for start, end in kept]
    segments = []
    offset = 0
    for part in message.parts:
        for start, end in kept:
            piece = part[max(start - offset, 0) : max(end - offset, 0)]
            if piece:
                segments.append(piece)
        offset += len(part)
    return segments


def _one_line(address: Address) -> str:
    """The wire form for a header field. An Address holds no line end and no NUL; if one did, it would end here."""
    text = str(address)
    return text if text.isprintable() else text.translate(_UNSAFE_IN_FIELD)
