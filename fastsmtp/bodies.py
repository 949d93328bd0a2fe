"""Bodies on their way in: in memory while they are small, else in a file of their own.

In: a connection's chunks. Out: octets for the database, or the path of a file that is durable, name and all, with
its CRC-32. A body goes to a file when it grows over `inline` octets or when memory is short; it is written and
flushed in the file thread in pieces, so that neither a commit nor the loop waits for it. More than 1 MB not yet
flushed: the connection stops reading. The commit that names a file comes behind its flushes, and confirms them too
(store.py). A file without a row in the database was never acknowledged and is removed at the next start; what does not
look like ours is left alone.
Not here: who decides that a message is kept. Errors of a file are kept for `seal`, which hands them on; a failed
flush is never tried again. Message size and header size are the parser's to limit.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

from ._files import append_file, fsync_dir
from .ids import is_id
from .room import Ballast, Room
from .thread import OneThread

PIECE = 512 << 10  # written and flushed at once; 20 MB in one flush made the p99 of commits 26 ms, 1 MB 6.6
UNFLUSHED = 1 << 20  # octets of one body, from which on its connection waits
HEAD = 256 << 10  # octets kept in memory for whoever reads the header
SMALL = 512  # shorter chunks are joined: one-octet BDAT chunks cost 40 octets each


class BodyFile:
    """A file that is being written; its methods run in the file thread, and raise OSError."""

    __slots__ = ("_ballast", "_fd", "_made", "crc", "path")

    def __init__(self, path: Path, ballast: Ballast) -> None:
        self.path = path
        self._ballast = ballast
        self.crc = 0
        self._fd = -1
        self._made = False

    def append(self, parts: list[bytes]) -> None:
        """Writes and flushes."""
        if not self._ballast.there:  # what it left free is the database's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)
            self._made = True
        for part in parts:
            self.crc = crc32(part, self.crc)
        append_file(self._fd, parts, True)

    def end(self, parts: list[bytes]) -> None:
        """Writes the last octets and makes all of it durable."""
        self.append(parts)
        self._close()
        fsync_dir(self.path.parent)

    def remove(self) -> None:
        """Closes and unlinks it, if it was made here."""
        self._close()
        if self._made:
            self._made = False
            remove(self.path)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Bodies:
    """The folder of body files, and what all drafts share."""

    __slots__ = ("directory", "inline", "room", "thread")

    def __init__(self, directory: Path, inline: int, room: Room, thread: OneThread) -> None:
        self.directory = directory
        self.inline = inline
        self.room = room
        self.thread = thread


class FileDraft:
    """A Draft (see job.py) that may go to a file."""

    __slots__ = (
        "_bodies", "_drained", "_error", "_file", "_flying", "_head", "_head_open", "_held", "_inline_limit", "_parts",
        "_paused", "_room", "_sealed", "_taken", "_waiting", "id", "size",
    )  # fmt: skip

    def __init__(self, message_id: str, bodies: Bodies, drained: Callable[[], None]) -> None:
        self.id = message_id
        self.size = 0
        self._bodies = bodies
        self._room = bodies.room
        self._drained = drained
        self._inline_limit = bodies.inline  # -1 once there is a file
        self._parts: list[bytes] = []  # not yet handed to the thread
        self._taken = False  # no longer the connection's
        self._file: BodyFile | None = None
        self._error: Exception | None = None
        # With a file only:
        self._waiting = 0  # octets in `_parts`
        self._flying = 0  # octets that the thread has
        self._held = 0  # octets counted in the budget
        self._head = bytearray()
        self._head_open = True
        self._paused = False
        self._sealed: Callable[[Exception | None], None] | None = None

    @property
    def head(self) -> bytes | bytearray:
        if self._file is not None:
            return self._head
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0] if self._parts else b""

    def write(self, chunk: bytes) -> bool:
        length = len(chunk)
        self.size += length
        room = self._room
        room.drafts += length
        parts = self._parts
        if parts and length < SMALL and len(parts[-1]) < SMALL:
            parts[-1] += chunk
        else:
            parts.append(chunk)
        if self.size <= self._inline_limit and room.drafts + room.jobs <= room.limit:
            return True
        return self._spill(chunk)

    def header_done(self) -> None:
        self._head_open = False

    def abandon(self) -> None:
        if not self._taken:
            self._taken = True
            self.discard()

    # --- for the spool ---

    def take(self) -> bytes | None:
        """The body, for the database; None when it is in a file: `seal` is next. The draft is now the spool's."""
        self._taken = True
        return bytes(self.head) if self._file is None else None

    @property
    def held(self) -> int:
        """Octets that stand in `Room.drafts` for it."""
        return self.size if self._file is None else self._held

    def seal(self, done: Callable[[Exception | None], None]) -> None:
        """Makes the file durable, then calls `done`; with the error if there was one."""
        self._sealed = done
        self._drained = _nothing
        if not self._flying:
            self._end()

    def file(self) -> BodyFile:
        """The file; there is one when `take` said so."""
        if self._file is None:
            raise LookupError(self.id)
        return self._file

    def discard(self) -> None:
        """Forgets the body; its file is removed."""
        self._room.drafts -= self.held
        self._held = 0
        self._parts = []
        self._drained = _nothing
        if self._file is None:
            self.size = 0
        else:
            self._error = self._error or OSError("abandoned")
            self._bodies.thread.run(self._file.remove, _nothing)

    # --- the file ---

    def _spill(self, chunk: bytes) -> bool:
        """What `write` does once there has to be a file."""
        if self._file is None:
            self._file = BodyFile(self._bodies.directory / self.id, self._room.ballast)
            self._inline_limit = -1
            self._head += b"".join(self._parts)
            self._waiting = self.size
            self._held = 2 * self.size
            self._room.drafts += self.size
        else:
            self._waiting += len(chunk)
            self._held += len(chunk)
            if self._head_open and len(self._head) < HEAD:
                self._head += chunk
                self._held += len(chunk)
                self._room.drafts += len(chunk)
        if self._error is not None:
            self._forget_waiting()
            return True
        room = self._room
        short = room.drafts + room.jobs > room.limit
        if not self._flying and (short or self._waiting >= PIECE):
            self._flush()
        self._paused = self._flying > 0 and (short or self._waiting + self._flying > UNFLUSHED)
        return not self._paused

    def _flush(self) -> None:
        file = self.file()
        parts, self._parts = self._parts, []
        self._flying, self._waiting = self._waiting, 0
        self._bodies.thread.run(lambda: file.append(parts), self._flushed)

    def _flushed(self, answer: Exception | None) -> None:
        flying, self._flying = self._flying, 0
        if self._held:  # else it was discarded meanwhile
            self._held -= flying
            self._room.drafts -= flying
        if answer is not None:
            self._error = answer
        if self._error is not None:
            self._forget_waiting()
        if self._sealed is not None:
            self._end()
        elif self._waiting >= PIECE:
            self._flush()
        if self._paused:
            self._paused = False
            self._drained()

    def _end(self) -> None:
        """The last step of `seal`."""
        file = self.file()
        sealed = self._sealed or _nothing
        if self._error is not None:
            sealed(self._error)
            return
        parts, self._parts = self._parts, []
        self._bodies.thread.run(lambda: file.end(parts), sealed)

    def _forget_waiting(self) -> None:
        self._parts = []
        if self._held:
            self._held -= self._waiting
            self._room.drafts -= self._waiting
        self._waiting = 0


