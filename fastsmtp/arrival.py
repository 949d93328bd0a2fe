"""A message at its end: what can only be checked when it is whole, and what the spool is given then.

In: what the parser says of its octets, their beginning, the transaction, and who sent it on which terms. Out: a `Store`
(envelope, our Received field and whatever else goes before the body), or the Reply that refuses it. Of a user's message
the header is looked at and mended, as submission wants it; a stranger's octets are only judged. Nothing is changed but
the envelope, which the refused message's transaction takes with it.
Not here: the order of commands (session.py), chunks of BDAT before the last, keeping it (spool.py).
RFC 5321 4.4, 6.3; RFC 6409 8; RFC 8689 5.
"""

from __future__ import annotations

from ._parser import BodyEnd
from .message import date, hidden_from, received, waives_tls
from .reply import (
    R550_BARE_LINE_END,
    R550_LINE_TOO_LONG,
    R552_HEADER_TOO_BIG,
    R552_TOO_BIG,
    R554_LOOP,
    Reply,
)
from .rights import NO_RIGHTS
from .submission import Handling, Submitter, prepare
from .terms import Terms
from .transaction import Transaction
from .verdict import Client, Store


def take_whole(
    terms: Terms,
    client: Client,
    from_part: str,
    transaction: Transaction,
    end: BodyEnd,
    head: bytes | bytearray,
    header_end: int,
) -> Reply | Store:
    """`from_part` is of the Received field. `head` and `header_end`: as in `Session.take_end`."""
    envelope = transaction.envelope
    if end.too_big:
        return R552_TOO_BIG
    if end.bare and not (terms.bare_bdat if transaction.begun else terms.bare_data):
        return R550_BARE_LINE_END
    if end.long_line and envelope.body != "BINARYMIME":
        return R550_LINE_TOO_LONG
    if end.long_header:
        return R552_HEADER_TOO_BIG
    if header_end < 0:
        header_end = end.header_end
    if (end.delivered or end.received > terms.hops) and transaction.loops(
        bytes(head[:header_end]), terms.hops, terms.lmtp
    ):
        return R554_LOOP
    arrived = terms.now()
    prefix = received(from_part, terms.hostname, envelope, date(int(arrived)))
    store = Store(envelope, prefix, arrived, header_end)
    if client.user and (handling := terms.handling) is not None:
        refusal = _submit(terms.hostname, client, handling, store, bytes(head[:header_end]))
        if refusal is not None:
            return refusal
    if terms.waivable and not envelope.require_tls:
        envelope.waives_tls = waives_tls(head, header_end)
    if transaction.hops is not None:
        refusal = transaction.unfit(end, store.prefix)
        if refusal is not None:
            return refusal
    return store


def _submit(hostname: str, client: Client, handling: Handling, store: Store, header: bytes) -> Reply | None:
    """Does to a user's message what submission does; or why it is refused."""
    envelope = store.envelope
    today = date(int(store.arrived))
    submitter = Submitter(client.user, client.rights or NO_RIGHTS, envelope.reverse_path, hostname, envelope.id, today)
    changes = prepare(handling, header, submitter)
    if isinstance(changes, Reply):
        return changes
    if handling.hide_client:
        store.prefix = received(hidden_from(client), hostname, envelope, today)
    store.prefix += changes.added
    store.cuts = changes.cuts
    if changes.headless:
        store.header_end = 0
    return None
