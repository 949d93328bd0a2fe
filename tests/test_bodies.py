"""Bodies on their way in: small ones in memory, large ones in files, slow disks, short memory, failed flushes."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from keeping import INLINE, Answers, Yard, keep, letter, octets, run, settle

from fastsmtp import bodies
from fastsmtp.bodies import HEAD, PIECE, UNFLUSHED, FileDraft, check_length, read_crc
from fastsmtp.commit import FAILED, NO_ROOM
from fastsmtp.reply import R451_LOCAL_ERROR, R452_NO_ROOM
from fastsmtp.spool import Spool
from fastsmtp.verdict import STORED, Refused


class Gate:
    """Stands where files are written: lets writes through when it is open, or fails them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.error: OSError | None = None
        self.sizes: list[int] = []
        self._append: Callable[[int, list[bytes], bool], None] = bodies.append_file
        monkeypatch.setattr(bodies, "append_file", self)

    def __call__(self, fd: int, parts: list[bytes], sync: bool) -> None:
        assert sync
        self.open.wait(10)
        if self.error is not None:
            raise self.error
        self.sizes.append(sum(map(len, parts)))
        self._append(fd, parts, sync)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def in_body(spool: Spool) -> list[str]:
    return os.listdir(spool._bodies.directory)


def test_the_body_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    body = octets(INLINE + 5000)

    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            for size in (len(body), INLINE + 1):
                for cut in (1, 7, 511, 512, 513, 4096, INLINE, len(body)):
                    answers = Answers()
                    message, draft = letter(spool, b"")
                    for place in range(0, size, cut):
                        assert draft.write(body[place : min(place + cut, size)])
                    assert draft.size == size
                    assert bytes(draft.head) == body[:size]
                    message.size = size
                    spool.append(message, draft, answers)
                    await answers.wait(1)
                    assert Path(message.file).read_bytes() == body[:size]
            for cut in (1, 3, 600, INLINE):
                answers = Answers()
                message, draft = letter(spool, b"")
                for place in range(0, INLINE, cut):
                    draft.write(body[place : min(place + cut, INLINE)])
                message.size = INLINE
                spool.append(message, draft, answers)
                await answers.wait(1)
                assert message.parts == [body[:INLINE]]

    run(main())


def test_one_octet_chunks_cost_bounded_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            _, draft = letter(spool, b"")
            assert isinstance(draft, FileDraft)
            for _ in range(INLINE):
                draft.write(b"x")
            assert len(draft._parts) <= INLINE // bodies.SMALL
            draft.abandon()

    run(main())


