"""An Authority to be asked in a test: real buckets, a clock that the test moves, and a log that is a list.

In: stores. Out: a `Bench` that asks questions of a client, and knows which lines were logged and how long each no
would have taken: nothing sleeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from inspect import isawaitable
from typing import TypeVar, cast

from fastsmtp._shared import Shared
from fastsmtp.config_values import Rate
from fastsmtp.credentials import Authority, Store
from fastsmtp.credentials.guessing import Guessing
from fastsmtp.log import Event, Log
from fastsmtp.metrics import Counter
from fastsmtp.verdict import Ask, Client, Question, Stage, Verdict

T = TypeVar("T")
ADDRESS_RATE = Rate(5, 600.0)
USER_RATE = Rate(20, 3600.0)


def client(ip: str = "192.0.2.1", listener: str = "127.0.0.1:587", tls: str = "TLSv1.3 x") -> Client:
    made = Client(ip, 4000, listener)
    made.tls = tls
    return made


async def settled(answer: T | Awaitable[T]) -> T:
    return cast("T", await answer if isawaitable(answer) else answer)


class Bench:
    """`now` is the clock's; `slept` are the delays of refusals; `lines` what was logged."""

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        cache: float = 60.0,
        address: Rate = ADDRESS_RATE,
        user: Rate = USER_RATE,
        unlimited: tuple[str, ...] = (),
        shared: Shared | None = None,
    ) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.lines: list[tuple[object, ...]] = []
        self.shared = shared or Shared(1, len(Counter))
        guessing = Guessing(self.shared, address, user, unlimited.__contains__, lambda: self.now)
        self.authority = Authority(
            stores, guessing, cache=cache, log=cast("Log", self), now=lambda: self.now, sleep=self._sleep
        )

    def write(self, event: Event, *values: object) -> None:
        self.lines.append((event.name, *values))

    async def ask(self, question: Question, ip: str = "192.0.2.1") -> Verdict:
        return await settled(self.authority(Ask(Stage.AUTH, client(ip), question=question)))

    async def words(self, *questions: Question, ip: str = "192.0.2.1") -> list[str]:
        """The reason of each verdict."""
        return [(await self.ask(question, ip)).reason for question in questions]

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)
