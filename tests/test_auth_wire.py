"""AUTH over a connection: what waits, what the log may know, and TLS under it, with real clients on real sockets."""

from __future__ import annotations

import asyncio
import smtplib
from base64 import b64decode, b64encode
from itertools import pairwise
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from tls_users import Papers, papers, serve, trusting
from users import ScramClient, Users, b64, plain
from wire import Bench, Player, bench

from fastsmtp import auth
from fastsmtp.config_inbound import Inbound
from fastsmtp.metrics import Counter
from fastsmtp.policy.limits import Limits
from fastsmtp.service import Times
from fastsmtp.verdict import Client

__all__ = ["papers"]

SECRET = "Correct-Horse"
ENCODED = b64encode(SECRET.encode()).decode().rstrip("=")


def greeted(made: Bench) -> Player:
    """A client that has said EHLO."""
    player = made.connect()
    player.say("EHLO c")
    return player


def raw_log(made: Bench) -> str:
    return "\n".join(map(str, made.log))


# The log


def test_a_failure_is_told_and_counted() -> None:
    with bench(users=Users(), auth_clear=True) as made:
        player = greeted(made)
        assert player.say(f"AUTH PLAIN {plain('Eve' * 30, SECRET)}") == ["535 5.7.8 Authentication credentials invalid"]
        player.say("AUTH LOGIN")
        player.say("*")
        player.say("AUTH PLAIN !")
        assert made.counted(Counter.AUTH_FAILED) == 1, "what was left is no failure"
        assert made.counted(Counter.AUTHENTICATED) == 0
        (line,) = made.logged("auth-failed")
        assert {key: line[key] for key in ("client", "port", "mechanism", "user", "reason", "reply")} == {
            "client": "192.0.2.7",
            "port": 25252,
            "mechanism": "PLAIN",
            "user": ("Eve" * 30)[:64],
            "reason": "auth-failed",
            "reply": "535 5.7.8 Authentication credentials invalid",
        }
        player.vanish()
        assert made.logged("session")[0]["user"] is None


@pytest.mark.parametrize(("role", "expected"), [("submission", 0), ("mx", 3)])
def test_a_guess_where_users_send_turns_no_office_away(role: str, expected: int) -> None:
    """Behind its address are many; what a password may cost there is counted where passwords are."""
    with bench(role, users=Users(), auth_clear=True) as made:
        service = made.service
        section = Inbound.model_validate({"failures": "100/d"})
        limits = Limits(
            section, lambda _: False, hostname="mx.here.test", log=service.log, shared=service.shared, worker=0
        )
        service.limits = limits

        def failures() -> int:
            keys = limits.counted(Client("192.0.2.7", 25252, ""))
            assert keys is not None
            free = range(100, 0, -1)
            return 100 - next(n for n in free if not service.shared.owes(keys.failures, 864.0, 100.0, limits.now(), n))

        player = greeted(made)
        for _ in range(2):
            player.say(f"AUTH PLAIN {plain('ann', SECRET)}")
        player.say("AUTH PLAIN")
        assert player.say(plain("ann", SECRET))[0].startswith("421 ")
        assert failures() == expected
        player = greeted(made)
        player.say("JUNK")
        assert failures() == expected + 1


def test_a_user_is_named_with_the_message_and_the_session() -> None:
    with bench(users=Users(), auth_clear=True, early_refused=False) as made:
        player = made.connect()
        player.say("EHLO c", f"AUTH PLAIN {plain('Ann', 'secret')}")
        assert made.counted(Counter.AUTHENTICATED) == 1
        player.say("MAIL FROM:<a@b.test>", "RCPT TO:<u@else.test>", "DATA", "x", ".", "QUIT")
        player.transport.settle()
        assert made.logged("accepted")[0]["user"] == "ann"
        assert made.logged("session")[0]["user"] == "ann"
        assert made.keeper.kept[0].message.envelope.protocol == "ESMTPA"
        assert made.logged("auth-failed") == []


