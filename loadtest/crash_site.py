"""A server with what it stands on, and one run after another in it: load, a fault, recovery, drain, verdict.

In: a Bench (what was asked for on the command line), a layout of disks, a strike. Out: a Finding for each run.
A site keeps its server from run to run, for a start costs more than all the rest. So each run has a ledger, mailboxes
and a record of its own, begins with an empty queue, and ends when nothing is queued any more. A run whose rules were
broken ends its site.
Always: the ledger, the sink's record, the log and the configuration lie outside of what is broken. What is broken comes
from the run's `chance`, which the seed, the fault's name and the run's number make; the moments are the machine's.
Not here: what each fault does (crash_kill, crash_power ...), the rules (rules). On failure: CrashError is a violation,
LoadError ends the fault.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .crash_disk import Ground, Layout, ground
from .crash_load import Load, Traffic
from .crash_result import Finding
from .crash_server import Server
from .deliveries import read_maildirs, sent_octets
from .ledger import Ledger, Outcome, find_fault
from .processes import free_port
from .rules import Circumstances, Report, verify
from .sink_server import SinkProcess

MAILBOXES = 6
LOCAL, NEXT = "here.test", "there.test"  # ends in a Maildir; is relayed to the sink
NOBODY = f"nobody@{NEXT}"  # refused by the sink, so that reports are made
CLEAN_SECONDS = 5.0  # until a queue that is empty has removed its body files

_CONFIGURATION = """\
hostname = "mx.here.test"
data_dir = {data}
workers = {workers}
[[listener]]
address = "{host}:{port}"
[spool]
min_free = "8MB"
[timeouts]
shutdown = "5s"
[queue]
retry = "1s"
retry_max = "2s"
[log]
format = "json"
[[domain]]
name = "{local}"
recipients = "any"
transport = "boxes"
[transport.boxes]
type = "maildir"
path = {mail}
[relay]
networks = ["{clients}"]
transport = "next"
[transport.next]
type = "smtp"
smarthost = "{next_hop}"
tls = "off"
{tables}
"""


@dataclass(frozen=True)
class Bench:
    """What all faults of a command share."""

    folder: Path
    package: Path
    seed: int
    numbers: tuple[int, ...]  # of the runs

    def chance(self, name: str, run: int) -> random.Random:
        return random.Random(f"{self.seed} {name} {run}")

    def of(self, name: str, numbers: tuple[int, ...]) -> Bench:
        """The same for one fault, in a folder of its own."""
        return replace(self, folder=self.folder / name, numbers=numbers)


class Site:
    """A server on its ground. What a strike needs: `server`, `ground`, `chance`, `note_fault`, `restart`."""

    def __init__(self, folder: Path, package: Path, under: Ground, sink: SinkProcess, record: Path) -> None:
        self.server = Server(folder, package, free_port(), under.data)
        self.ground = under
        self.chance = random.Random(0)  # of the run
        self.traffic = Traffic(())  # of the run
        self.ledger: Ledger
        self.running: Load  # under which a strike falls
        self.tables = ""  # more of the configuration
        self.folder = folder
        self._sink = sink
        self._record = record
        self._recorded = 0  # octets of the record when the run began
        self.run = 0
        self.probes = 0  # messages that were sent besides the load
        self._faults: list[float] = []
        self._partial: list[str] = []  # what a reader must not have seen
        self._recovery = 0.0
        self._clients = "127.0.0.1"
        self._next_hop = sink.address
        self._port = self.server.port
        self.configure(workers=2)

    def move(self, prefix: tuple[str, ...], host: str, clients: str, port: int, next_hop: str) -> None:
        """Into a namespace, from the next start on: `prefix` stands before its command, it listens on `host`, clients
        come from the address `clients` and reach it by `port` of this machine."""
        self.server.prefix, self.server.host = prefix, host
        self._clients, self._port, self._next_hop = clients, port, next_hop
        self.configure(self.workers)

    def configure(self, workers: int) -> None:
        """From the next start on."""
        self.workers = self.server.places = workers
        self.server.configuration = _CONFIGURATION.format(
            data=json.dumps(str(self.ground.data)),
            mail=json.dumps(f"{self.ground.mail}/{{domain}}/{{local}}"),
            workers=workers,
            host=self.server.host,
            port=self.server.port,
            clients=self._clients,
            local=LOCAL,
            next_hop=self._next_hop,
            tables=self.tables,
        )

    # --- for strikes ---

    def note_fault(self) -> None:
        """Now: what was delivered shortly before it may come again."""
        self._faults.append(time.time())

    def kill(self) -> None:
        """The whole group, with SIGKILL."""
        self.note_fault()
        self.server.kill()
        self.note_fault()  # on a busy machine what is killed may deliver until here

    def restart(self) -> None:
        """Starts it again after what was done to it, when a reader has looked into the mailboxes. Raises CrashError."""
        self.check_whole()
        self.note_recovery(self.server.start())

    def note_recovery(self, seconds: float) -> None:
        """It accepts again. What the old server sent last the sink may have noted meanwhile."""
        self._recovery = max(self._recovery, seconds)
        if self._faults:
            self.note_fault()

    def check_whole(self) -> None:
        """Nobody writes now, so this is what a reader sees at that moment: no part of a message."""
        for found in read_maildirs(self.ground.mail) if self.ground.mail.exists() else ():
            octets = sent_octets(found)
            fault = found.fault or (find_fault(found.id, octets) if octets and found.id else "")
            if fault:
                self._partial.append(f"B {found.id} <{found.mailbox}>: a reader saw {found.place}: {fault}")

    # --- a run ---

    def begin(self, run: int, chance: random.Random, size: Callable[[random.Random], int] | None = None) -> None:
        """New mailboxes, so that their folders are made in each run, and a new ledger."""
        self.run = run
        self.chance = chance
        self._faults.clear()
        self._partial.clear()
        self._recovery = 0.0
        self._recorded = self._record.stat().st_size if self._record.exists() else 0
        shutil.rmtree(self.ground.mail / LOCAL, ignore_errors=True)
        boxes = [f"box{number}-{run}@{LOCAL}" for number in range(MAILBOXES)]
        there = [f"box{number}@{NEXT}" for number in range(2)]
        self.traffic = Traffic((*boxes, *there, NOBODY))
        if size is not None:
            self.traffic = replace(self.traffic, size=size)
        path = self.folder / "ledger"
        path.unlink(missing_ok=True)
        self.ledger = Ledger(path)
        self.server.forget_events()

    def load(self) -> Load:
        return Load(self._port, self.traffic, self.ledger, f"r{self.run}", self.chance.getrandbits(32))

    @property
    def sink_port(self) -> int:
        return self._sink.port

    def records(self) -> int:
        """Messages that the sink has taken or refused at their end in this run."""
        with self._record.open("rb") as record:
            record.seek(self._recorded)
            return record.read().count(b"\n")

    def finish(self, struck: bool = True, damaged: frozenset[str] | None = None) -> Finding:
        """Waits for the end of all deliveries, and compares. `damaged`: what was kept was damaged by us, and messages
        of these ids were set aside for it. Raises CrashError."""
        self.server.drain()
        report = self._verify()
        if damaged is not None:
            report.violations = [found for found in report.violations if found.rule != "A" or found.id not in damaged]
        found = Finding(self.run, struck=struck, recovery=self._recovery)
        found.acked = report.outcomes[Outcome.ACKED]
        found.lost = report.broken["A"]
        found.altered = report.broken["B"] + len(self._partial)
        found.duplicates = report.duplicates
        found.violations = self._partial + [
            f"{broken.rule} {broken.id} <{broken.recipient}>: {broken.text} {broken.where}".rstrip()
            for broken in report.violations
        ]
        found.violations += [
            f"a bug: {event.get('where')} {event.get('exception')}" for event in self.server.events("bug")
        ]
        if damaged is None:
            found.violations += [f"E: left over: {path}" for path in self._leftovers()]
            found.violations += [f"put aside: {path}" for path in self.ground.data.glob("spool/*/damaged-*")]
            aside = self.server.events("set-aside")
            found.violations += [f"set aside: {event.get('id')}: {event.get('why')}" for event in aside]
        return found

    def close(self) -> None:
        self.ledger.close()

    def _verify(self) -> Report:
        record = self.folder / "record.run"
        with self._record.open("rb") as whole:
            whole.seek(self._recorded)
            record.write_bytes(whole.read())
        windows = tuple((at, at) for at in self._faults)
        mail = [self.ground.mail] if self.ground.mail.exists() else []
        return verify(self.ledger.path, mail, [record], Circumstances(windows))

    def _leftovers(self) -> list[Path]:
        """Bodies and temporary files that stay although nothing is queued."""
        deadline = time.monotonic() + CLEAN_SECONDS
        mail = self.ground.mail
        while True:
            found = [*self.ground.data.glob("spool/*/body/*"), *mail.glob(".*/*"), *mail.glob("*/*/tmp/*")]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.01)


@contextmanager
def opened(bench: Bench, layout: Layout, tables: str = "", workers: int = 2) -> Iterator[Site]:
    """A site whose server has not been started yet. Raises LoadError."""
    shutil.rmtree(bench.folder, ignore_errors=True)
    bench.folder.mkdir(parents=True)
    record = bench.folder / "record"
    with (
        ground(layout, bench.folder) as under,
        SinkProcess("--record", str(record), "--answer", f"rcpt {NOBODY} 550 5.1.1 nobody") as sink,
    ):
        site = Site(bench.folder, bench.package, under, sink, record)
        site.tables = tables
        site.configure(workers)
        try:
            yield site
        finally:
            site.server.kill()
