"""delivery/discard: everything is delivered and nothing is kept."""

from __future__ import annotations

import asyncio

from fastsmtp.address import NULL, Address
from fastsmtp.delivery import Delivery, Result, Transport
from fastsmtp.delivery.discard import Discard
from fastsmtp.message import Content, Envelope, Message, Recipient


def test_every_recipient_is_delivered_without_a_body() -> None:
    async def run() -> None:
        discard: Transport = Discard()
        assert discard.any_octets
        assert not discard.needs_body
        message = Message(Envelope(NULL), b"", None, 5, 5, Content.NONE, 0.0)
        recipients = [Recipient(Address(name, "y.test")) for name in "abc"]
        outcomes = discard.deliver([Delivery(message, recipients, [0, 1, 2]), Delivery(message, [], [])])
        assert [[outcome.result for outcome in group] for group in outcomes] == [[Result.DELIVERED] * 3, []]
        assert discard.deliver([]) == []
        await discard.close()

    asyncio.run(run())
