"""The mechanisms of AUTH that a sink knows: PLAIN and LOGIN.

In: the client's responses. Out: the questions, and at the end a name and a password. Not here: whether they are right.
On failure: ValueError for a response that is none.
RFC 4954, RFC 4616; LOGIN is described nowhere but spoken everywhere.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Generator
from typing import TypeAlias

# Yields questions, takes responses, returns name and password.
Exchange: TypeAlias = Generator[bytes, bytes, tuple[bytes, bytes]]


def decode(response: bytes) -> bytes:
    """Base64 as RFC 4954 4 has it: `=` is an empty initial response. Raises ValueError."""
    try:
        return b"" if response == b"=" else base64.b64decode(response, validate=True)
    except binascii.Error:
        raise ValueError("no base64") from None


def _plain() -> Exchange:
    response = yield b"334 \r\n"
    _, user, password = response.split(b"\0")
    return user, password


def _login() -> Exchange:
    user = yield b"334 VXNlcm5hbWU6\r\n"
    password = yield b"334 UGFzc3dvcmQ6\r\n"
    return user, password


MECHANISMS: dict[bytes, Callable[[], Exchange]] = {b"PLAIN": _plain, b"LOGIN": _login}
