"""Checks, and how they are asked: facts in, verdict out.

A check belongs to one stage. It answers an Ask with a Verdict, or None when it has no opinion; a check that must look
something up returns an awaitable of that. The first Verdict decides; where nobody has one, the answer is ACCEPT.
A check that raises, or takes longer than `patience`, is answered 451: what could not be looked up is neither unknown
nor welcome. Checks never import each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from inspect import isawaitable
from typing import Protocol, TypeAlias

from .. import log as logs
from ..reply import R451_CHECK_FAILED
from ..verdict import Ask, Stage, Verdict

ACCEPT = Verdict("accepted")
CHECK_FAILED = Verdict("check-failed", R451_CHECK_FAILED)

Opinion: TypeAlias = "Verdict | None"


class Check(Protocol):
    """One rule."""

    stage: Stage

    def __call__(self, ask: Ask) -> Opinion | Awaitable[Opinion]: ...


class Policy:
    """The checks of a listener, in their order. `patience` is in seconds."""

    def __init__(self, checks: Sequence[Check], log: logs.Log, patience: float = 30.0) -> None:
        self._checks = {stage: tuple(check for check in checks if check.stage is stage) for stage in Stage}
        self._log = log
        self._patience = patience
        self.stages = frozenset(stage for stage, present in self._checks.items() if present)

    def evaluate(self, ask: Ask) -> Verdict | Awaitable[Verdict]:
        """The verdict, or an awaitable of it when a check has to wait. Never raises."""
        checks = self._checks[ask.stage]
        for number, check in enumerate(checks):
            try:
                opinion = check(ask)
            except Exception as error:
                return self._failed(ask, error)
            if opinion is None:
                continue
            if isinstance(opinion, Verdict):
                return opinion
            return self._go_on(ask, opinion, checks[number + 1 :])
        return ACCEPT

    async def _go_on(self, ask: Ask, waiting: Awaitable[Opinion], rest: Sequence[Check]) -> Verdict:
        try:
            async with asyncio.timeout(self._patience):
                opinion = await waiting
                for check in rest:
                    if opinion is not None:
                        break
                    answer = check(ask)
                    opinion = await answer if isawaitable(answer) else answer
        except Exception as error:
            return self._failed(ask, error)
        return opinion or ACCEPT

    def _failed(self, ask: Ask, error: Exception) -> Verdict:
        # What a store says of a question about a password may hold it.
        what = type(error).__name__ if ask.stage is Stage.AUTH else repr(error)
        self._log.write(logs.BUG, "policy", what, logs.trace(error))
        return CHECK_FAILED
