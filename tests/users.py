"""Users for tests: the check that the stage AUTH asks, with its answers written down, and a client of SCRAM-SHA-256.

In: names and passwords. Out: `Users`, which stands where the credential stores do, notes what it is asked, and answers
at once or later; keys of SCRAM are made of the passwords, for unknown names too. `ScramClient` is the other side,
written from RFC 5802 alone. Nothing of fastsmtp but the values of verdict.py is used here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Mapping

from fastsmtp.reply import R535_BAD_CREDENTIALS
from fastsmtp.verdict import Ask, Identity, Keys, Password, Proved, Question, ScramKeys, Stage, Token, Verdict

PASSWORDS = {"ann": "secret", "bob@here.test": "pencil", "jürgen": "grün"}
TOKENS = {"ann-token": "ann"}
MECHANISMS = frozenset(("PLAIN", "LOGIN", "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS", "OAUTHBEARER", "XOAUTH2", "EXTERNAL"))
NO = Verdict("auth-failed", R535_BAD_CREDENTIALS, problem="invalid_token")


def b64(octets: bytes | str) -> str:
    return b64encode(octets.encode() if isinstance(octets, str) else octets).decode()


def plain(name: str, password: str, authzid: str = "") -> str:
    """The response of PLAIN."""
    return b64(f"{authzid}\0{name}\0{password}")


def make_keys(password: str, salt: bytes, iterations: int = 4096) -> Keys:
    """RFC 5802 3."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return Keys(salt, iterations, hashlib.sha256(client_key).digest(), server_key)


class Users:
    """The check at AUTH. `later`: what a verdict waits for; `fault`: what is said instead of any verdict."""

    stage = Stage.AUTH

    def __init__(self, passwords: Mapping[str, str] = PASSWORDS) -> None:
        self.passwords = passwords
        self.asked: list[Question] = []
        self.later: Callable[[], Awaitable[None]] | None = None
        self.fault: Verdict | Exception | None = None

    def __call__(self, ask: Ask) -> Verdict | Awaitable[Verdict]:
        assert ask.question is not None
        self.asked.append(ask.question)
        verdict = self.decide(ask.question)
        return verdict if self.later is None else self._wait(verdict, self.later)

    async def _wait(self, verdict: Verdict, later: Callable[[], Awaitable[None]]) -> Verdict:
        await later()
        return verdict

    def decide(self, question: Question) -> Verdict:
        if isinstance(self.fault, Exception):
            raise self.fault
        if self.fault is not None:
            return self.fault
        match question:
            case Password(name=name, password=password):
                user = name.lower()
                return Verdict("auth-ok", user=user) if self.passwords.get(user) == password else NO
            case ScramKeys(name=name):
                user = name.lower()
                known = user in self.passwords
                keys = make_keys(self.passwords.get(user, "nobody knows"), user.encode().ljust(16, b"."))
                return Verdict("auth-keys", user=user if known else "", keys=keys)
            case Proved(ok=ok):
                return Verdict("auth-ok") if ok else NO
            case Token(token=token, name=name):
                user = TOKENS.get(token, "")
                return Verdict("auth-ok", user=user) if user and name in ("", user) else NO
            case Identity(name=name):
                return Verdict("auth-ok", user=name.lower()) if name.lower() in self.passwords else NO


class ScramClient:
    """`gs2` is the header that it begins with, `binding` the data that stands behind it in the last message."""

    def __init__(
        self, name: str, password: str, gs2: str = "n,,", binding: bytes = b"", nonce: str = "fyko+d2lbbFgONRv9qkx"
    ) -> None:
        self.password = password
        self.gs2 = gs2
        self.binding = binding
        self.nonce = nonce
        self.bare = f"n={name.replace('=', '=3D').replace(',', '=2C')},r={nonce}"
        self.server_signature = b""

    def first(self) -> str:
        return self.gs2 + self.bare

    def final(self, server_first: str, nonce: str = "") -> str:
        """`nonce`: another one than the server's is answered."""
        parts = dict(part.split("=", 1) for part in server_first.split(","))
        assert parts["r"].startswith(self.nonce)
        assert len(parts["r"]) > len(self.nonce)
        unproved = f"c={b64(self.gs2.encode() + self.binding)},r={nonce or parts['r']}"
        salted = hashlib.pbkdf2_hmac("sha256", self.password.encode(), b64decode(parts["s"]), int(parts["i"]))
        key = hmac.digest(salted, b"Client Key", "sha256")
        signed = f"{self.bare},{server_first},{unproved}".encode()
        signature = hmac.digest(hashlib.sha256(key).digest(), signed, "sha256")
        self.server_signature = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256")
        return f"{unproved},p={b64(bytes(a ^ b for a, b in zip(key, signature, strict=True)))}"


def problem(challenge: str) -> dict[str, str]:
    """What a refused token's challenge says."""
    said: dict[str, str] = json.loads(b64decode(challenge))
    return said
