"""The race itself: the same load on each server in interleaved rounds, A B C A B C, so that a machine's drift hits all.

In: Terms and what sends (a function of Options, the generator's). Out: a Comparison. A server is started once for each
end, warmed up, and idle while others have their round. A round is a time of load, then a bounded wait until nothing is
left to do; what was acknowledged is compared with what lies in the mailboxes or at the sink. A server that loses or
doubles mail, or does not finish, has that round counted for nothing, is said so aloud, and starts anew.
Always: whatever ends the race, all servers are stopped and their folders gone. A server that cannot be installed or
started is `missing`, and the race goes on. Not here: files and tables (compare). On failure: LoadError.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import LoadError
from .comparison import Comparison, Line, Round, Syncs, holds, summarise
from .install import Installed, Store
from .machine import describe_machine
from .measurements import say
from .options import Options
from .peers import Peer
from .result import Result
from .scenarios import find_scenario
from .start import HOST, Running, start
from .syncs import Tracer, count_syncs, make_tracer

POLL_SECONDS = 0.05
SETTLE_SECONDS = 10.0  # at least, after a load
WARM_UP_SECONDS = 2.0  # compilers that compile while they run want some time
SAMPLED_AT = 0.75  # of the load, for memory


@dataclass(frozen=True)
class Terms:
    """What is raced, and how long."""

    peers: tuple[Peer, ...]
    ends: tuple[str, ...]
    scenarios: tuple[str, ...]
    rounds: int
    seconds: float  # of load in a round
    drain: float  # seconds that a server has to finish after a load
    folder: Path
    store: Store
    options: Mapping[str, object] = field(default_factory=dict)  # of all scenarios, above their own
    warm_up: float = WARM_UP_SECONDS
    traced: bool = True  # whether calls that wait for the disk are counted


Load = Callable[[Options], Result]


@dataclass
class Contestant:
    """A server in the race; `running` while it is up."""

    peer: Peer
    installed: Installed
    running: Running | None = None
    started: int = 0
    accounting: str = ""
    syncs: dict[str, Syncs] = field(default_factory=dict)  # by end
    rounds: dict[tuple[str, str], list[Round]] = field(default_factory=dict)  # by end and scenario
    problems: dict[str, list[str]] = field(default_factory=dict)  # by end

    def stop(self) -> None:
        if self.running is not None:
            running, self.running = self.running, None
            running.stop()


class Race:
    """One race, step by step; `comparison` is what it has found so far."""

    def __init__(self, terms: Terms, load: Load) -> None:
        self._terms = terms
        self._load = load
        self._contestants: list[Contestant] = []
        self._missing: dict[str, str] = {}
        self._started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._machine = describe_machine(terms.folder)
        self._interrupted = False

    def run(self) -> None:
        """To the end, or until it is interrupted."""
        try:
            self._install()
            for end in self._terms.ends:
                self._run_end(end)
        except KeyboardInterrupt:
            self._interrupted = True
        finally:
            for contestant in self._contestants:
                contestant.stop()

    def _install(self) -> None:
        for peer in self._terms.peers:
            say(f"{peer.name}: installing")
            try:
                if peer.private and os.geteuid() != 0:
                    raise LoadError("its view of the file system needs root")
                self._contestants.append(Contestant(peer, peer.install(self._terms.store)))
            except LoadError as error:
                self._miss(peer, f"cannot be installed: {error}")

    def _miss(self, peer: Peer, why: str) -> None:
        self._missing[peer.name] = why
        say(f"{peer.name}: {why}")

    def _run_end(self, end: str) -> None:
        racing = [one for one in self._contestants if end in one.peer.claims]
        if self._terms.traced:
            self._count_syncs(racing, end)
        for name in self._terms.scenarios:
            for number in range(1, self._terms.rounds + 1):
                for contestant in racing:
                    found = self._run_round(contestant, end, name, number)
                    contestant.rounds.setdefault((end, name), []).append(found)
                    _tell(contestant, end, name, found, self._terms.rounds)
        for contestant in racing:
            contestant.stop()

    def _start(self, contestant: Contestant, end: str, tracer: Tracer | None = None) -> Running:
        contestant.started += 1
        folder = self._terms.folder / f"{contestant.peer.name}-{contestant.started}"
        running = start(contestant.peer, contestant.installed, self._terms.store, folder, end, tracer)
        contestant.accounting = running.server.how
        return running

    def _count_syncs(self, racing: list[Contestant], end: str) -> None:
        """On a run of its own, for each that can be started."""
        try:
            tracer = make_tracer(self._terms.store)
        except LoadError as error:
            say(f"calls that wait for the disk are not counted: {error}")
            return
        for contestant in racing:
            name, claim = contestant.peer.name, contestant.peer.claims[end]
            try:
                running = self._start(contestant, end, tracer)
                try:
                    syncs = count_syncs(HOST, running.port, running.trace())
                finally:
                    running.stop()
            except LoadError as error:
                contestant.problems.setdefault(end, []).append(f"syncs not counted: {error}")
                say(f"{name}, {end}: syncs not counted: {error}")
                continue
            contestant.syncs[end] = syncs
            verdict = "" if holds(claim, syncs) else f": CLAIMS {claim}, COUNTED {syncs.before_250:g}"
            say(f"{name}, {end}: {syncs.before_250:g} syncs before a 250, {syncs.in_all:g} in all{verdict}")

    def _run_round(self, contestant: Contestant, end: str, scenario: str, number: int) -> Round:
        """Never raises LoadError: what goes wrong is in the round."""
        try:
            if contestant.running is None:
                contestant.running = self._start(contestant, end)
                self._measure(contestant.running, scenario, 0, min(self._terms.warm_up, self._terms.seconds))
            found = self._measure(contestant.running, scenario, number, self._terms.seconds)
        except LoadError as error:
            contestant.stop()
            return failed(number, str(error))
        if found.problems:
            contestant.stop()  # what it still has to do would be in the next round
        return found

    def _measure(self, running: Running, scenario: str, number: int, seconds: float) -> Round:
        """One load and what comes of it. Raises LoadError, KeyboardInterrupt when the load was interrupted."""
        values = {**find_scenario(scenario).options, **self._terms.options}
        values |= {"scenario": scenario, "target": f"{HOST}:{running.port}", "duration": seconds}
        options = Options(**values)
        running.clear()
        os.sync()  # what others have left to flush would be in this server's time
        cpu, before = running.server.cpu(), running.delivered()
        with Sampler(running, seconds * SAMPLED_AT) as sampler:
            result = self._load(options)
        returned = time.monotonic()
        if result.interrupted:
            raise KeyboardInterrupt
        delivered, drained = self._drain(running, before, result.messages_accepted, returned)
        busy = not running.server.settle(max(self._terms.drain - (time.monotonic() - returned), SETTLE_SECONDS))
        if before is not None:  # what came after the count was enough would be a double
            delivered = (running.delivered() or 0) - before
        used = running.server.cpu() - cpu
        accepted = result.messages_accepted
        drained_seconds = None if drained is None else result.seconds + drained
        return Round(
            number=number,
            seconds=result.seconds,
            accepted=accepted,
            refused=result.messages_refused,
            unknown=result.messages_unknown,
            errors=sum(result.errors.values()),
            delivered=delivered,
            drained_seconds=drained_seconds,
            accepted_rate=result.rate,
            drained_rate=accepted / drained_seconds if drained_seconds else None,
            cpu_us=used / max(accepted, 1) * 1e6,
            client_cpu_us=result.client_cpu_us_per_message,
            memory=sampler.memory,
            latency_ms=result.latency_ms,
            problems=tuple(judge(accepted, result.messages_unknown, delivered, busy, self._terms.drain)),
        )

    def _drain(
        self, running: Running, before: int | None, accepted: int, returned: float
    ) -> tuple[int | None, float | None]:
        """What was delivered, and how long after the load that was all; None where it was not, or is not counted."""
        if before is None:
            return None, None
        quiet_at = returned + self._terms.drain
        while True:
            now = time.monotonic()
            delivered = (running.delivered() or 0) - before
            if delivered >= accepted:
                return delivered, now - returned
            if now > quiet_at:
                return delivered, None
            running.server.check_alive()
            time.sleep(POLL_SECONDS)

    def comparison(self, command: str) -> Comparison:
        terms = self._terms
        lines = [
            line
            for scenario in terms.scenarios
            for end in terms.ends
            for line in sorted(self._lines(end, scenario), key=_order)
        ]
        return Comparison(
            started=self._started,
            command=command,
            machine=self._machine,
            versions={one.peer.name: one.installed.version for one in self._contestants},
            rounds=terms.rounds,
            seconds=terms.seconds,
            scenarios={name: find_scenario(name).sentence for name in terms.scenarios},
            ends=terms.ends,
            accounting="; ".join(sorted({one.accounting for one in self._contestants} - {""})),
            lines=tuple(lines),
            missing=self._missing,
            interrupted=self._interrupted,
        )

    def _lines(self, end: str, scenario: str) -> list[Line]:
        return [
            summarise(
                one.peer.name,
                one.installed.version,
                end,
                scenario,
                one.peer.claims[end],
                one.syncs.get(end),
                one.rounds.get((end, scenario), ()),
                one.problems.get(end, ()),
            )
            for one in self._contestants
            if end in one.peer.claims
        ]


class Sampler:
    """Reads a server's memory once, while it is under load."""

    def __init__(self, running: Running, after: float) -> None:
        self._running = running
        self._timer = threading.Timer(after, self._sample)
        self.memory: int | None = None

    def _sample(self) -> None:
        self.memory = self._running.server.memory()

    def __enter__(self) -> Sampler:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()


