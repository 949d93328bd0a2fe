"""Addresses that have made servers relay, in every state of a session: none of them reaches a foreign domain for
a stranger, and for a user only those do that name one."""

from __future__ import annotations

import smtplib
from collections.abc import Callable, Mapping

import pytest
from tls_users import Papers, papers, serve, trusting
from users import Users, plain
from wire import DOMAINS, Bench, Player, bench

__all__ = ["papers"]

OURS = frozenset(domain.name for domain in DOMAINS)
RIGHT, WRONG = plain("ann", "secret"), plain("ann", "wrong")

# S is a domain of ours, in which every mailbox is taken, or only some; D a foreign one.
FORMS = (
    "<u@D>",
    "<u%D@S>",
    '<"u@D"@S>',
    "<u@D@S>",
    "<@S:u@D>",
    "<@D,@S:u@D>",
    "<D!u@S>",
    "<S!D!u@S>",
    "<u@[192.0.2.1]>",
    "<u@[IPv6:2001:db8::1]>",
    "<u%D@[192.0.2.1]>",
    "<u@D.>",
    "<u@D%S>",
    "<u@S@D>",
    "<@S@D:u>",
    "<u%D>",
    "<D!u>",
    '<"u@D">',
    '<"u%D"@S>',
    "u@D",
    "<u(c)@D>",
    "<u@S.D>",
    "<postmaster@D>",
    "<u@D >",
    "<u@\tD>",
    "<<u@D>>",
    "<u@D>, <ann@S>",
)
FOREIGN = "else.test"
# What a user reaches with them: a foreign domain is named in so many words.
RELAYED = {"<u@D>", "<@S:u@D>", "<@D,@S:u@D>", "<u@[192.0.2.1]>", "<u@[IPv6:2001:db8::1]>", "<u%D@[192.0.2.1]>"} | {
    "<u@S.D>",
    "<postmaster@D>",
}


def written(form: str, served: str) -> str:
    return form.replace("D", FOREIGN).replace("S", served)


def hello(player: Player) -> None:
    player.say("EHLO client.test")


def after_rset(player: Player) -> None:
    hello(player)
    player.say("MAIL FROM:<a@b.test>")
    player.say("RSET")


def after_a_failure(player: Player) -> None:
    hello(player)
    assert player.say(f"AUTH PLAIN {WRONG}")[0].startswith("535")


def after_cancelling(player: Player) -> None:
    hello(player)
    player.say("AUTH LOGIN YW5u")
    assert player.say("*")[0].startswith("501")


def after_a_token(player: Player) -> None:
    hello(player)
    player.say("AUTH XOAUTH2 dXNlcj1hbm4BYXV0aD1CZWFyZXIgd3JvbmcBAQ==")
    assert player.say("")[0].startswith("535")


def after_half_of_scram(player: Player) -> None:
    """The server has shown what it keeps of ann; the client goes no further."""
    hello(player)
    assert player.say("AUTH SCRAM-SHA-256 biwsbj1hbm4scj1hYmM=")[0].startswith("334")
    assert player.say("*")[0].startswith("501")


def with_ann_elsewhere(player: Player) -> None:
    hello(player)
    other = player.bench.connect()
    other.say("EHLO client.test")
    assert other.say(f"AUTH PLAIN {RIGHT}")[0].startswith("235")


def with_ann_too_late(player: Player) -> None:
    """AUTH inside a transaction is refused."""
    hello(player)
    player.say("MAIL FROM:<ann@here.test>")
    assert player.say(f"AUTH PLAIN {RIGHT}")[0].startswith("503")


def claiming(player: Player) -> None:
    hello(player)
    player.say("MAIL FROM:<ann@here.test> AUTH=ann@here.test")


STRANGERS: Mapping[str, Callable[[Player], None]] = {
    each.__name__: each
    for each in (
        hello, after_rset, after_a_failure, after_cancelling, after_a_token, after_half_of_scram, with_ann_elsewhere,
        with_ann_too_late, claiming,
    )
}  # fmt: skip


