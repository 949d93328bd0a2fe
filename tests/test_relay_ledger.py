"""A next host that does everything wrong, a little of each: what was acknowledged arrives there all the same, and once.

A whole server relays under load to a sink that has each fault at each stage, with a small share of each. In the end
the queue is empty and the sink's record is verified against the ledger: nothing is lost, altered, given to another,
reported without cause, or sent twice, for no fault here lies between the sink's 250 and its being read. Commands go one
at a time, so that what a fault befalls is what the table of docs/failures.md says; sent all at once, a message may be
kept although an answer before it was garbage. Each fault by itself, with its outcome, stands in test_relay_faults.py.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from test_kill_relay import NOBODY, RelayRun

from loadtest.ledger import read_ledger
from loadtest.rules import verify
from loadtest.sink_plan import FAULTS
from loadtest.sink_server import SinkProcess

ENOUGH = 60  # messages
SECONDS = 30.0  # for them, on a machine that is busy
STAGES = ("banner", "ehlo", "mail", "rcpt", "data", "end")
# What the sink has kept, and then says so that nobody can read it
KEPT_UNHEARD = {("long-line", "end"), ("drip", "end")}
# A LF alone ends a line of a reply for us; the sink thinks it unheard and does not do what it said.
NOT_MEANT = "bare-lf"
SHARE = "0.2%"


class FaultRun(RelayRun):
    """Nothing is killed; it ends when there was enough mail."""

    def strike(self) -> None:
        if sum(1 for _ in read_ledger(self.ledger.path)) >= ENOUGH:
            self.struck["enough"] += 1


@pytest.mark.timeout(0)
def test_every_fault_of_a_next_host(tmp_path: Path) -> None:
    record = tmp_path / "record"
    options = ["--record", str(record), "--without", "PIPELINING", "--without", "CHUNKING"]
    options += ["--answer", f"rcpt {NOBODY} 550 5.1.1 nobody"]
    for fault in FAULTS:
        for stage in STAGES:
            if (fault, stage) not in KEPT_UNHEARD and fault != NOT_MEANT:
                options += ["--fault", f"{fault}@{stage}:{SHARE}"]
    with SinkProcess(*options) as sink:
        run = FaultRun(tmp_path, random.Random(), sink.address, record, timeout="1s")
        try:
            run.kill(1, time.monotonic() + SECONDS)
            run.drain()
            run.check_rest()
        finally:
            run.server.kill()
            run.ledger.close()
    entries = list(read_ledger(run.ledger.path))
    outcomes = Counter(str(entry.outcome) for entry in entries)
    report = verify(run.ledger.path, (), [record])
    faults = sink.counts["faults"]
    print(f"{dict(outcomes)}, {report.delivered} delivered, {report.failed} reported, faults: {faults}")
    assert report.violations == []
    assert set(outcomes) == {"acked"}
    assert report.delivered > ENOUGH / 2
    assert report.failed == sum(NOBODY in entry.recipients for entry in entries) > 0
    assert len(faults) > 5, "hardly anything went wrong"