def judge(accepted: int, unknown: int, delivered: int | None, busy: bool, drain: float) -> list[str]:
    """Why a round counts for nothing; nothing when it counts."""
    problems = []
    if not accepted:
        problems.append("no message was accepted")
    if delivered is not None and delivered < accepted:
        missing = f"{accepted - delivered:,} of {accepted:,} acknowledged messages"
        problems.append(f"{missing} not delivered within {drain:.0f} s" if busy else f"LOST {missing}")
    elif delivered is not None and delivered > accepted + unknown:
        problems.append(f"{delivered - accepted - unknown:,} messages delivered more than once or never acknowledged")
    elif busy:
        problems.append(f"still busy {drain:.0f} s after the load")
    return problems


def failed(number: int, why: str) -> Round:
    """A round that could not be run."""
    return Round(number, 0.0, 0, 0, 0, 0, None, None, 0.0, None, 0.0, 0.0, None, {}, (why,))


def _order(line: Line) -> tuple[bool, bool, float]:
    """Those that keep their word to sync first, then the faster."""
    rate = line.drained or line.accepted
    return line.claim != "fsync", line.claim_holds is False, -(rate.median if rate else 0.0)


def _tell(contestant: Contestant, end: str, scenario: str, found: Round, rounds: int) -> None:
    what = f"{contestant.peer.name}, {end}, {scenario}, round {found.number} of {rounds}"
    if found.problems:
        say(f"{what}: COUNTS FOR NOTHING: {'; '.join(found.problems)}")
        return
    drained = f", {found.drained_rate:,.0f}/s drained" if found.drained_rate else ""
    say(f"{what}: {found.accepted_rate:,.0f}/s accepted{drained}, {found.cpu_us:,.0f} µs of CPU a message")
