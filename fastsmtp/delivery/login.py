"""The client's side of AUTH: mechanisms as small resumable objects, and the credentials they speak for.

In: the host's challenges, decoded. Out: our answers, to be encoded. A mechanism says in `finished` whether what it
had to hear has been heard: with SCRAM the host proves that it knows the password too, and 235 without that proof is
no success. Whether the connection may see a password at all is decided by the dialogue, never here.
On failure: LoginError; its text holds nothing of a secret or of what the host sent. The work that a host can ask of
us is bounded. RFC 4954 4; RFC 4616 (PLAIN); draft-murchison-sasl-login; RFC 5802, 7677 (SCRAM-SHA-256); XOAUTH2 as
Google and Microsoft document it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from unicodedata import normalize

# 2 ms for 4,096 iterations, on the loop; RFC 7677 asks for no fewer.
LEAST_ITERATIONS = 4_096
MOST_ITERATIONS = 100_000


@dataclass(frozen=True, slots=True)
class Credentials:
    """`secret` is the password, or the token of XOAUTH2. `mechanisms` in the order of our preference."""

    user: str
    secret: str = field(repr=False)
    mechanisms: tuple[str, ...] = ("SCRAM-SHA-256", "PLAIN", "LOGIN")


class LoginError(Exception):
    """The exchange cannot go on."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Mechanism(Protocol):
    """`initial` is sent with AUTH, None where the host speaks first."""

    initial: bytes | None
    finished: bool

    def answer(self, challenge: bytes) -> bytes:
        """To a 334. Raises LoginError."""
        ...


class Plain:
    """RFC 4616: all at once."""

    finished = True

    def __init__(self, credentials: Credentials) -> None:
        self.initial: bytes | None = f"\0{credentials.user}\0{credentials.secret}".encode()

    def answer(self, challenge: bytes) -> bytes:
        raise LoginError("the host asked for more than PLAIN has")


class Login:
    """User, then password; the prompts' words differ from host to host and say nothing."""

    def __init__(self, credentials: Credentials) -> None:
        self.initial: bytes | None = None
        self.finished = False
        self._left = [credentials.secret.encode(), credentials.user.encode()]

    def answer(self, challenge: bytes) -> bytes:
        if not self._left:
            raise LoginError("the host asked for more than LOGIN has")
        word = self._left.pop()
        self.finished = not self._left
        return word


class XOAuth2:
    """A bearer token. A host that refuses it says why in a challenge, and wants an empty answer before its 535."""

    finished = True

    def __init__(self, credentials: Credentials) -> None:
        self.initial: bytes | None = f"user={credentials.user}\1auth=Bearer {credentials.secret}\1\1".encode()
        self._refused = False

    def answer(self, challenge: bytes) -> bytes:
        if self._refused:
            raise LoginError("the host asked for more than XOAUTH2 has")
        self._refused = True
        return b""


_FIRST = re.compile(rb"r=([\x21-\x2b\x2d-\x7e]+),s=([A-Za-z0-9+/]+=*),i=([1-9][0-9]{0,8})(?:,.*)?")


class ScramSha256:
    """RFC 5802 without channel binding. `nonce` is ours: printable ASCII without a comma, never used twice."""

    def __init__(self, credentials: Credentials, nonce: str = "") -> None:
        self._nonce = (nonce or secrets.token_urlsafe(18)).encode()
        user = normalize("NFKC", credentials.user).replace("=", "=3D").replace(",", "=2C")
        self._password = normalize("NFKC", credentials.secret).encode()
        self._bare = b"n=%s,r=%s" % (user.encode(), self._nonce)
        self.initial: bytes | None = b"n,," + self._bare
        self.finished = False
        self._proof_wanted = b""  # what the host's last message must be

    def answer(self, challenge: bytes) -> bytes:
        if self._proof_wanted:
            if self.finished or not hmac.compare_digest(challenge.split(b",")[0], self._proof_wanted):
                raise LoginError("the host does not know the password")
            self.finished = True
            return b""
        match = _FIRST.fullmatch(challenge)
        if match is None or not match[1].startswith(self._nonce) or match[1] == self._nonce:
            raise LoginError("the host's answer is not SCRAM")
        nonce, salt, iterations = match[1], match[2], int(match[3])
        if not LEAST_ITERATIONS <= iterations <= MOST_ITERATIONS:
            raise LoginError(f"the host asked for {iterations} iterations")
        salted = hashlib.pbkdf2_hmac("sha256", self._password, decode(salt), iterations)
        key = _hmac(salted, b"Client Key")
        last = b"c=biws,r=" + nonce
        said = b",".join((self._bare, challenge, last))
        signature = _hmac(hashlib.sha256(key).digest(), said)
        self._proof_wanted = b"v=" + b64encode(_hmac(_hmac(salted, b"Server Key"), said))
        proof = bytes(a ^ b for a, b in zip(key, signature, strict=True))
        return b"%s,p=%s" % (last, b64encode(proof))


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def decode(text: bytes) -> bytes:
    """Base64 of a challenge. Raises LoginError."""
    try:
        return b64decode(text, validate=True)
    except Base64Error:
        raise LoginError("the host's challenge is not base64") from None


MECHANISMS: Mapping[str, Callable[[Credentials], Mechanism]] = {
    "SCRAM-SHA-256": ScramSha256,
    "PLAIN": Plain,
    "LOGIN": Login,
    "XOAUTH2": XOAuth2,
}


def choose(credentials: Credentials, offered: Collection[str]) -> tuple[str, Mechanism] | None:
    """The first mechanism of ours that the host offers."""
    for name in credentials.mechanisms:
        if name in offered and name in MECHANISMS:
            return name, MECHANISMS[name](credentials)
    return None
