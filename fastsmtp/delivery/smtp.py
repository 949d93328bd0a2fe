"""The transports that hand mail to another server: SMTP by MX, SMTP by smarthost, LMTP.

In: deliveries for one destination; they go one after another over one link, a kept one where there is one. Out: an
Outcome for each recipient. What a host does not decide goes on: over another connection to the same host where
`retry` says so, else to the next host, five addresses at most; what is still open then is deferred with what was
heard. Each connection decides something, or its host is left; so an attempt ends.
A hop that failed is tried last for a while; one whose TLS failed, where TLS is only opportunistic, is spoken to in
clear, at once and for a while. Mail whose sender waives TLS goes by the side, over links of its own, as if TLS were
opportunistic with the hosts of others; a host that the configuration names, and what is told to it, are never for a
sender to decide about.
Not here: when to try again (the queue), which hosts a domain has (hosts.py), what failures mean (failures.py),
connections (pool.py, link.py). RFC 5321 5.1, RFC 2033, RFC 3207, RFC 7435, RFC 8689 5.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from .. import log as logs
from ..address import Address
from . import Delivery, Outcome, Result, Retry, Scope
from .client_tls import Manner, Tls
from .failures import PATIENCE, Stage
from .hosts import Finder, Hosts
from .link import Link
from .offers import Offers, Terms
from .pool import Hop, IPAddress, Limits, Pool

LATER, SAME_HOST, NEXT_HOST = Retry.LATER, Retry.SAME_HOST, Retry.NEXT_HOST
_OF_MAIL = (Scope.MESSAGE, Scope.RECIPIENT)


def patience_within(longest: float) -> Mapping[Stage, float]:
    """The time-outs of RFC 5321, none longer than this."""
    return {stage: min(seconds, longest) for stage, seconds in PATIENCE.items()}


class Way(Protocol):
    """Where a transport's mail goes. `port`: of its hosts; `by_domain`: each domain has its own."""

    port: int
    by_domain: bool

    def find(self, domain: str) -> Awaitable[Hosts | Outcome]:
        """The hosts to try, best first; or why there is none."""
        ...


class ByMx:
    """Each domain's own mail hosts."""

    by_domain = True

    def __init__(self, finder: Finder, port: int = 25) -> None:
        self.find: Callable[[str], Awaitable[Hosts | Outcome]] = finder.find
        self.port = port


class ToHost:
    """One host that the configuration names, by name or address."""

    by_domain = False

    def __init__(self, finder: Finder, name: str, port: int) -> None:
        self._finder = finder
        self._name = name
        self.port = port

    def find(self, domain: str) -> Awaitable[Hosts | Outcome]:
        return self._finder.find_host(self._name)


class _Open:
    """A delivery that not all recipients have an end of. `place` is its place in the batch, `places` are those of its
    recipients in the delivery as it came."""

    __slots__ = ("delivery", "place", "places")

    def __init__(self, delivery: Delivery, place: int, places: Sequence[int]) -> None:
        self.delivery = delivery
        self.place = place
        self.places = places

    def narrow(self, indices: list[int]) -> _Open:
        """For these of its recipients."""
        delivery = self.delivery
        if len(indices) == len(delivery.recipients):
            return self
        recipients = [delivery.recipients[index] for index in indices]
        numbers = [delivery.numbers[index] for index in indices]
        return _Open(
            Delivery(delivery.message, recipients, numbers, delivery.probe),
            self.place,
            [self.places[i] for i in indices],
        )


