"""Which hosts a domain's mail goes to: every case of the table, with a real name server and zones made for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import dns.rcode
import pytest
import uvloop
from nameserver import Scripted, nameserver, response

from fastsmtp.delivery import Outcome, Result, Scope
from fastsmtp.delivery.hosts import (
    ADDRESSES,
    BATCH,
    LOOP,
    NO_ADDRESS,
    NO_BETTER,
    NO_DOMAIN,
    NO_HOSTS,
    NO_SMARTHOST,
    NULL_MX,
    UNUSABLE,
    Finder,
    Host,
    Hosts,
    Way,
    choose,
    find_way,
)
from fastsmtp.dns import IPAddress, Resolver
from fastsmtp.nameservers import NameServers

OURS = "MX.here.Test"
OWN = ip_address("198.51.100.1")  # an address of this machine, for the tests

ZONE = """\
one IN MX 10 h1
order IN MX 30 h3
order IN MX 10 h1
order IN MX 20 h2
Mixed IN MX 10 H1
equal IN MX 10 h1
equal IN MX 10 h2
equal IN MX 10 h3
plain IN A 203.0.113.9
plain IN AAAA 2001:db8::9
alias IN CNAME order
aliasplain IN CNAME plain
aliasnone IN CNAME none
tohostalias IN MX 10 hostalias
hostalias IN CNAME h1
circle IN CNAME circle2
circle2 IN CNAME circle
null IN MX 0 .
nullodd IN MX 10 .
withroot IN MX 0 .
withroot IN MX 10 h1
rootandus IN MX 0 .
rootandus IN MX 10 mx.here
nothing IN TXT "no mail"
noneresolve IN MX 10 none1
noneresolve IN MX 20 none2
noaddress IN MX 10 nothing
toip IN MX 10 203.0.113.9.test.
someresolve IN MX 10 none1
someresolve IN MX 20 h2
brokenfirst IN MX 10 h.broken.
brokenfirst IN MX 20 h2
brokenonly IN MX 10 h.broken.
brokenonly IN MX 20 none1
us IN MX 10 mx.here
us IN MX 10 h1
us IN MX 20 h2
backup IN MX 10 h1
backup IN MX 20 MX.Here
backup IN MX 20 h2
backup IN MX 30 h3
backupaddress IN MX 10 h1
backupaddress IN MX 20 otherus
backupaddress IN MX 20 h2
otherus IN A 198.51.100.1
mapped IN MX 10 mappedus
mappedus IN AAAA ::ffff:198.51.100.1
implicitus IN A 198.51.100.1
primarygone IN MX 10 none1
primarygone IN MX 20 mx.here
primarybroken IN MX 10 h.broken.
primarybroken IN MX 20 mx.here
equalbroken IN MX 20 mx.here
equalbroken IN MX 20 h.broken.
mx.here IN A 203.0.113.77
loopback IN MX 10 local
local IN A 127.0.0.1
local IN AAAA ::1
localhost IN MX 10 localhost.
implicitloopback IN A 127.0.0.2
mixeduse IN MX 10 mixedhost
mixedhost IN A 169.254.1.1
mixedhost IN A 203.0.113.5
both IN MX 10 both1
both1 IN A 203.0.113.11
both1 IN A 203.0.113.12
both1 IN AAAA 2001:db8::11
both1 IN AAAA 2001:db8::12
pairs IN MX 10 both1
pairs IN MX 20 both2
pairs IN MX 30 h3
both2 IN A 203.0.113.21
both2 IN AAAA 2001:db8::21
enough IN MX 10 both1
enough IN MX 20 both2
enough IN MX 30 h3
enough IN MX 40 h2
large IN MX 10 large1
large IN MX 20 h2
same IN MX 10 h1
same IN MX 20 hostalias
h1 IN A 203.0.113.1
h2 IN A 203.0.113.2
h3 IN A 203.0.113.3
"""
ZONE += "".join(f"large1 IN A 203.0.113.{n}\n" for n in range(100, 140))
ZONE += "".join(f"many IN MX 10 many{n}\nmany{n} IN A 203.0.113.{n % 200 + 1}\n" for n in range(300))
ZONE += "".join(f"chain{n} IN CNAME chain{n + 1}\n" for n in range(40)) + "chain40 IN A 203.0.113.4\n"

BROKEN = "broken"  # a zone the server has not: it refuses


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nameserver(tmp_path_factory.mktemp("nsd"), ZONE) as address:
        yield address


def way_out(address: IPAddress) -> Way:
    return Way.OWN if address == OWN else Way.OUT


def run(server: str, check: Callable[[Finder], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        asked = NameServers([server], timeout=20.0)
        resolver = Resolver(asked.ask)
        async with asyncio.timeout(60):
            await check(Finder(resolver, OURS, **{"way": way_out, **options}))
        await resolver.close()
        await asked.close()

    uvloop.run(main())


def find(server: str, domain: str, **options: Any) -> Hosts | Outcome:
    found: list[Hosts | Outcome] = []

    async def check(finder: Finder) -> None:
        found.append(await finder.find(domain))

    run(server, check, **options)
    return found[0]


def hosts(*rows: str) -> Hosts:
    """From "name address"."""
    return tuple(Host(name, ip_address(address)) for name, address in (row.split() for row in rows))


H1, H2, H3 = (f"h{n}.test 203.0.113.{n}" for n in (1, 2, 3))

FOUND = {
    "one MX": ("one.test", [H1]),
    "in order of preference": ("order.test", [H1, H2, H3]),
    "names in any case": ("MIXED.test", [H1]),
    "no MX: its own addresses": ("plain.test", ["plain.test 2001:db8::9", "plain.test 203.0.113.9"]),
    "an alias with MX": ("alias.test", [H1, H2, H3]),
    "an alias without MX": ("aliasplain.test", ["aliasplain.test 2001:db8::9", "aliasplain.test 203.0.113.9"]),
    "an MX that is an alias": ("tohostalias.test", ["hostalias.test 203.0.113.1"]),
    "the root among others": ("withroot.test", [H1]),
    "a better host that does not exist": ("someresolve.test", [H2]),
    "a better host that cannot be asked for": ("brokenfirst.test", [H2]),
    "ourselves by name, with all that are no better": ("backup.test", [H1]),
    "ourselves by address, with all that are no better": ("backupaddress.test", [H1]),
    "an address of no use beside another": ("mixeduse.test", ["mixedhost.test 203.0.113.5"]),
    "an address twice": ("same.test", [H1]),
    "a literal": ("[203.0.113.7]", ["[203.0.113.7] 203.0.113.7"]),
    "a literal, IPv6": ("[ipv6:2001:db8::7]", ["[ipv6:2001:db8::7] 2001:db8::7"]),
}


@pytest.mark.parametrize(("domain", "rows"), FOUND.values(), ids=FOUND)
def test_hosts_are_found(server: str, domain: str, rows: list[str]) -> None:
    assert find(server, domain) == hosts(*rows)


NOT_FOUND = {
    "null MX": ("null.test", NULL_MX),
    "null MX with another preference": ("nullodd.test", NULL_MX),
    "no such domain": ("none.test", NO_DOMAIN),
    "no such domain behind an alias": ("aliasnone.test", NO_DOMAIN),
    "no domain name": ("a..b", NO_DOMAIN),
    "neither MX nor addresses": ("nothing.test", NO_ADDRESS),
    "no MX host exists": ("noneresolve.test", NO_HOSTS),
    "no MX host has an address": ("noaddress.test", NO_HOSTS),
    "an address in place of a name": ("toip.test", NO_HOSTS),
    "loopback only": ("loopback.test", UNUSABLE),
    "localhost": ("localhost.test", UNUSABLE),
    "loopback without MX": ("implicitloopback.test", UNUSABLE),
    "loopback as a literal": ("[127.0.0.1]", UNUSABLE),
    "ourselves as the best": ("us.test", LOOP),
    "ourselves as the best that is a host": ("rootandus.test", LOOP),
    "ourselves by mapped address": ("mapped.test", LOOP),
    "ourselves by address, without MX": ("implicitus.test", LOOP),
    "ourselves by name, without MX": ("MX.here.test", LOOP),
    "ourselves as a literal": ("[198.51.100.1]", LOOP),
    "ourselves, an equal cannot be asked for": ("equalbroken.test", LOOP),
    "ourselves, the better one does not exist": ("primarygone.test", NO_BETTER),
}


@pytest.mark.parametrize(("domain", "outcome"), NOT_FOUND.values(), ids=NOT_FOUND)
def test_there_is_no_host(server: str, domain: str, outcome: Outcome) -> None:
    found = find(server, domain)
    assert found is outcome, found


CODES = {
    NULL_MX: (Result.FAILED, "5.1.10"),
    NO_DOMAIN: (Result.FAILED, "5.1.2"),
    NO_ADDRESS: (Result.FAILED, "5.1.2"),
    NO_HOSTS: (Result.FAILED, "5.4.4"),
    UNUSABLE: (Result.FAILED, "5.4.4"),
    LOOP: (Result.FAILED, "5.4.6"),
    NO_BETTER: (Result.DEFERRED, "4.4.4"),
    NO_SMARTHOST: (Result.DEFERRED, "4.4.4"),
}


@pytest.mark.parametrize(("outcome", "result", "status"), [(key, *row) for key, row in CODES.items()])
def test_what_the_outcomes_say(outcome: Outcome, result: Result, status: str) -> None:
    assert (outcome.result, outcome.status, outcome.scope) == (result, status, Scope.HOST)


@pytest.mark.parametrize("domain", ["d.broken", "brokenonly.test", "primarybroken.test", "circle.test"])
def test_what_cannot_be_asked_is_deferred(server: str, domain: str) -> None:
    found = find(server, domain)
    assert isinstance(found, Outcome)
    assert (found.result, found.status, found.scope) == (Result.DEFERRED, "4.4.3", Scope.HOST)
    assert found.text.startswith("DNS: ")


def test_no_address_is_asked_for_after_an_error() -> None:
    def script(query: Any, way: str) -> Any:
        return response(query, code=dns.rcode.SERVFAIL)

    async def main() -> None:
        async with Scripted(script) as server:
            asked = NameServers([server.address])
            found = await Finder(Resolver(asked.ask), OURS, way=way_out).find("d.test")
            assert isinstance(found, Outcome)
            assert found.text == f"DNS: {server.address}: SERVFAIL"
            assert [query.question[0].to_text() for query, *_ in server.queries] == ["d.test. IN MX"]
            await asked.close()

    uvloop.run(main())


def test_an_error_for_one_family_hides_no_address_of_the_other() -> None:
    def script(query: Any, way: str) -> Any:
        match query.question[0].to_text().split():
            case [name, _, "MX"]:
                return response(query, f"{name} 60 IN MX 10 h.test.")
            case [name, _, "A"]:
                return response(query, f"{name} 60 IN A 203.0.113.1")
        return response(query, code=dns.rcode.SERVFAIL)

    async def main() -> None:
        async with Scripted(script) as server:
            asked = NameServers([server.address])
            assert await Finder(Resolver(asked.ask), OURS, way=way_out).find("d.test") == hosts("h.test 203.0.113.1")
            await asked.close()

    uvloop.run(main())


def test_a_long_chain_of_aliases_is_deferred(server: str) -> None:
    found = find(server, "chain0.test")
    assert isinstance(found, Outcome)
    assert found.text == "DNS: a chain of CNAME records has no end"
    assert find(server, "chain35.test") == hosts("chain35.test 203.0.113.4")


def test_equals_come_by_chance(server: str) -> None:
    async def check(finder: Finder) -> None:
        orders = set()
        for _ in range(100):
            found = await finder.find("equal.test")
            assert not isinstance(found, Outcome)
            assert sorted(found) == sorted(hosts(H1, H2, H3))
            orders.add(found)
        assert len(orders) == 6

    run(server, check, shuffle=random.Random(1).shuffle)


def test_of_one_host_the_families_come_in_turn(server: str) -> None:
    async def check(finder: Finder) -> None:
        orders = set()
        for _ in range(50):
            found = await finder.find("both.test")
            assert not isinstance(found, Outcome)
            assert [host.address.version for host in found] == [6, 4, 6, 4]
            orders.add(found)
        assert len(orders) == 4

    run(server, check, shuffle=random.Random(1).shuffle)


def test_each_host_has_a_pair_of_addresses_before_one_has_more(server: str) -> None:
    found = find(server, "pairs.test", shuffle=lambda addresses: addresses.sort(key=str))
    assert found == hosts(
        "both1.test 2001:db8::11", "both1.test 203.0.113.11", "both2.test 2001:db8::21", "both2.test 203.0.113.21", H3
    )


def test_a_host_of_many_addresses_leaves_room_for_the_next(server: str) -> None:
    found = find(server, "large.test")
    assert not isinstance(found, Outcome)
    assert [host.name for host in found] == ["large1.test"] * 4 + ["h2.test"]


def names_asked_for(server: str, domain: str) -> tuple[Hosts | Outcome, set[str]]:
    names: set[str] = set()
    found: list[Hosts | Outcome] = []

    async def main() -> None:
        asked = NameServers([server], timeout=20.0)

        def ask(kind: Any, name: str) -> Any:
            names.add(name)
            return asked.ask(kind, name)

        found.append(await Finder(Resolver(ask), OURS, way=way_out).find(domain))
        await asked.close()

    uvloop.run(main())
    return found[0], names


def test_hundreds_of_equals_are_not_all_asked_for(server: str) -> None:
    found, names = names_asked_for(server, "many.test")
    assert not isinstance(found, Outcome)
    assert len({host.name for host in found}) == ADDRESSES
    assert len(names) == 1 + BATCH


def test_hosts_that_will_not_be_tried_are_not_asked_for(server: str) -> None:
    _, names = names_asked_for(server, "enough.test")
    assert names == {"enough.test", "both1.test", "both2.test", "h3.test"}


def test_no_route_for_ipv6_costs_no_try(server: str) -> None:
    def no_ipv6(address: IPAddress) -> Way:
        return Way.NONE if address.version == 6 else Way.OUT

    assert find(server, "plain.test", way=no_ipv6) == hosts("plain.test 203.0.113.9")
    # Where nothing can be reached all are tried: connecting says why.
    assert find(server, "plain.test", way=lambda _: Way.NONE) == hosts(
        "plain.test 2001:db8::9", "plain.test 203.0.113.9"
    )


def test_own_addresses_that_the_machine_does_not_have(server: str) -> None:
    own = [ip_address("203.0.113.2")]
    assert find(server, "order.test", own_addresses=own) == hosts(H1)
    assert find(server, "[203.0.113.2]", own_addresses=own) is LOOP


def test_loopback_is_usable_when_allowed(server: str) -> None:
    rows = hosts("local.test ::1", "local.test 127.0.0.1")
    # The kernel calls it ours; it is another server nevertheless.
    assert find(server, "loopback.test", allow_loopback=True, way=find_way) == rows
    assert find(server, "[127.0.0.1]", allow_loopback=True, way=find_way) == hosts("[127.0.0.1] 127.0.0.1")
    own = [ip_address("127.0.0.1")]
    assert find(server, "loopback.test", allow_loopback=True, own_addresses=own) is LOOP


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.0.1", "169.254.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
     "255.255.255.255", "::", "::1", "::203.0.113.1", "fe80::1", "ff02::1"],
)  # fmt: skip
def test_addresses_of_no_use(server: str, address: str) -> None:
    literal = f"[ipv6:{address}]" if ":" in address else f"[{address}]"
    assert find(server, literal) is UNUSABLE


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "fd00::1", "64:ff9b::cb00:7101"]
)
def test_private_addresses_are_usable(server: str, address: str) -> None:
    literal = f"[ipv6:{address}]" if ":" in address else f"[{address}]"
    assert find(server, literal) == (Host(literal, ip_address(address)),)


HOSTS_BY_NAME = {
    "a name": ("h1.test", hosts(H1)),
    "both families": ("both2.test", hosts("both2.test 2001:db8::21", "both2.test 203.0.113.21")),
    "its MX records do not count": ("backup.test", NO_SMARTHOST),
    "an address": ("203.0.113.5", hosts("203.0.113.5 203.0.113.5")),
    "IPv6": ("2001:db8::1", hosts("2001:db8::1 2001:db8::1")),
    "this machine": ("localhost", hosts("localhost ::1", "localhost 127.0.0.1")),
    "a loopback address": ("local.test", hosts("local.test ::1", "local.test 127.0.0.1")),
    "no such name": ("none.test", NO_SMARTHOST),
}


@pytest.mark.parametrize(("name", "result"), HOSTS_BY_NAME.values(), ids=HOSTS_BY_NAME)
def test_a_host_of_the_configuration(server: str, name: str, result: Hosts | Outcome) -> None:
    async def check(finder: Finder) -> None:
        assert await finder.find_host(name) == result
        broken = await finder.find_host("h.broken")
        assert isinstance(broken, Outcome)
        assert (broken.result, broken.status) == (Result.DEFERRED, "4.4.3")

    run(server, check)


def test_where_addresses_lead() -> None:
    assert find_way(ip_address("127.0.0.1")) is Way.OWN
    assert find_way(ip_address("::1")) in (Way.OWN, Way.NONE)  # some machines have no IPv6
    assert find_way(ip_address("255.255.255.255")) is Way.NONE
    assert find_way(ip_address("203.0.113.1")) in (Way.OUT, Way.NONE)


def test_where_an_address_leads_is_asked_again_after_a_while(server: str) -> None:
    asked: list[IPAddress] = []
    clock = 0.0

    def way(address: IPAddress) -> Way:
        asked.append(address)
        return Way.OUT

    async def check(finder: Finder) -> None:
        nonlocal clock
        for seconds in (0.0, 59.0, 60.0):
            clock = seconds
            await finder.find("one.test")
        assert len(asked) == 2

    run(server, check, way=way, now=lambda: clock)


def test_choosing_keeps_the_order_and_the_bound() -> None:
    a = [IPv4Address(n) for n in range(10)]
    b = [IPv6Address(n) for n in range(10)]
    assert [host.address for host in choose([("a", a[:1]), ("b", b), ("c", a[:3])])] == [a[0], b[0], b[1], a[1], a[2]]
    assert [host.address for host in choose([("a", a)])] == a[:ADDRESSES]
    assert choose([]) == ()
