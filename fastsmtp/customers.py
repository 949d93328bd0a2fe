"""Clients for whose domains mail waits here: they have the queue run (ETRN), or fetch the mail themselves (ATRN).

In: an Ask at ETRN or ATRN of a client that `fetches` says yes to, or that has logged in. Out: a Verdict, always with a
reply; for an ATRN that is granted also what the connection becomes. A client may ask for what its rows of [[customer]]
name; all or nothing.
`ETRN domain` is for that domain, `@domain` for all of it and below it that is the client's, `#queue` for a row. ATRN
without domains is for all of them. A row with a wildcard means the domains that mail waits for when it is asked for.
Mail may lie in the spools of all workers, and all are asked (colleagues.py). When one cannot be, or not in time, the
client hears "later". Not here: the turned connection (odmr.py). RFC 1985 5, RFC 2645 5.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import log as logs
from .colleagues import Colleagues, UnreachableError
from .config import Customer
from .config_conflicts import serves
from .odmr import TakenError, Turn, claim_all
from .policy.relay import Trust
from .reply import (
    R250_QUEUE_RUN,
    R250_TURNING,
    R251_NOTHING_WAITS,
    R450_ATRN_REFUSED,
    R450_FETCHED_NOW,
    R451_CANNOT_TURN,
    R453_NO_MAIL,
    R458_NO_QUEUE_RUN,
    R459_NODE_REFUSED,
    pending,
)
from .verdict import Ask, Client, Stage, Verdict

PATIENCE = 20.0  # seconds for the answers of all workers; below that of a policy
RUN_SECONDS = 5.0  # that a client waits to hear how much mail its queue run is for


class Customers:
    """Who they are, by address or as users."""

    def __init__(self, rows: Sequence[Customer]) -> None:
        self._rows = [(Trust(row.networks), row) for row in rows]
        self.fetches = Trust([network for row in rows for network in row.networks])

    def find(self, client: Client) -> list[Customer]:
        return [row for trust, row in self._rows if trust(client.ip) or client.user in row.users]


def names_of(rows: Iterable[Customer]) -> list[str]:
    return [name for row in rows for name in row.domains]


def is_among(domain: str, names: Iterable[str]) -> bool:
    """Whether one of the names, wildcards perhaps, is that of a domain."""
    return any(serves(name, domain) for name in names)


def narrow(names: Iterable[str], node: str) -> list[str]:
    """What of a client's names an ETRN's domain or @domain means."""
    domain = node.removeprefix("@")
    if domain == node:
        return [domain] if is_among(domain, names) else []
    below = f".{domain}"
    found = []
    for name in names:
        if name.startswith("*") and is_among(domain, [name]):
            found += [domain, f"*{below}"]
        elif name == domain or name.endswith(below):  # *.domain too
            found.append(name)
    return found


async def expand(names: Iterable[str], colleagues: Colleagues) -> list[str]:
    """The domains that names stand for now."""
    exact = [name for name in dict.fromkeys(names) if not name.startswith("*")]
    wild = [name for name in names if name.startswith("*")]
    if wild:
        waiting = await colleagues.domains()
        exact += sorted(domain for domain in waiting if is_among(domain, wild) and domain not in exact)
    return exact


class QueueRun:
    """The check at ETRN."""

    stage = Stage.ETRN

    def __init__(self, customers: Customers, colleagues: Colleagues, log: logs.Log) -> None:
        self._customers = customers
        self._colleagues = colleagues
        self._log = log
        self._runs: set[asyncio.Task[int]] = set()

    async def __call__(self, ask: Ask) -> Verdict:
        rows = self._customers.find(ask.client)
        (node,) = ask.nodes
        if node.startswith("#"):
            names = names_of(row for row in rows if row.queue == node[1:])
        else:
            names = narrow(names_of(rows), node)
        if not names:
            return Verdict("node-refused", R459_NODE_REFUSED)
        run = asyncio.create_task(self._run(ask.client.ip, node, names))
        self._runs.add(run)
        run.add_done_callback(self._runs.discard)
        done, _ = await asyncio.wait((run,), timeout=RUN_SECONDS)
        if not done:
            return Verdict("queue-run", R250_QUEUE_RUN)  # it goes on
        if run.result() < 0:
            return Verdict("no-queue-run", R458_NO_QUEUE_RUN)
        return Verdict("queue-run", pending(run.result()) if run.result() else R251_NOTHING_WAITS)

    async def _run(self, ip: str, node: str, names: list[str]) -> int:
        """For how many messages; -1: it cannot be done."""
        try:
            messages = await self._colleagues.retry(await expand(names, self._colleagues))
        except UnreachableError:
            return -1
        self._log.write(logs.QUEUE_RUN, ip, node, messages)
        return messages


class Fetch:
    """The check at ATRN. `waits`: whether the mail of a domain waits to be fetched; `ending`: whether the server is
    about to stop."""

    stage = Stage.ATRN

    def __init__(
        self,
        customers: Customers,
        colleagues: Colleagues,
        data_dir: Path,
        hostname: str,
        *,
        waits: Callable[[str], bool],
        log: logs.Log,
        ending: Callable[[], bool],
    ) -> None:
        self._customers = customers
        self._colleagues = colleagues
        self._data_dir = data_dir
        self._hostname = hostname
        self._waits = waits
        self._log = log
        self._ending = ending

    async def __call__(self, ask: Ask) -> Verdict:
        names = names_of(self._customers.find(ask.client))
        if not all(is_among(domain, names) and self._waits(domain) for domain in ask.nodes):
            return Verdict("atrn-refused", R450_ATRN_REFUSED)
        try:
            async with asyncio.timeout(PATIENCE):
                domains = list(ask.nodes) or list(filter(self._waits, await expand(names, self._colleagues)))
                waiting = await self._colleagues.count(domains, "waiting")
        except (UnreachableError, TimeoutError):
            return Verdict("cannot-turn", R451_CANNOT_TURN)
        if not waiting:
            return Verdict("no-mail", R453_NO_MAIL)
        try:
            claims = claim_all(self._data_dir, domains)
        except TakenError:
            return Verdict("fetched-now", R450_FETCHED_NOW)
        except OSError:
            return Verdict("cannot-turn", R451_CANNOT_TURN)
        turn = Turn(
            claims, domains, self._colleagues,
            client=ask.client.ip, hostname=self._hostname, log=self._log, ending=self._ending,
        )  # fmt: skip
        return Verdict("turned", R250_TURNING, turned=turn)
