"""What a host offers in its answer to EHLO, and what a message asks of it.

In: a Reply, a message, the terms of a destination. Out: Offers; a Finding where the host cannot take the message as
it is; the command lines of MAIL and RCPT with the parameters that this host knows. Content decides, not what the
sender declared; only a header that holds octets above 0x7f without a SMTPUTF8 declared is old mail, and is treated
like a body that does. A keyword in `ignore` is as if it had not been offered. No line has a control character.
Not here: order, octets of the body, replies. RFC 5321 4.1.1.1, 1870, 6152, 3030, 6531, 3461, 8689, 9422, 6533 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..message import Content, Message, Recipient
from .body import sent_size
from .failures import PATIENCE, Finding, Stage
from .login import Credentials
from .replies import Reply

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Terms:
    """How one destination is spoken to: the same for all sessions with it.

    `hostname` is our name in EHLO. `starttls`: "off", "opportunistic" (in clear where it is not offered or refused) or
    "required". `eight_bit`: whether 8-bit content is sent to a host without 8BITMIME. `bare`: whether a message with
    a bare CR or LF is converted for a host without CHUNKING. `recipients`: the most in one transaction.
    """

    hostname: str
    lmtp: bool = False
    starttls: Literal["off", "opportunistic", "required"] = "off"
    credentials: Credentials | None = None
    eight_bit: Literal["send", "bounce"] = "send"
    bare: Literal["convert", "bounce"] = "convert"
    ignore: frozenset[str] = frozenset()
    recipients: int = 100  # every server takes as many (RFC 5321 4.5.3.1.8)
    patience: Mapping[Stage, float] = field(default_factory=lambda: PATIENCE)

    def __post_init__(self) -> None:
        if not self.hostname or not self.hostname.isascii() or _CONTROL.search(self.hostname):
            raise ValueError("the name for EHLO is not printable ASCII")


def _number(text: str) -> int:
    """0 for what is no number, or none that could matter."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


class Offers:
    """`keywords` are upper-case, each with its parameters as text. Limits are 0 where none is known."""

    __slots__ = (
        "binary", "chunking", "domains", "dsn", "eight_bit", "keywords", "mechanisms", "pipelining", "recipients",
        "require_tls", "size", "sized", "starttls", "transactions", "utf8",
    )  # fmt: skip

    def __init__(self, keywords: Mapping[str, str]) -> None:
        self.keywords = keywords
        self.pipelining = "PIPELINING" in keywords
        self.chunking = "CHUNKING" in keywords
        self.binary = "BINARYMIME" in keywords and self.chunking
        self.eight_bit = "8BITMIME" in keywords
        self.utf8 = "SMTPUTF8" in keywords
        self.dsn = "DSN" in keywords
        self.starttls = "STARTTLS" in keywords
        self.require_tls = "REQUIRETLS" in keywords
        self.mechanisms = frozenset(keywords.get("AUTH", "").upper().split())
        self.sized = "SIZE" in keywords
        self.size = _number(keywords.get("SIZE", ""))
        limits = dict(word.upper().partition("=")[::2] for word in keywords.get("LIMITS", "").split())
        self.transactions = _number(limits.get("MAILMAX", ""))
        self.recipients = _number(limits.get("RCPTMAX", ""))
        self.domains = _number(limits.get("RCPTDOMAINMAX", ""))  # within a session


NOTHING = Offers({})


def parse_offers(reply: Reply, ignore: frozenset[str]) -> Offers:
    """The first line is the host's name. `AUTH=LOGIN` is how hosts older than RFC 2554 said it."""
    keywords: dict[str, str] = {}
    for line in reply.lines[1:]:
        keyword, _, parameters = line.decode("latin-1").strip().replace("AUTH=", "AUTH ", 1).partition(" ")
        keyword = keyword.upper()
        if keyword not in ignore:
            keywords.setdefault(keyword, parameters)
    return Offers(keywords)


_EIGHT_BIT = int(Content.EIGHT_BIT)
_EIGHT_BIT_HEADER = int(Content.EIGHT_BIT_HEADER)
_EIGHT_BIT_ANYWHERE = _EIGHT_BIT | _EIGHT_BIT_HEADER
_BARE = int(Content.BARE)
_BINARY = int(Content.BINARY)


def check_message(message: Message, offers: Offers, terms: Terms) -> Finding | None:
    """Why the host cannot take the message whoever it is for; None: it can."""
    envelope = message.envelope
    content = int(message.content)
    if offers.size and sent_size(message) > offers.size:
        return Finding.TOO_BIG
    if not offers.utf8 and _header_utf8(message):
        return Finding.HEADER_UTF8
    if content:
        if content & _BINARY:
            return None if offers.binary else Finding.BINARY
        if content & _EIGHT_BIT_ANYWHERE and not offers.eight_bit and terms.eight_bit == "bounce":
            return Finding.EIGHT_BIT
        if content & _BARE and not offers.chunking and terms.bare == "bounce":
            return Finding.BARE
    return None if _is_sendable(envelope.reverse_path.wire + envelope.envid + envelope.ret) else Finding.BAD_SENDER


def check_recipient(recipient: Recipient, offers: Offers) -> Finding | None:
    """Why this host cannot be told of the recipient."""
    if not offers.utf8 and not recipient.address.local.isascii():
        return Finding.ADDRESS_UTF8
    address = recipient.address
    return None if _is_sendable(address.wire + recipient.orcpt + recipient.notify) else Finding.BAD_RECIPIENT


def _is_sendable(text: str) -> bool:
    # isprintable is stricter, and five times as fast.
    return text.isprintable() or _CONTROL.search(text) is None


def _header_utf8(message: Message) -> bool:
    envelope = message.envelope
    if not envelope.reverse_path.local.isascii():
        return True
    return envelope.utf8 and (bool(int(message.content) & _EIGHT_BIT_HEADER) or not message.prefix.isascii())


def render_mail(message: Message, offers: Offers, *, utf8: bool, require_tls: bool) -> str:
    """`utf8`: one of the recipients has a non-ASCII address."""
    envelope = message.envelope
    content = int(message.content)
    line = f"MAIL FROM:<{envelope.reverse_path.wire}>"
    if offers.sized:
        line += f" SIZE={sent_size(message)}"
    if content:
        if content & _BINARY:
            line += " BODY=BINARYMIME"
        elif content & _EIGHT_BIT_ANYWHERE and offers.eight_bit:
            line += " BODY=8BITMIME"
    if offers.utf8 and (utf8 or _header_utf8(message)):
        line += " SMTPUTF8"
    if offers.dsn:
        if envelope.ret:
            line += f" RET={envelope.ret}"
        if envelope.envid:
            line += f" ENVID={envelope.envid}"
    if require_tls:
        line += " REQUIRETLS"
    return line + "\r\n"


def render_rcpt(recipient: Recipient, offers: Offers) -> str:
    line = f"RCPT TO:<{recipient.address.wire}>"
    if offers.dsn:
        if recipient.notify:
            line += f" NOTIFY={recipient.notify}"
        if recipient.orcpt:
            line += f" ORCPT={recipient.orcpt if offers.utf8 else _ascii(recipient.orcpt)}"
    return line + "\r\n"


def _ascii(orcpt: str) -> str:
    """The same original recipient for a host without SMTPUTF8: utf-8-addr-xtext (RFC 6533 3)."""
    return orcpt if orcpt.isascii() else "".join(c if c.isascii() else f"\\x{{{ord(c):X}}}" for c in orcpt)
