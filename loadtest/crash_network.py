"""`network`: connections that are cut at every octet, answers that get lost, and a network that loses packets.

In: a proxy between client and server, or between server and next host; a network namespace with rules that drop
packets. Out: for a message whose 250 was read: it arrives, whole. For one whose 250 was swallowed it may have arrived,
and may arrive twice where that was the next host's 250, never otherwise.
A run is a row of neighbouring cases, each with a connection and a message of its own. On failure: as any fault.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import getdoc
from typing import TypeVar

from .crash_disk import Layout, check_root, run
from .crash_fault import Fault, lost_run, play_run
from .crash_load import Connection, GoneError, Letter, send_bdat, send_data
from .crash_proxy import Cut, Proxy
from .crash_result import Finding
from .crash_server import CrashError
from .crash_site import LOCAL, Bench, Site, opened
from .ledger import make_body, outcome_of
from .processes import find_program
from .sink_replies import R250_KEPT

SIZE = 200  # octets of a body that travels
INWARD = 700  # octets that a session of one message has at most, each way
OUTWARD = 800
ROW = 50  # cases of an inward run
LANES = 8  # next hosts beside each other: each is tried again a second after a cut
HELD_SECONDS = (0.3, 1.5)

_Case = TypeVar("_Case")
_LANE = """
[[route]]
domain = "lane{number}.test"
transport = "lane{number}"
[transport.lane{number}]
type = "smtp"
smarthost = "127.0.0.1:{port}"
tls = "off"
"""


def cut_inward(bench: Bench) -> Iterator[Finding]:
    """The connection of a client is cut behind every single octet of a session with one message, by DATA and by BDAT,
    on its way in and on that of the replies. A message whose 250 was read is delivered once; one whose end was not seen
    by the server is not; in between either."""
    cases = [
        (Cut(octets, forward), bdat)
        for octets in range(1, INWARD + 1)
        for forward, bdat in itertools.product((True, False), repeat=2)
    ]
    with opened(bench, Layout()) as site:
        site.server.start()
        for number, row in _rows(bench, cases):
            site.begin(number, bench.chance("inward", number))
            try:
                with Proxy(("127.0.0.1", site.server.port), [cut for cut, _ in row], lambda: None) as proxy:
                    for place, (_, bdat) in enumerate(row):
                        _send_one(site, proxy.port, f"r{number}c{place}", f"box{place % 3}-{number}@{LOCAL}", bdat)
                    struck = proxy.hits > 0
                yield site.finish(struck)
            except CrashError as error:
                yield lost_run(site, number, str(error))
                return
            finally:
                site.close()


def cut_outward(bench: Bench) -> Iterator[Finding]:
    """The connection to a next host is cut behind every single octet, on its way out and on that of its replies. The
    message is sent again until its 250 was read; a second copy only where the cut fell behind the next host's 250."""
    cases = [Cut(octets, forward) for octets in range(1, OUTWARD + 1) for forward in (True, False)]
    yield from _outward(bench, cases)


def swallow_replies(bench: Bench) -> Iterator[Finding]:
    """The next host takes a message and answers the final dot; the answer never arrives. The message is sent again:
    this one fault makes second copies."""
    yield from _outward(bench, [Cut(0, forward=False, swallow=R250_KEPT)] * (5 * LANES))


def _outward(bench: Bench, cases: Sequence[Cut]) -> Iterator[Finding]:
    with ExitStack() as stack:
        site = stack.enter_context(opened(bench, Layout()))
        proxies = [stack.enter_context(Proxy(("127.0.0.1", site.sink_port), (), site.note_fault)) for _ in range(LANES)]
        site.tables = "".join(_LANE.format(number=number, port=proxy.port) for number, proxy in enumerate(proxies))
        site.configure(workers=2)
        site.server.start()
        for number, row in _rows(bench, cases, LANES):
            site.begin(number, bench.chance("outward", number))
            hits = sum(proxy.hits for proxy in proxies)
            try:
                for place, (cut, proxy) in enumerate(zip(row, proxies, strict=False)):
                    proxy.order([cut])
                    _send_one(site, site.server.port, f"r{number}c{place}", f"box@lane{place}.test", bdat=False)
                site.server.drain()
                yield site.finish(sum(proxy.hits for proxy in proxies) > hits)
            except CrashError as error:
                yield lost_run(site, number, str(error))
                return
            finally:
                site.close()


