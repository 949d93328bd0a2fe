"""`power`: the machine loses its power.

In: ext4 and xfs, with spool and mailboxes on two disks and on one. Where they share one, a commit of a spool whose log
grows happens to make the names in mailboxes durable too, and would hide that they are not; so there the log is made to
start again from its beginning first (`fill_log`), and messages are small, for body files make directories durable too.
A power cut comes in one of two ways: the processes end first, so that both disks are cut at one moment; or the disks
are cut while the server runs, so that it sees errors, and must not say 250 because of them.
Not here: the cut at each single step (crash_sweep), file systems (crash_disk).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from .crash_disk import Layout
from .crash_fault import Fault, under_load
from .crash_load import Connection, Letter, send_bdat
from .crash_site import LOCAL, Site
from .ledger import make_body, outcome_of

# The log is checkpointed when it has grown by 4 MB, and is then written from its beginning.
FILLING_OCTETS = 60_000  # of a body that is kept in the database
FILLING = 100
NEW = """Power cut shortly behind the first 250 of a server that has just been installed: its folders, its database
and the mailboxes were all made a moment ago, and their names must be durable too."""
AFTER_CUT_SECONDS = 0.1  # in which a server whose disks are gone must not say 250


def small(chance: random.Random) -> int:
    return chance.choice((0, 64, 1000, 3000))


def cut_power(site: Site) -> None:
    """Power cut on both disks at a random moment under load. What was acknowledged before is there afterwards, whole;
    a second copy only of what was under way."""
    lose_power(site)
    site.restart()


def cut_power_behind(site: Site) -> None:
    """Power cut when everything has just been delivered and its marks are made: nobody will deliver it again, so every
    name in a mailbox must be durable by then."""
    site.running.stop()
    site.server.drain()
    lose_power(site)
    site.restart()


def cut_power_twice(site: Site) -> None:
    """Power cut, then another while the server starts and recovers."""
    lose_power(site)
    site.check_whole()
    site.server.launch()
    time.sleep(site.chance.uniform(0.2, 0.8))
    lose_power(site)
    site.restart()


def lose_power(site: Site) -> None:
    """The cut, and the end of all that ran."""
    site.note_fault()
    if site.chance.random() < 0.5:
        site.server.kill()
        site.ground.cut()
    else:
        site.ground.cut()
        time.sleep(site.chance.uniform(0, AFTER_CUT_SECONDS))
        site.server.kill()
    site.note_fault()
    site.ground.recover()


def fill_log(site: Site) -> None:
    """Sends as much as makes the log start again, and waits until it is delivered."""
    chance = random.Random(0)
    with Connection(site.server.port) as connection:
        connection.hello()
        for number in range(FILLING):
            name = f"f{site.run}-{number}"
            letter = Letter(name, make_body(name, FILLING_OCTETS, chance), (f"filling-{site.run}@{LOCAL}",))
            send_bdat(connection, [letter], chance)
            site.ledger.write(letter, outcome_of(letter.code), letter.code)
    site.server.drain()


def install(site: Site) -> None:
    """A server that is new: empty disks, no folder. The load waits for it."""
    site.server.kill()
    site.ground.make()
    site.server.launch()


def _faults(kind: str) -> Iterator[Fault]:
    two, one = Layout(kind), Layout(kind, one=True)
    yield under_load(f"power.{kind}-two", cut_power, layout=two, share=3)
    yield under_load(f"power.{kind}-one", cut_power, layout=one, share=3, sizes=small, prepare=fill_log, workers=1)
    yield under_load(f"power.{kind}-two-idle", cut_power_behind, layout=two)
    yield under_load(f"power.{kind}-one-idle", cut_power_behind, layout=one, sizes=small, prepare=fill_log, workers=1)
    yield under_load(f"power.{kind}-twice", cut_power_twice, layout=two)
    yield under_load(f"power.{kind}-new", cut_power, layout=two, prepare=install, text=NEW)


FAULTS: tuple[Fault, ...] = (*_faults("ext4"), *_faults("xfs"))
