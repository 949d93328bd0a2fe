"""The connections of a transport: made when needed, kept for the next messages, ended when nobody wants them.

A Hop is one address spoken to in one manner, with what is known of it: its idle links, that it failed, that its TLS
failed. A link is kept for so many messages, for so long, and some seconds without any; then it says QUIT. One timer
serves all, and only while there are links: once a second it looks at each.
In: a Host and a Manner. Out: a Link that can be sent deliveries, or the Outcome of a connection that was not to be had.
Not here: which host is tried (smtp.py), what is said (dialogue.py). Failure: an Outcome; what this machine lacks
(descriptors, ports) is not laid to the host's account.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from errno import EADDRNOTAVAIL, EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeAlias

from . import Outcome, Result, Retry, Scope
from .client_tls import Manner
from .failures import Answer, Stage, failure
from .link import LINGER, Link

IPAddress: TypeAlias = IPv4Address | IPv6Address

READERS = 4  # threads that read messages from the disk
MANY = 10_000  # hops, and destinations, of which something is remembered

# Of this machine, and not the host's doing. EAGAIN: a unix socket whose backlog is full is the host's.
_OURS = {EADDRNOTAVAIL, EMFILE, ENFILE, ENOBUFS, ENOMEM}


class Limits(NamedTuple):
    """Seconds, but for `messages` over one connection and `idle_links` in all. `tick`: how often is looked."""

    messages: int = 100
    age: float = 300.0
    idle: float = 3.0
    idle_links: int = 200
    tick: float = 1.0
    near: float = 60.0  # a destination's mail goes to the hop it went to last, if that has an idle link
    failing: float = 120.0  # a hop that failed comes last
    clear: float = 3600.0  # a hop whose TLS failed is spoken to in clear


class Hop:
    """`name` is what a certificate is checked for and outcomes tell; `address` is an IP address, or the path of a unix
    socket. Times are monotonic."""

    __slots__ = ("address", "clear_until", "failing_until", "idle", "manner", "name", "port")

    def __init__(self, name: str, address: IPAddress | str, port: int, manner: Manner) -> None:
        self.name = name
        self.address = address
        self.port = port
        self.manner = manner
        self.idle: list[Link] = []
        self.failing_until = 0.0
        self.clear_until = 0.0


class Pool:
    """`source` are our own addresses for connections, at most one of each family. `now` is in seconds."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        source: tuple[IPAddress, ...] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or Limits()
        self.now = now
        self._source = {address.version: (str(address), 0) for address in source}
        self._links: dict[Link, tuple[Hop, float]] = {}  # with when it was made
        self._hops: dict[tuple[str, IPAddress | str, int, Manner], Hop] = {}
        self._near: dict[tuple[str, Manner], tuple[Hop, float]] = {}
        self._idle = 0
        self._timer: asyncio.TimerHandle | None = None
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._closing = False

    # Hops

    def hop(self, name: str, address: IPAddress | str, port: int, manner: Manner) -> Hop:
        key = (name, address, port, manner)
        hop = self._hops.get(key)
        if hop is None:
            if len(self._hops) >= MANY:
                now = self.now()
                self._hops = {
                    key: hop
                    for key, hop in self._hops.items()
                    if hop.idle or hop.failing_until > now or hop.clear_until > now
                }
            hop = self._hops[key] = Hop(name, address, port, manner)
        return hop

    def remember(self, destination: str, hop: Hop) -> None:
        """That mail for the destination goes to this hop, for now."""
        if len(self._near) >= MANY:
            self._near.clear()
        self._near[destination, hop.manner] = (hop, self.now() + self.limits.near)

    # Links

    def near(self, destination: str, manner: Manner) -> Link | None:
        """An idle link to where the last mail for the destination went."""
        near = self._near.get((destination, manner))
        if near is None or not near[0].idle or near[1] < self.now():
            return None
        return self.take(near[0])

    def take(self, hop: Hop) -> Link | None:
        """An idle link to the hop: the one used last."""
        if not hop.idle:
            return None
        self._idle -= 1
        return hop.idle.pop()

    def make(self, hop: Hop) -> Link:
        """A link that is not connected yet; deliveries can be given to it."""
        now = self.now()
        link = Link(
            hop.name,
            hop.manner,
            clear=hop.clear_until > now,
            local=hop.manner.terms.lmtp and (isinstance(hop.address, str) or hop.address.is_loopback),
            most=self.limits.messages,
            executor=self._readers,
            on_end=self._on_end,
            on_gone=self._on_gone,
        )
        self._links[link] = (hop, now)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.limits.tick, self._tick)
        return link

    async def connect(self, link: Link) -> Outcome | None:
        """None, or why there is no connection."""
        hop = self._links[link][0]
        loop = asyncio.get_running_loop()
        made = False
        try:
            async with asyncio.timeout(link.dialogue.terms.patience[Stage.CONNECT]):
                if isinstance(hop.address, str):
                    await loop.create_unix_connection(lambda: link, hop.address)
                else:
                    source = self._source.get(hop.address.version)
                    await loop.create_connection(lambda: link, str(hop.address), hop.port, local_addr=source)
            made = True
        except TimeoutError:
            return failure(Stage.CONNECT, Answer.TIME_OUT, hop.name)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            if error.errno in _OURS or (error.errno == EAGAIN and not isinstance(hop.address, str)):
                text = f"no connection to {hop.name} can be made from here: {why}"
                return Outcome(Result.DEFERRED, "4.3.2", text, Scope.SESSION, Retry.LATER, hop.name)
            return failure(Stage.CONNECT, Answer.HANG_UP, hop.name, why=why)
        finally:
            if not made:
                link.abort()
                self._links.pop(link, None)
        return None

    def park(self, link: Link) -> None:
        """Keeps a link for the next delivery, or ends it."""
        if link.closing:
            return
        entry = self._links.get(link)
        if entry is None or self._closing or self._idle >= self.limits.idle_links or not link.reusable:
            link.quit()
            return
        if link.messages == 1:
            link.keep_session()
        link.park()
        self._idle += 1
        entry[0].idle.append(link)

    def _on_end(self, link: Link) -> None:
        if link.parked:
            link.parked = False
            self._links[link][0].idle.remove(link)
            self._idle -= 1

    def _on_gone(self, link: Link) -> None:
        self._links.pop(link, None)

    # Time

    def _tick(self) -> None:
        limits = self.limits
        now = self.now()
        for link, (_, made) in list(self._links.items()):
            if now - made > limits.age:
                link.most = 0
            if link.parked and (not link.reusable or link.rested(now) > limits.idle):
                link.quit()
            else:
                link.check(now)
        self._timer = None
        if self._links:
            self._timer = asyncio.get_running_loop().call_later(limits.tick, self._tick)

    async def close(self) -> None:
        """Ends all links: those that are idle with QUIT."""
        self._closing = True
        for link in list(self._links):
            if link.parked:
                link.quit()
            elif not link.closing:
                link.abort()
        deadline = self.now() + LINGER
        while self._links and self.now() < deadline:
            await asyncio.sleep(0.005)
        for link in list(self._links):
            link.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._readers.shutdown(wait=False)
