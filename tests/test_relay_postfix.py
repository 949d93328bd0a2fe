"""SMTP to a real Postfix: in clear and by TLS, with a login, refused for now, refused for one of three."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from dovecot import dovecot
from postfix import DOMAIN, Postfix, postfix
from sending import CLEAR, Fixed, make_certificate, run, sending, terms, to, told

from fastsmtp.delivery import Delivery
from fastsmtp.delivery.client_tls import Tls
from fastsmtp.delivery.login import Credentials
from fastsmtp.delivery.smtp import Smtp

DELIVERED = "delivered 2.0.0 recipient"


def mail(*names: str, octets: bytes = b"Subject: x\r\n\r\nHi\r\n") -> Delivery:
    return to(*names, octets=octets, domain=DOMAIN)


def deliver(
    server: Postfix,
    check: Callable[[Smtp], Awaitable[None]],
    tls: Tls = CLEAR,
    login: Credentials | None = None,
    **options: Any,
) -> None:
    async def main() -> None:
        async with sending(Fixed(server.port, "127.0.0.1"), terms(credentials=login), tls, **options) as transport:
            await check(transport)

    run(main)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"), "mx0.test")


@pytest.mark.parametrize("ignored", [(), ("CHUNKING",), ("CHUNKING", "PIPELINING")], ids=["BDAT", "DATA", "slowly"])
def test_in_clear(ignored: tuple[str, ...]) -> None:
    """Octets arrive as they were: dots, a large message, 8-bit content. Each recipient has an answer of its own."""
    lines = b".leading dot\r\n..\r\n.\r\n8-bit \xe4\xf6\xfc\r\n"
    large = b"Subject: large\r\n\r\n" + lines * 30_000
    answers = {"no": repeat("550 5.1.1 nobody of that name"), "late": ["450 4.2.0 later"]}

    async def check(transport: Smtp) -> None:
        results = await transport.deliver([mail("ann", "no", "late"), mail("bob", octets=large), mail("no")])
        assert told(results) == [
            [DELIVERED, "failed 5.1.1 recipient", "deferred 4.2.0 recipient"],
            [DELIVERED],
            ["failed 5.1.1 recipient"],
        ]
        assert told(await transport.deliver([mail("late")])) == [[DELIVERED]]
        assert len(transport._pool._links) == 1

    with postfix(answers=answers) as server:
        deliver(server, check, Tls("off", ignore=frozenset(ignored)))
        assert server.asked == ["ann", "no", "late", "bob", "no", "late"]
        assert len(server.wait_mails("ann", 1)) == 1
        assert len(server.wait_mails("late", 1)) == 1
        (kept,) = server.wait_mails("bob", 1)
        assert kept.endswith(b"Received: from here\n" + large.replace(b"\r\n", b"\n"))


def test_a_message_that_is_too_large_for_it() -> None:
    async def check(transport: Smtp) -> None:
        results = await transport.deliver([mail("ann", octets=b"x" * 20_000), mail("bob")])
        assert told(results) == [["failed 5.3.4 message"], [DELIVERED]]

    with postfix(size=15_000) as server:
        deliver(server, check)
        assert server.asked == ["bob"]


@pytest.mark.parametrize("mode", ["opportunistic", "required", "verified"])
def test_by_tls(mode: Any, pem: Path) -> None:
    """It wants TLS before any mail."""

    async def check(transport: Smtp) -> None:
        for _ in range(2):
            assert told(await transport.deliver([mail("ann"), mail("bob")])) == [[DELIVERED]] * 2

    with postfix(certificate=(pem, pem), tls="encrypt") as server:
        deliver(server, check, Tls(mode), ca_file=pem)
        for kept in server.wait_mails("ann", 2):
            assert b"with ESMTPS" in kept


def test_by_login(pem: Path) -> None:
    user = f"relay@{DOMAIN}"

    async def refused(transport: Smtp) -> None:
        (outcomes,) = await transport.deliver([mail("ann")])
        assert outcomes[0].status == "4.7.8"

    with (
        dovecot({}, passwords={user: "open sesame"}) as passwords,
        postfix(certificate=(pem, pem), auth=passwords.auth) as server,
    ):
        for mechanism in ("PLAIN", "LOGIN", "SCRAM-SHA-256"):

            async def accepted(transport: Smtp) -> None:
                assert told(await transport.deliver([mail("ann")])) == [[DELIVERED]]
                assert transport.heard is not None

            login = Credentials(user, "open sesame", (mechanism,))
            deliver(server, accepted, Tls("verified"), login, ca_file=pem)
        deliver(server, refused, Tls("verified"), Credentials(user, "wrong"), ca_file=pem)
        for kept in server.wait_mails("ann", 3):
            assert b"with ESMTPSA" in kept
