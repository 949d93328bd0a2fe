"""What an operator asks of a spool and orders in it, beside the queue that works on the same messages.

In: a Selection, or a filter and a place. Out: counts, rows in JSON's values, a Census. Reading goes through the
reading connection in short slices, writing through the group commit in pieces of 1,000 recipients, so that a million
of them delay nobody; an order is answered when it is durable, and does not reach mail that comes meanwhile. What the
queue has in memory is under way: a delivery cannot be called back, so a delete takes effect behind the attempt, a hold
before the next. A message that is to be deleted is taken like a claim, so that nothing else delivers it meanwhile.
Not here: SQL (reader.py, store.py), who may ask (control.py). Raises SpoolError where the database cannot be read.
"""

from __future__ import annotations

import json
from asyncio import sleep
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import apsw

from .bodies import read_beginning, remove
from .census import AGES, Census
from .commit import GroupCommit
from .ids import key_of
from .job import HELD, JOB_OCTETS, Job, Mark
from .reader import LAST, Reader, parse_messages
from .record import parse_job
from .room import Room
from .scan import LOAD, Scan
from .selection import Selection
from .store import ROWS, SpoolError
from .thread import OneThread

SLICE = 5_000  # recipients read at once: some milliseconds of the reading thread
HEAD_LIMIT = 256 << 10  # octets of a header section that are shown

T = TypeVar("T")


class Changed(NamedTuple):
    """What an order has reached: `under_way` are messages among those that the queue has in hand."""

    messages: int = 0
    recipients: int = 0
    under_way: int = 0


