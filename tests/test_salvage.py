"""A spool whose database is damaged: what can be read is kept, the rest is named, and nothing is thrown away."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest
from keeping import INLINE, Yard, keep, octets, run

from fastsmtp import salvage
from fastsmtp.ids import begin_of, key_of
from fastsmtp.spool import CLOSED, Spool, SpoolError
from fastsmtp.store import FORMAT

PAGE = 4096
MESSAGES = 60


async def _fill(yard: Yard, messages: int = MESSAGES, step: int = 100) -> dict[str, bytes]:
    """Bodies by id, each by `step` longer than the one before; the first of them in a file."""
    kept = {}
    async with yard.opened() as spool:
        for number in range(messages):
            body = octets(INLINE + 1 if not number else step * number)
            kept[(await keep(spool, body)).id] = body
    return kept


async def _read_all(spool: Spool) -> dict[str, bytes]:
    found = {}
    for job in await spool.claim(time.time(), 1000):
        if await spool.read(job):
            message = job.message
            found[message.id] = Path(message.file).read_bytes() if message.file else b"".join(message.parts or [])
    return found


async def _fill_and_kill(yard: Yard) -> dict[str, bytes]:
    """With nothing in files; what a process leaves behind that was killed."""
    kept = {}
    left = yard.path / "left"
    async with yard.opened() as spool:
        for number in range(20):
            body = octets(100 * number)
            kept[(await keep(spool, body)).id] = body
        shutil.copytree(yard.directory, left)
    yard.directory = left
    return kept


async def _again(yard: Yard) -> dict[str, bytes]:
    """What there is to be delivered after another start."""
    async with yard.opened() as spool:
        return await _read_all(spool)


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
    found = run(_again(yard))
    assert found.items() <= kept.items()
    named = {line["id"]: line["why"] for line in yard.lines("set-aside")}
    missing = kept.keys() - found.keys()
    assert missing
    assert named.keys() == {one if one in named else one[:13] for one in missing}
    assert all(f"it was {'from <ann@example.org> ' if one in kept and table == 'recipient' else ''}for " in why
               for one, why in named.items())  # fmt: skip
    (folder,) = yard.directory.glob("damaged-*")
    assert (folder / "spool.db").read_bytes() == before
    assert all(line["path"] == str(folder) for line in yard.lines("set-aside"))
    assert [line["where"] for line in yard.lines("spool-warning")] == ["damage"]
    assert run(_again(yard)) == found
    assert len(list(yard.directory.glob("damaged-*"))) == 1, "the new database is sound"


def test_body_files_of_what_is_not_kept_go_to_the_damaged_database(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    _zero(yard, _leaves(yard, "message")[0])
    assert next(iter(kept)) not in run(_again(yard))
    (folder,) = yard.directory.glob("damaged-*")
    assert (folder / next(iter(kept))).read_bytes() == next(iter(kept.values()))
    assert os.listdir(yard.directory / "body") == []


def test_a_file_that_is_too_short(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    file = yard.directory / "spool.db"
    os.truncate(file, file.stat().st_size // 2 // PAGE * PAGE)
    found = run(_again(yard))
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


def _damage(yard: Yard, kind: str) -> None:
    file = yard.directory / "spool.db"
    octets_ = file.read_bytes()
    if kind == "first-page":
        file.write_bytes(bytes(PAGE) + octets_[PAGE:])
    elif kind == "noise":
        file.write_bytes(os.urandom(PAGE) + octets_[PAGE:])
    elif kind == "no-spool":
        with yard.database() as db:
            db.pragma("application_id", 7)
    elif kind == "format":
        with yard.database() as db:
            db.pragma("user_version", 1 << 24 | FORMAT)
    else:
        file.rename(yard.path / "elsewhere")
        if kind == "empty":
            file.touch()
        elif kind == "link":
            file.symlink_to(yard.path / "elsewhere")
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
            (file / "x").touch()


@pytest.mark.parametrize("kind", ["first-page", "noise", "no-spool", "format"])
def test_a_first_page_is_not_needed(tmp_path: Path, kind: str) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    _damage(yard, kind)
    before = (yard.directory / "spool.db").read_bytes()
    assert run(_again(yard)) == kept
    assert yard.lines("set-aside") == []
    (folder,) = yard.directory.glob("damaged-*")
    assert os.listdir(folder) == ["spool.db"]
    assert (folder / "spool.db").read_bytes() == before
    (line,) = yard.lines("spool-warning")
    assert f": {MESSAGES} messages could be read" in line["why"]
    assert str(folder) in line["why"]
    assert run(_again(yard)) == kept
    assert len(list(yard.directory.glob("damaged-*"))) == 1


def _strike(yard: Yard, whole: bytes, flips: list[tuple[int, int]]) -> dict[str, bytes]:
    """What there is to be delivered where octets of a database are others; earlier findings are taken away."""
    octets_ = bytearray(whole)
    for place, bits in flips:
        octets_[place] ^= bits
    (yard.directory / "spool.db").write_bytes(octets_)
    found: dict[str, bytes] = run(_again(yard))
    for folder in yard.directory.glob("damaged-*"):
        shutil.rmtree(folder)
    return found


def test_whatever_a_header_says_it_starts(tmp_path: Path) -> None:
    """Each octet of the database's header is another one; most messages go over several pages."""
    yard = Yard(tmp_path)
    kept = run(_fill(yard, 12, step=1500))
    whole = (yard.directory / "spool.db").read_bytes()
    for place in range(100):
        bits = 0xFF if place % 3 else 1 << place % 8  # a format that is a little higher would be a newer one
        assert _strike(yard, whole, [(place, bits)]) == kept, (place, bits)
    assert sum("messages could be read" in line["why"] for line in yard.lines("spool-warning")) > 30
    assert yard.lines("set-aside") == []


