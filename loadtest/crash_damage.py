"""`damage`: what lies in the data directory is not what was put there, when the server starts.

In: a server that was stopped in order with mail that waits, small in the database, large in files of their own. Out: a
Finding: what was not damaged is delivered, what was is set aside and named in the log, never delivered in part, and the
server starts. A function for each kind of damage does it and returns the server's ids of the messages that it hit; None
where nobody can say which: then each message is delivered, or the log names it, but for those of which nothing is left.
Where the database itself is not there any more, nobody can name its messages: the log says so, and nothing that lay
beside it is deleted. Where it was only elsewhere it is put back then, with what was put aside, and everything arrives.
Not here: damage by the medium while the server runs (crash_broken).
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from inspect import getdoc
from pathlib import Path
from typing import TypeAlias

from .crash_disk import Layout
from .crash_fault import Fault, lost_run
from .crash_load import Letter
from .crash_result import Finding
from .crash_server import CrashError, wait_until
from .crash_site import LOCAL, Bench, Site, opened
from .crash_sweep import Steps

PAGE = 4096
KEY = 13  # characters of an id that are its key
SMALL, LARGE = 10, 4  # messages
LOG_SECONDS = 1.0
BOXES = ("a", "b", "c")

Damage: TypeAlias = Callable[["Stock"], set[str] | None]


class Stock:
    """What lies in a spool that is stopped: `letters` by the server's id, those in files in `large`."""

    def __init__(self, data: Path, letters: list[Letter], chance: random.Random) -> None:
        self.chance = chance
        self.letters = {letter.kept_as: letter for letter in letters}
        self.spools = sorted(data.glob("spool/*"))
        # One connection brought all of it, to one worker.
        (self.bodies,) = (spool / "body" for spool in self.spools if any((spool / "body").iterdir()))
        self.database = self.bodies.parent / "spool.db"
        self.large = sorted(path.name for path in self.bodies.iterdir())
        self.octets = {name: (self.bodies / name).read_bytes() for name in self.large}
        self.elsewhere = data.parent / "elsewhere"  # where the database may have gone

    def body(self) -> Path:
        """One of the files."""
        return self.bodies / self.chance.choice(self.large)

    def kept(self) -> dict[str, Path]:
        """Where the large bodies are now that were put aside, those that are whole."""
        found = {path.name: path for spool in self.spools for path in spool.glob("damaged-*/*")}
        return {
            name: found[name] for name in self.large if name in found and found[name].read_bytes() == self.octets[name]
        }

    def put_back(self) -> None:
        """The database, and the bodies that were put aside with what was found in its place."""
        for name, path in self.kept().items():
            path.rename(self.bodies / name)
        self.database.unlink()
        self.elsewhere.rename(self.database)

    def without_trace(self) -> set[str]:
        """Of which neither id nor key stands anywhere any more: nobody can name them."""
        left = self.database.read_bytes()
        keys = {one: int(one[:KEY], 32).to_bytes(8) for one in self.letters}
        return {
            one for one, key in keys.items() if one not in self.large and one.encode() not in left and key not in left
        }

    def page(self) -> int:
        """The place of a page of the database, not its first."""
        return PAGE * self.chance.randrange(1, self.database.stat().st_size // PAGE)


def _write(path: Path, place: int, octets: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(octets)


def cut_body(stock: Stock) -> set[str]:
    """A body file is shorter than it was."""
    path = stock.body()
    os.truncate(path, stock.chance.randrange(path.stat().st_size))
    return {path.name}


def lengthen_body(stock: Stock) -> set[str]:
    """A body file is longer than it was."""
    path = stock.body()
    with path.open("ab") as file:
        file.write(b"more\r\n")
    return {path.name}


def flip_body(stock: Stock) -> set[str]:
    """A bit of a body file is another."""
    path = stock.body()
    octets = path.read_bytes()
    place = stock.chance.randrange(len(octets))
    _write(path, place, bytes([octets[place] ^ 1 << stock.chance.randrange(8)]))
    return {path.name}


def swap_bodies(stock: Stock) -> set[str]:
    """Two body files have changed places; they are of the same length."""
    one, other = stock.chance.sample(stock.large, 2)
    between = stock.bodies / "between"
    (stock.bodies / one).rename(between)
    (stock.bodies / other).rename(stock.bodies / one)
    between.rename(stock.bodies / other)
    return {one, other}


def remove_body(stock: Stock) -> set[str]:
    """A body file is gone."""
    path = stock.body()
    path.unlink()
    return {path.name}


def link_body(stock: Stock) -> set[str]:
    """A symbolic link stands in the place of a body file, to the same octets elsewhere."""
    path = stock.body()
    elsewhere = stock.database.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return {path.name}


def pipe_body(stock: Stock) -> set[str]:
    """A FIFO stands in the place of a body file: whoever opens it would wait for ever."""
    path = stock.body()
    path.unlink()
    os.mkfifo(path)
    return {path.name}


def folder_body(stock: Stock) -> set[str]:
    """A folder stands in the place of a body file."""
    path = stock.body()
    path.unlink()
    path.mkdir()
    return {path.name}


def add_strangers(stock: Stock) -> set[str]:
    """Copies of body files under names that are none of ours, and under an id that no message has, which is named;
    folders and a FIFO beside them. All mail is delivered."""
    path = stock.body()
    unknown = "0" * len(path.name)
    shutil.copy(path, stock.bodies / "copy")
    shutil.copy(path, stock.bodies / unknown)
    (stock.bodies / "folder").mkdir()
    os.mkfifo(stock.bodies / "pipe")
    (stock.database.parent / "notes.txt").write_text("what is this?")
    return {unknown}


def flip_page(stock: Stock) -> None:
    """Some bits of a page of the database are others."""
    place = stock.page()
    for _ in range(8):
        _write(stock.database, place + stock.chance.randrange(PAGE), stock.chance.randbytes(1))


def zero_page(stock: Stock) -> None:
    """A page of the database holds nothing but zeros."""
    _write(stock.database, stock.page(), bytes(PAGE))


def swap_pages(stock: Stock) -> None:
    """Two pages of the database have changed places."""
    one, other = stock.page(), stock.page()
    octets = stock.database.read_bytes()
    _write(stock.database, one, octets[other : other + PAGE])
    _write(stock.database, other, octets[one : one + PAGE])


def cut_database(stock: Stock) -> None:
    """The database ends before its end."""
    os.truncate(stock.database, stock.page())


def add_log(stock: Stock) -> set[str]:
    """A write-ahead log of octets that mean nothing lies beside the database, and an index of them. All mail is
    delivered."""
    for end in ("wal", "shm"):
        Path(f"{stock.database}-{end}").write_bytes(stock.chance.randbytes(20 * PAGE))
    return set()


def zero_first_page(stock: Stock) -> set[str]:
    """The first page of the database, which says what and where everything is, holds nothing but zeros. All mail is
    delivered."""
    _write(stock.database, 0, bytes(PAGE))
    return set()


def flip_header(stock: Stock) -> set[str]:
    """A bit of the database's header is another. All mail is delivered."""
    place = stock.chance.randrange(100)
    octets = stock.database.read_bytes()[: place + 1]
    # Of a newer format that is known to nobody the server would rightly say that it cannot read it.
    _write(
        stock.database, place, bytes([octets[place] ^ (0x80 if 60 <= place < 64 else 1 << stock.chance.randrange(8))])
    )
    return set()


def empty_database(stock: Stock) -> set[str]:
    """The database is an empty file. The server says that it is gone, starts, and keeps the files of large bodies."""
    os.truncate(stock.database, 0)
    return set(stock.letters)


def remove_database(stock: Stock) -> set[str]:
    """The database has gone elsewhere. The server says so, starts without, and deletes no body; when everything is put
    back, all mail is delivered."""
    stock.database.rename(stock.elsewhere)
    return set()


def link_database(stock: Stock) -> set[str]:
    """A symbolic link stands in the place of the database, to where it has gone. As if it were gone."""
    stock.database.rename(stock.elsewhere)
    stock.database.symlink_to(stock.elsewhere)
    return set()


def pipe_database(stock: Stock) -> set[str]:
    """A FIFO stands in the place of the database. As if it were gone."""
    stock.database.rename(stock.elsewhere)
    os.mkfifo(stock.database)
    return set()


def folder_database(stock: Stock) -> set[str]:
    """A folder stands in the place of the database. As if it were gone."""
    stock.database.rename(stock.elsewhere)
    stock.database.mkdir()
    return set()


def swap_databases(stock: Stock) -> set[str]:
    """Two workers' databases have changed places, and their body files have not. What has no file is named; no file is
    deleted."""
    (other,) = (spool / "spool.db" for spool in stock.spools if spool != stock.bodies.parent)
    stock.database.rename(stock.elsewhere)
    other.rename(stock.database)
    stock.elsewhere.rename(other)
    return set(stock.large)


def copy_spool(stock: Stock) -> set[str]:
    """A copy of the whole spool lies beside it, under the number of a worker that is no more. Everything is delivered
    from both, and a mailbox has it once: both copies have one name."""
    shutil.copytree(stock.bodies.parent, stock.bodies.parent.parent / "8")
    return set()


def add_foreign_log(stock: Stock) -> set[str]:
    """The write-ahead log of another database lies beside this one, and is whole: with it, all messages would be gone.
    All mail is delivered, for the log was empty when the server ended."""
    shutil.copy(stock.database, stock.elsewhere)
    other = sqlite3.connect(stock.elsewhere)
    other.executescript("PRAGMA journal_mode = WAL; DELETE FROM recipient; DELETE FROM message")
    shutil.copy(f"{stock.elsewhere}-wal", f"{stock.database}-wal")
    other.close()
    stock.elsewhere.unlink()
    return set()


def damaged(name: str, damage: Damage, workers: int = 1) -> Fault:
    """Each run with a spool of its own."""

    def play(bench: Bench) -> Iterator[Finding]:
        with ExitStack() as stack:
            site = stack.enter_context(opened(bench, Layout(), workers=workers))
            for run in bench.numbers:
                site.server.kill()
                for path in (site.ground.data, site.ground.mail):
                    shutil.rmtree(path, ignore_errors=True)
                (site.ground.data.parent / "elsewhere").unlink(missing_ok=True)
                site.begin(run, bench.chance(name, run))
                try:
                    yield _play_run(site, run, damage)
                except CrashError as error:
                    yield lost_run(site, run, str(error))
                finally:
                    site.close()

    return Fault(name, play, getdoc(damage) or "")


def _play_run(site: Site, run: int, damage: Damage) -> Finding:
    site.server.start()
    letters = _leave_mail(site)
    if code := site.server.stop():
        raise CrashError(f"exit code {code} after SIGTERM")
    stock = Stock(site.ground.data, letters, site.chance)
    hit = damage(stock)
    unnamed = stock.without_trace() if hit is None else set()
    for name in BOXES:
        (site.ground.mail / LOCAL / name).unlink()
    gone = stock.elsewhere.exists()
    if gone:
        _miss(site, stock)
        stock.put_back()
    begun = time.monotonic()
    site.note_recovery(site.server.start())
    wait_until(lambda: time.monotonic() - begun > 1 and site.server.queued() == 0, "an empty queue")
    if damage is empty_database:
        _check_missed(site, stock)
        return site.finish(damaged=frozenset(letter.id for letter in letters))
    hit = hit | set(stock.large) if gone and hit is not None else hit  # named while the database was elsewhere
    aside = _set_aside(site, hit)
    begins = {one[:KEY]: letter.id for one, letter in stock.letters.items()}  # of a record without its id
    names = {one: letter.id for one, letter in stock.letters.items()} | begins
    found = site.finish(damaged=frozenset(names[one] for one in (aside | unnamed) & names.keys()))
    if hit is not None and hit != aside:
        found.violations.append(f"set aside are {sorted(aside)}, damaged were {sorted(hit)}")
    if damage is swap_databases and sorted(stock.kept()) != stock.large:
        found.violations.append("bodies are gone with a database that was elsewhere")
    return found


def _miss(site: Site, stock: Stock) -> None:
    """A start without the database, and an end in order."""
    site.server.start()
    _check_missed(site, stock)
    if code := site.server.stop():
        raise CrashError(f"exit code {code} after SIGTERM")


def _check_missed(site: Site, stock: Stock) -> None:
    """What the server says and keeps when there is no database. Raises CrashError."""
    wait_until(
        lambda: any(event["where"] == "damage" for event in site.server.events("spool-warning")),
        "a word about the database",
        LOG_SECONDS,
    )
    if sorted(stock.kept()) != stock.large:
        raise CrashError("bodies are gone with the database")


def _set_aside(site: Site, hit: set[str] | None) -> set[str]:
    """What the log names, which is written a moment later."""
    deadline = time.monotonic() + LOG_SECONDS
    while True:
        aside = {str(event["id"]) for event in site.server.events("set-aside")}
        if aside == hit or time.monotonic() > deadline:
            return aside
        time.sleep(0.02)


def _leave_mail(site: Site) -> list[Letter]:
    """Mail that waits, because plain files stand where its mailboxes would be. All large bodies are of one length."""
    place = site.ground.mail / LOCAL
    place.mkdir(parents=True)
    for name in BOXES:
        (place / name).touch()
    steps = Steps(site, "d")
    sizes = [site.chance.randrange(100, 20_000) for _ in range(SMALL)] + [200_000] * LARGE
    letters = [steps.letter(size, f"{site.chance.choice(BOXES)}@{LOCAL}") for size in sizes]
    steps.send(letters)
    wait_until(lambda: len(site.server.events("deferred")) >= len(letters), "mail that waits")
    return letters


_DAMAGES: dict[str, Damage] = {
    "body-cut": cut_body,
    "body-longer": lengthen_body,
    "body-flip": flip_body,
    "body-swap": swap_bodies,
    "body-gone": remove_body,
    "body-link": link_body,
    "body-pipe": pipe_body,
    "body-folder": folder_body,
    "strangers": add_strangers,
    "page-flip": flip_page,
    "page-zero": zero_page,
    "page-swap": swap_pages,
    "database-cut": cut_database,
    "log": add_log,
    "log-foreign": add_foreign_log,
    "first-page": zero_first_page,
    "header": flip_header,
    "database-empty": empty_database,
    "database-gone": remove_database,
    "database-link": link_database,
    "database-pipe": pipe_database,
    "database-folder": folder_database,
    "spool-copy": copy_spool,
}
FAULTS = (
    *(damaged(f"damage.{name}", damage) for name, damage in _DAMAGES.items()),
    damaged("damage.database-swap", swap_databases, workers=2),
)
