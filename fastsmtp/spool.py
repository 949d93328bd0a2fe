"""The durable store of accepted mail: what connections and the queue see of it.

In: messages with their drafts, and the marks of the queue. Out: STORED or Refused for each message, once the
commit that holds it is on the disk, and jobs. A spool that another worker left behind is opened in the same way. A
damaged message is never delivered, in part or whole, and never deleted. One object has a directory for itself:
    spool.db (-wal, -shm)   the database        body/ID   bodies that are too large for it
    lock                    held while open     ballast   given up when the disk is full
Not here: the commit and what its failure means (commit.py), SQL (store.py), body files (bodies.py), what is claimed
next (scan.py), how much may be taken (room.py), what is found broken at a start (recovery.py), what an operator asks
and orders (administration.py).
"""

from __future__ import annotations

import fcntl
import os
import time
from asyncio import AbstractEventLoop, Future
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from zlib import crc32

import apsw

from ._files import make_dirs
from .administration import Administration
from .bodies import Bodies, FileDraft, check_length, read_crc
from .commit import GroupCommit, refusal
from .ids import Ids, begin_of, key_of
from .job import Draft, Job, Mark
from .log import SET_ASIDE, SPOOL_OPENED, Log
from .message import Message
from .reader import Reader
from .record import render_row
from .recovery import Recovery
from .room import Room
from .scan import RETRY_SECONDS, Scan
from .store import SpoolError, SpoolLockedError, Store
from .thread import OneThread
from .trouble import Trouble
from .verdict import STORED, Refused, Stored
from .waiting import Entry

__all__ = ["Draft", "Job", "Mark", "Spool", "SpoolError", "SpoolLockedError"]

# What the lock file says between an end in order and the next start, and behind that: of one length, for a full disk.
CLOSED, IN_USE = b"closed\n", b"in use\n"


