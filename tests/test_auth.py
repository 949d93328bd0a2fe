"""SASL mechanisms, resumed step by step without SMTP: the RFCs' examples, what is malformed, who is who."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scramp import ScramClient as Scramp  # type: ignore[import-untyped]
from users import MECHANISMS as ALL
from users import NO, ScramClient, Users, make_keys

from fastsmtp import auth
from fastsmtp.auth import TABLE, Attempt, AuthError, Challenge, Facts, available, decode_base64
from fastsmtp.config_auth import Mechanism
from fastsmtp.reply import (
    R451_CHECK_FAILED,
    R454_AUTH_UNAVAILABLE,
    R501_BAD_RESPONSE,
    R535_BAD_CREDENTIALS,
    Reply,
)
from fastsmtp.verdict import Ask, Client, Identity, Password, Proved, Question, ScramKeys, Stage, Token, Verdict


def make_client(tls: str = "TLSv1.3 x", bindings: tuple[bytes, ...] = (), certificate: str = "") -> Client:
    client = Client("192.0.2.7", 25252, "test")
    client.tls = tls
    client.bindings = bindings
    client.certificate = certificate
    return client


class Play:
    """A mechanism, its questions answered by `users`."""

    def __init__(
        self, mechanism: str, client: Client | None = None, users: Users | None = None, nonce: str = ""
    ) -> None:
        self.client = client or make_client()
        self.users = users or Users()
        self.attempt = Attempt(mechanism)
        self.user = ""
        facts = Facts(self.client, self.attempt, available(ALL, self.client, clear=False))
        if nonce:
            facts = facts._replace(make_nonce=lambda: nonce)
        self.run = auth.MECHANISMS[mechanism].run(facts)
        self.prompt = self._go(None)

    def _go(self, answer: bytes | Verdict | None) -> bytes | None:
        try:
            step = self.run.send(answer)
            while not isinstance(step, Challenge):
                verdict = self.users(Ask(Stage.AUTH, self.client, question=step))
                assert isinstance(verdict, Verdict)
                step = self.run.send(verdict)
        except StopIteration as end:
            self.user = end.value
            return None
        return step.octets

    def say(self, response: bytes | str) -> bytes | None:
        """The next challenge; None: it is over, and went well."""
        return self._go(response.encode() if isinstance(response, str) else response)

    def fail(self, response: bytes | str) -> tuple[Reply, str]:
        with pytest.raises(AuthError) as caught:
            self.say(response)
        return caught.value.reply, caught.value.reason


def ask_only(question: Question, users: Users) -> bool:
    (asked,) = users.asked
    return type(asked) is type(question) and all(
        getattr(asked, part, None) == getattr(question, part, None) for part in ("name", "password", "token")
    )


# PLAIN


def test_plain() -> None:
    """RFC 4616 4."""
    play = Play("PLAIN", users=Users({"tim": "tanstaaftanstaaf"}))
    assert play.prompt == b""
    assert play.say("\0tim\0tanstaaftanstaaf") is None
    assert play.user == "tim"
    assert play.attempt.name == "tim"
    assert ask_only(Password("tim", "tanstaaftanstaaf"), play.users)


def test_plain_for_another_user() -> None:
    """RFC 4616 4: nobody may be another here."""
    play = Play("PLAIN", users=Users({"kurt": "xipj3plmq"}))
    assert play.fail("Ursel\0Kurt\0xipj3plmq") == (R535_BAD_CREDENTIALS, "auth-foreign-authzid")
    assert play.users.asked == []
    assert play.user == ""


def test_plain_for_oneself() -> None:
    play = Play("PLAIN")
    assert play.say("ann\0ann\0secret") is None
    assert play.user == "ann"


def test_names_and_passwords_are_prepared() -> None:
    play = Play("PLAIN", users=Users({"jurgen": "a b"}))
    assert play.say("\0ju\u00adrgen\0a\u00a0b") is None
    assert ask_only(Password("jurgen", "a b"), play.users)


@pytest.mark.parametrize(
    "response",
    [
        b"", b"ann", b"\0", b"\0\0", b"\0ann\0", b"\0\0secret", b"ann\0secret", b"\0ann\0secret\0", b"\0ann\0sec\0ret",
        b"\0\0ann\0secret", b"\0ann\0\xff", b"\xff\0ann\0secret", b"\0a\xc0\x80nn\0secret",
    ],
)  # fmt: skip
def test_malformed_plain(response: bytes) -> None:
    play = Play("PLAIN")
    assert play.fail(response) == (R501_BAD_RESPONSE, "auth-malformed")
    assert play.users.asked == []


@pytest.mark.parametrize("name", ["ann\r\n", "ann\x07", "\u00ad", "a" * 256, "ann\ufffe", "\u0627a"])
def test_what_is_no_name_is_answered_as_a_wrong_password_is(name: str) -> None:
    play = Play("PLAIN")
    assert play.fail(f"\0{name}\0secret") == (R535_BAD_CREDENTIALS, "auth-malformed")
    assert play.users.asked == []


def test_what_is_too_long_is_not_even_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these characters becomes eighteen, and nobody has paid for the work yet."""
    prepared: list[str] = []
    monkeypatch.setattr(auth, "saslprep", lambda text: prepared.append(text) or text)
    for name, password in (("ann", "\ufdfa" * 342), ("\ufdfa" * 86, "secret")):
        play = Play("PLAIN")
        assert play.fail(f"\0{name}\0{password}") == (R535_BAD_CREDENTIALS, "auth-malformed")
        assert play.users.asked == []
    assert prepared == ["ann"]
    play = Play("PLAIN", users=Users({"ann": "\ufdfa" * 341}))
    assert play.say("\0ann\0" + "\ufdfa" * 341) is None


