"""Discard: a transport that keeps nothing. Every recipient is delivered at once.

For benchmarks, and for addresses whose mail is to vanish. It has no thread, no file and no failure.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..address import Address
from . import DELIVERED, Delivery, Outcome


class Discard:
    """The Transport that throws away."""

    any_octets = True
    needs_body = False
    concurrency = 0

    def destination(self, recipient: Address) -> str:
        """There is only one."""
        return ""

    def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Sequence[Outcome]]:
        """Delivered, one and all."""
        return [[DELIVERED] * len(delivery.recipients) for delivery in deliveries]

    async def close(self) -> None:
        """There is nothing to end."""