class Spool:
    """A Keeper and a Backlog (see job.py) on the disk; one object has `directory` for itself.

    `inline`: greatest body, in octets, that is kept in the database. `min_free`: octets of its file system that are
    left alone. `memory`: octets for bodies in flight and waiting jobs. Used on the loop's thread only.
    """

    def __init__(
        self,
        directory: Path,
        worker: int,
        *,
        loop: AbstractEventLoop,
        log: Log,
        inline: int,
        min_free: int,
        memory: int,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_stored: Callable[[list[Job]], None] = lambda _: None
        self._directory = directory
        self._worker = worker
        self._loop = loop
        self._log = log
        self._inline_limit = inline
        self._wall = wall
        self._trouble = Trouble(log, str(directory), monotonic)
        self._room = Room(directory, min_free, memory, monotonic)
        self._store = Store(directory / "spool.db")
        self._reader = Reader(self._store.path)
        self._lock = -1
        self._closing = False
        self._sealing = 0  # messages whose files are being flushed
        self._sealed_all: Future[None] | None = None
        # Made by `open`, after the fork
        self.administration: Administration
        self._writer: OneThread
        self._files: OneThread
        self._bodies: Bodies
        self._scan: Scan
        self._commit: GroupCommit
        self._ids: Ids

    # --- start and end ---

    def open(self) -> None:
        """Takes the lock, opens or creates, recovers. Raises SpoolError with one line, SpoolLockedError."""
        bodies = self._directory / "body"
        try:
            make_dirs(bodies)
            was_closed = self._take_lock()
        except OSError as error:
            raise SpoolError(f"{error.filename or self._directory}: {error.strerror}") from error
        try:
            self._room.ballast.give_up()  # SQLite must not meet a full disk while it opens
            Recovery(self._directory, self._store, self._log, self._trouble, self._wall).open(was_closed)
            try:
                self._reader.open()
                self._ids = Ids(self._worker, self._store.newest(), self._wall)
                backlog, broken = self._store.count()
            except (OSError, apsw.Error) as error:
                self._reader.close()
                self._store.drop()
                raise SpoolError(f"{self._directory}: {error}") from error
        except SpoolError:
            self._release_lock()
            raise
        self._room.ballast.make()
        self._writer = OneThread(self._loop, "spool-writer")
        self._files = OneThread(self._loop, "spool-files")
        self._bodies = Bodies(bodies, self._inline_limit, self._room, self._files)
        self._scan = Scan(self._reader, self._files, bodies, self._set_aside, self._trouble.warn)
        self._commit = GroupCommit(
            self._loop, self._store, self._reader, self._writer, self._files, self._room, self._scan,
            self._trouble, lambda jobs: self.on_stored(jobs), backlog, broken,
        )  # fmt: skip
        self.administration = Administration(self._reader, self._files, self._scan, self._commit, bodies, self._room)
        self._log.write(SPOOL_OPENED, str(self._directory), backlog)

    async def close(self) -> None:
        """Commits what waits, empties the log into the database, closes, gives the lock back."""
        self._closing = True
        if self._sealing:
            self._sealed_all = self._loop.create_future()
            await self._sealed_all
        await self._commit.close()
        try:
            await self._files.call(self._reader.close)
            await self._writer.call(self._store.close)
        except apsw.Error as error:
            self._trouble.warn("close", str(error))
        await self._writer.close()
        await self._files.close()
        self._note_end()
        self._release_lock()

    def _take_lock(self) -> bool:
        """Whether the last who had it has ended in order. That is no longer so when this returns, whatever happens."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(self._directory / "lock", flags, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release_lock()
            raise SpoolLockedError(f"{self._directory}: another process has this spool") from None
        if os.pread(self._lock, len(CLOSED), 0) != CLOSED:
            return False
        try:
            os.pwrite(self._lock, IN_USE, 0)
            os.fsync(self._lock)
        except OSError:
            self._release_lock()
            raise
        return True

    def _note_end(self) -> None:
        """The log is empty: what the next start finds in one is none of ours."""
        try:
            if not Path(f"{self._store.path}-wal").stat().st_size:
                os.pwrite(self._lock, CLOSED, 0)
        except OSError:
            pass  # it is not certain then, and nothing more

    def _release_lock(self) -> None:
        lock, self._lock = self._lock, -1
        os.close(lock)

    # --- for connections ---

    def next_id(self) -> str:
        """An id for a new message."""
        return self._ids.next()

    def room(self, size: int = 0) -> bool:
        """Whether a message of `size` octets may be taken now; False is 452 4.3.1 at MAIL."""
        return self._commit.healthy and not self._closing and self._room.fits(size, self._files)

    def draft(self, message_id: str, drained: Callable[[], None]) -> FileDraft:
        """Where the body of message `message_id` goes; `drained` is called when `write` may go on."""
        return FileDraft(message_id, self._bodies, drained)

    def append(
        self, message: Message, draft: Draft, answer: Callable[[Stored | Refused], None], marks: Sequence[Mark] = ()
    ) -> None:
        """Keeps a message whose id is the draft's. `answer` is called once: after the commit, or at once when
        the message is refused without one. `marks` of held jobs are durable with it, or were not made.
        Raises ValueError for an envelope that cannot be written down."""
        if not isinstance(draft, FileDraft):
            raise TypeError(f"a draft of another keeper: {draft!r}")
        if marks:
            answer = partial(self._told, marks, answer)
        body = draft.take()
        if body is None:
            message.parts = None
            message.file = str(draft.file().path)
            self._sealing += 1
            draft.seal(partial(self._sealed, message, draft, answer, marks))
            return
        message.parts = [body]
        self._enter(message, draft, crc32(body), body, answer, marks)

    def _sealed(
        self,
        message: Message,
        draft: FileDraft,
        answer: Callable[[Stored | Refused], None],
        marks: Sequence[Mark],
        error: Exception | None,
    ) -> None:
        """The file is durable, or failed."""
        self._sealing -= 1
        if self._sealed_all is not None and not self._sealing:
            self._sealed_all.set_result(None)  # whoever waits for it runs behind this callback
        if error is None:
            self._enter(message, draft, draft.file().crc, None, answer, marks)
            return
        self._room.look_again()
        self._trouble.warn("body", str(error))
        draft.discard()
        answer(refusal(self._store.is_full(error)))

    def _told(
        self, marks: Sequence[Mark], answer: Callable[[Stored | Refused], None], result: Stored | Refused
    ) -> None:
        """A report was answered for; with it its marks are made."""
        if result is STORED:
            self._forget_doomed(marks)
        answer(result)

    def _forget_doomed(self, marks: Sequence[Mark]) -> None:
        """What is over needs no deletion any more."""
        doomed = self.administration.doomed
        for mark in marks:
            job = self._scan.held.get(mark.key)
            if doomed and job is not None and not job.pending:
                doomed.pop(mark.key, None)

    def _enter(
        self,
        message: Message,
        draft: FileDraft,
        crc: int,
        body: bytes | None,
        answer: Callable[[Stored | Refused], None],
        marks: Sequence[Mark],
    ) -> None:
        """Puts a message whose body is in memory or durable into the next batch."""
        key = key_of(message.id)
        try:
            row = render_row(key, message, crc, body)
        except ValueError:
            draft.discard()
            raise
        job = Job(key, message, list(range(len(message.envelope.recipients))), checked=True)
        self._commit.enter(Entry(row, job, draft, answer, marks))

    # --- for the queue ---

    @property
    def healthy(self) -> bool:
        """Whether marks can be committed. While they cannot, no delivery may begin."""
        return self._commit.healthy

    @property
    def backlog(self) -> int:
        """Messages that are not finished."""
        return self._commit.backlog

    @property
    def broken(self) -> int:
        """Messages that were set aside, in this run and before."""
        return self._commit.broken

    @property
    def commits(self) -> tuple[int, int]:
        """Commits that were flushed, and those that failed."""
        return self._commit.commits, self._commit.commits_failed

    @property
    def over_budget(self) -> bool:
        """Whether bodies of waiting jobs should be dropped: before new mail is refused for them."""
        room = self._room
        return 4 * (room.drafts + room.jobs) > 3 * room.limit

    def next_due(self) -> float | None:
        """When to claim again (epoch seconds; past: now); None: not before something is deferred or released."""
        return self._scan.next_due()

    def finish(self, marks: Sequence[Mark]) -> None:
        """Takes what became of recipients of held jobs; durable with the next commit. Finished recipients
        leave `Job.pending` at once; a job without any is over and need not be released. What one transport still
        had of a message that was set aside for another is not noted."""
        held = self._scan.held
        for mark in marks:
            job = held.get(mark.key)
            if job is not None:
                self._commit.finish(job, mark)
        if self.administration.doomed:
            self._forget_doomed(marks)

    async def claim(self, now: float, n: int) -> list[Job]:
        """Jobs that are due, and mail that was never tried and is not in memory: up to `n`, or some more."""
        if not self._commit.healthy or self._closing:
            return []
        jobs = await self._scan.claim(now, n)
        for job in jobs:
            self._room.jobs += job.held
        return jobs

    async def read(self, job: Job) -> bool:
        """Brings the body back: into `parts`, or checks its file. False: nothing more of the job is to be delivered,
        its message is damaged and was set aside, or cannot be read now and will be claimed again later."""
        message = job.message
        try:
            if message.parts is not None or (message.file and job.checked):
                return True
            body, crc = await self._files.call(partial(self._reader.body, job.key))
            why = ""
            if message.file:
                why = await self._check_file(message, crc)
            elif body is None or len(body) != message.size or crc32(body) != crc:
                why = "its body does not have the length and checksum that were kept"
        except (LookupError, apsw.CorruptError) as error:
            why = f"its body cannot be read: {error}"
        except (apsw.Error, OSError) as error:
            self._trouble.warn("read", str(error))
            self._loop.call_later(RETRY_SECONDS, self._release_idle, job)
            return False
        if self._scan.held.get(job.key) is not job:
            return False  # read for two transports, and set aside for the other
        if why:
            self._set_aside(job.key, why, message.id, message.file)
            return False
        job.checked = True
        if body is not None:
            message.parts = [body]
            job.held += message.size
            self._room.jobs += message.size
        return True

    async def _check_file(self, message: Message, crc: int) -> str:
        """What is wrong with a body file; read in pieces, between which others have the thread."""
        path = Path(message.file)
        why = check_length(path, message.size)
        place = found = 0
        while not why and place < message.size:
            found, length = await self._files.call(partial(read_crc, path, place, found))
            place += length
            if not length:
                break
        if not why and (place != message.size or found != crc):
            why = "its file does not have the checksum that was kept"
        return why

    def drop(self, job: Job) -> None:
        """Drops the body of a waiting job from memory; `read` brings it back."""
        message = job.message
        if message.parts is not None and job.held:
            message.parts = None
            job.held -= message.size
            self._room.jobs -= message.size

    def release(self, job: Job) -> None:
        """Gives a job back; once its marks are durable, what is pending of it can be claimed."""
        if self.administration.doomed:
            self.administration.delete_rest(job)
        self._commit.release(job)

    def _release_idle(self, job: Job) -> None:
        """Gives a job back that could not be read, unless another transport has it: claimed again, its recipients
        would be delivered to twice. Behind that the queue gives it back."""
        if not job.deliveries:
            self.release(job)

    def _set_aside(self, key: int, why: str, message_id: str = "", path: str = "") -> None:
        """Notes a damaged message; its recipients are no longer pending when that is durable."""
        if self._commit.set_aside(key, why, self._wall()):
            self._log.write(SET_ASIDE, message_id or begin_of(key), why, path or str(self._store.path))
