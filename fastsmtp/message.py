"""A message and its envelope, and the trace header fields that we add.

A message is kept as three things: `prefix` (our trace fields), `cuts` (byte ranges of the original header that
are left out) and the body, the sender's octets, untouched. Whoever passes it on sends prefix + body minus cuts.
Nothing here does I/O. RFC 5321 4.1.1, 4.4; RFC 3848; RFC 6531 4.3.
"""

from __future__ import annotations

import re
import time
from enum import IntFlag
from functools import lru_cache
from typing import TYPE_CHECKING

from .address import Address, AddressError, parse_address

if TYPE_CHECKING:
    from .verdict import Client


LIST = "list"  # a fault that is none: this is the address of a list, and its members are recipients of their own


class Recipient:
    """One accepted forward-path. `orcpt` and `notify` (RFC 3461) are empty where the client sent none.

    `fault`: why this recipient cannot be delivered to, found when the message was taken, or LIST; empty as a rule.
    `sender`: the owner of the list that brought it here, in place of the reverse-path.
    """

    __slots__ = ("address", "fault", "notify", "orcpt", "sender")

    def __init__(self, address: Address, notify: str = "", orcpt: str = "", fault: str = "") -> None:
        self.address = address
        self.notify = notify
        self.orcpt = orcpt
        self.fault = fault
        self.sender: Address | None = None


class Content(IntFlag):
    """What the octets of a message hold; found by the parser, whatever the parameters said."""

    NONE = 0
    BARE = 1  # a CR or LF that is no part of CRLF
    EIGHT_BIT = 2  # a byte >= 0x80 in the body
    EIGHT_BIT_HEADER = 4  # a byte >= 0x80 in the header section
    BINARY = 8  # sent with BODY=BINARYMIME


# An int: the operators of IntFlag cost 1.9 µs on the path of every message.
_KEPT_AS_SENT = int(Content.BARE | Content.BINARY)


class Envelope:
    """What MAIL and RCPT said, with what the trace fields show of the session."""

    __slots__ = (
        "body", "client", "envid", "helo", "id", "protocol", "recipients", "require_tls", "ret", "reverse_path", "size",
        "utf8", "waives_tls",
    )  # fmt: skip

    def __init__(self, reverse_path: Address) -> None:
        self.id = ""
        self.reverse_path = reverse_path
        self.recipients: list[Recipient] = []
        self.body = ""  # BODY=: "7BIT", "8BITMIME", "BINARYMIME" or not given
        self.utf8 = False
        self.require_tls = False  # RFC 8689: never over a connection that is not verified
        self.waives_tls = False  # RFC 8689 5: in clear rather than not at all, whatever its next host wants
        self.size = 0  # SIZE=, octets announced
        self.ret = ""
        self.envid = ""
        self.client = ""  # IP address, empty for a unix socket
        self.helo = ""
        self.protocol = ""  # as in Received: ESMTP, ESMTPS, LMTP, ...


