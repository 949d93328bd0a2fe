"""Delivery status notifications that arrived: which message they are about, and what became of whom.

In: a message as it was found. Out: a Notification, or None where it is something else. The id comes from the message or
the header that the notification returns, or from the address it went to, whose local-part is the id.
Always: it is read with the standard library only. Not here: whether what it says may be (verify).
On failure: ValueError where a notification says nothing that can be understood. RFC 3461, RFC 3464, RFC 6522.
"""

from __future__ import annotations

import re
from email import message_from_bytes
from email.message import Message
from typing import NamedTuple

_TYPE = re.compile(rb"^content-type:\s*multipart/report\b", re.IGNORECASE | re.MULTILINE)
_STATUS_TYPES = ("message/delivery-status", "message/global-delivery-status")
_ADDRESS_FIELDS = ("Original-Recipient", "Final-Recipient")  # the first is what the sender wrote, RFC 3464 2.3.1
_MARK = re.compile(rb"^X-Ledger: (?P<id>\S+) ", re.MULTILINE)


class Fate(NamedTuple):
    """What is said of one recipient: `action` is failed, delayed, delivered, relayed or expanded."""

    recipient: str
    action: str
    status: str


class Notification(NamedTuple):
    """`id` is empty where nothing that was returned has one."""

    id: str
    fates: tuple[Fate, ...]


def read_notification(octets: bytes) -> Notification | None:
    """Raises ValueError."""
    end = octets.find(b"\r\n\r\n") + 1 or octets.find(b"\n\n") + 1 or len(octets)
    if _TYPE.search(octets, 0, end) is None:
        return None
    parsed = message_from_bytes(octets)
    fates = []
    for part in parsed.walk():
        blocks = part.get_payload()
        if part.get_content_type() in _STATUS_TYPES and isinstance(blocks, list):
            fates += [fate for block in blocks if isinstance(block, Message) if (fate := _read_fate(block))]
    if not fates:
        raise ValueError("a report that names no recipient")
    mark = _MARK.search(octets, end)
    return Notification("" if mark is None else mark["id"].decode("ascii", "replace"), tuple(fates))


def _read_fate(block: Message) -> Fate | None:
    """None for the fields about the whole message."""
    if block["Final-Recipient"] is None:
        return None
    named = next(str(block[name]) for name in _ADDRESS_FIELDS if block[name] is not None)
    address = named.partition(";")[2].strip() or named.strip()
    return Fate(address.strip("<>"), str(block["Action"] or "").strip().lower(), str(block["Status"] or "").strip())
