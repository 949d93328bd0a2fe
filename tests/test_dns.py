"""The cache of DNS: how long what is kept, who waits for whom, what is put together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest

from fastsmtp.dns import CLOSED, MX, Answer, IPAddress, Kind, Resolver, Status, join

A1, A2 = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
AAAA1 = IPv6Address("2001:db8::1")


def records(*values: Any, ttl: int = 600, octets: int = 100) -> Answer[Any]:
    return Answer(Status.RECORDS, values, ttl, octets=octets)


def absent(status: Status, ttl: int = 300) -> Answer[Any]:
    return Answer(status, (), ttl, status.value)


class Fake:
    """Answers what `answers` holds, or SERVFAIL, once `gate` is open where there is one; `time` is the clock, `asked`
    what was asked."""

    def __init__(self, answers: dict[tuple[Kind, str], Answer[Any]] | None = None, **options: Any) -> None:
        self.answers = answers or {}
        self.asked: list[tuple[Kind, str]] = []
        self.time = 1_000.0
        self.gate: asyncio.Event | None = None
        self.resolver = Resolver(self.ask, now=lambda: self.time, **options)

    async def ask(self, kind: Kind, name: str) -> Answer[Any]:
        self.asked.append((kind, name))
        if self.gate is not None:
            await self.gate.wait()
        return self.answers.get((kind, name), Answer(Status.FAILED, reason="SERVFAIL"))


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main()

    asyncio.run(bounded())


LIVES = {
    "as the TTL says": (records(MX(10, "a"), ttl=600), 600),
    "a TTL of nothing": (records(MX(10, "a"), ttl=0), 5),
    "a TTL of years": (records(MX(10, "a"), ttl=2**31 - 1), 86_400),
    "no name": (absent(Status.NO_NAME, 300), 300),
    "no name, for a week": (absent(Status.NO_NAME, 604_800), 3_600),
    "no records": (absent(Status.NO_RECORDS, 60), 60),
    "no records, without SOA": (absent(Status.NO_RECORDS, 0), 5),
    "a failure": (Answer[Any](Status.FAILED, reason="SERVFAIL"), 10),
}


@pytest.mark.parametrize(("answer", "seconds"), LIVES.values(), ids=LIVES)
def test_an_answer_is_kept_so_long(answer: Answer[Any], seconds: float) -> None:
    async def main() -> None:
        fake = Fake({(Kind.MX, "d.test"): answer})
        assert await fake.resolver.mx("d.test") is answer
        fake.time += seconds - 0.001
        assert await fake.resolver.mx("d.test") is answer
        assert len(fake.asked) == 1
        fake.time += 0.001
        assert await fake.resolver.mx("d.test") is answer
        assert len(fake.asked) == 2

    run(main)


def test_what_is_kept_costs_no_task() -> None:
    async def main() -> None:
        fake = Fake({(Kind.MX, "d.test"): records(MX(10, "a"))})
        await fake.resolver.mx("d.test")
        kept = fake.resolver.mx("d.test")
        with pytest.raises(StopIteration) as stop:
            kept.send(None)
        assert stop.value.value.records == (MX(10, "a"),)
        assert len(asyncio.all_tasks()) == 1

    run(main)


def test_one_question_in_flight_for_each_name_and_type() -> None:
    async def main() -> None:
        fake = Fake({(Kind.MX, "d.test"): records(MX(10, "a")), (Kind.TXT, "d.test"): records(b"x")})
        fake.gate = asyncio.Event()
        asking = [asyncio.ensure_future(fake.resolver.mx(name)) for name in ("d.test", "D.Test", "d.test.")]
        other = asyncio.ensure_future(fake.resolver.txt("d.test"))
        await asyncio.sleep(0.01)
        assert sorted(fake.asked) == [(Kind.MX, "d.test"), (Kind.TXT, "d.test")]
        fake.gate.set()
        answers = await asyncio.gather(*asking)
        assert all(answer is answers[0] for answer in answers)
        assert (await other).records == (b"x",)
        assert (await fake.resolver.mx("D.TEST.")) is answers[0]
        assert len(fake.asked) == 2

    run(main)


def test_who_stops_waiting_does_not_stop_the_question() -> None:
    async def main() -> None:
        fake = Fake({(Kind.MX, "d.test"): records(MX(10, "a"))})
        fake.gate = asyncio.Event()
        one, other = (asyncio.ensure_future(fake.resolver.mx("d.test")) for _ in range(2))
        await asyncio.sleep(0.01)
        one.cancel()
        await asyncio.sleep(0.01)
        fake.gate.set()
        assert (await other).records == (MX(10, "a"),)
        assert one.cancelled()
        assert len(fake.asked) == 1

    run(main)


def test_a_bug_is_raised_once_and_not_kept() -> None:
    async def main() -> None:
        async def ask(kind: Kind, name: str) -> Answer[Any]:
            raise KeyError(name)

        resolver = Resolver(ask)
        for _ in range(2):
            with pytest.raises(KeyError):
                await resolver.mx("d.test")
        assert resolver.known(Kind.MX, "d.test") is None

    run(main)


def test_the_longest_unused_goes_first() -> None:
    async def main() -> None:
        fake = Fake({(Kind.MX, name): records(MX(10, name)) for name in "abcd"}, entries=3)
        for name in "abcad":
            await fake.resolver.mx(name)
        assert [name for name in "abcd" if fake.resolver.known(Kind.MX, name)] == ["a", "c", "d"]

    run(main)


def test_a_long_answer_counts_as_several() -> None:
    async def main() -> None:
        answers = {(Kind.TXT, name): records(b"x", octets=100) for name in "abcd"}
        answers[Kind.TXT, "long"] = records(b"x" * 1_100, octets=1_200)
        fake = Fake(answers, entries=4)
        for name in ("a", "b", "c", "d", "long"):
            await fake.resolver.txt(name)
        assert [name for name in "abcd" if fake.resolver.known(Kind.TXT, name)] == ["d"]
        # It is asked for again when it is old: room is counted once.
        fake.time += 700
        for name in ("long", "d"):
            await fake.resolver.txt(name)
        assert fake.resolver.known(Kind.TXT, "long")
        assert fake.resolver.known(Kind.TXT, "d")

    run(main)


def test_an_answer_larger_than_all_room_is_given_and_not_kept() -> None:
    async def main() -> None:
        fake = Fake({(Kind.TXT, "long"): records(b"x", octets=60_000), (Kind.TXT, "a"): records(b"y")}, entries=10)
        for _ in range(2):
            assert (await fake.resolver.txt("long")).records == (b"x",)
        assert len(fake.asked) == 2
        await fake.resolver.txt("a")
        assert fake.resolver.known(Kind.TXT, "a")

    run(main)


def test_closing_answers_those_who_wait() -> None:
    async def main() -> None:
        fake = Fake()
        fake.gate = asyncio.Event()
        waiting = [asyncio.ensure_future(fake.resolver.mx(name)) for name in ("a", "a", "b")]
        await asyncio.sleep(0.01)
        await fake.resolver.close()
        assert [await each for each in waiting] == [CLOSED] * 3
        assert await fake.resolver.mx("c") is CLOSED
        assert len(asyncio.all_tasks()) == 1

    run(main)


def test_addresses_of_both_families() -> None:
    async def main() -> None:
        fake = Fake({(Kind.A, "h.test"): records(A1, A2, ttl=60), (Kind.AAAA, "h.test"): records(AAAA1)})
        answer = await fake.resolver.addresses("h.test")
        assert answer.records == (AAAA1, A1, A2)
        assert answer.ttl == 60
        assert sorted(fake.asked) == [(Kind.A, "h.test"), (Kind.AAAA, "h.test")]
        both = await fake.resolver.addresses_of(["H.test.", "x.test"])
        assert [each.status for each in both] == [Status.RECORDS, Status.FAILED]
        assert len(fake.asked) == 4

    run(main)


def test_ptr_asks_for_the_reverse_name() -> None:
    async def main() -> None:
        fake = Fake({(Kind.PTR, "1.2.0.192.in-addr.arpa"): records("h.test")})
        assert (await fake.resolver.ptr(A1)).records == ("h.test",)
        assert (await fake.resolver.ptr(AAAA1)).status is Status.FAILED
        assert fake.asked[1][1].endswith("8.b.d.0.1.0.0.2.ip6.arpa")

    run(main)


@pytest.mark.parametrize("name", ["localhost", "LocalHost.", "x.localhost"])
def test_localhost_is_not_asked_for(name: str) -> None:
    async def main() -> None:
        fake = Fake()
        answer = await fake.resolver.addresses(name)
        assert [str(address) for address in answer.records] == ["::1", "127.0.0.1"]
        assert not fake.asked
        assert (await fake.resolver.mx(name)).status is Status.FAILED

    run(main)


FAILED: Answer[IPAddress] = Answer(Status.FAILED, reason="SERVFAIL")
NO_NAME, NO_RECORDS = absent(Status.NO_NAME), absent(Status.NO_RECORDS)
JOINED = {
    "records of one, an error of the other": (FAILED, records(A1), Status.RECORDS),
    "records of one, the name denied for the other": (NO_NAME, records(A1), Status.RECORDS),
    "IPv6 only": (records(AAAA1), NO_RECORDS, Status.RECORDS),
    "an error and nothing": (FAILED, NO_RECORDS, Status.FAILED),
    "nothing and an error": (NO_RECORDS, FAILED, Status.FAILED),
    "denied and an error": (NO_NAME, FAILED, Status.FAILED),
    "denied for one": (NO_NAME, NO_RECORDS, Status.NO_RECORDS),
    "denied": (NO_NAME, NO_NAME, Status.NO_NAME),
}


@pytest.mark.parametrize(("six", "four", "status"), JOINED.values(), ids=JOINED)
def test_two_answers_are_one(six: Answer[IPAddress], four: Answer[IPAddress], status: Status) -> None:
    joined = join(six, four)
    assert joined.status is status
    assert joined.records == six.records + four.records