class Administration:
    """Used on the loop's thread. `doomed` are recipients under way that are to be deleted, by key; the spool looks
    into it when a job is given back."""

    def __init__(
        self, reader: Reader, thread: OneThread, scan: Scan, commit: GroupCommit, bodies: Path, room: Room
    ) -> None:
        self.doomed: dict[int, set[int]] = {}
        self._reader = reader
        self._thread = thread
        self._scan = scan
        self._commit = commit
        self._bodies = bodies
        self._room = room

    # Orders. Each yields what it has done so far, which is durable.

    async def retry(self, selection: Selection, now: float) -> AsyncIterator[Changed]:
        """Makes what is deferred due now."""
        async for done in self._change(selection, "deferred", partial(self._commit.wake, due=now)):
            yield done

    async def hold(self, selection: Selection) -> AsyncIterator[Changed]:
        """No further attempt before it is released."""
        async for done in self._change(selection, "waiting", self._commit.hold):
            yield done

    async def release(self, selection: Selection, now: float) -> AsyncIterator[Changed]:
        """What was on hold is due now."""
        async for done in self._change(selection, "held", partial(self._commit.wake, due=now)):
            yield done

    async def delete(self, selection: Selection) -> AsyncIterator[Changed]:
        """Ends recipients without a report; a message without any is gone. Set aside ones go when named by id."""
        messages = recipients = under_way = 0
        async for rows in self._rows(selection, ""):
            numbers: dict[int, set[int]] = {}
            for key, number in rows:
                numbers.setdefault(key, set()).add(number)
            keys = list(numbers)
            for start in range(0, len(keys), LOAD):
                chunk = keys[start : start + LOAD]
                jobs = {job.key: job for job in await self._take(chunk)}
                for key in chunk:
                    if key in jobs:
                        messages += 1
                        recipients += self._finish(jobs[key], numbers[key])
                    elif key in self._scan.held:
                        under_way += 1
                        self.doomed.setdefault(key, set()).update(numbers[key])
            await self._flushed()
            yield Changed(messages, recipients, under_way)
        if selection.ids and (erased := await self._erase(selection.keys)):
            yield Changed(messages + erased, recipients, under_way)

    def delete_rest(self, job: Job) -> None:
        """A job is about to be given back: what is doomed of it ends."""
        self._finish(job, self.doomed.pop(job.key, set()), release=False)

    async def _change(
        self, selection: Selection, state: str, order: Callable[[list[tuple[int, int]]], None]
    ) -> AsyncIterator[Changed]:
        messages = recipients = under_way = 0
        async for rows in self._rows(selection, state):
            order(rows)
            await self._flushed()
            keys = {key for key, _ in rows}
            messages += len(keys)
            recipients += len(rows)
            under_way += len(keys & self._scan.held.keys())
            yield Changed(messages, recipients, under_way)

    async def _rows(self, selection: Selection, state: str, late: bool = False) -> AsyncIterator[list[tuple[int, int]]]:
        """Key and number of the selected recipients, some at once. `late` as in _slices."""
        if selection.ids:
            keys = selection.keys
            for start in range(0, len(keys), LOAD):
                chunk = keys[start : start + LOAD]
                for rows in _pieces(await self._read(partial(self._reader.recipients_of, chunk, state))):
                    yield rows
            return
        async for behind, until in self._slices(late):
            read = partial(self._reader.recipients, behind, until, selection.domain, state)
            for rows in _pieces(await self._read(read)):
                yield rows

    async def _slices(self, late: bool = True) -> AsyncIterator[tuple[int, int]]:
        """What stands in the spool now, in slices. `late`: the last slice reaches as far as there is anything when it
        is read. Else a message that is finished meanwhile would not be found, and neither the report that came in its
        place, behind all that was there: an empty queue, with mail in it."""
        behind, last = -1, await self._read(self._reader.last)
        while behind < last:
            until = await self._read(partial(self._reader.slice_end, behind, SLICE))
            yield behind, until if late else min(until, last)
            behind = until

    async def _take(self, keys: list[int]) -> list[Job]:
        if not self._commit.healthy:
            raise SpoolError("the spool cannot keep what is ordered at present; the log says why")
        try:
            jobs = await self._scan.take(keys)
        except apsw.Error as error:
            raise SpoolError(str(error)) from error
        self._room.jobs += JOB_OCTETS * len(jobs)
        return jobs

    def _finish(self, job: Job, numbers: set[int], release: bool = True) -> int:
        """Ends recipients of a job; how many."""
        chosen = [number for number in job.pending if number in numbers]
        for number in chosen:
            self._commit.finish(job, Mark(job.key, number))
        if release and job.pending:
            self._commit.release(job)
        return len(chosen)

    async def _erase(self, keys: list[int]) -> int:
        """Deletes what was set aside; how many messages."""
        found = [
            (key_of(one), one) for one, why, _ in json.loads(await self._read(partial(self._reader.known, keys))) if why
        ]
        if found:
            self._commit.erase([key for key, _ in found])
            await self._flushed()
            for _, message_id in found:
                await self._call(partial(remove, self._bodies / message_id))
        return len(found)

    async def _flushed(self) -> None:
        if not await self._commit.flushed():
            raise SpoolError("the server is ending")
        await sleep(0)  # others have their turn

    # Questions

    async def unknown(self, ids: tuple[str, ...]) -> list[str]:
        """Those of the ids that no message here has."""
        known: set[str] = set()
        for start in range(0, len(ids), LOAD):
            keys = [key_of(message_id) for message_id in ids[start : start + LOAD]]
            known.update(row[0] for row in json.loads(await self._read(partial(self._reader.known, keys))))
        return [message_id for message_id in ids if message_id not in known]

    async def count(self, selection: Selection, state: str = "") -> Changed:
        """What is in a state (see reader.STATES); "": what a delete would reach."""
        messages = recipients = under_way = 0
        async for rows in self._rows(selection, state, late=True):
            keys = {key for key, _ in rows}
            messages += len(keys)
            recipients += len(rows)
            under_way += len(keys & self._scan.held.keys())
        if selection.ids and not state:
            rows = json.loads(await self._read(partial(self._reader.known, selection.keys)))
            messages += sum(why is not None for _, why, _ in rows)
        return Changed(messages, recipients, under_way)

    async def messages(self, domain: str, state: str) -> AsyncIterator[dict[str, Any]]:
        """The messages with recipients at a domain ("": any) in a state (see reader.STATES), oldest first."""
        async for behind, until in self._slices():
            reached = behind
            while reached < until:
                read = partial(self._reader.keys, reached, until, domain, state, LOAD)
                keys: list[int] = json.loads(await self._read(read))
                for row in await self._describe(keys):
                    yield row
                reached = keys[-1] if len(keys) == LOAD else LAST

    async def show(self, message_id: str) -> dict[str, Any] | None:
        """All that is known of a message; None: there is none of this id."""
        known = json.loads(await self._read(partial(self._reader.known, [key_of(message_id)])))
        if not known or known[0][0] != message_id:
            return None
        _, why, since = known[0]
        rows = await self._describe([key_of(message_id)])
        shown = rows[0] if rows else {"id": message_id}
        return shown | {"set_aside": {"why": why, "since": since} if why else None}

    async def head(self, message_id: str) -> bytes:
        """The message's header section as it was sent, or its beginning. Raises LookupError."""
        octets, length = await self._read(partial(self._reader.head, key_of(message_id)))
        if octets is None:
            octets = await self._call(partial(read_beginning, self._bodies / message_id, min(length, HEAD_LIMIT)))
        return octets[:HEAD_LIMIT]

    async def summary(self, now: float) -> Census:
        """What waits, by domain, age and reason."""
        census = Census(messages=self._commit.backlog, set_aside=self._commit.broken)
        async for behind, until in self._slices():
            census.add(json.loads(await self._read(partial(self._reader.groups, behind, until, int(now), AGES))))
        return census

    async def _describe(self, keys: list[int]) -> list[dict[str, Any]]:
        found = parse_messages(await self._read(partial(self._reader.messages, keys)))
        described = []
        for row in sorted(found, key=lambda row: row[0]):
            try:
                described.append(_described(parse_job(row, self._bodies), row[0] in self._scan.held))
            except ValueError:  # the claim that meets it sets it aside
                described.append({"id": str(row[1]), "arrived": float(row[2]), "damaged": True})
        return described

    async def _read(self, work: Callable[[], T]) -> T:
        try:
            return await self._thread.call(work)
        except apsw.Error as error:
            raise SpoolError(f"the spool cannot be read at present: {error}") from error

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            return await self._thread.call(work)
        except OSError as error:
            raise SpoolError(f"{error.filename}: {error.strerror}") from error


def _pieces(text: str) -> list[list[tuple[int, int]]]:
    rows = [(key, number) for key, number in json.loads(text)]
    return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]


def _described(job: Job, under_way: bool) -> dict[str, Any]:
    """A message as a person or a program is told of it. Times are seconds since the epoch."""
    message = job.message
    envelope = message.envelope
    recipients = []
    for number in job.pending:
        recipient = envelope.recipients[number]
        mark = job.tried.get(number)
        held = mark is not None and mark.due == HELD
        recipients.append(
            {
                "to": recipient.address.wire,
                "domain": recipient.address.domain,
                "state": "held" if held else "deferred" if mark else "new",
                "attempts": mark.attempts if mark else 0,
                "next": mark.due if mark and not held else None,
                "reason": mark.reason if mark else "",
                "delay_reported": mark.reported if mark else False,
            }
        )
    return {
        "id": message.id,
        "from": envelope.reverse_path.wire,
        "arrived": message.arrived,
        "size": message.size,
        "under_way": under_way,
        "client": envelope.client,
        "helo": envelope.helo,
        "protocol": envelope.protocol,
        "recipients": recipients,
    }