class Attempt:
    """What has become of a batch so far. `same` is open and to be sent over another connection to the same host,
    `following` at the next one."""

    def __init__(self, deliveries: Sequence[Delivery]) -> None:
        self._outcomes: list[list[Outcome | None]] = [[None] * len(each.recipients) for each in deliveries]
        self.same = [_Open(each, place, range(len(each.recipients))) for place, each in enumerate(deliveries)]
        self.following: list[_Open] = []

    def outcomes(self) -> list[list[Outcome]]:
        """When all was tried."""
        found = [[each for each in outcomes if each is not None] for outcomes in self._outcomes]
        assert list(map(len, found)) == list(map(len, self._outcomes))
        return found

    def go_on(self) -> bool:
        """All that is open is for the host that is tried now; whether there is anything."""
        self.same += self.following
        self.following = []
        return bool(self.same)

    def take(self, results: Sequence[Sequence[Outcome]], failure: Outcome | None, *, opened: bool, kept: bool) -> None:
        """What a link made of `same`: `results` of as many as it sent; the `failure` that ended its session, which had
        `opened` before or not. `kept`: from earlier mail, so its end says little of the host."""
        tried, self.same = self.same, []
        again = kept
        same: list[_Open] = []
        for each, outcomes in zip(tried, results, strict=False):
            again |= self._record(each, outcomes, same)
        unsent = tried[len(results) :]
        if failure is not None:
            for each in unsent:
                self._settle(each, failure)
            if not opened and failure.retry is LATER:
                unsent = []
            again &= kept or failure.scope is not Scope.HOST
        (self.same if again else self.following).extend([*same, *unsent])

    def settle(self, outcome: Outcome) -> None:
        """The same for all that is open."""
        for each in [*self.same, *self.following]:
            self._settle(each, outcome)

    def _settle(self, each: _Open, outcome: Outcome) -> None:
        for place in each.places:
            self._note(each.place, place, outcome)

    def _record(self, each: _Open, outcomes: Sequence[Outcome], same: list[_Open]) -> bool:
        """Whether an end was found for any recipient. What is left goes to `same`, or to the next host."""
        left = []
        at_same = False
        for index, outcome in enumerate(outcomes):
            self._note(each.place, each.places[index], outcome)
            if outcome.retry is not LATER:
                left.append(index)
                at_same |= outcome.retry is SAME_HOST
        if left:
            (same if at_same else self.following).append(each.narrow(left))
        return len(left) < len(outcomes)

    def _note(self, place: int, recipient: int, outcome: Outcome) -> None:
        """The last word counts. But what a host said of the mail says more than that another was not to be reached, and
        one that cannot take it does not speak for one that was not to be reached."""
        before = self._outcomes[place][recipient]
        if before is not None and before.result is Result.DEFERRED:
            if outcome.result is Result.DEFERRED and before.scope in _OF_MAIL and outcome.scope not in _OF_MAIL:
                return
            if outcome.result is Result.FAILED and outcome.retry is NEXT_HOST:
                return
        self._outcomes[place][recipient] = outcome


def _are_final(results: Sequence[Sequence[Outcome]]) -> bool:
    for outcomes in results:
        for outcome in outcomes:
            if outcome.retry is not LATER:
                return False
    return True


