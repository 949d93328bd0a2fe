"""How much each client may, over all workers: open sessions, and sessions, messages, recipients and failures in a time.

In: a client's address when it connects (`admit`, which counts it in until `leave`), MAIL and RCPT, and each failure
(`fail`). Out: nothing, or the refusal: 421 at connect, where it must cost less than a session, 450 after. A client is
an IPv4 address or an IPv6 network of 64 bits; who is free of limits is never counted. The counts are in the memory of
all workers (_shared.pyx), so they are exact, and survive a worker and a reload. What is turned away at connect stands
in the log once for each client and interval. The words of the refusals are those of reply.py, metrics.py and the log.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from .. import log as logs
from .._shared import Shared
from ..config_inbound import Inbound
from ..config_values import Rate
from ..metrics import Counter
from ..reply import (
    R421_ADDRESS_FULL,
    R421_FAILURE_RATE,
    R421_NETWORK_FULL,
    R421_SESSION_RATE,
    R450_FAILURE_RATE,
    R450_MESSAGE_RATE,
    R450_RECIPIENT_RATE,
    Reply,
    named,
    reason,
)
from ..shared_keys import KeyKind
from ..verdict import Ask, Client, Stage, Verdict
from . import Check

REMEMBERED = 10_000  # clients whose keys are kept: making them takes 4 µs
TOLD = 1000  # clients of which an interval's log speaks by name
INTERVAL = 10.0  # seconds

MESSAGE_RATE = Verdict("message-rate", R450_MESSAGE_RATE)
RECIPIENT_RATE = Verdict("recipient-rate", R450_RECIPIENT_RATE)
FAILURE_RATE = Verdict("failure-rate", R450_FAILURE_RATE)


class _Keys:
    """The keys of a client."""

    __slots__ = ("address", "failures", "messages", "network", "recipients", "sessions")

    def __init__(self, shared: Shared, ip: str) -> None:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        octets = socket.inet_pton(family, ip.partition("%")[0])
        client = octets[:8]
        self.address = shared.key(KeyKind.SESSIONS_OF_ADDRESS, octets)
        self.network = shared.key(KeyKind.SESSIONS_OF_NETWORK, octets[: 3 if family == socket.AF_INET else 8])
        self.sessions = shared.key(KeyKind.NEW_SESSIONS, client)
        self.messages = shared.key(KeyKind.MESSAGES, client)
        self.recipients = shared.key(KeyKind.RECIPIENTS, client)
        self.failures = shared.key(KeyKind.FAILURES, client)


class _Refusal:
    """A refusal at connect."""

    __slots__ = ("counter", "reason", "wire")

    def __init__(self, reply: Reply, hostname: str) -> None:
        self.reason = reason(reply)
        self.wire = named(reply, hostname).wire
        self.counter = Counter[self.reason.upper().replace("-", "_")]


class Limits:
    """The limits of one worker. `is_free` says of an address whether it has none; it may say something else when
    `version` is another object than before."""

    def __init__(
        self,
        section: Inbound,
        is_free: Callable[[str], bool],
        *,
        hostname: str,
        log: logs.Log,
        shared: Shared,
        worker: int,
        now: Callable[[], float] = time.monotonic,
        version: Callable[[], object] = lambda: None,
    ) -> None:
        self._section = section
        self._is_free = is_free
        self._log = log
        self.shared = shared
        self._worker = worker
        self.now = now
        self._version = version
        self._known_as_of = version()
        self._uncounted: dict[str, int] = {}  # open sessions of those who were free when they came
        self._known: dict[str, _Keys | None] = {}
        self._per_address = section.sessions_per_address
        self._per_network = section.sessions_per_network
        self._sessions, self._session_interval = _parts(section.new_sessions)
        self._fails, self._fail_interval = _parts(section.failures)
        self._address_full = _Refusal(R421_ADDRESS_FULL, hostname)
        self._network_full = _Refusal(R421_NETWORK_FULL, hostname)
        self._session_rate = _Refusal(R421_SESSION_RATE, hostname)
        self._failure_rate = _Refusal(R421_FAILURE_RATE, hostname)
        self._turned_away: dict[tuple[str, str], int] = {}
        self._since = 0.0  # when the first of them came

    def admit(self, ip: str) -> bytes | None:
        """None: the client is let in, and counted until `leave`. Else what it hears before it is turned away. `ip` is
        unmapped, and empty for a program on a unix socket."""
        keys = self._keys_of(ip)
        if keys is None:
            self._uncounted[ip] = self._uncounted.get(ip, 0) + 1
            return None
        shared, worker = self.shared, self._worker
        now = self.now()
        if self._fails and shared.owes(keys.failures, self._fail_interval, self._fails, now):
            return self._turn_away(ip, self._failure_rate)
        if self._per_address and not shared.enter(worker, keys.address, self._per_address):
            return self._turn_away(ip, self._address_full)
        if self._per_network and not shared.enter(worker, keys.network, self._per_network):
            self._leave(keys, network=False)
            return self._turn_away(ip, self._network_full)
        if self._sessions and shared.spend(keys.sessions, self._session_interval, self._sessions, now):
            self._leave(keys)
            return self._turn_away(ip, self._session_rate)
        return None

    def leave(self, ip: str) -> None:
        """The session of a client that was let in is over."""
        uncounted = self._uncounted.get(ip)
        if uncounted is not None:
            if uncounted > 1:
                self._uncounted[ip] = uncounted - 1
            else:
                del self._uncounted[ip]
            return
        # Who was counted has become free meanwhile: what it holds is given back all the same.
        self._leave(self._keys_of(ip) or _Keys(self.shared, ip))

    def fail(self, client: Client) -> None:
        """The client was refused for good, or sent what is no command."""
        if self._fails and (keys := self.counted(client)) is not None:
            self.shared.spend(keys.failures, self._fail_interval, self._fails, self.now())

    def checks(self) -> list[Check]:
        """Those that are asked after the connection was made."""
        section = self._section
        checks: list[Check] = []
        for stage, rate, verdict in (
            (Stage.MAIL, section.messages, MESSAGE_RATE),
            (Stage.RCPT, section.recipients, RECIPIENT_RATE),
        ):
            if rate is not None or section.failures is not None:
                checks.append(_Limit(self, stage, rate, section.failures, verdict))
        return checks

    def counted(self, client: Client) -> _Keys | None:
        """The keys of a client that is limited."""
        return None if client.user else self._keys_of(client.ip)

    def refuse(self, verdict: Verdict, counter: Counter) -> Verdict:
        self.shared.add(self._worker, counter, 1)
        return verdict

    def tick(self) -> None:
        """Called about once a second."""
        version = self._version()
        if version is not self._known_as_of:
            self._known_as_of = version
            self._known.clear()
        if self._turned_away and self.now() - self._since >= INTERVAL:
            self._tell()

    async def close(self) -> None:
        """Tells what was not told yet."""
        self._tell()

    def _tell(self) -> None:
        seconds = self.now() - self._since
        for (ip, why), connections in self._turned_away.items():
            self._log.write(logs.TURNED_AWAY, ip, why, connections, seconds)
        self._turned_away.clear()

    def _keys_of(self, ip: str) -> _Keys | None:
        try:
            return self._known[ip]
        except KeyError:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            keys = self._known[ip] = None if not ip or self._is_free(ip) else _Keys(self.shared, ip)
            return keys

    def _leave(self, keys: _Keys, network: bool = True) -> None:
        if self._per_address:
            self.shared.leave(self._worker, keys.address)
        if self._per_network and network:
            self.shared.leave(self._worker, keys.network)

    def _turn_away(self, ip: str, refusal: _Refusal) -> bytes:
        self.shared.add(self._worker, refusal.counter, 1)
        told = self._turned_away
        if not told:
            self._since = self.now()
        key = (ip, refusal.reason)
        if key not in told and len(told) >= TOLD:
            key = ("", refusal.reason)
        told[key] = told.get(key, 0) + 1
        return refusal.wire


def _parts(rate: Rate | None) -> tuple[float, float]:
    """Burst and interval, as the shared memory has them; 0: there is no limit."""
    return (0.0, 0.0) if rate is None else (float(rate.count), rate.interval)


class _Limit:
    """The check at MAIL, and that at RCPT."""

    def __init__(
        self, limits: Limits, stage: Stage, rate: Rate | None, failures: Rate | None, verdict: Verdict
    ) -> None:
        self.stage = stage
        self._limits = limits
        self._burst, self._interval = _parts(rate)
        self._fails, self._fail_interval = _parts(failures)
        self._verdict = verdict
        self._counter = Counter.MESSAGE_RATE if stage is Stage.MAIL else Counter.RECIPIENT_RATE

    def __call__(self, ask: Ask) -> Verdict | None:
        limits = self._limits
        keys = limits.counted(ask.client)
        if keys is None:
            return None
        now = limits.now()
        if self._fails and limits.shared.owes(keys.failures, self._fail_interval, self._fails, now):
            return limits.refuse(FAILURE_RATE, Counter.FAILURE_RATE)
        key = keys.messages if self.stage is Stage.MAIL else keys.recipients
        if self._burst and limits.shared.spend(key, self._interval, self._burst, now):
            return limits.refuse(self._verdict, self._counter)
        return None