def _rows(bench: Bench, cases: Sequence[_Case], length: int = ROW) -> Iterator[tuple[int, Sequence[_Case]]]:
    """Cases in runs; fewer runs than there are rows: at equal distances."""
    count = -(-len(cases) // length)
    wanted = len(bench.numbers) or count
    for number in range(bench.numbers[0] if bench.numbers else 0, count, max(1, count // wanted)):
        yield number, cases[number * length : (number + 1) * length]


def _send_one(site: Site, port: int, name: str, recipient: str, bdat: bool) -> None:
    chance = random.Random(name)
    letter = Letter(name, make_body(name, SIZE, chance), (recipient,))
    try:
        with Connection(port) as connection:
            connection.hello()
            if bdat:
                send_bdat(connection, [letter], chance)
            else:
                send_data(connection, [letter])
    except GoneError:
        pass
    finally:
        site.ledger.write(letter, outcome_of(letter.code), letter.code, letter.refused)


# --- a network of our own ---


class Wire:
    """A wire to a namespace. What comes out at its other end can be dropped."""

    inside, outside = "10.213.97.2", "10.213.97.1"

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def prefix(self) -> tuple[str, ...]:
        """Before a command that is to run inside."""
        return ("ip", "netns", "exec", self.name)

    def drop(self, what: str) -> None:
        """Packets that match, on their way in and out, such as "numgen random mod 100 < 5 drop"."""
        chains = [f"chain {hook} {{ type filter hook {hook} priority 0; {what}; }}" for hook in ("input", "output")]
        self.command("nft", "\n".join(["table inet crash {", *chains, "}"]))

    def mend(self) -> None:
        self.command("nft", "delete table inet crash")

    def command(self, *words: str) -> None:
        run(*self.prefix, *words)


@contextmanager
def wire() -> Iterator[Wire]:
    """As long as the block runs. Raises LoadError."""
    check_root()
    find_program("nft", "nftables")
    made = Wire(f"crash{os.getpid()}")
    run("ip", "netns", "add", made.name)
    try:
        run("ip", "link", "add", "crash-out", "type", "veth", "peer", "name", "crash-in", "netns", made.name)
        run("ip", "address", "add", f"{made.outside}/30", "dev", "crash-out")
        run("ip", "link", "set", "crash-out", "up")
        for words in (f"address add {made.inside}/30 dev crash-in", "link set crash-in up", "link set lo up"):
            made.command("ip", *words.split())
        yield made
    finally:
        # With its namespace it would go too, but only some time later, and its name with it.
        subprocess.run(["ip", "link", "delete", "crash-out"], capture_output=True, check=False)
        run("ip", "netns", "delete", made.name)


def lose_packets(site: Site, there: Wire) -> None:
    """One packet in ten is lost for a moment, in both directions. Everything takes longer, and nothing else."""
    _drop(site, there, "numgen random mod 100 < 10 drop")


def part(site: Site, there: Wire) -> None:
    """No packet passes for a moment, as when a switch is started anew. Everything goes on where it stood."""
    _drop(site, there, "drop")


def reset(site: Site, there: Wire) -> None:
    """Every connection is reset for a moment, as by a firewall that forgot them. What was under way is sent again: a
    second copy only where the next host's 250 was on its way."""
    site.note_fault()
    _drop(site, there, "meta l4proto tcp reject with tcp reset")
    site.note_fault()


def _drop(site: Site, there: Wire, what: str) -> None:
    there.drop(what)
    try:
        time.sleep(site.chance.uniform(*HELD_SECONDS))
    finally:
        there.mend()


def in_namespace(name: str, strike: Callable[[Site, Wire], None]) -> Fault:
    """The server runs at the other end of a wire, between its clients and its next host."""

    def play(bench: Bench) -> Iterator[Finding]:
        with ExitStack() as stack:
            there = stack.enter_context(wire())
            site = stack.enter_context(opened(bench, Layout()))
            inward = Proxy((there.inside, site.server.port), (), site.note_fault)
            outward = Proxy(("127.0.0.1", site.sink_port), (), site.note_fault, there.outside)
            for proxy in (inward, outward):
                stack.enter_context(proxy)
            site.move(there.prefix, there.inside, there.outside, inward.port, f"{there.outside}:{outward.port}")
            site.server.start()
            for number in bench.numbers:
                found = play_run(site, number, bench.chance(name, number), lambda site: strike(site, there))
                yield found
                if found.violations:
                    return

    return Fault(name, play, getdoc(strike) or "")


FAULTS: tuple[Fault, ...] = (
    Fault("network.inward", cut_inward, getdoc(cut_inward) or "", every=True),
    Fault("network.outward", cut_outward, getdoc(cut_outward) or "", every=True),
    Fault("network.swallow", swallow_replies, getdoc(swallow_replies) or "", every=True),
    in_namespace("network.loss", lose_packets),
    in_namespace("network.partition", part),
    in_namespace("network.reset", reset),
)