def test_whatever_the_first_page_says_it_starts(tmp_path: Path) -> None:
    """Octets of its tree, and of the words that made the tables: names, columns and pages of other tables."""
    yard = Yard(tmp_path)
    kept = run(_fill(yard, 12))
    whole = (yard.directory / "spool.db").read_bytes()
    used = [place for place in range(100, PAGE) if whole[place]]
    for place in [*range(100, 120, 3), *used[::25]]:
        bits = 0x80 if place % 3 else 1 << place % 7
        assert _strike(yard, whole, [(place, bits)]) == kept, (place, bits)
    assert yard.lines("set-aside") == []


def test_a_migrated_database_begins_elsewhere(tmp_path: Path) -> None:
    """The last table and an index have changed places in it."""
    yard = Yard(tmp_path)
    kept = run(_fill(yard, 12))
    with yard.database() as db:
        sql = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'recipient_due'").get
        db.execute(f"DROP INDEX recipient_due; {sql}").fetchall()
        assert db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'broken'").get == 6
    assert run(_again(yard)) == kept
    assert not list(yard.directory.glob("damaged-*"))
    for kind in ("first-page", "noise"):
        _damage(yard, kind)
        assert run(_again(yard)) == kept
        assert yard.lines("set-aside") == []


def test_bits_anywhere(tmp_path: Path) -> None:
    """It starts, and each message is delivered whole or named, by the part of its id that is its place at least."""
    chance = random.Random(7)
    yard = Yard(tmp_path)
    kept = run(_fill(yard, 12))
    whole = (yard.directory / "spool.db").read_bytes()
    large = next(iter(kept))
    for _ in range(40):
        page = chance.randrange(1, len(whole) // PAGE) * PAGE
        used = [place for place in range(page, page + PAGE) if whole[place]] or [page]
        flips = [(chance.choice(used), 1 << chance.randrange(8)) for _ in range(chance.choice((1, 2, 8)))]
        told = len(yard.lines("set-aside"))
        (yard.directory / "body" / large).write_bytes(kept[large])
        found = _strike(yard, whole, flips)
        arrived = {one[:13]: body for one, body in found.items()}
        sent = {one[:13]: body for one, body in kept.items()}
        assert arrived.items() <= sent.items(), flips
        assert sent.keys() - arrived.keys() <= {line["id"][:13] for line in yard.lines("set-aside")[told:]}, flips


def test_an_index_that_is_damaged_costs_nothing(tmp_path: Path) -> None:
    """One bit makes text of an id octets, or has an index say what its table does not."""
    yard = Yard(tmp_path)
    kept = run(_fill(yard, 3))
    (page,) = _leaves(yard, "message_in_file")
    whole = (yard.directory / "spool.db").read_bytes()
    large = next(iter(kept))
    for place in range((page - 1) * PAGE + 8, page * PAGE):
        if whole[place]:
            (yard.directory / "body" / large).write_bytes(kept[large])
            assert _strike(yard, whole, [(place, 1)]) == kept, place


def test_a_key_out_of_its_order_leads_in_no_circle() -> None:
    """A page whose keys are not in order answers with what is not behind the place that was asked for."""

    class Table:
        asked = 0

        def execute(self, statement: str, place: tuple[int, int]) -> list[tuple[object]]:
            self.asked += 1
            assert self.asked < 10, "a circle"
            return [(5,), (b"no number",)] if place[0] < 5 or "DESC" in statement else [(3,)]

    assert set(salvage._keys(Table(), "message", "key")) == {3, 5}  # type: ignore[arg-type]


@pytest.mark.parametrize("column", ["arrived", "cuts", "size", "content"])
def test_a_value_of_another_type_stands_in_nobodys_way(tmp_path: Path, column: str) -> None:
    """Many records are read at once, so one that cannot be read would hide the others."""
    yard = Yard(tmp_path)
    kept = run(_fill(yard, 12))
    lost = list(kept)[5]
    with yard.database() as db:
        db.execute(f"UPDATE message SET {column} = x'ff' WHERE key = ?", (key_of(lost),))
    assert run(_again(yard)) == {name: body for name, body in kept.items() if name != lost}
    assert [line["id"] for line in yard.lines("set-aside")] == [lost[:13]]
    assert run(_again(yard)).keys() == kept.keys() - {lost}
    assert len(yard.lines("set-aside")) == 1, "told once"


def test_bodies_are_named_when_all_records_are_gone(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    os.truncate(yard.directory / "spool.db", PAGE)
    assert run(_again(yard)) == {}
    assert [line["id"] for line in yard.lines("set-aside")] == [next(iter(kept))]


@pytest.mark.parametrize("kind", ["empty", "gone", "link", "pipe", "folder"])
def test_without_a_database_bodies_are_not_thrown_away(tmp_path: Path, kind: str) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    large = next(iter(kept))
    _damage(yard, kind)
    assert run(_again(yard)) == {}
    (folder,) = yard.directory.glob("damaged-*")
    assert (folder / large).read_bytes() == kept[large]
    (line,) = yard.lines("spool-warning")
    assert ": 0 messages could be read" in line["why"]
    if kind == "link":
        assert (folder / "spool.db").readlink() == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere").exists()
    # Put back, all is there.
    (yard.directory / "spool.db").unlink()
    (tmp_path / "elsewhere").rename(yard.directory / "spool.db")
    (folder / large).rename(yard.directory / "body" / large)
    assert run(_again(yard)) == kept


@pytest.mark.parametrize("kind", ["first-page", "empty", "gone", "pipe"])
def test_what_the_log_holds_is_read_too(tmp_path: Path, kind: str) -> None:
    """Killed, so that most is still in the log."""
    yard = Yard(tmp_path)
    kept = run(_fill_and_kill(yard))
    assert (yard.directory / "spool.db-wal").stat().st_size > 0
    _damage(yard, kind)
    assert run(_again(yard)) == kept
    # Where the log has a first page, nothing is missing.
    folders = list(yard.directory.glob("damaged-*"))
    assert [(folder / "spool.db-wal").stat().st_size > 0 for folder in folders] == [True] * (kind != "first-page")


@pytest.mark.parametrize("kind", ["first-page", "empty", "pipe"])
def test_a_renewal_that_was_cut_off_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard)) if kind == "first-page" else run(_fill_and_kill(yard))
    _damage(yard, kind)
    whole, calls, last = yard.directory, 1, 0

    def cut(call: Callable[..., None]) -> Callable[..., None]:
        def at_the_last(*arguments: object, **options: object) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise OSError(5, "cut off")
            call(*arguments, **options)

        return at_the_last

    for name in ("rename", "link", "unlink"):
        monkeypatch.setattr(os, name, cut(getattr(os, name)))
    refused = 0
    while calls >= last:
        last += 1
        yard.directory = tmp_path / str(last)
        subprocess.run(["cp", "-a", whole, yard.directory], check=True)  # FIFOs too
        calls = 0
        try:
            found = run(_again(yard))
        except SpoolError:
            refused += 1
            found = run(_again(yard))
        assert found == kept, last
    assert refused > 10


