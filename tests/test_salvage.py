"""A spool whose database is damaged: what can be read is kept, the rest is named, and nothing is thrown away."""

from __future__ import annotations

import os
import time
from pathlib import Path

import apsw
import pytest
from keeping import INLINE, Yard, keep, octets, run

from fastsmtp import salvage
from fastsmtp.spool import Spool, SpoolError

PAGE = 4096
MESSAGES = 60


async def _fill(yard: Yard) -> dict[str, bytes]:
    """Bodies by id; the first of them in a file."""
    kept = {}
    async with yard.opened() as spool:
        for number in range(MESSAGES):
            body = octets(INLINE + 1 if not number else 100 * number)
            kept[(await keep(spool, body)).id] = body
    return kept


async def _read_all(spool: Spool) -> dict[str, bytes]:
    found = {}
    for job in await spool.claim(time.time(), 1000):
        if await spool.read(job):
            message = job.message
            found[message.id] = Path(message.file).read_bytes() if message.file else b"".join(message.parts or [])
    return found


def _leaves(yard: Yard, table: str) -> list[int]:
    """The pages in which a table's rows are."""
    with yard.database() as db:
        rows = db.execute("SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf'", (table,)).fetchall()
    return [page for (page,) in rows]


def _zero(yard: Yard, page: int) -> None:
    with (yard.directory / "spool.db").open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(bytes(PAGE))


@pytest.mark.parametrize("table", ["message", "recipient"])
def test_what_is_on_other_pages_is_delivered_and_the_rest_is_named(tmp_path: Path, table: str) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    _zero(yard, _leaves(yard, table)[0])
    before = (yard.directory / "spool.db").read_bytes()

    async def again() -> dict[str, bytes]:
        async with yard.opened() as spool:
            return await _read_all(spool)

    found = run(again())
    assert found.items() <= kept.items()
    named = {line["id"].removeprefix("key ") for line in yard.lines("set-aside")}
    missing = kept.keys() - found.keys()
    assert missing
    assert named == {one if one in named else str(int(one[:13], 32)) for one in missing}
    (folder,) = yard.directory.glob("damaged-*")
    assert (folder / "spool.db").read_bytes() == before
    assert all(line["path"] == str(folder) for line in yard.lines("set-aside"))
    assert [line["where"] for line in yard.lines("spool-warning")] == ["damage"]
    assert run(again()) == found
    assert len(list(yard.directory.glob("damaged-*"))) == 1, "the new database is sound"


def test_body_files_of_what_is_not_kept_go_to_the_damaged_database(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    _zero(yard, _leaves(yard, "message")[0])

    async def again() -> dict[str, bytes]:
        async with yard.opened() as spool:
            return await _read_all(spool)

    assert next(iter(kept)) not in run(again())
    (folder,) = yard.directory.glob("damaged-*")
    assert (folder / next(iter(kept))).read_bytes() == next(iter(kept.values()))
    assert os.listdir(yard.directory / "body") == []


def test_a_file_that_is_too_short(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    file = yard.directory / "spool.db"
    os.truncate(file, file.stat().st_size // 2 // PAGE * PAGE)

    async def again() -> dict[str, bytes]:
        async with yard.opened() as spool:
            return await _read_all(spool)

    found = run(again())
    assert found.items() < kept.items()
    assert found


def test_what_cannot_be_salvaged_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yard = Yard(tmp_path)
    run(_fill(yard))
    _zero(yard, _leaves(yard, "message")[0])
    before = (yard.directory / "spool.db").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(salvage, "make_dirs", full)

    async def again() -> None:
        spool = yard.spool()
        with pytest.raises(SpoolError, match="nothing can be made of it"):
            spool.open()

    run(again())
    assert (yard.directory / "spool.db").read_bytes() == before
    monkeypatch.undo()

    async def at_last() -> int:
        async with yard.opened() as spool:
            return len(await _read_all(spool))

    assert run(at_last()) > 0


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    yard.directory.mkdir()
    file = yard.directory / "spool.db"
    file.write_bytes(b"what is this?" * 1000)

    async def opened() -> None:
        spool = yard.spool()
        with pytest.raises(SpoolError, match=r"spool\.db: not a database$"):
            spool.open()

    run(opened())
    assert file.read_bytes() == b"what is this?" * 1000


def test_a_large_database_is_not_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yard = Yard(tmp_path)
    run(_fill(yard))
    monkeypatch.setattr(salvage, "CHECKED_OCTETS", 1000)
    monkeypatch.setattr(salvage.Store, "check", lambda _: False)

    async def again() -> int:
        async with yard.opened() as spool:
            return len(await _read_all(spool))

    assert run(again()) == MESSAGES
    assert not list(yard.directory.glob("damaged-*"))


def test_keys_are_found_on_both_sides_of_what_cannot_be_read(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    run(_fill(yard))
    leaves = _leaves(yard, "message")
    assert len(leaves) > 3
    _zero(yard, leaves[len(leaves) // 2])
    with yard.database() as db:
        assert isinstance(db, apsw.Connection)
        found = set(salvage._keys(db, "message", "key"))
    assert MESSAGES - 12 < len(found) < MESSAGES
