"""Asking name servers: those that answer, those that do not, and those that answer what nobody asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import pytest
import uvloop
from nameserver import Script, Scripted, nameserver, response

from fastsmtp import nameservers
from fastsmtp.dns import MX, Answer, Kind, Resolver, Status
from fastsmtp.dns_message import RECORDS
from fastsmtp.nameservers import NameServers, parse_resolv_conf, parse_server
from loadtest.processes import free_port

QUICK = 0.3  # seconds in which nothing will come
PATIENCE = 20.0  # seconds for what comes at once
MX1 = "d.test. 600 IN MX 10 m.test."


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main()

    uvloop.run(bounded())


def scripted(
    script: Script, check: Callable[[NameServers, Scripted], Awaitable[None]], timeout: float = PATIENCE
) -> None:
    """Runs `check` with one server that answers what `script` says."""

    async def main() -> None:
        async with Scripted(script) as server:
            asked = NameServers([server.address], timeout=timeout)
            await check(asked, server)
            await asked.close()

    run(main)


def good(query: dns.message.Message, way: str) -> dns.message.Message:
    return response(query, MX1)


def silent(query: dns.message.Message, way: str) -> None:
    return None


def servfail(query: dns.message.Message, way: str) -> dns.message.Message:
    return response(query, code=dns.rcode.SERVFAIL)


def test_a_question_and_its_answer() -> None:
    async def check(asked: NameServers, server: Scripted) -> None:
        answer = await asked.ask(Kind.MX, "D.test")
        assert answer.records == (MX(10, "m.test"),)
        assert [query.question[0].to_text() for query, *_ in server.queries] == ["d.test. IN MX"]

    scripted(good, check)


def test_no_domain_name_is_not_asked_for() -> None:
    async def check(asked: NameServers, server: Scripted) -> None:
        assert (await asked.ask(Kind.MX, "a..b")).status is Status.NO_NAME
        assert not server.queries

    scripted(good, check)


def test_silence_is_asked_again_and_then_a_failure() -> None:
    async def check(asked: NameServers, server: Scripted) -> None:
        answer = await asked.ask(Kind.MX, "d.test")
        assert (answer.status, answer.reason) == (Status.FAILED, f"{server.address}: no answer")
        assert len(server.queries) == len(nameservers.SHARES)
        assert len({query.id for query, *_ in server.queries}) > 1

    scripted(silent, check, QUICK)


def test_a_failure_is_said_at_once() -> None:
    async def check(asked: NameServers, server: Scripted) -> None:
        answer = await asked.ask(Kind.MX, "d.test")
        assert (answer.status, answer.reason) == (Status.FAILED, f"{server.address}: SERVFAIL")
        assert len(server.queries) == 1

    scripted(servfail, check)


@pytest.mark.parametrize("first", [silent, servfail], ids=lambda script: script.__name__)
def test_the_next_server_is_asked(first: Script) -> None:
    async def main() -> None:
        async with Scripted(first) as one, Scripted(good) as other:
            asked = NameServers([one.address, other.address], timeout=8.0)
            for _ in range(2):
                assert (await asked.ask(Kind.MX, "d.test")).status is Status.RECORDS
            # What was silent comes last for a while; what failed for one name may know another.
            assert len(one.queries) == (1 if first is silent else 2)
            assert len(other.queries) == 2
            await asked.close()

    run(main)


def test_a_server_that_answers_again_has_its_place_again() -> None:
    async def main() -> None:
        async with Scripted(silent) as first, Scripted(silent) as second:
            asked = NameServers([first.address, second.address], timeout=2.0)
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.FAILED
            second.answer = good
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.RECORDS
            first.answer = good
            first.queries.clear()
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.RECORDS
            assert not first.queries  # it was silent since
            await asked.close()

    run(main)


def test_a_question_that_has_ended_leaves_nothing() -> None:
    async def check(asked: NameServers, _: Scripted) -> None:
        async def until(waiting: bool) -> None:
            async with asyncio.timeout(PATIENCE):
                while waiting is not any(socket._waiting for socket in asked._servers[0].sockets.values()):
                    await asyncio.sleep(0.01)

        asking = asyncio.ensure_future(asked.ask(Kind.MX, "d.test"))
        await until(waiting=True)
        asking.cancel()
        await until(waiting=False)

    scripted(silent, check, 600.0)


def test_a_silent_server_does_not_hide_that_the_other_fails() -> None:
    async def main() -> None:
        async with Scripted(silent) as one, Scripted(servfail) as other:
            asked = NameServers([one.address, other.address], timeout=2.0)
            answer = await asked.ask(Kind.MX, "d.test")
            assert answer.reason == f"{one.address}: no answer, {other.address}: SERVFAIL"
            assert len(other.queries) == 1
            await asked.close()

    run(main)


@pytest.mark.parametrize("loop", [asyncio.run, uvloop.run], ids=lambda run: run.__module__)
def test_where_nothing_listens_the_next_server_is_asked(loop: Callable[[Any], None]) -> None:
    async def main() -> None:
        async with Scripted(good) as server:
            closed = f"127.0.0.1:{free_port()}"
            asked = NameServers([closed, server.address], timeout=600.0)
            async with asyncio.timeout(PATIENCE):
                assert (await asked.ask(Kind.MX, "d.test")).status is Status.RECORDS
                lonely = NameServers([closed], timeout=600.0)
                assert (await lonely.ask(Kind.MX, "d.test")).reason == f"{closed}: Connection refused"
            await asked.close()
            await lonely.close()

    loop(main())


def test_a_server_that_no_route_leads_to() -> None:
    async def main() -> None:
        # A datagram to all is not allowed: connecting fails.
        asked = NameServers(["255.255.255.255"], timeout=600.0)
        answer = await asked.ask(Kind.MX, "d.test")
        assert answer.status is Status.FAILED
        assert answer.reason.startswith("255.255.255.255:53: ")
        await asked.close()

    run(main)


def test_a_late_answer_to_an_earlier_try_counts() -> None:
    kept: list[dns.message.Message] = []

    def late(query: dns.message.Message, way: str) -> dns.message.Message | None:
        kept.append(query)
        return response(kept[0], MX1) if len(kept) == 2 else None

    async def main() -> None:
        async with Scripted(late) as server:
            # Both tries come from one socket, for the answer goes to the port of the second.
            asked = NameServers([server.address], timeout=2.0)
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.RECORDS
            assert len(kept) == 2
            await asked.close()

    nameservers.SOCKETS, before = 1, nameservers.SOCKETS
    try:
        run(main)
    finally:
        nameservers.SOCKETS = before


def wrong_id(message: dns.message.Message) -> bytes:
    message.id ^= 1
    return message.to_wire()


def wrong_name(message: dns.message.Message) -> bytes:
    return message.to_wire().replace(b"\1d\4test", b"\1e\4test")


def wrong_type(message: dns.message.Message) -> bytes:
    return message.to_wire().replace(b"\4test\0\0\x0f", b"\4test\0\0\x10")


def a_query(message: dns.message.Message) -> bytes:
    message.flags &= ~dns.flags.QR
    return message.to_wire()


def a_piece(message: dns.message.Message) -> bytes:
    return message.to_wire()[:11]


WRONG = [wrong_id, wrong_name, wrong_type, a_query, a_piece, lambda _: b"", lambda _: b"\0", lambda _: b"x" * 2_000]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_was_not_asked_for_is_not_heard(wrong: Callable[[dns.message.Message], bytes]) -> None:
    def script(query: dns.message.Message, way: str) -> list[bytes]:
        forged = wrong(response(query, "d.test. 600 IN MX 0 evil.test."))
        return [forged, forged, response(query, MX1).to_wire()]

    async def check(asked: NameServers, server: Scripted) -> None:
        assert (await asked.ask(Kind.MX, "d.test")).records == (MX(10, "m.test"),)
        assert len(server.queries) == 1

    scripted(script, check)


def test_many_forged_answers_drive_the_question_to_tcp() -> None:
    def script(query: dns.message.Message, way: str) -> list[bytes] | dns.message.Message:
        if way == "tcp":
            return response(query, MX1)
        forged = response(query, "d.test. 600 IN MX 0 evil.test.")
        return [wrong_id(forged), *[wrong_name(forged)] * nameservers.UNWANTED, a_query(forged)]

    async def check(asked: NameServers, server: Scripted) -> None:
        assert (await asked.ask(Kind.MX, "d.test")).records == (MX(10, "m.test"),)
        assert [way for _, way, _ in server.queries] == ["udp", "tcp"]

    scripted(script, check)


def test_a_malformed_answer_is_a_fault_of_the_server() -> None:
    def script(query: dns.message.Message, way: str) -> bytes:
        return response(query, MX1).to_wire()[:-8]

    async def check(asked: NameServers, server: Scripted) -> None:
        assert (await asked.ask(Kind.MX, "d.test")).reason == f"{server.address}: a malformed answer"

    scripted(script, check)


def truncating(by_tcp: Callable[[dns.message.Message], bytes | dns.message.Message | None]) -> Script:
    def script(query: dns.message.Message, way: str) -> bytes | dns.message.Message | None:
        return by_tcp(query) if way == "tcp" else response(query, flags=dns.flags.TC)

    return script


def test_a_truncated_answer_is_asked_for_by_tcp() -> None:
    lines = [f"d.test. 600 IN TXT {n:0200}" for n in range(200)]

    async def check(asked: NameServers, server: Scripted) -> None:
        answer = await asked.ask(Kind.TXT, "d.test")
        assert len(answer.records) == RECORDS
        assert [way for _, way, _ in server.queries] == ["udp", "tcp"]

    scripted(truncating(lambda query: response(query, *lines)), check)


BY_TCP: dict[str, tuple[Callable[[dns.message.Message], bytes | None], str]] = {
    "closed": (lambda query: None, "by TCP: the connection was closed"),
    "another id": (lambda query: wrong_id(response(query, MX1)), "another answer by TCP than was asked for"),
    "another name": (lambda query: wrong_name(response(query, MX1)), "another answer by TCP than was asked for"),
    "nothing in it": (lambda query: b"", "another answer by TCP than was asked for"),
    "cut": (lambda query: response(query, MX1).to_wire()[:-8], "a malformed answer"),
}


@pytest.mark.parametrize(("by_tcp", "reason"), BY_TCP.values(), ids=BY_TCP)
def test_what_goes_wrong_by_tcp(by_tcp: Callable[[dns.message.Message], bytes | None], reason: str) -> None:
    async def check(asked: NameServers, server: Scripted) -> None:
        assert (await asked.ask(Kind.MX, "d.test")).reason == f"{server.address}: {reason}"

    scripted(truncating(by_tcp), check)


def test_tcp_that_hangs_or_is_refused_is_followed_by_the_next_server() -> None:
    async def main() -> None:
        truncate = truncating(lambda query: None)
        async with (
            Scripted(truncate, tcp=False) as hangs,
            Scripted(truncate, tcp=False) as refuses,
            Scripted(good) as works,
        ):
            host, port = parse_server(hangs.address)
            hanging = await asyncio.start_server(lambda reader, writer: reader.read(), host, port)
            asked = NameServers([hangs.address, refuses.address, works.address], timeout=2.0)
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.RECORDS
            hanging.close()
            await asked.close()

    run(main)


def test_a_server_without_edns() -> None:
    def old(query: dns.message.Message, way: str) -> bytes | dns.message.Message:
        if query.edns < 0:
            return response(query, MX1)
        # The header alone, as old servers have it.
        return query.id.to_bytes(2, "big") + b"\x80\x01" + bytes(8)

    async def check(asked: NameServers, server: Scripted) -> None:
        for _ in range(2):
            assert (await asked.ask(Kind.MX, "d.test")).records == (MX(10, "m.test"),)
        assert [query.edns for query, *_ in server.queries] == [0, -1, -1]

    scripted(old, check)


def test_a_server_that_cannot_read_anything() -> None:
    def script(query: dns.message.Message, way: str) -> dns.message.Message:
        return response(query, code=dns.rcode.FORMERR)

    async def check(asked: NameServers, server: Scripted) -> None:
        assert (await asked.ask(Kind.MX, "d.test")).reason == f"{server.address}: FORMERR"
        assert len(server.queries) == 2

    scripted(script, check)


def test_an_alias_is_followed_to_where_its_target_is_told() -> None:
    def script(query: dns.message.Message, way: str) -> dns.message.Message:
        if query.question[0].name.to_text() == "a.test.":
            return response(query, "a.test. 30 IN CNAME d.test.")
        return response(query, MX1)

    async def check(asked: NameServers, server: Scripted) -> None:
        answer = await asked.ask(Kind.MX, "a.test")
        assert (answer.records, answer.ttl) == ((MX(10, "m.test"),), 30)

    scripted(script, check)


def test_aliases_without_end_are_bounded() -> None:
    def script(query: dns.message.Message, way: str) -> dns.message.Message:
        return response(query, f"{query.question[0].name} 30 IN CNAME x{query.id}.test.")

    async def check(asked: NameServers, server: Scripted) -> None:
        answer = await asked.ask(Kind.MX, "a.test")
        assert (answer.status, answer.reason) == (Status.FAILED, "a chain of CNAME records has no end")
        assert len(server.queries) == nameservers.CHAIN

    scripted(script, check)


def test_ids_and_ports_are_many_and_ports_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameservers, "QUESTIONS", 10)

    async def check(asked: NameServers, server: Scripted) -> None:
        for _ in range(400):
            await asked.ask(Kind.MX, "d.test")
        assert len({query.id for query, *_ in server.queries}) > 350
        ports = {port for *_, port in server.queries}
        assert 30 <= len(ports) <= 48  # the kernel may give one twice

    scripted(good, check)


def test_many_at_once_on_few_sockets() -> None:
    async def check(asked: NameServers, server: Scripted) -> None:
        answers = await asyncio.gather(*(asked.ask(Kind.MX, "d.test") for _ in range(100)))
        assert all(answer.status is Status.RECORDS for answer in answers)
        assert len({port for *_, port in server.queries}) <= nameservers.SOCKETS

    scripted(good, check)


def test_questions_in_flight_are_bounded() -> None:
    async def main() -> None:
        async with Scripted(silent) as server:
            asked = NameServers([server.address], timeout=PATIENCE, at_once=5)
            asking = [asyncio.ensure_future(asked.ask(Kind.MX, "d.test")) for _ in range(20)]
            await asyncio.sleep(0.1)
            assert len(server.queries) == 5
            server.answer = good
            for each in asking[:5]:
                each.cancel()
            answers = await asyncio.gather(*asking[5:])
            assert all(answer.status is Status.RECORDS for answer in answers)
            await asked.close()

    run(main)


def test_closing_ends_the_questions_of_the_cache() -> None:
    async def main() -> None:
        async with Scripted(silent) as server:
            asked = NameServers([server.address], timeout=600.0)
            resolver = Resolver(asked.ask)
            asking = asyncio.ensure_future(resolver.mx("d.test"))
            await asyncio.sleep(0.05)
            await resolver.close()
            await asked.close()
            assert (await asking).status is Status.FAILED
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.FAILED
            assert len(server.queries) == 1

    run(main)


SERVERS = {
    "192.0.2.53": ("192.0.2.53", 53),
    "192.0.2.53:5353": ("192.0.2.53", 5353),
    "2001:db8::53": ("2001:db8::53", 53),
    "[2001:db8::53]": ("2001:db8::53", 53),
    "[2001:db8::53]:5353": ("2001:db8::53", 5353),
}


@pytest.mark.parametrize(("text", "address"), SERVERS.items(), ids=SERVERS)
def test_servers_are_read(text: str, address: tuple[str, int]) -> None:
    assert parse_server(text) == address


@pytest.mark.parametrize(
    "text", ["", "ns.test", "ns.test:53", "192.0.2.53:", "192.0.2.53:0", "192.0.2.53:65536", "192.0.2.53:x", "[::1]53x",
             "[::1]:", ":53", "192.0.2.53:²"],
)  # fmt: skip
def test_what_is_no_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="an IP address"):
        NameServers([text])


def test_resolv_conf() -> None:
    text = (
        b"# nameserver 192.0.2.9\nsearch test\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 # x\nnameserver ns.test\n"
    )
    assert parse_resolv_conf(text) == [("192.0.2.1", 53), ("2001:db8::1", 53)]
    assert len(parse_resolv_conf(b"nameserver 192.0.2.1\n" * 9)) == 3
    for empty in (b"", b"nameserver\n", b"\xff\n"):
        assert parse_resolv_conf(empty) == [("127.0.0.1", 53)]


def test_resolv_conf_is_read_again_when_its_servers_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Scripted(servfail) as one, Scripted(good) as other:
            ports = iter([one.address, other.address])
            monkeypatch.setattr(nameservers, "parse_resolv_conf", lambda text: [parse_server(next(ports))])
            path = tmp_path / "resolv.conf"
            asked = NameServers(resolv_conf=path)
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.FAILED
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.FAILED
            path.write_text("nameserver 192.0.2.1\n")
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.FAILED
            assert (await asked.ask(Kind.MX, "d.test")).status is Status.RECORDS
            await asked.close()

    run(main)


ZONE = """\
d IN MX 20 m2
d IN MX 10 m1
m1 60 IN A 192.0.2.1
m1 60 IN AAAA 2001:db8::1
alias IN CNAME d
away IN CNAME d.other.
1.2.0.192.in-addr IN PTR M1
text IN TXT "v=spf1 " "-all"
""" + "".join(f"many IN MX {n} mx{n}\n" for n in range(1, 301))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nameserver(tmp_path_factory.mktemp("nsd"), {"test": ZONE, "other": "d 30 IN MX 5 m1.test.\n"}) as address:
        yield address


REAL: dict[str, tuple[Kind, str, Status, int]] = {
    "records": (Kind.MX, "d.test", Status.RECORDS, 600),
    "an alias": (Kind.MX, "alias.test", Status.RECORDS, 600),
    "an alias to another zone": (Kind.MX, "away.test", Status.RECORDS, 30),
    "addresses": (Kind.A, "m1.test", Status.RECORDS, 60),
    "strings": (Kind.TXT, "text.test", Status.RECORDS, 600),
    "no such records": (Kind.MX, "m1.test", Status.NO_RECORDS, 300),
    "no such name": (Kind.MX, "none.test", Status.NO_NAME, 300),
    "a zone it has not": (Kind.MX, "d.example", Status.FAILED, 0),
}


@pytest.mark.parametrize(("kind", "name", "status", "ttl"), REAL.values(), ids=REAL)
def test_a_real_server(real: str, kind: Kind, name: str, status: Status, ttl: int) -> None:
    async def main() -> None:
        asked = NameServers([real], timeout=PATIENCE)
        answer: Answer[Any] = await asked.ask(kind, name)
        assert (answer.status, answer.ttl) == (status, ttl), answer
        await asked.close()

    run(main)


def test_a_real_server_truncates(real: str) -> None:
    async def main() -> None:
        asked = NameServers([real], timeout=PATIENCE)
        answer: Answer[MX] = await asked.ask(Kind.MX, "many.test")
        assert answer.octets > 1_232
        assert [record.preference for record in answer.records] == list(range(1, 101))
        await asked.close()

    run(main)
