"""What a fault is, and the usual way to make one: under load, at a random moment.

In: a strike, which is a function that breaks something in a Site and brings the server back; its docstring says what it
does and what must hold. Out: a Fault, whose `play` makes runs one after another and yields a Finding for each.
`crash` finds the faults by the tables FAULTS of the modules that it names. Who adds one writes a strike, or a `play` of
its own where the load is not the usual one.
On failure: what breaks a rule or raises CrashError is a violation in its Finding; LoadError ends the fault.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import getdoc
from typing import TypeAlias

from . import LoadError
from .crash_disk import Layout
from .crash_load import GoneError
from .crash_result import Finding
from .crash_server import CrashError
from .crash_site import Bench, Site, opened
from .ledger import Outcome, read_ledger

Strike: TypeAlias = Callable[[Site], None]
Play: TypeAlias = Callable[[Bench], Iterator[Finding]]
Sizes: TypeAlias = Callable[[random.Random], int]

LOAD_SECONDS = 0.5  # before the fault, at most
AFTER_SECONDS = 0.15  # behind it, with the server back
FIRST_SECONDS = 20.0  # until the first message is acknowledged
SITE_RUNS = 100  # then a site begins anew: a spool that is empty and a log that is short


@dataclass(frozen=True)
class Fault:
    """`name` is GROUP.NAME. `share`: of the runs of its group, in relation to the others. `text` says what it does."""

    name: str
    play: Play
    text: str
    share: float = 1.0
    every: bool = False  # it has so many cases as it has: all of them, unless told otherwise


def under_load(
    name: str,
    strike: Strike,
    *,
    layout: Layout | None = None,
    share: float = 1.0,
    sizes: Sizes | None = None,
    prepare: Strike | None = None,
    tables: str = "",
    workers: int = 2,
    text: str = "",
) -> Fault:
    """`strike` falls on a server under load. `prepare` is done before the load, with nothing queued; `tables` are added
    to the configuration; `text` is said of it in place of the strike's docstring."""

    def play(bench: Bench) -> Iterator[Finding]:
        with ExitStack() as stack:
            site: Site | None = None
            used = 0
            for run in bench.numbers:
                if site is None or used == SITE_RUNS:
                    stack.close()
                    site = stack.enter_context(opened(bench, layout or Layout(), tables, workers))
                    site.server.start()
                    used = 0
                found = play_run(site, run, bench.chance(name, run), strike, sizes, prepare)
                used += 1
                if found.violations:
                    site = None
                yield found

    return Fault(name, play, text or getdoc(strike) or "", share)


def play_run(
    site: Site,
    run: int,
    chance: random.Random,
    strike: Strike,
    sizes: Sizes | None = None,
    prepare: Strike | None = None,
) -> Finding:
    """One run in a site whose server runs and has nothing queued."""
    site.begin(run, chance, sizes)
    try:
        if prepare is not None:
            prepare(site)
        load = site.running = site.load()
        load.start()
        try:
            if not load.acked.wait(FIRST_SECONDS):
                raise CrashError("no message is acknowledged")
            load.sleep(chance.uniform(0, LOAD_SECONDS))
            strike(site)
            load.sleep(AFTER_SECONDS)
        finally:
            load.stop()
        return site.finish()
    except (CrashError, GoneError) as error:
        return lost_run(site, run, str(error))
    finally:
        site.close()


def lost_run(site: Site, run: int, why: str) -> Finding:
    """A run that did not come to its end; what was acknowledged until then is not compared."""
    site.server.kill()
    found = Finding(run, violations=[why])
    try:
        found.acked = sum(entry.outcome is Outcome.ACKED for entry in read_ledger(site.ledger.path))
    except LoadError:
        pass
    return found