class Message:
    """A whole message.

    `parts` are the body's octets in order, or None while they are not in memory; `file` is the absolute path of
    the file that holds the body, empty when the spool keeps it inline. `size` counts the body's octets,
    `header_end` is the offset in the body of the first octet behind the header's empty line. `arrived` is in
    seconds since the epoch.
    """

    __slots__ = (
        "arrived",
        "content",
        "cuts",
        "envelope",
        "file",
        "header_end",
        "id",
        "parts",
        "prefix",
        "size",
    )

    def __init__(
        self,
        envelope: Envelope,
        prefix: bytes,
        parts: list[bytes] | None,
        size: int,
        header_end: int,
        content: Content,
        arrived: float,
        file: str = "",
        cuts: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.id = envelope.id
        self.envelope = envelope
        self.prefix = prefix
        self.parts = parts
        self.size = size
        self.header_end = header_end
        self.content = content
        self.arrived = arrived
        self.file = file
        self.cuts = cuts

    @property
    def convertible(self) -> bool:
        """Whether its line ends may be rewritten (CRLF to LF in a mailbox): not binary, no bare CR or LF."""
        return not int(self.content) & _KEPT_AS_SENT


def sent_by_owner(message: Message, owner: Address) -> Message:
    """A message as a list passes it on (RFC 5321 3.9.2). What its sender wants to be told ends at the list."""
    envelope, given = Envelope(owner), message.envelope
    envelope.id = given.id
    envelope.recipients = given.recipients
    envelope.body = given.body
    envelope.utf8 = given.utf8 or not owner.wire.isascii()
    envelope.require_tls = given.require_tls
    envelope.waives_tls = given.waives_tls
    envelope.size = given.size
    envelope.client = given.client
    envelope.helo = given.helo
    envelope.protocol = given.protocol
    return Message(
        envelope, message.prefix, message.parts, message.size, message.header_end, message.content, message.arrived,
        message.file, message.cuts,
    )  # fmt: skip


# RFC 3848, RFC 6531 4.3: the word behind "with".
def protocol_word(base: str, utf8: bool, tls: bool, authenticated: bool) -> str:
    """`base` is SMTP, ESMTP or LMTP."""
    if base == "SMTP":
        return base
    if utf8:
        base = "UTF8SMTP" if base == "ESMTP" else "UTF8LMTP"
    return f"{base}{'S' * tls}{'A' * authenticated}"


_UNSAFE = re.compile(r"[^A-Za-z0-9.\-_:\[\]]")


def traceable(text: str) -> str:
    """The peer's text as it may stand in a trace field: parentheses or semicolons in it would forge one."""
    return _UNSAFE.sub("?", text)[:255]


def received_from(client: Client) -> str:
    """The part of the Received field that is the same for a whole session (RFC 5321 4.4)."""
    if not client.ip:
        host = "local" if client.uid < 0 else f"local, uid {client.uid}"
    else:
        host = f"[IPv6:{client.ip}]" if ":" in client.ip else f"[{client.ip}]"
        if client.rdns:
            host = f"{traceable(client.rdns)} {host}"
    tls = f"\r\n\t({client.tls})" if client.tls else ""
    return f"Received: from {traceable(client.helo)} ({host}){tls}\r\n\tby "


def hidden_from(client: Client) -> str:
    """The same without the client's name and address, for users who do not want to say where they are."""
    tls = f"\r\n\t({client.tls})" if client.tls else ""
    return f"Received: from localhost (hidden){tls}\r\n\tby "


def shows_tls(prefix: bytes) -> bool:
    """Whether a message came over TLS, by the Received field that it got here. The word behind "with" does not say so
    where the client said HELO (RFC 3848)."""
    return b"\r\n\t(" in prefix.partition(b"\r\n\tby ")[0]


def received(from_part: str, hostname: str, envelope: Envelope, date: str) -> bytes:
    """The Received field of a message. The recipient is shown only when it is the only one."""
    recipients = envelope.recipients
    single = f"\r\n\tfor <{recipients[0].address.wire}>" if len(recipients) == 1 else ""
    return (f"{from_part}{hostname} with {envelope.protocol} id {envelope.id}{single};\r\n\t{date}\r\n").encode()


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@lru_cache(maxsize=4)
def date(seconds: int) -> str:
    """A date-time in local time (RFC 5322 3.3). Names are English whatever the locale."""
    t = time.localtime(seconds)
    sign, offset = ("-", -t.tm_gmtoff) if t.tm_gmtoff < 0 else ("+", t.tm_gmtoff)
    return (
        f"{_DAYS[t.tm_wday]}, {t.tm_mday} {_MONTHS[t.tm_mon - 1]} {t.tm_year}"
        f" {t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} {sign}{offset // 3600:02}{offset % 3600 // 60:02}"
    )


_WAIVER = re.compile(
    rb"^tls-required[ \t]*:(?:[ \t]|\r?\n[ \t])*no(?:[ \t]|\r?\n[ \t])*\r?$", re.IGNORECASE | re.MULTILINE
)


def waives_tls(head: bytes | bytearray, header_end: int) -> bool:
    """Whether a header says `TLS-Required: No` (RFC 8689 5); other values mean nothing."""
    return _WAIVER.search(head, 0, header_end) is not None


# A field name, blanks that obsolete syntax allows (RFC 5322 4.5.8), the value with its folded lines.
_TRACE_FIELD = re.compile(
    rb"^(received|delivered-to)[ \t]*:((?:[^\r\n]|\r?\n[ \t]|\r(?!\n))*)", re.IGNORECASE | re.MULTILINE
)


def trace(header: bytes, most: int) -> tuple[int, frozenset[str]]:
    """How often a message was received, and the mailboxes it was delivered to, by its header section.

    With more than `most` deliveries it is a loop whatever they were: as many hops, and no address of the rest is
    read, which takes up to 0.3 ms each. Mailboxes are keys as in `Address.mailbox`. What is no address is passed over.
    """
    hops = deliveries = 0
    mailboxes: set[str] = set()
    for match in _TRACE_FIELD.finditer(header):
        if match[1].lower() == b"received":
            hops += 1
            continue
        deliveries += 1
        if deliveries > most:
            return deliveries, frozenset(mailboxes)
        text = b"".join(match[2].split()).decode("utf-8", "replace").strip("<>")
        try:
            mailboxes.add(parse_address(text).mailbox)
        except AddressError:
            pass
    return hops, frozenset(mailboxes)
