"""kill -9 at random moments while mail is relayed: what was acknowledged arrives at the next host, or is reported.

As in test_kill.py, but everything goes on to a sink that refuses one mailbox for good, puts off some of the mail, and
hangs up on some of it: so reports are made, and mail waits and is tried again, while workers and the group are killed.
In the end the queue is empty, and the sink's record is verified against the ledger. A second copy, of a message or of a
report, is excused only where a kill fell between the sink's 250 and our mark. `--kills N` is the long form, as there.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from queueing import queue
from servers import PATIENCE, toml
from test_kill import MAILBOXES, ROUND, Run

from loadtest.ledger import read_ledger
from loadtest.rules import Circumstances, verify
from loadtest.sink_server import SinkProcess

SHORT_KILLS = 5
SHORT_SECONDS = 8.0
NOBODY = MAILBOXES[-1]  # refused by the sink

_TABLES = """\
[relay]
networks = ["127.0.0.1"]
transport = "next"
[transport.next]
type = "smtp"
smarthost = "{sink}"
tls = "off"
timeout = "{timeout}"
[queue]
retry = "1s"
retry_max = "2s"
[timeouts]
shutdown = "5s"
"""


class RelayRun(Run):
    """A round of kills while mail goes on to `sink`, whose record is `record`."""

    def __init__(self, folder: Path, chance: random.Random, sink: str, record: Path, timeout: str = "1m") -> None:
        super().__init__(folder, chance)
        listener = f'[[listener]]\naddress = "127.0.0.1:{self.port}"\n'
        tables = _TABLES.format(sink=sink, timeout=timeout)
        self.server.configuration = toml(folder, workers=2, listeners=listener, domains="", tables=tables)
        self.record = record

    def drain(self) -> None:
        """Waits until nothing is queued; whether all of it has arrived says verify."""
        said = ""
        deadline = time.monotonic() + PATIENCE
        while said != "Nothing is queued.\n":
            assert time.monotonic() < deadline, self.server.story(f"not drained\n{said}")
            said = queue(self.server.folder, "summary").output
            time.sleep(0.1)


@pytest.mark.timeout(0)
def test_kill_while_relaying(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    kills = pytestconfig.getoption("--kills")
    seed = int(os.environ.get("KILL_SEED") or random.randrange(1 << 32))
    chance = random.Random(seed)
    until = time.monotonic() + (float("inf") if kills else SHORT_SECONDS)
    left = kills or SHORT_KILLS
    number = 0
    while left > 0 and time.monotonic() < until:
        left -= play(tmp_path / str(number), chance, min(left, ROUND), until, f"KILL_SEED={seed}, round {number}")
        number += 1


def play(folder: Path, chance: random.Random, kills: int, until: float, name: str) -> int:
    """One round; how often it has struck."""
    folder.mkdir()
    record = folder / "record"
    faults = ["--answer", f"rcpt {NOBODY} 550 5.1.1 nobody", "--fail", "5%", "--hangup", "2%"]
    with SinkProcess("--record", str(record), *faults) as sink:
        run = RelayRun(folder, chance, sink.address, record)
        try:
            run.kill(kills, until)
            run.drain()
            run.check_rest()
        finally:
            run.server.kill()
            run.ledger.close()
        assert sink.running()
    outcomes = Counter(str(entry.outcome) for entry in read_ledger(run.ledger.path))
    report = verify(run.ledger.path, (), [record], Circumstances(tuple((at, at) for at in run.faults)))
    print(
        f"{name}: {dict(run.struck)}, {dict(outcomes)}, {report.delivered} delivered, {report.failed} reported,"
        f" {report.duplicates} second copies, accepted again within {max(run.restarts, default=0):.1f} s"
    )
    assert report.violations == []
    assert report.failed > 0
    assert all(sink.counts[what] for what in ("refusals", "faults")), sink.counts
    assert outcomes["acked"] > 3 * sum(run.struck.values()), "there was hardly any load"
    assert outcomes["5xx"] == 0
    assert max(run.restarts, default=0) < PATIENCE / 2
    return sum(run.struck.values())