def test_a_log_that_was_empty_at_the_end_is_not_read(tmp_path: Path) -> None:
    """It is that of another database: all its messages were deleted."""
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    other = tmp_path / "other.db"
    shutil.copyfile(yard.directory / "spool.db", other)
    db = apsw.Connection(str(other))
    db.execute("PRAGMA journal_mode = WAL; DELETE FROM recipient; DELETE FROM message").fetchall()
    shutil.copyfile(f"{other}-wal", yard.directory / "spool.db-wal")
    db.close()
    assert run(_again(yard)) == kept
    (folder,) = yard.directory.glob("damaged-*")
    assert (folder / "spool.db-wal").stat().st_size > 0
    (line,) = yard.lines("spool-warning")
    assert (line["where"], "spool.db-wal was empty" in line["why"]) == ("log", True)


def test_a_log_is_read_unless_the_end_was_in_order(tmp_path: Path) -> None:
    """The mark of an end in order is gone before anything is written."""
    yard = Yard(tmp_path)

    async def killed() -> None:
        spool = yard.spool()
        spool.open()
        await keep(spool)
        shutil.copytree(yard.directory, tmp_path / "copy")
        await spool.close()

    run(_fill(yard))
    assert (yard.directory / "lock").read_bytes() == CLOSED
    run(killed())
    yard.directory = tmp_path / "copy"
    assert (yard.directory / "lock").read_bytes() != CLOSED
    assert len(run(_again(yard))) == MESSAGES + 1
    assert not list(yard.directory.glob("damaged-*"))