def remove(path: Path) -> None:
    """Unlinks a file that may not be there. Raises OSError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def check_length(path: Path, size: int) -> str:
    """What is wrong with a body file, as far as its inode tells; "" when nothing is."""
    try:
        state = os.lstat(path)
    except OSError as error:
        return f"its file cannot be read: {error.strerror}"
    if not stat.S_ISREG(state.st_mode):
        return "its file is not a regular file"
    if state.st_size != size:
        return f"its file has {state.st_size} octets, {size} were kept"
    return ""


def read_beginning(path: Path, length: int) -> bytes:
    """The first octets of a body. Raises OSError."""
    # Not blocking: a FIFO that took the file's place would wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(fd, length)
    finally:
        os.close(fd)


def read_crc(path: Path, place: int, crc: int) -> tuple[int, int]:
    """The checksum up to the next MB from `place`, and how many octets were read. Raises OSError."""
    # Opened for each piece: a descriptor kept over many pieces would have to be closed on every way out.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        piece = os.pread(fd, 1 << 20, place)
        return crc32(piece, crc), len(piece)
    finally:
        os.close(fd)


def remove_orphans(directory: Path, known: set[str]) -> tuple[int, int]:
    """Removes the body files that no message owns. How many, and how many entries were left as not ours."""
    removed = strange = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name in known:
                continue
            if is_id(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)
                removed += 1
            else:
                strange += 1
    return removed, strange


def _nothing(_: object = None) -> None:
    pass