def test_no_secret_gets_into_the_log() -> None:
    """However it is sent, and whatever breaks over it."""
    users = Users()
    with bench(users=users, auth_clear=True, early_refused=False, errors=1000, bugs=2) as made:

        def play(*lines: str) -> None:
            player = greeted(made)
            for line in lines:
                player.say(line)
            player.vanish()

        for mechanism in ("PLAIN", "LOGIN", "SCRAM-SHA-256", "OAUTHBEARER", "XOAUTH2", "NOSUCH"):
            for response in (plain("ann", SECRET), b64(SECRET), SECRET, b64(b"\xff" + SECRET.encode()), "x" * 13000):
                play(f"AUTH {mechanism} {response}", SECRET, ENCODED)
                play(f"AUTH {mechanism}", response, SECRET, b64(SECRET), "*")
        play(f"AUTH LOGIN {b64('ann')}", b64(SECRET))
        play("AUTH XOAUTH2 " + b64(f"user=ann\1auth=Bearer {SECRET}\1\1"), "")
        client = ScramClient("ann", SECRET)
        play(f"AUTH SCRAM-SHA-256 {b64(client.first())}", b64(SECRET))
        play(SECRET, f"{SECRET} x", f"AUTH{SECRET}")
        users.fault = RuntimeError(f"bad value: {SECRET}")
        play(f"AUTH PLAIN {plain('ann', SECRET)}")
        users.fault = None

        def prepare(text: str) -> str:
            raise KeyError(text)

        before, auth.saslprep = auth.saslprep, prepare
        try:
            play(f"AUTH PLAIN {plain(SECRET, SECRET)}")
        finally:
            auth.saslprep = before
        assert len(made.logged("auth-failed")) > 20
        text = raw_log(made)
        assert "RuntimeError" in text
        assert "KeyError in AUTH" in text
        assert "prepare" in text, "where it broke is told"
        # A name that is logged is what stood where names stand.
        assert SECRET not in text.replace(f"'user': '{SECRET}'", "")
        assert ENCODED not in text
        assert ENCODED[1:-1] not in text


# What waits