class Smtp:
    """`way` is a Path for a unix socket. `terms` say how we speak, but for TLS; `terms.lmtp`: LMTP. `concurrency` is
    for the queue: calls of `deliver` for one destination at a time. `heard`: what the host that was last connected to
    offers. Domains that are spoken to in a manner of their own have a transport of their own."""

    any_octets = False
    needs_body = True

    def __init__(
        self,
        way: Way | Path,
        terms: Terms,
        *,
        log: logs.Log,
        tls: Tls | None = None,
        ca_file: Path | None = None,
        source: tuple[IPAddress, ...] = (),
        concurrency: int = 20,
        limits: Limits | None = None,
        name: str = "localhost",
    ) -> None:
        """`name`: of the host behind a unix socket. Raises OSError and ssl.SSLError for `ca_file`."""
        self.concurrency = concurrency
        self.heard: Offers | None = None
        self._way = way
        self._name = name
        self._by_domain = not isinstance(way, Path) and way.by_domain
        self._log = log
        tls = tls or Tls("off" if terms.lmtp else "opportunistic")
        self._manner = Manner(tls, terms, ca_file)
        self._waived: Manner | None = None  # for mail whose sender waives TLS, where that is another one
        if self._by_domain and terms.credentials is None and tls.mode in ("required", "verified"):
            self._waived = Manner(tls._replace(mode="opportunistic"), terms)
        self._pool = Pool(limits, source=source)

    def destination(self, recipient: Address) -> str:
        """The domain; "" where one host takes all."""
        return recipient.domain if self._by_domain else ""

    @property
    def demands_tls(self) -> bool:
        """Whether there is mail that does not leave in clear, and would if its sender waived TLS."""
        return self._waived is not None

    def deliver(self, deliveries: Sequence[Delivery]) -> Awaitable[Sequence[Sequence[Outcome]]]:
        """All of one destination."""
        if self._waived is not None and any(each.message.envelope.waives_tls for each in deliveries):
            return self._deliver_apart(deliveries, self._waived)
        return self._deliver(deliveries, self._manner)

    async def _deliver_apart(self, deliveries: Sequence[Delivery], waived: Manner) -> Sequence[Sequence[Outcome]]:
        """Those that waive TLS, and those that do not."""
        outcomes: dict[int, Sequence[Outcome]] = {}
        for manner in (self._manner, waived):
            places = [
                place for place, each in enumerate(deliveries)
                if each.message.envelope.waives_tls is (manner is waived)
            ]  # fmt: skip
            if places:
                results = await self._deliver([deliveries[place] for place in places], manner)
                outcomes.update(zip(places, results, strict=True))
        return [outcomes[place] for place in range(len(deliveries))]

    async def _deliver(self, deliveries: Sequence[Delivery], manner: Manner) -> Sequence[Sequence[Outcome]]:
        pool = self._pool
        address = deliveries[0].recipients[0].address
        destination = self.destination(address)
        link = pool.near(destination, manner)
        if link is None:
            attempt = Attempt(deliveries)
        else:
            results = await self._await(link, link.run(deliveries))
            pool.park(link)
            if len(results) == len(deliveries) and _are_final(results):
                return results
            attempt = Attempt(deliveries)
            attempt.take(results, link.dialogue.failure, opened=True, kept=True)
        if attempt.go_on():
            await self._attempt(destination, address.domain, attempt, manner)
        return attempt.outcomes()

    async def _attempt(self, destination: str, domain: str, attempt: Attempt, manner: Manner) -> None:
        """From host to host."""
        pool = self._pool
        if isinstance(self._way, Path):
            hops = [pool.hop(self._name, str(self._way), 0, manner)]
        else:
            hosts = await self._way.find(domain)
            if isinstance(hosts, Outcome):
                attempt.settle(hosts)
                return
            hops = [pool.hop(host.name, host.address, self._way.port, manner) for host in hosts]
            now = pool.now()
            hops.sort(key=lambda hop: hop.failing_until > now)
        for hop in hops:
            await self._try(hop, destination, attempt)
            if not attempt.go_on():
                return

    async def _try(self, hop: Hop, destination: str, attempt: Attempt) -> None:
        """One host, over as many connections as it takes."""
        pool = self._pool
        link = pool.take(hop)
        while attempt.same:
            deliveries = [each.delivery for each in attempt.same]
            kept = link is not None
            results: Sequence[Sequence[Outcome]] = ()
            if link is None:
                link = pool.make(hop)
                running = link.run(deliveries)
                failure = await pool.connect(link)
            else:
                running = link.run(deliveries)
                failure = None
            if failure is None:
                results = await self._await(link, running)
                pool.park(link)
                failure = link.dialogue.failure
            opened = link.dialogue.opened
            if opened:
                self.heard = link.dialogue.opening.offers
            attempt.take(results, failure, opened=opened, kept=kept)
            if failure is None:
                hop.failing_until = 0.0
                pool.remember(destination, hop)
            elif link.no_handshake and hop.manner.opportunistic:
                hop.clear_until = pool.now() + pool.limits.clear
                self._log.write(logs.TLS_GIVEN_UP, hop.name, str(hop.address), link.no_handshake)
                attempt.go_on()
            elif failure.scope is Scope.HOST and not opened:
                hop.failing_until = pool.now() + pool.limits.failing
            link = None

    @staticmethod
    async def _await(link: Link, running: Awaitable[list[list[Outcome]]]) -> list[list[Outcome]]:
        try:
            return await running
        except asyncio.CancelledError:
            link.abort()
            raise

    async def close(self) -> None:
        """Says QUIT where a connection is kept."""
        await self._pool.close()
