"""AUTH from the client's side: known exchanges, and hosts that cheat."""

from __future__ import annotations

import pytest

from fastsmtp.delivery.login import (
    MOST_ITERATIONS,
    Credentials,
    Login,
    LoginError,
    Plain,
    ScramSha256,
    XOAuth2,
    choose,
    decode,
)

# RFC 7677 3
USER = Credentials("user", "pencil")
NONCE = "rOprNGfwEbeRWgbNEkqO"
FIRST = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
PROOF = b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


def test_scram_as_in_the_rfc() -> None:
    scram = ScramSha256(USER, NONCE)
    assert scram.initial == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    assert scram.answer(FIRST) == PROOF
    assert not scram.finished
    assert scram.answer(FINAL) == b""
    assert scram.finished


CHEATING = {
    "another nonce": FIRST.replace(b"r=rO", b"r=xO"),
    "our nonce with nothing added": b"r=" + NONCE.encode() + b",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
    "no salt": b"r=" + NONCE.encode() + b"x,i=4096",
    "few iterations": FIRST.replace(b"4096", b"1"),
    "iterations without end": FIRST.replace(b"4096", str(MOST_ITERATIONS + 1).encode()),
    "nothing": b"",
    "an extension that is mandatory": b"m=x," + FIRST,
}


@pytest.mark.parametrize("first", CHEATING.values(), ids=CHEATING)
def test_scram_and_a_host_that_cheats(first: bytes) -> None:
    with pytest.raises(LoginError):
        ScramSha256(USER, NONCE).answer(first)


@pytest.mark.parametrize("last", [b"", b"v=", b"e=other-error", FINAL[:-1], b"v=" + PROOF[-44:]])
def test_scram_and_a_host_that_does_not_know_the_password(last: bytes) -> None:
    scram = ScramSha256(USER, NONCE)
    scram.answer(FIRST)
    with pytest.raises(LoginError):
        scram.answer(last)
    assert not scram.finished


def test_scram_takes_no_second_proof() -> None:
    scram = ScramSha256(USER, NONCE)
    scram.answer(FIRST)
    scram.answer(FINAL)
    with pytest.raises(LoginError):
        scram.answer(FINAL)


def test_scram_names_with_reserved_characters_and_nonces_of_our_own() -> None:
    first, second = (ScramSha256(Credentials("a=b,c", "x")).initial for _ in range(2))
    assert first is not None
    assert first.startswith(b"n,,n=a=3Db=2Cc,r=")
    assert first != second


def test_plain() -> None:
    plain = Plain(Credentials("änn", "pass wörd"))
    assert plain.initial == "\0änn\0pass wörd".encode()
    assert plain.finished
    with pytest.raises(LoginError):
        plain.answer(b"")


def test_login() -> None:
    login = Login(Credentials("ann", "secret"))
    assert login.initial is None
    assert login.answer(b"Username:") == b"ann"
    assert not login.finished
    assert login.answer(b"Password:") == b"secret"
    assert login.finished
    with pytest.raises(LoginError):
        login.answer(b"Token:")


def test_xoauth2() -> None:
    mechanism = XOAuth2(Credentials("ann@x.test", "ya29.token"))
    assert mechanism.initial == b"user=ann@x.test\1auth=Bearer ya29.token\1\1"
    assert mechanism.answer(b'{"status":"401"}') == b""
    with pytest.raises(LoginError):
        mechanism.answer(b"")


def test_ours_is_the_order() -> None:
    credentials = Credentials("ann", "secret")
    chosen = choose(credentials, {"LOGIN", "PLAIN", "SCRAM-SHA-256", "XOAUTH2"})
    assert chosen is not None
    assert chosen[0] == "SCRAM-SHA-256"
    assert choose(credentials, {"XOAUTH2", "CRAM-MD5"}) is None
    assert choose(Credentials("ann", "secret", ("MADE-UP",)), {"MADE-UP"}) is None


def test_base64_of_a_host() -> None:
    assert decode(b"") == b""
    for text in (b"=", b"a", b"YW5u!", b"YW 5u"):
        with pytest.raises(LoginError):
            decode(text)


def test_a_secret_is_not_shown() -> None:
    assert "secret" not in repr(Credentials("ann", "secret"))