class Gate:
    """Lets verdicts wait."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self) -> None:
        await self.open.wait()


def test_a_verdict_that_waits() -> None:
    users, gate = Users(), Gate()
    users.later = gate
    with bench(users=users, auth_clear=True, early_refused=False) as made:
        player = greeted(made)
        assert player.say(f"AUTH PLAIN {plain('ann', 'secret')}", "MAIL FROM:<a@b.test>", "RCPT TO:<u@else.test>") == []
        made.run()
        assert player.say("NOOP") == []
        assert player.connection.client.user == ""
        gate.open.set()
        made.run()
        assert [line[:3] for line in player.say()] == ["235", "250", "250", "250"]


@pytest.mark.parametrize("password", ["secret", "wrong"])
def test_a_client_that_does_not_wait_for_the_verdict(password: str) -> None:
    users, gate = Users(), Gate()
    users.later = gate
    with bench(users=users, auth_clear=True) as made:
        player = greeted(made)
        player.say(f"AUTH PLAIN {plain('ann', password)}")
        player.vanish()
        gate.open.set()
        made.run()
        made.run()
        assert made.counted(Counter.AUTH_FAILED) == (password == "wrong")
        assert [line["user"] for line in made.logged("auth-failed")] == ["ann"] * (password == "wrong")
        assert player.take() == b"", "nothing was answered"


def test_a_client_that_ends_its_side_is_answered() -> None:
    users, gate = Users(), Gate()
    users.later = gate
    with bench(users=users, auth_clear=True) as made:
        player = greeted(made)
        player.say(f"AUTH PLAIN {plain('ann', 'secret')}")
        player.end()
        gate.open.set()
        made.run()
        assert player.take().startswith(b"235 ")
        assert player.transport.ended


def test_the_delay_of_a_failure_is_the_connections_own() -> None:
    users, gate = Users(), Gate()
    with bench(users=users, auth_clear=True) as made:
        slow, quick = made.connect(), made.connect()
        for player in (slow, quick):
            player.say("EHLO c")
        users.later = gate
        assert slow.say(f"AUTH PLAIN {plain('ann', 'wrong')}") == []
        users.later = None
        assert quick.say(f"AUTH PLAIN {plain('ann', 'secret')}")[0].startswith("235")
        gate.open.set()
        made.run()
        assert slow.take().startswith(b"535")


@pytest.mark.parametrize("what", ["too late", "raises", "raises later"])
def test_a_check_that_fails_is_454(what: str) -> None:
    users, gate = Users(), Gate()
    if what == "raises":
        users.fault = OSError("down")
    elif what == "too late":
        users.later = gate
    else:

        async def fail() -> None:
            raise OSError("down")

        users.later = fail
    with bench(users=users, auth_clear=True, patience=0.02, bugs=1) as made:
        player = greeted(made)
        said = player.say(f"AUTH PLAIN {plain('ann', 'secret')}")
        made.run(0.05)
        assert (said + player.say())[0].startswith("454 4.7.0 ")
        assert player.connection.client.user == ""
        (line,) = made.logged("auth-failed")
        assert line["reason"] == "check-failed"
        users.fault = users.later = None
        assert player.say(f"AUTH PLAIN {plain('ann', 'secret')}")[0].startswith("235"), "454 is no guess"


def test_what_cannot_be_asked_is_not_asked_for_ever() -> None:
    users = Users()
    users.fault = OSError("down")
    with bench(users=users, auth_clear=True, useless=5, bugs=5) as made:
        player = greeted(made)
        said = [player.say(f"AUTH PLAIN {plain('ann', 'secret')}")[0][:3] for _ in range(6)]
        assert said == ["454"] * 5 + ["421"]


def test_a_response_has_the_time_of_a_command() -> None:
    with bench(users=Users(), auth_clear=True, times=Times(command=10)) as made:
        player = greeted(made)
        player.say("AUTH LOGIN")
        player.connection.check(1000.0)
        player.connection.check(1009.0)
        assert player.take() == b""
        player.connection.check(1011.0)
        assert player.take().startswith(b"421 4.4.2 ")


def test_an_exchange_does_not_hold_up_the_end() -> None:
    with bench(users=Users(), auth_clear=True) as made:
        player = greeted(made)
        player.say("AUTH LOGIN")
        made.service.drain()
        assert player.take().startswith(b"421 4.3.2 ")


def test_a_verdict_that_comes_when_the_server_ends() -> None:
    users, gate = Users(), Gate()
    users.later = gate
    with bench(users=users, auth_clear=True) as made:
        player = greeted(made)
        player.say(f"AUTH PLAIN {plain('ann', 'secret')}")
        made.service.drain()
        assert player.take() == b""
        gate.open.set()
        made.run()
        assert [line[:3] for line in player.say()] == ["235", "421"]


LINES = st.one_of(
    st.sampled_from(
        ["", "=", "*", "A", "AA==", "AGFubgA=", "AABhbm4=", plain("ann", "wrong"), b64("ann"), b64("\0"), "x" * 12287]
        + [f"AUTH {row.name}" for row in auth.TABLE]
        + ["AUTH PLAIN =", f"AUTH LOGIN {b64('eve')}", "AUTH PLAIN AGFubgA=", "NOOP", "EHLO c", "MAIL FROM:<>", "RSET"]
    ),
    st.binary(max_size=40).map(lambda octets: b64(octets)),
    st.text(alphabet="AB+/=\0 *", max_size=9),
)


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(LINES, max_size=12), cuts=st.lists(st.integers(0, 600), max_size=5))
def test_one_reply_for_each_line_however_it_is_cut(lines: list[str], cuts: list[int]) -> None:
    """And nobody gets in without a password."""
    stream = "".join(f"{line}\r\n" for line in ["EHLO c", *lines]).encode()

    def play(at: list[int]) -> tuple[list[str], list[Any]]:
        with bench(users=Users(), auth_clear=True, early_refused=False, errors=1000, useless=1000) as made:
            player = made.connect()
            for start, end in pairwise([0, *sorted(at), len(stream)]):
                player.send(stream[start:end])
            said = [line for line in player.take().decode().splitlines() if line[3] == " "]
            assert player.connection.client.user == ""
            failures = [(line["mechanism"], line["user"], line["reason"]) for line in made.logged("auth-failed")]
            # A nonce is never the same.
            return [line[:60] if line.startswith("334 c") else line for line in said], failures

    whole, failures = play([])
    assert (whole, failures) == play([min(cut, len(stream)) for cut in cuts])
    codes = [line[:3] for line in whole]
    assert "235" not in codes
    assert codes[-1] == "421" or len(codes) == len(lines) + 2
    assert len(failures) <= 3


def test_scram_on_a_connection() -> None:
    with bench(users=Users(), auth_clear=True) as made:
        player = greeted(made)
        client = ScramClient("bob@here.test", "pencil")
        (first,) = player.say(f"AUTH SCRAM-SHA-256 {b64(client.first())}")

        (final,) = player.say(b64(client.final(b64decode(first[4:]).decode())))
        assert b64decode(final[4:]) == b"v=" + b64encode(client.server_signature)
        assert player.connection.client.user == ""
        assert player.say("")[0].startswith("235 2.7.0 ")
        assert player.connection.client.user == "bob@here.test"


# TLS


@pytest.mark.parametrize("implicit", [False, True])
def test_smtplib(papers: Papers, implicit: bool) -> None:
    def client(port: int) -> tuple[Any, Any]:
        if implicit:
            smtp: smtplib.SMTP = smtplib.SMTP_SSL("127.0.0.1", port, timeout=10, context=trusting())
        else:
            smtp = smtplib.SMTP("127.0.0.1", port, timeout=10)
        with smtp:
            smtp.ehlo("client.test")
            before = dict(smtp.esmtp_features)
            if not implicit:
                smtp.starttls(context=trusting())
            smtp.login("ann", "secret")
            smtp.sendmail(
                "ann@here.test", ["bob@here.test", "u@else.test"], b"Subject: x\r\n\r\nx\r\n", ["BODY=8BITMIME"]
            )
            return before, smtp.esmtp_features

    (before, after), made = serve(papers, client, implicit=implicit)
    assert ("auth" in before) is implicit
    mechanisms = "SCRAM-SHA-256-PLUS SCRAM-SHA-256 PLAIN LOGIN OAUTHBEARER XOAUTH2"
    assert after["auth"].split() == mechanisms.split()
    (kept,) = made.keeper.kept
    assert kept.recipients == ["<bob@here.test>", "<u@else.test>"]
    assert kept.message.envelope.protocol == "ESMTPSA"
    assert made.logged("session")[0]["user"] == "ann"


@pytest.mark.parametrize("method", ["auth_plain", "auth_login"])
def test_smtplib_with_a_wrong_password(papers: Papers, method: str) -> None:
    def client(port: int) -> tuple[int, bytes]:
        with smtplib.SMTP_SSL("127.0.0.1", port, timeout=10, context=trusting()) as smtp:
            smtp.ehlo("client.test")
            smtp.user, smtp.password = "ann", "wrong"  # type: ignore[attr-defined]
            mechanism = method.removeprefix("auth_").upper()
            with pytest.raises(smtplib.SMTPAuthenticationError) as caught:
                smtp.auth(mechanism, getattr(smtp, method))
            assert caught.value.smtp_code == 535
            return smtp.mail("ann@here.test")

    reply, made = serve(papers, client, implicit=True)
    assert reply[0] == 530
    assert made.counted(Counter.AUTH_FAILED) == 1


def exchange(smtp: smtplib.SMTP, mechanism: str, client: ScramClient) -> tuple[int, bytes]:
    """SCRAM by hand."""

    code, first = smtp.docmd("AUTH", f"{mechanism} {b64(client.first())}")
    if code != 334:
        return code, first
    code, final = smtp.docmd(b64(client.final(b64decode(first).decode())))
    return smtp.docmd("") if code == 334 else (code, final)


def test_a_channel_is_bound_to_the_certificate(papers: Papers) -> None:
    certificate = x509.load_pem_x509_certificate(papers.server[0].read_bytes())
    ours = certificate.fingerprint(hashes.SHA256())

    def client(port: int) -> list[int]:
        codes = []
        for mechanism, gs2, binding in (
            ("SCRAM-SHA-256-PLUS", "p=tls-server-end-point,,", ours),
            ("SCRAM-SHA-256-PLUS", "p=tls-server-end-point,,", b"x" * 32),
            ("SCRAM-SHA-256", "n,,", b""),
            ("SCRAM-SHA-256", "y,,", b""),
        ):
            with smtplib.SMTP_SSL("127.0.0.1", port, timeout=10, context=trusting()) as smtp:
                smtp.ehlo("client.test")
                codes.append(exchange(smtp, mechanism, ScramClient("ann", "secret", gs2, binding))[0])
        return codes

    codes, made = serve(papers, client, implicit=True)
    assert codes == [235, 535, 235, 535]
    assert [line["reason"] for line in made.logged("auth-failed")] == ["auth-failed", "auth-downgrade"]


@pytest.mark.parametrize("implicit", [False, True])
def test_a_client_certificate(papers: Papers, implicit: bool) -> None:
    def client(port: int) -> tuple[str, tuple[int, bytes], tuple[int, bytes]]:
        context = trusting(papers.client)
        if implicit:
            smtp: smtplib.SMTP = smtplib.SMTP_SSL("127.0.0.1", port, timeout=10, context=context)
        else:
            smtp = smtplib.SMTP("127.0.0.1", port, timeout=10)
            smtp.starttls(context=context)
        with smtp:
            smtp.ehlo("client.test")
            # It names bob by its address; "Ann" is only its common name.
            return (
                smtp.esmtp_features["auth"],
                smtp.docmd("AUTH", "EXTERNAL " + b64("ann")),
                smtp.docmd("AUTH EXTERNAL ="),
            )

    (offered, as_ann, as_itself), made = serve(papers, client, implicit=implicit)
    assert offered.split()[-1] == "EXTERNAL"
    assert (as_ann[0], as_itself[0]) == (535, 235)
    assert made.logged("session")[0]["user"] == "bob@here.test"


def test_a_client_certificate_that_nobody_vouches_for(papers: Papers) -> None:
    def client(port: int) -> bool:
        try:
            with smtplib.SMTP_SSL("127.0.0.1", port, timeout=10, context=trusting(papers.stranger)) as smtp:
                smtp.ehlo("client.test")
                return "EXTERNAL" in smtp.esmtp_features.get("auth", "")
        except (OSError, smtplib.SMTPException):
            return False

    accepted, _ = serve(papers, client, implicit=True)
    assert not accepted


def test_starttls_forgets_the_user_and_keeps_the_count(papers: Papers) -> None:
    def client(port: int) -> list[int]:
        codes = []
        with smtplib.SMTP("127.0.0.1", port, timeout=10) as smtp:
            smtp.ehlo("client.test")
            codes.append(smtp.docmd("AUTH", f"PLAIN {plain('ann', 'wrong')}")[0])
            codes.append(smtp.docmd("AUTH", f"PLAIN {plain('ann', 'secret')}")[0])
            codes.append(smtp.mail("ann@here.test")[0])
            smtp.starttls(context=trusting())
            smtp.ehlo("client.test")
            codes.append(smtp.mail("ann@here.test")[0])
            codes.append(smtp.docmd("AUTH", f"PLAIN {plain('ann', 'wrong')}")[0])
            codes.append(smtp.docmd("AUTH", f"PLAIN {plain('ann', 'wrong')}")[0])
        return codes

    codes, made = serve(papers, client, auth_clear=True)
    assert codes == [535, 235, 250, 530, 535, 421]
    assert made.logged("session")[0]["user"] is None