def test_a_wrong_password() -> None:
    play = Play("PLAIN")
    assert play.fail("\0ann\0wrong") == (R535_BAD_CREDENTIALS, "auth-failed")
    assert play.attempt.name == "ann"


def test_a_verdict_that_names_nobody_grants_nothing() -> None:
    """As of a policy in which nobody has an opinion."""
    for mechanism, response in (("PLAIN", "\0ann\0secret"), ("XOAUTH2", "user=ann\1auth=Bearer t\1\1")):
        users = Users()
        users.fault = Verdict("accepted")
        play = Play(mechanism, users=users)
        assert play.fail(response) == (R535_BAD_CREDENTIALS, "auth-failed")
        assert play.user == ""


def test_what_cannot_be_asked_is_454() -> None:
    for verdict in (Verdict("check-failed", R451_CHECK_FAILED), Verdict("auth-busy", R454_AUTH_UNAVAILABLE)):
        for mechanism, response in (
            ("PLAIN", "\0ann\0secret"),
            ("SCRAM-SHA-256", "n,,n=ann,r=abc"),
            ("XOAUTH2", "user=ann\1auth=Bearer t\1\1"),
        ):
            users = Users()
            users.fault = verdict
            assert Play(mechanism, users=users).fail(response) == (R454_AUTH_UNAVAILABLE, verdict.reason)


# LOGIN


def test_login() -> None:
    play = Play("LOGIN")
    assert play.prompt == b"Username:"
    assert play.say("ann") == b"Password:"
    assert play.say("secret") is None
    assert play.user == "ann"


@pytest.mark.parametrize(("name", "password"), [("", "secret"), ("ann", ""), ("a\0nn", "secret"), ("ann", "secret\0")])
def test_malformed_login(name: str, password: str) -> None:
    play = Play("LOGIN")
    assert play.say(name) == b"Password:"
    assert play.fail(password) == (R501_BAD_RESPONSE, "auth-malformed")
    assert play.users.asked == []


# SCRAM