def test_a_log_that_is_put_back_is_read_without_the_lock_file(tmp_path: Path) -> None:
    """As docs/durability.md says."""
    yard = Yard(tmp_path)
    kept = run(_fill_and_kill(yard))
    for end in ("", "-wal"):
        (yard.directory / f"spool.db{end}").rename(tmp_path / f"away{end}")
    assert run(_again(yard)) == {}
    for end in ("", "-wal"):
        (tmp_path / f"away{end}").rename(yard.directory / f"spool.db{end}")
    (yard.directory / "lock").unlink()
    assert run(_again(yard)) == kept


@pytest.mark.parametrize("end", ["wal", "shm"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_stands_in_the_place_of_the_log_is_put_aside(tmp_path: Path, end: str, kind: str) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    log = yard.directory / f"spool.db-{end}"
    log.unlink(missing_ok=True)
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(b"theirs")
        log.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(log)
    else:
        log.mkdir()
    assert run(_again(yard)) == kept
    (folder,) = yard.directory.glob("damaged-*")
    assert os.listdir(folder) == [log.name]
    if kind == "link":
        assert (tmp_path / "elsewhere").read_bytes() == b"theirs"


def test_swapped_databases_lose_no_body(tmp_path: Path) -> None:
    yard, other = Yard(tmp_path), Yard(tmp_path)
    other.directory = tmp_path / "other"
    kept = [run(_fill(one)) for one in (yard, other)]
    places = [one.directory / "spool.db" for one in (yard, other)]
    places[0].rename(tmp_path / "between")
    places[1].rename(places[0])
    (tmp_path / "between").rename(places[1])
    found = [run(_again(one)) for one in (yard, other)]
    for bodies, theirs, one in zip(kept, reversed(found), (yard, other), strict=True):
        large = next(iter(bodies))
        assert theirs == {name: body for name, body in bodies.items() if name != large}
        (folder,) = one.directory.glob("damaged-*")
        assert (folder / large).read_bytes() == bodies[large]
    assert {line["id"] for one in (other, yard) for line in one.lines("set-aside")} == {
        next(iter(bodies)) for bodies in kept
    }


def test_a_message_and_its_recipients_that_do_not_know_each_other(tmp_path: Path) -> None:
    """A bit of a key is another one: the pages hang together, and nothing would ever be tried."""
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    lost = list(kept)[7]
    with yard.database() as db:
        db.execute("UPDATE recipient SET message = message | (1 << 60) WHERE message = ?", (key_of(lost),))
        assert db.execute("PRAGMA quick_check").get == "ok"
    assert run(_again(yard)) == {name: body for name, body in kept.items() if name != lost}
    named = {line["id"]: line["why"] for line in yard.lines("set-aside")}
    other = begin_of(key_of(lost) | 1 << 60)
    assert named == {lost: "its recipients are gone", other: "its record is gone; it was for example.net"}

    async def count() -> tuple[int, int]:
        async with yard.opened() as spool:
            return spool.backlog, spool.broken

    assert run(count()) == (MESSAGES - 1, 1)
    assert len(yard.lines("set-aside")) == 2, "told once"


def test_an_older_database_costs_no_body(tmp_path: Path) -> None:
    """Somebody has put back what he kept: the bodies that came since are no rubbish."""
    yard = Yard(tmp_path)
    run(_fill(yard, 0))
    shutil.copyfile(yard.directory / "spool.db", tmp_path / "backup")
    kept = run(_fill(yard))
    large = next(iter(kept))
    shutil.copyfile(tmp_path / "backup", yard.directory / "spool.db")
    assert run(_again(yard)) == {}
    (folder,) = yard.directory.glob("damaged-*")
    assert (folder / large).read_bytes() == kept[large]
    (line,) = yard.lines("spool-warning")
    assert str(folder) in line["why"]


def test_what_a_kill_has_left_is_removed(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    (yard.directory / "lock").write_bytes(b"")
    orphan = yard.directory / "body" / ("0" * 20)
    orphan.write_bytes(b"begun")
    assert run(_again(yard)) == kept
    assert not orphan.exists()
    assert not list(yard.directory.glob("damaged-*"))


def test_a_large_database_is_not_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yard = Yard(tmp_path)
    run(_fill(yard))
    monkeypatch.setattr(salvage, "CHECKED_OCTETS", 1000)
    monkeypatch.setattr(salvage.Store, "check", lambda _: False)
    assert len(run(_again(yard))) == MESSAGES
    assert not list(yard.directory.glob("damaged-*"))


def test_damage_that_shows_late_in_a_large_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yard = Yard(tmp_path)
    kept = run(_fill(yard))
    monkeypatch.setattr(salvage, "CHECKED_OCTETS", 1000)
    _zero(yard, _leaves(yard, "message_in_file")[0])
    assert run(_again(yard)) == kept
    assert len(list(yard.directory.glob("damaged-*"))) == 1


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
