"""queue: whatever happens, each recipient has one fate, caps hold, the dead are left alone, the slow delay nobody.

Two workers, each with a spool on the disk, share a machine's memory and one network. Hypothesis sends mail, lets
destinations die, stall and recover, jumps ahead in time and restarts workers. In the end all is well again and drained.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scripted import LATER, NEVER, SCHEDULE, UNREACHED, Bench, Clock, body_of, logged, open_spool

from fastsmtp._shared import Shared
from fastsmtp.address import Address
from fastsmtp.delivery import DELIVERED, Delivery, Outcome
from fastsmtp.destinations import _key
from fastsmtp.spool import Spool

WORKERS = (0, 1)
CAP = 3
TOTAL = 8
DOMAINS = ("net.one", "net.two", "net.three")
ANSWERS = {"d": DELIVERED, "l": LATER, "n": NEVER}
WELL = "net.well"  # a destination that nothing happens to


class Network:
    """What is out there. A local-part says how a recipient is answered: one letter for each attempt."""

    any_octets = True
    needs_body = True
    concurrency = CAP

    def __init__(self, shared: Shared, clock: Clock) -> None:
        self.shared = shared
        self.clock = clock
        self.down: set[str] = set()
        self.missed: dict[str, float] = {}  # when a destination was last not reached
        self.gates: dict[str, asyncio.Event] = {}
        self.running: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.told: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    def destination(self, recipient: Address) -> str:
        return recipient.domain

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Sequence[Outcome]]:
        domain = deliveries[0].recipients[0].address.domain
        until = self.shared.dead_until(_key("net", domain))
        self.running[domain] += 1
        # What had been begun when the others found out may still be tried.
        known = self.missed.get(domain) != self.clock.ahead
        if known and until > self.clock.monotonic():
            self.wrong.append(f"{domain} is dead and was tried")
        if known and until and self.running[domain] > 1:
            self.wrong.append(f"{domain} was tried twice at once to see whether it is well")
        if self.running[domain] > CAP or self.running.total() > TOTAL:
            self.wrong.append(f"too much at once: {dict(self.running)}")
        try:
            if domain in self.gates:
                await self.gates[domain].wait()
            await asyncio.sleep(0)
            return [
                [self.answer(delivery, domain, one.address) for one in delivery.recipients] for delivery in deliveries
            ]
        finally:
            self.running[domain] -= 1

    def answer(self, delivery: Delivery, domain: str, address: Address) -> Outcome:
        if domain in self.down:
            self.missed[domain] = self.clock.ahead
            return UNREACHED
        if not delivery.message.envelope.reverse_path:
            self.read_report(body_of(delivery.message))
            return DELIVERED
        mailbox = str(address)
        script = address.local.partition("-")[0]
        attempt = self.attempts[mailbox]
        self.attempts[mailbox] += 1
        outcome = ANSWERS[script[attempt]] if attempt < len(script) else DELIVERED
        if outcome is DELIVERED:
            self.delivered[mailbox] += 1
        return outcome

    def read_report(self, body: bytes) -> None:
        fields = message_from_bytes(body).get_payload(1).as_string()  # type: ignore[union-attr]
        found = zip(
            re.findall(r"Action: (\S+)", fields), re.findall(r"Final-Recipient: rfc822; (\S+)", fields), strict=True
        )
        self.told.update(found)

    async def close(self) -> None:
        pass


class Machine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.logged = logged()
        self.log, self.lines = self.logged.__enter__()
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.shared = Shared(len(WORKERS), 0)
        self.network = Network(self.shared, self.clock)
        self.sent: list[str] = []
        self.benches: list[Bench] = []
        self.run(self.open_all())

    def run(self, main: object) -> None:
        self.loop.run_until_complete(asyncio.wait_for(main, 60))  # type: ignore[arg-type]

    async def open_all(self) -> None:
        self.benches = [self.open(worker) for worker in WORKERS]

    def open(self, worker: int) -> Bench:
        spool = open_spool("disk", self.log, self.folder, worker)
        schedule = SCHEDULE._replace(delay_report=1000.0)
        transports = {"net": self.network}
        return Bench(
            spool, self.log, transports, schedule=schedule, clock=self.clock, shared=self.shared, worker=worker,
            total=TOTAL,
        )  # fmt: skip

    async def rest(self) -> None:
        """Until only what is held up by a gate is under way."""
        quiet = 0
        while quiet < 4:
            await asyncio.sleep(0.001)
            busy = False
            for bench in self.benches:
                assert isinstance(bench.spool, Spool)
                queue = bench.queue
                stuck = {state.destination for state in queue.lanes() if state.waiting or state.running}
                busy |= bench.spool._commit._busy or queue._claiming or not stuck <= set(self.network.gates)
            quiet = 0 if busy else quiet + 1

    async def go(self) -> None:
        for bench in self.benches:
            bench.queue.tick()
        await self.rest()

    @rule(
        worker=st.sampled_from(WORKERS),
        recipients=st.lists(
            st.tuples(st.text("dln", min_size=1, max_size=3), st.sampled_from(DOMAINS)), min_size=1, max_size=4
        ),
        copies=st.integers(1, 6),
    )
    def send(self, worker: int, recipients: list[tuple[str, str]], copies: int) -> None:
        async def main() -> None:
            for _ in range(copies):
                addresses = []
                for script, domain in recipients:
                    addresses.append(f"{script}-{len(self.sent)}@{domain}")
                    self.sent.append(addresses[-1])
                await self.benches[worker].keep(*addresses, sender=f"a@{WELL}")
            await self.rest()

        self.run(main())

    @rule(worker=st.sampled_from(WORKERS))
    def send_where_all_is_well(self, worker: int) -> None:
        """It arrives at once, whatever happens to others."""
        address = f"d-{len(self.sent)}@{WELL}"
        self.sent.append(address)

        async def main() -> None:
            await self.benches[worker].keep(address, sender=f"a@{WELL}")
            await self.rest()

        self.run(main())
        assert self.network.delivered[address] == 1

    @rule(domain=st.sampled_from(DOMAINS))
    def die(self, domain: str) -> None:
        self.network.down.add(domain)

    @rule(domain=st.sampled_from(DOMAINS))
    def recover(self, domain: str) -> None:
        self.network.down.discard(domain)

    @rule(domain=st.sampled_from(DOMAINS[:2]))
    def stall(self, domain: str) -> None:
        self.network.gates.setdefault(domain, asyncio.Event())

    @rule()
    def go_on(self) -> None:
        async def main() -> None:
            for gate in self.network.gates.values():
                gate.set()
            self.network.gates.clear()
            await self.go()

        self.run(main())

    @rule(seconds=st.sampled_from([1, 30, 70, 200, 700, 2000, 60_000]))
    def pass_time(self, seconds: float) -> None:
        self.clock.ahead += seconds
        self.run(self.go())

    @rule(worker=st.sampled_from(WORKERS))
    def restart(self, worker: int) -> None:
        async def main() -> None:
            for gate in self.network.gates.values():
                gate.set()
            self.network.gates.clear()
            bench = self.benches[worker]
            await bench.queue.close()
            await bench.spool.close()
            self.benches[worker] = self.open(worker)
            await self.go()

        self.run(main())

    @invariant()
    def nothing_was_wrong(self) -> None:
        assert self.network.wrong == []

    def teardown(self) -> None:
        if not hasattr(self, "network"):
            return
        try:
            self.network.down.clear()
            self.go_on()
            for _ in range(30):
                if not any(bench.spool.backlog for bench in self.benches):
                    break
                self.pass_time(700)
            self.check()
        finally:
            self.run(self.close_all())
            self.loop.close()
            self.logged.__exit__(None, None, None)
            shutil.rmtree(self.folder)

    def check(self) -> None:
        network = self.network
        assert [bench.spool.backlog for bench in self.benches] == [0, 0]
        assert network.wrong == []
        for address in self.sent:
            fates = network.delivered[address] + network.told["failed", address]
            assert fates == 1, f"{address}: {fates} fates"
            assert network.told["delayed", address] <= 1
        assert network.delivered.total() + sum(network.told["failed", one] for one in self.sent) == len(self.sent)
        assert [line for line in self.lines() if line["event"] == "bug"] == []

    async def close_all(self) -> None:
        for bench in self.benches:
            await bench.queue.close()
            await bench.spool.close()


@pytest.mark.filterwarnings("error")
def test_each_recipient_has_one_fate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsmtp.queue.POLL_SECONDS", 0.001)
    monkeypatch.setattr("fastsmtp.destinations.FEW", 2)
    Machine.TestCase.settings = settings(
        max_examples=20,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],  # to shrink a failure would take many minutes
    )
    Machine.TestCase().runTest()