def test_the_exchange_of_rfc_7677() -> None:
    class Store(Users):
        def decide(self, question: Question) -> Verdict:
            if isinstance(question, ScramKeys):
                keys = make_keys("pencil", b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="))
                return Verdict("auth-keys", user="user", keys=keys)
            return super().decide(question)

    play = Play("SCRAM-SHA-256", users=Store(), nonce="%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
    assert play.say("n,,n=user,r=rOprNGfwEbeRWgbNEkqO") == (
        b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    )
    assert (
        play.say(
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        )
        == b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    )
    assert play.user == ""
    assert play.say("") is None
    assert play.user == "user"
    proved = play.users.asked[-1]
    assert isinstance(proved, Proved)
    assert (proved.name, proved.ok) == ("user", True)


def exchange(client: ScramClient, play: Play) -> None:
    first = play.say(client.first())
    assert first is not None
    final = play.say(client.final(first.decode()))
    assert final is not None
    assert final.startswith(b"v=")
    assert b64decode(final[2:]) == client.server_signature
    assert play.say("") is None


BINDINGS = (b"r" * 32, b"e" * 48)
PLUS = "p=tls-server-end-point,,"


@pytest.mark.parametrize("name", ["ann", "jürgen", "bob@here.test", "a,b=c"])
def test_scram(name: str) -> None:
    play = Play("SCRAM-SHA-256", users=Users({name: "secret"}))
    exchange(ScramClient(name, "secret"), play)
    assert play.user == name


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_channel_is_bound_to_any_certificate_of_the_context(binding: bytes) -> None:
    play = Play("SCRAM-SHA-256-PLUS", make_client(bindings=BINDINGS))
    exchange(ScramClient("ann", "secret", PLUS, binding), play)
    assert play.user == "ann"


def refused(mechanism: str, client: ScramClient, bindings: tuple[bytes, ...] = BINDINGS) -> tuple[str, list[bool]]:
    """Why, and which proofs were told of."""
    play = Play(mechanism, make_client(bindings=bindings))
    with pytest.raises(AuthError) as caught:
        play.say(client.final((play.say(client.first()) or b"").decode()))
    assert caught.value.reply is R535_BAD_CREDENTIALS
    assert play.user == ""
    return caught.value.reason, [asked.ok for asked in play.users.asked if isinstance(asked, Proved)]


@pytest.mark.parametrize("binding", [b"", b"x" * 32, b"r" * 31, b"r" * 33, BINDINGS[0] + BINDINGS[1]])
def test_another_certificate_than_ours(binding: bytes) -> None:
    """Somebody stands between us and the client."""
    assert refused("SCRAM-SHA-256-PLUS", ScramClient("ann", "secret", PLUS, binding)) == ("auth-failed", [False])


def test_binding_data_where_no_binding_was_agreed() -> None:
    client = ScramClient("ann", "secret", "n,,", b"r" * 32)
    assert refused("SCRAM-SHA-256", client) == ("auth-failed", [False])


@pytest.mark.parametrize(
    ("mechanism", "gs2"),
    [
        ("SCRAM-SHA-256-PLUS", "n,,"),
        ("SCRAM-SHA-256-PLUS", "y,,"),
        ("SCRAM-SHA-256-PLUS", "p=tls-unique,,"),
        ("SCRAM-SHA-256-PLUS", "p=tls-exporter,,"),
        ("SCRAM-SHA-256", PLUS),
        ("SCRAM-SHA-256", "p=tls-exporter,,"),
    ],
)
def test_a_flag_that_does_not_go_with_the_mechanism(mechanism: str, gs2: str) -> None:
    assert refused(mechanism, ScramClient("ann", "secret", gs2, BINDINGS[0])) == ("auth-binding", [])


def test_a_downgrade_is_found() -> None:
    """RFC 5802 6: "y" says that the client saw no PLUS in our offer."""
    assert refused("SCRAM-SHA-256", ScramClient("ann", "secret", "y,,")) == ("auth-downgrade", [])
    play = Play("SCRAM-SHA-256", make_client(bindings=()))
    exchange(ScramClient("ann", "secret", "y,,"), play)
    assert play.user == "ann"


def test_a_wrong_password_is_told_of() -> None:
    assert refused("SCRAM-SHA-256", ScramClient("ann", "wrong")) == ("auth-failed", [False])


def test_an_unknown_user_is_answered_alike() -> None:
    assert refused("SCRAM-SHA-256", ScramClient("nobody", "x")) == ("auth-failed", [False])
    # Not even with the keys that were made up for the name.
    assert refused("SCRAM-SHA-256", ScramClient("nobody", "nobody knows")) == ("auth-failed", [False])


def test_as_another_user() -> None:
    assert refused("SCRAM-SHA-256", ScramClient("ann", "secret", "n,a=bob,")) == ("auth-foreign-authzid", [])
    play = Play("SCRAM-SHA-256")
    exchange(ScramClient("ann", "secret", "n,a=ann,"), play)
    assert play.user == "ann"


@pytest.mark.parametrize(
    "response",
    [
        b"", b"n", b"n,,", b"n,,n=ann", b"n,,n=ann,r=", b"n,,n=,r=abc", b"n,,r=abc,n=ann", b"n,n=ann,r=abc",
        b"x,,n=ann,r=abc", b"n,b=ann,n=ann,r=abc", b"n,a=,n=ann,r=abc", b"p,,n=ann,r=abc", b"p=,,n=ann,r=abc",
        b"n,,n=a=nn,r=abc", b"n,,n=a=2cnn,r=abc", b"n,a=b=2,n=ann,r=abc",
        b"n,,n=ann,r=a c", b"n,,n=ann,r=a\xc3\xbc", b"n,,n=ann,r=a\x7f", b"n,,n=ann,r=abc,", b"n,,n=ann,r=abc,x",
        b"n,,m=x,n=ann,r=abc", b"n,,n=a\0nn,r=abc", b"\0n,,n=ann,r=abc", b"n,,n=ann,r=abc\0", b"n,,n=ann,r=abc,x=\0",
        b"n,,n=\xff,r=abc", b"n,,n=ann,r=abc\n",
    ],
)  # fmt: skip
def test_a_malformed_first_message(response: bytes) -> None:
    play = Play("SCRAM-SHA-256")
    assert play.fail(response) == (R501_BAD_RESPONSE, "auth-malformed")
    assert play.users.asked == []


PROOF = "p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="


@pytest.mark.parametrize(
    "response",
    [
        "", f"c=biws,{PROOF}", "c=biws,r=abcNONCE", f"r=abcNONCE,c=biws,{PROOF}", f"c=biws,r=abcNONCE,{PROOF},x=y",
        f"c=biws,r=,{PROOF}", f"c=,r=abcNONCE,{PROOF}", f"c=bi ws,r=abcNONCE,{PROOF}", "c=biws,r=abcNONCE,p=",
        f"c=biw,r=abcNONCE,{PROOF}", "c=biws,r=abcNONCE,p=AAA", "c=biws,r=abcNONCE,p=AB==",
        f"c=biws,r=abcNONCE,{PROOF}\0",
    ],
)  # fmt: skip
def test_a_malformed_last_message(response: str) -> None:
    play = Play("SCRAM-SHA-256", nonce="NONCE")
    assert play.say("n,,n=ann,r=abc") is not None
    assert play.fail(response) == (R501_BAD_RESPONSE, "auth-malformed")


@pytest.mark.parametrize("proof", ["p=AA==", f"p={'A' * 40}", PROOF])
@pytest.mark.parametrize("nonce", ["abcNONCE", "abc", "abcNONCEx", "NONCE"])
def test_another_nonce_or_proof(proof: str, nonce: str) -> None:
    play = Play("SCRAM-SHA-256", nonce="NONCE")
    assert play.say("n,,n=ann,r=abc") is not None
    assert play.fail(f"c=biws,r={nonce},{proof}") == (R535_BAD_CREDENTIALS, "auth-failed")


def test_a_nonce_of_another_exchange_proves_nothing() -> None:
    """The proof is right for its own words; the words are not those of this exchange."""
    client = ScramClient("ann", "secret", nonce="abc")
    play = Play("SCRAM-SHA-256", nonce="NONCE")
    first = play.say(client.first())
    assert first is not None
    final = client.final("r=abcOTHER,s=YW5uLi4uLi4uLi4uLi4uLg==,i=4096")
    assert play.fail(final) == (R535_BAD_CREDENTIALS, "auth-failed")


def test_a_nonce_that_is_not_ours() -> None:
    """All else is right, and proved."""
    client = ScramClient("ann", "secret", nonce="abc")
    play = Play("SCRAM-SHA-256", nonce="NONCE")
    first = play.say(client.first())
    assert first is not None
    assert play.fail(client.final(first.decode(), nonce="abcOTHER")) == (R535_BAD_CREDENTIALS, "auth-failed")


def test_something_behind_the_servers_proof() -> None:
    client = ScramClient("ann", "secret")
    play = Play("SCRAM-SHA-256")
    first = play.say(client.first())
    assert first is not None
    assert play.say(client.final(first.decode())) is not None
    assert play.fail("x") == (R501_BAD_RESPONSE, "auth-malformed")
    assert play.user == ""


def test_a_proof_that_is_right_may_still_be_refused() -> None:
    class Full(Users):
        def decide(self, question: Question) -> Verdict:
            if isinstance(question, Proved):
                return Verdict("auth-limited", R454_AUTH_UNAVAILABLE)
            return super().decide(question)

    client = ScramClient("ann", "secret")
    play = Play("SCRAM-SHA-256", users=Full())
    first = play.say(client.first())
    assert first is not None
    assert play.fail(client.final(first.decode())) == (R454_AUTH_UNAVAILABLE, "auth-limited")
    assert play.user == ""


def test_a_wrong_proof_is_no_whatever_the_store_says_of_it() -> None:
    class Kind(Users):
        def decide(self, question: Question) -> Verdict:
            if isinstance(question, Proved):
                return Verdict("auth-ok", user="ann")
            return super().decide(question)

    client = ScramClient("ann", "wrong")
    play = Play("SCRAM-SHA-256", users=Kind())
    first = play.say(client.first())
    assert first is not None
    assert play.fail(client.final(first.decode())) == (R535_BAD_CREDENTIALS, "auth-failed")


@pytest.mark.parametrize("plus", [False, True])
def test_with_another_implementation(plus: bool) -> None:
    mechanism = "SCRAM-SHA-256-PLUS" if plus else "SCRAM-SHA-256"
    binding = ("tls-server-end-point", BINDINGS[1]) if plus else None
    client: Any = Scramp([mechanism], "bob@here.test", "pencil", channel_binding=binding)
    play = Play(mechanism, make_client(bindings=BINDINGS if plus else ()))
    first = play.say(client.get_client_first())
    assert first is not None
    client.set_server_first(first.decode())
    final = play.say(client.get_client_final())
    assert final is not None
    client.set_server_final(final.decode())
    assert play.say("") is None
    assert play.user == "bob@here.test"


def test_every_exchange_has_a_nonce_of_its_own() -> None:
    nonces = {Play("SCRAM-SHA-256").say("n,,n=ann,r=abc") for _ in range(50)}
    assert len(nonces) == 50


# Tokens

RFC_7628 = (
    "bixhPXVzZXJAZXhhbXBsZS5jb20sAWhvc3Q9c2VydmVyLmV4YW1wbGUuY29tAXBvcnQ9MTQzAWF1dGg9QmVhcmVyIHZGOWRmdDRxbVRjMk52YjNS"
    "bGNrQmhiSFJoZG1semRHRXVZMjl0Q2c9PQEB"
)


def test_the_token_of_rfc_7628() -> None:
    """4.1."""
    play = Play("OAUTHBEARER")
    assert play.say(b64decode(RFC_7628)) == b'{"status": "invalid_token"}'
    assert ask_only(Token("vF9dft4qmTc2Nvb3RlckBhbHRhdmlzdGEuY29tCg==", "user@example.com"), play.users)
    assert play.attempt.name == "user@example.com"
    assert play.fail(b"\1") == (R535_BAD_CREDENTIALS, "auth-failed")


@pytest.mark.parametrize(
    ("mechanism", "response"),
    [
        ("OAUTHBEARER", "n,,\1auth=Bearer ann-token\1\1"),
        ("OAUTHBEARER", "y,a=ann,\1host=h\1port=25\1auth=bearer ann-token\1\1"),
        ("OAUTHBEARER", "n,a=ann,\1AUTH=BEARER ann-token\1mthd=POST\1qs=\1\1"),
        ("XOAUTH2", "user=ann\1auth=Bearer ann-token\1\1"),
        ("XOAUTH2", "user=\1auth=bearer ann-token\1\1"),
    ],
)
def test_a_token(mechanism: str, response: str) -> None:
    play = Play(mechanism)
    assert play.say(response) is None
    assert play.user == "ann"


@pytest.mark.parametrize(
    ("mechanism", "response"),
    [
        ("OAUTHBEARER", ""),
        ("OAUTHBEARER", "n,,\1auth=Bearer ann-token\1"),
        ("OAUTHBEARER", "n,,auth=Bearer ann-token\1\1"),
        ("OAUTHBEARER", "p=tls-server-end-point,,\1auth=Bearer ann-token\1\1"),
        ("OAUTHBEARER", "n,,\1\1"),
        ("OAUTHBEARER", "n,,\1auth=Bearer x\1auth=Bearer ann-token\1\1"),
        ("OAUTHBEARER", "n,,\1auth=Bearer ann-token\1\1x"),
        ("OAUTHBEARER", "n,a=a=nn,\1auth=Bearer ann-token\1\1"),
        ("OAUTHBEARER", "n,,\1auth=Bearer ann\0token\1\1"),
        ("XOAUTH2", ""),
        ("XOAUTH2", "auth=Bearer ann-token\1\1"),
        ("XOAUTH2", "user=ann\1auth=Bearer ann-token\1"),
        ("XOAUTH2", "user=ann\1auth=Bearer ann-token\1\1\1"),
        ("XOAUTH2", "user=a\0nn\1auth=Bearer ann-token\1\1"),
    ],
)
def test_malformed_tokens(mechanism: str, response: str) -> None:
    play = Play(mechanism)
    assert play.fail(response) == (R501_BAD_RESPONSE, "auth-malformed")
    assert play.users.asked == []


@pytest.mark.parametrize("auth", ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer a b", "Bearer a,b", "Bearer =a"])
@pytest.mark.parametrize("mechanism", ["OAUTHBEARER", "XOAUTH2"])
def test_what_is_no_bearer_token(mechanism: str, auth: str) -> None:
    """RFC 7628 4.3: an empty one asks what there is to be had; the answer is the same."""
    play = Play(mechanism)
    response = f"n,a=ann,\1auth={auth}\1\1" if mechanism == "OAUTHBEARER" else f"user=ann\1auth={auth}\1\1"
    challenge = play.say(response)
    assert challenge is not None
    assert json.loads(challenge)["status"] in ("invalid_token", "401")
    assert play.users.asked == []
    assert play.fail(b"") == (R535_BAD_CREDENTIALS, "auth-malformed")


def test_why_a_token_is_refused() -> None:
    users = Users()
    users.fault = Verdict("auth-failed", R535_BAD_CREDENTIALS, problem="insufficient_scope")
    assert Play("OAUTHBEARER", users=users).say("n,,\1auth=Bearer t\1\1") == b'{"status": "insufficient_scope"}'
    play = Play("XOAUTH2", users=users)
    challenge = play.say("user=ann\1auth=Bearer t\1\1")
    assert challenge is not None
    assert json.loads(challenge) == {"status": "401", "schemes": "bearer", "scope": ""}
    # Known already while the client's empty answer is waited for.
    assert play.attempt.reason == "auth-failed"


def test_a_token_of_another_user() -> None:
    play = Play("XOAUTH2")
    assert play.say("user=bob\1auth=Bearer ann-token\1\1") is not None
    assert play.fail("") == (R535_BAD_CREDENTIALS, "auth-failed")


# EXTERNAL


@pytest.mark.parametrize("authzid", ["", "Ann", "ann"])
def test_external(authzid: str) -> None:
    play = Play("EXTERNAL", make_client(certificate="Ann"))
    assert play.prompt == b""
    assert play.say(authzid) is None
    assert play.user == "ann"
    assert play.attempt.name == "Ann"
    assert ask_only(Identity("Ann"), play.users)


def test_external_as_another_user() -> None:
    play = Play("EXTERNAL", make_client(certificate="ann"))
    assert play.fail("bob@here.test") == (R535_BAD_CREDENTIALS, "auth-foreign-authzid")


def test_a_certificate_of_nobody() -> None:
    assert Play("EXTERNAL", make_client(certificate="eve")).fail("") == (R535_BAD_CREDENTIALS, "auth-failed")


# What can succeed


def test_what_is_offered() -> None:
    names = tuple(row.name for row in TABLE)
    everything = make_client(bindings=BINDINGS, certificate="ann")
    assert available(ALL, everything, clear=False) == names
    assert "SCRAM-SHA-256-PLUS" not in available(ALL, make_client(certificate="ann"), clear=False)
    assert "EXTERNAL" not in available(ALL, make_client(bindings=BINDINGS), clear=False)
    assert available(frozenset({"PLAIN"}), everything, clear=False) == ("PLAIN",)
    assert available(ALL, make_client(tls=""), clear=False) == ()
    in_clear = available(ALL, make_client(tls=""), clear=True)
    assert in_clear == ("SCRAM-SHA-256", "PLAIN", "LOGIN", "OAUTHBEARER", "XOAUTH2")
    everything.user = "ann"
    assert available(ALL, everything, clear=True) == ()
    assert "CRAM-MD5" not in names


def test_the_configuration_knows_the_mechanisms() -> None:
    assert get_args(Mechanism) == tuple(row.name for row in TABLE)


# base64


@given(octets=st.binary(max_size=200))
def test_base64_of_every_length(octets: bytes) -> None:
    assert decode_base64(b64encode(octets)) == octets


@given(text=st.text(alphabet="AQgw+/=-_ \n", max_size=12).map(str.encode))
@example(text=b"AA")
@example(text=b"AA=")
@example(text=b"AA===")
@example(text=b"AA==AA==")
@example(text=b"AB==")
@example(text=b"=")
@example(text=b"A")
@example(text=b"AA==\n")
def test_one_text_for_one_value(text: bytes) -> None:
    try:
        octets = decode_base64(text)
    except ValueError:
        pass
    else:
        assert b64encode(octets) == text


@given(response=st.binary(max_size=60), mechanism=st.sampled_from([row.name for row in TABLE]))
def test_no_response_breaks_a_mechanism(response: bytes, mechanism: str) -> None:
    play = Play(mechanism, make_client(bindings=BINDINGS, certificate="ann"), Users({}))
    with pytest.raises(AuthError) as caught:  # nobody has an account
        list(map(play.say, [response] * 9))
    assert caught.value.reply in (R501_BAD_RESPONSE, R535_BAD_CREDENTIALS)
    # Nothing hangs on it that holds the response.
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert play.user == ""


def test_no_is_a_no() -> None:
    assert NO.reply is R535_BAD_CREDENTIALS
