"""What tests of the outgoing transports have in common: hosts without DNS, deliveries, and that nothing is left over.

`run` plays a coroutine on an event loop, and asserts at its end that no task and no reader's thread is left. `sending`
is an Smtp for a block; at its end it says QUIT, and has no connection.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from outgoing import describe, make_address, make_message

from fastsmtp import log as logs
from fastsmtp.delivery import Delivery, Outcome
from fastsmtp.delivery.client_tls import Tls
from fastsmtp.delivery.failures import Stage
from fastsmtp.delivery.hosts import Host, Hosts
from fastsmtp.delivery.offers import Terms
from fastsmtp.delivery.pool import Limits
from fastsmtp.delivery.smtp import Smtp, Way
from fastsmtp.message import Recipient
from loadtest.sink_server import Sink

LONG = 60.0  # seconds for what takes none
SHORT = 0.3  # for what never comes
LIMITS = Limits(tick=0.05, idle=LONG)
CLEAR = Tls("off")


class Fixed:
    """Hosts by name and address, the same for each domain, or one outcome."""

    by_domain = True

    def __init__(self, port: int, *hosts: str | tuple[str, str], outcome: Outcome | None = None) -> None:
        named = [host if isinstance(host, tuple) else (f"mx{number}.test", host) for number, host in enumerate(hosts)]
        self.hosts = tuple(Host(name, ip_address(address)) for name, address in named)
        self.port = port
        self.outcome = outcome
        self.asked: list[str] = []

    async def find(self, domain: str) -> Hosts | Outcome:
        self.asked.append(domain)
        return self.outcome or self.hosts


class Lines:
    """A log that only remembers."""

    def __init__(self) -> None:
        self.written: list[tuple[Any, ...]] = []

    def write(self, event: logs.Event, *values: Any) -> None:
        self.written.append((event, *values))


def to(*names: str, octets: bytes = b"Subject: x\r\n\r\nHi\r\n", domain: str = "there.test") -> Delivery:
    """From me@here.test; names of local-parts."""
    recipients = [Recipient(make_address(f"{name}@{domain}")) for name in names]
    message = make_message(make_address("me@here.test"), recipients, octets, b"Received: from here\r\n")
    return Delivery(message, recipients, list(range(len(names))))


def terms(*short: Stage, lmtp: bool = False, seconds: float = SHORT, **options: Any) -> Terms:
    """Patient, but for these stages, where nothing will come."""
    return Terms("me.test", lmtp=lmtp, patience={each: seconds if each in short else LONG for each in Stage}, **options)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def told(results: Sequence[Sequence[Outcome]]) -> list[list[str]]:
    return [[describe(outcome) for outcome in outcomes] for outcomes in results]


@asynccontextmanager
async def sending(
    way: Way | Path, spoken: Terms | None = None, tls: Tls | None = CLEAR, limits: Limits = LIMITS, **options: Any
) -> AsyncIterator[Smtp]:
    """Without TLS, if nothing else is said. `log` is a Lines."""
    options.setdefault("log", Lines())
    transport = Smtp(way, spoken or terms(), tls=tls, limits=limits, **options)
    try:
        yield transport
    finally:
        await transport.close()
        assert transport._pool._links == {}
        assert transport._pool._idle == 0
        assert transport._pool._timer is None


def make_certificate(folder: Path, *names: str) -> Path:
    """Self-signed; key and certificate in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    file = folder / f"{names[0]}.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return file


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def ended(sink: Sink) -> None:
    """No session is open at the sink; one that ends while TLS begins stays in its list."""
    await until(lambda: all(session._transport.is_closing() for session in sink._service.sessions))


def run(main: Callable[[], Coroutine[Any, Any, None]], loop: str = "uvloop") -> None:
    async def checked() -> None:
        async with asyncio.timeout(LONG):
            await main()
        await until(lambda: len(asyncio.all_tasks()) == 1)

    errors: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        await checked()

    (uvloop.run if loop == "uvloop" else asyncio.run)(watched())
    assert not errors, errors
    deadline = time.monotonic() + LONG
    while any(thread.name.startswith("reader") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