def logged_in(player: Player) -> None:
    hello(player)
    assert player.say(f"AUTH PLAIN {RIGHT}")[0].startswith("235")


def logged_in_and_reset(player: Player) -> None:
    logged_in(player)
    player.say("MAIL FROM:<a@b.test>")
    player.say("RSET")


def logged_in_and_greeted(player: Player) -> None:
    logged_in(player)
    hello(player)


def logged_in_after_a_failure(player: Player) -> None:
    after_a_failure(player)
    assert player.say(f"AUTH PLAIN {RIGHT}")[0].startswith("235")
    assert player.say(f"AUTH PLAIN {WRONG}")[0].startswith("503")


USERS: Mapping[str, Callable[[Player], None]] = {
    each.__name__: each for each in (logged_in, logged_in_and_reset, logged_in_and_greeted, logged_in_after_a_failure)
}


def is_ours(domain: str) -> bool:
    return domain in OURS or domain.endswith(".sub.test") or domain == ""


def reached(player: Player, form: str) -> str | None:
    """The domain that a RCPT's mail would go to; None: it was refused."""
    if player.connection.session.transaction is None:
        player.say("MAIL FROM:<ann@here.test>")
    (reply,) = player.say(f"RCPT TO:{form}")
    transaction = player.connection.session.transaction
    assert transaction is not None
    recipients = transaction.envelope.recipients
    if not reply.startswith("250"):
        assert recipients == []
        return None
    (recipient,) = recipients
    assert (transaction.foreign is None) == is_ours(recipient.address.domain)
    return recipient.address.domain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", STRANGERS)
def test_no_stranger_is_relayed_for(state: str, form: str) -> None:
    for served in ("here.test", "any.test"):
        with bench(users=Users(), auth_clear=True, early_refused=False) as made:
            player = made.connect()
            STRANGERS[state](player)
            domain = reached(player, written(form, served))
            assert domain is None or is_ours(domain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", USERS)
def test_a_user_reaches_what_is_named(state: str, form: str) -> None:
    for served in ("here.test", "any.test"):
        with bench(users=Users(), auth_clear=True, early_refused=False) as made:
            player = made.connect()
            USERS[state](player)
            domain = reached(player, written(form, served))
            assert (domain is not None and not is_ours(domain)) == (form in RELAYED)


def codes(smtp: smtplib.SMTP) -> dict[str, int]:
    """How each form is answered."""
    found = {}
    for form in FORMS:
        smtp.docmd("MAIL FROM:<ann@here.test>")
        found[form] = smtp.docmd(f"RCPT TO:{written(form, 'here.test')}")[0]
        smtp.docmd("RSET")
    return found


def through_tls(port: int, *words: str) -> dict[str, int]:
    """A session in which AUTH stands before or behind STARTTLS, or nowhere."""
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as smtp:
        smtp.ehlo("client.test")
        for word in words:
            if word == "STARTTLS":
                assert smtp.starttls(context=trusting())[0] == 220
                smtp.ehlo("client.test")
            else:
                assert smtp.docmd("AUTH", f"PLAIN {word}")[0] == (235 if word == RIGHT else 535)
        return codes(smtp)


@pytest.mark.parametrize(
    ("words", "relays"),
    [
        (["STARTTLS"], False),
        ([RIGHT, "STARTTLS"], False),
        (["STARTTLS", WRONG], False),
        ([RIGHT, "STARTTLS", WRONG], False),
        (["STARTTLS", RIGHT], True),
        ([WRONG, "STARTTLS", RIGHT], True),
    ],
)
def test_around_starttls(papers: Papers, words: list[str], relays: bool) -> None:
    def client(port: int) -> dict[str, int]:
        return through_tls(port, *words)

    found, made = serve(papers, client, role="mx", auth_clear=True, useless=1000)
    assert isinstance(made, Bench)
    assert {form for form in FORMS if found[form] == 250} == (RELAYED if relays else set())