def test_a_file_is_flushed_in_pieces_and_a_slow_disk_stops_the_reading(tmp_path: Path, gate: Gate) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            drained: list[bool] = []
            message, draft = letter(spool, b"", drained=lambda: drained.append(True))
            chunk = octets(64 << 10)
            gate.open.clear()
            taken = 0
            while draft.write(chunk):
                taken += len(chunk)
            assert taken == UNFLUSHED
            assert not drained
            assert spool._room.drafts <= UNFLUSHED + HEAD + 2 * len(chunk)
            await keep(spool)  # small mail does not wait for it
            gate.open.set()
            await until(lambda: drained == [True])
            while draft.size < 5 << 20:
                if not draft.write(chunk):
                    await until(lambda: len(drained) > 1)
                    drained.pop()
            answers = Answers()
            message.size = draft.size
            spool.append(message, draft, answers)
            assert await answers.wait(1) == [STORED]
            assert Path(message.file).read_bytes() == chunk * (draft.size // len(chunk))
            assert max(gate.sizes) <= UNFLUSHED + len(chunk)
            assert sum(gate.sizes) == draft.size
            assert gate.sizes[0] == PIECE
            await until(lambda: spool._room.drafts == 0)

    run(main())


def test_a_message_joins_a_commit_only_when_its_file_is_durable(tmp_path: Path, gate: Gate) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            gate.open.clear()
            answers = Answers()
            spool.append(*letter(spool, octets(3_000_000)), answers)
            for _ in range(5):
                await keep(spool)
            assert answers.all == []
            assert spool.backlog == 5
            gate.open.set()
            assert await answers.wait(1) == [STORED]

    run(main())


@pytest.mark.parametrize(
    ("number", "reason", "reply"),
    [
        (errno.ENOSPC, NO_ROOM, R452_NO_ROOM),
        (errno.EDQUOT, NO_ROOM, R452_NO_ROOM),
        (errno.EIO, FAILED, R451_LOCAL_ERROR),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_file_that_fails_is_refused_and_removed(
    tmp_path: Path, gate: Gate, number: int, reason: str, reply: object, late: bool
) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        async with yard.opened() as spool:
            gate.error = OSError(number, os.strerror(number))
            message, draft = letter(spool, octets(3_000_000))
            if late:
                await asyncio.sleep(0.1)  # the failed flush is known
                for _ in range(100):
                    assert draft.write(octets(100_000))  # what comes is dropped, not kept
                assert spool._room.drafts <= 7_000_000
            answers = Answers()
            spool.append(message, draft, answers)
            (answer,) = await answers.wait(1)
            assert isinstance(answer, Refused)
            assert (answer.reason, answer.reply) == (reason, reply)
            gate.error = None
            await until(lambda: in_body(spool) == [])
            assert spool._room.drafts == 0
            assert spool.healthy
            await keep(spool, octets(3_000_000))

    run(main())
    assert yard.lines("spool-warning")[0]["where"] == "body"


def test_without_the_ballast_no_file_takes_its_room(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            spool._room.ballast.give_up()
            answers = Answers()
            spool.append(*letter(spool, octets(INLINE + 1)), answers)
            (answer,) = await answers.wait(1)
            assert isinstance(answer, Refused)
            assert answer.reply is R452_NO_ROOM
            assert in_body(spool) == []

    run(main())


@pytest.mark.parametrize("size", [10, INLINE + 1, 700_000])
def test_an_abandoned_draft_leaves_nothing(tmp_path: Path, gate: Gate, size: int) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            for wait in (0.0, 0.1):
                _, draft = letter(spool, octets(size))
                await asyncio.sleep(wait)
                draft.abandon()
                draft.abandon()
                await until(lambda: in_body(spool) == [])
                assert spool._room.drafts == 0
            gate.open.clear()
            drained: list[bool] = []
            _, draft = letter(spool, octets(3_000_000), drained=lambda: drained.append(True))
            draft.abandon()
            gate.open.set()
            await settle(spool)
            await until(lambda: in_body(spool) == [])
            assert (spool._room.drafts, drained) == (0, [])

    run(main())


def test_an_appended_draft_is_no_longer_the_connections(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            for size in (10, INLINE + 1):
                answers = Answers()
                message, draft = letter(spool, octets(size))
                spool.append(message, draft, answers)
                draft.abandon()  # the connection was lost: the message is kept all the same
                assert await answers.wait(1) == [STORED]
            assert spool.backlog == 2
            assert in_body(spool) == [message.id]
            assert spool._room.drafts == 0

    run(main())


def test_the_head_is_kept_until_the_header_is_done_or_to_its_limit(tmp_path: Path) -> None:
    body = octets(1_000_000)

    async def main() -> None:
        async with Yard(tmp_path, inline=1000).opened() as spool:
            for done_at in (5_000, 200_000, 900_000):
                _, draft = letter(spool, b"")
                for place in range(0, len(body), 1000):
                    if place == done_at:
                        draft.header_done()
                    draft.write(body[place : place + 1000])
                    await asyncio.sleep(0)
                length = min(done_at, HEAD)
                assert bytes(draft.head)[:length] == body[:length]
                assert len(draft.head) <= length + 1000
                draft.abandon()
            assert spool._room.drafts == 0

    run(main())


def test_when_memory_is_short_small_bodies_go_to_files_too(tmp_path: Path, gate: Gate) -> None:
    async def main() -> None:
        async with Yard(tmp_path, memory=50_000).opened() as spool:
            gate.open.clear()
            drained: list[bool] = []
            answers = Answers()
            for n in range(8):
                message, draft = letter(spool, b"", drained=lambda: drained.append(True))
                more = draft.write(octets(10_000, n))
                assert more == (n < 5)
                spool.append(message, draft, answers)
            gate.open.set()
            assert await answers.wait(8) == [STORED] * 8
            assert len(in_body(spool)) == 3

    run(main())


def test_a_file_that_is_there_already_is_neither_written_nor_removed(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            message, draft = letter(spool, octets(100_000))
            (spool._bodies.directory / message.id).write_text("somebody's")
            answers = Answers()
            spool.append(message, draft, answers)
            (answer,) = await answers.wait(1)
            assert isinstance(answer, Refused)
            await settle(spool)
            assert (spool._bodies.directory / message.id).read_text() == "somebody's"

    run(main())


def test_reading_never_waits_for_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert check_length(tmp_path / "fifo", 0) == "its file is not a regular file"
    with pytest.raises(OSError, match="Illegal seek"):
        read_crc(tmp_path / "fifo", 0, 0)
    assert "cannot be read" in check_length(tmp_path / "missing", 0)
