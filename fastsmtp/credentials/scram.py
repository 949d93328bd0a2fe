"""SCRAM keys at rest: made of a password, written and read, and imagined for users that do not exist.

In: passwords as SASLprep leaves them, texts of a store. Out: `Keys`. The text is Dovecot's
`{SCRAM-SHA-256}count,salt,stored,server`; `SCRAM-SHA-256$count:salt$stored:server` (RFC 5803, as PostgreSQL has it) is
read too. What is imagined depends on the name and on a secret of this machine: a user who does not exist has the same
salt and count on every day and in every worker, as others do; and such a count as others have. ValueError for a text
that is neither. RFC 5802 3; RFC 7677 4 (at least 4,096 iterations).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import TypeAlias

from ..verdict import Keys

ITERATIONS = 10_000  # some ms of a telephone's; the greatest that is read below keeps a store from costing minutes
MOST_ITERATIONS = 1_000_000
SALT = 16  # octets

Shape: TypeAlias = tuple[int, int]  # what a client sees of keys: their count, and the octets of their salt
USUAL: Shape = (ITERATIONS, SALT)

WORDS = ("salt", "stored", "server")  # of what is imagined

_WORD = "([A-Za-z0-9+/]+=*)"
_FORMS = (
    re.compile(rf"\{{SCRAM-SHA-256\}}([0-9]{{1,7}}),{_WORD},{_WORD},{_WORD}"),
    re.compile(rf"SCRAM-SHA-256\$([0-9]{{1,7}}):{_WORD}\${_WORD}:{_WORD}"),
)


def make_keys(password: str, iterations: int = ITERATIONS, salt: bytes = b"") -> Keys:
    """Takes some milliseconds, without the GIL."""
    salt = salt or secrets.token_bytes(SALT)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    return Keys(salt, iterations, hashlib.sha256(client_key).digest(), hmac.digest(salted, b"Server Key", "sha256"))


def fits(keys: Keys, password: str) -> bool:
    """Whether the keys are of this password."""
    made = make_keys(password, keys.iterations, keys.salt)
    return hmac.compare_digest(made.stored_key, keys.stored_key)


def imagine_keys(secret: bytes, name: str, shapes: Mapping[Shape, int]) -> Keys:
    """Of a user who does not exist: no password fits. Each shape is met as often as among users, and a name keeps its
    own while others come and go (weighted rendezvous hashing)."""

    def draw(shape: Shape) -> float:
        digest = hmac.digest(secret, f"{shape[0]},{shape[1]}\0{name}".encode(), "sha256")
        return -log((int.from_bytes(digest[:6]) + 1) / 2**48) / shapes[shape]

    iterations, size = min(shapes, key=draw, default=USUAL)
    salt, stored, server = (hmac.digest(secret, f"{word}\0{name}".encode(), "sha256") for word in WORDS)
    while len(salt) < size:
        salt += hmac.digest(secret, salt, "sha256")
    return Keys(salt[:size], iterations, stored, server)


def render_keys(keys: Keys) -> str:
    words = [b64encode(octets).decode() for octets in (keys.salt, keys.stored_key, keys.server_key)]
    return f"{{SCRAM-SHA-256}}{keys.iterations},{','.join(words)}"


def parse_keys(text: str) -> Keys:
    """Raises ValueError."""
    for form in _FORMS:
        if match := form.fullmatch(text):
            iterations = int(match[1])
            try:
                salt, stored, server = (b64decode(word, validate=True) for word in match.groups()[1:])
            except Base64Error:
                break
            if not 0 < iterations <= MOST_ITERATIONS or len(stored) != 32 or len(server) != 32:
                break
            return Keys(salt, iterations, stored, server)
    raise ValueError("no SCRAM keys")


def take_secret(path: Path) -> bytes:
    """The machine's secret, made where there is none yet; several workers may ask at once. Raises OSError."""
    try:
        return _read_secret(path)
    except FileNotFoundError:
        pass
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(32))
        os.fsync(descriptor)
        os.link(temporary, path)  # whole from the first moment; the first of several makes it
    except FileExistsError:
        pass
    finally:
        os.close(descriptor)
        temporary.unlink()
    return _read_secret(path)


def _read_secret(path: Path) -> bytes:
    secret = path.read_bytes()
    if len(secret) != 32:
        raise OSError(None, "is not 32 octets long; remove it to have a new one made", str(path))
    return secret
