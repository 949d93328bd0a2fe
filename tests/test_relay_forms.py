"""Addresses that have made servers relay, in every state of a session: none of them reaches a foreign domain for
a stranger, and for a user only those do that name one."""

from __future__ import annotations

import smtplib
from collections.abc import Mapping

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


# How a session came to where it is: what is said after EHLO, and the codes of the replies.
Said = tuple[tuple[str, str], ...]
LOGIN: Said = ((f"AUTH PLAIN {RIGHT}", "235"),)
FAILURE: Said = ((f"AUTH PLAIN {WRONG}", "535"),)
RESET: Said = (("MAIL FROM:<a@b.test>", "250"), ("RSET", "250"))
STRANGERS: Mapping[str, Said] = {
    "greeted": (),
    "after RSET": RESET,
    "after a failure": FAILURE,
    "after cancelling": (("AUTH LOGIN YW5u", "334"), ("*", "501")),
    "after a token": (("AUTH XOAUTH2 dXNlcj1hbm4BYXV0aD1CZWFyZXIgd3JvbmcBAQ==", "334"), ("", "535")),
    # The server has shown what it keeps of ann; the client goes no further.
    "after half of SCRAM": (("AUTH SCRAM-SHA-256 biwsbj1hbm4scj1hYmM=", "334"), ("*", "501")),
    "with ann elsewhere": (),
    "with ann too late": (("MAIL FROM:<ann@here.test>", "250"), (f"AUTH PLAIN {RIGHT}", "503")),
    "claiming": (("MAIL FROM:<ann@here.test> AUTH=ann@here.test", "250"),),
}
USERS: Mapping[str, Said] = {
    "logged in": LOGIN,
    "logged in and reset": LOGIN + RESET,
    "logged in and greeted": (*LOGIN, ("EHLO client.test", "250")),
    "logged in after a failure": FAILURE + LOGIN + ((f"AUTH PLAIN {WRONG}", "503"),),
}


def come(made: Bench, said: Said) -> Player:
    """A client that has said so."""
    player = made.connect()
    for line, code in (("EHLO client.test", "250"), *said):
        assert player.say(line)[-1].startswith(code)
    return player


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
            if state == "with ann elsewhere":
                come(made, LOGIN)
            player = come(made, STRANGERS[state])
            domain = reached(player, written(form, served))
            assert domain is None or is_ours(domain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", USERS)
def test_a_user_reaches_what_is_named(state: str, form: str) -> None:
    for served in ("here.test", "any.test"):
        with bench(users=Users(), auth_clear=True, early_refused=False) as made:
            player = come(made, USERS[state])
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
