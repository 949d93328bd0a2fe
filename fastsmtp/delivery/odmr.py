"""The transport for mail that waits until its domain's server comes for it (on-demand relay, ATRN).

In: deliveries for one domain. Out: "later" as long as its server is not here; else what it says to them. When it comes,
one worker holds its connection and offers it on a unix socket (odmr.py), one for each domain; every worker hands over
its own mail there, as to any other host. A session over that socket ends with QUIT, which does not reach the server:
a message's last octets must not be able to look like it, so no message is sent in chunks.
Not here: who may come, the connection itself. "Later" has the scope of a host: the queue makes one attempt for all the
mail of a domain, and none is needed to find out that its server has come, for it is woken then. RFC 2645.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .. import log as logs
from ..address import Address
from . import Delivery, Outcome, Result, Scope
from .client_tls import Tls
from .failures import Stage
from .offers import Terms
from .pool import Limits
from .smtp import Smtp

AWAY = Outcome(Result.DEFERRED, "4.4.1", "it waits until the domain's server comes for it", Scope.HOST)
TURN = 3600.0  # seconds for the mail of other workers and domains, which goes over the same connection
NOT_KEPT = Limits(idle_links=0)


class OnDemand:
    """`find` gives the socket of a domain's server, None while it is away."""

    any_octets = False
    needs_body = True
    concurrency = 1

    def __init__(self, find: Callable[[str], Path | None], terms: Terms, log: logs.Log) -> None:
        self._find = find
        self._terms = replace(terms, ignore=frozenset(("CHUNKING",)), patience={**terms.patience, Stage.GREETING: TURN})
        self._log = log

    def destination(self, recipient: Address) -> str:
        """The domain."""
        return recipient.domain

    def deliver(
        self, deliveries: Sequence[Delivery]
    ) -> Sequence[Sequence[Outcome]] | Awaitable[Sequence[Sequence[Outcome]]]:
        """All of one domain."""
        domain = deliveries[0].recipients[0].address.domain
        path = self._find(domain)
        if path is None:
            return [[AWAY] * len(each.recipients) for each in deliveries]
        return self._hand_over(path, domain, deliveries)

    async def _hand_over(self, path: Path, domain: str, deliveries: Sequence[Delivery]) -> Sequence[Sequence[Outcome]]:
        """One session for them, which is not kept: others wait for theirs."""
        server = Smtp(path, self._terms, log=self._log, tls=Tls("off"), limits=NOT_KEPT, name=domain)
        try:
            return await server.deliver(deliveries)
        finally:
            await server.close()

    async def close(self) -> None:
        """Nothing is kept."""
