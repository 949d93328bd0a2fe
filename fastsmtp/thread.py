"""One thread for work that releases the GIL: a commit, a flush, a read from the disk.

In: callables, run in the order they came. Out: each one's result or exception, handed to the event loop.
The thread itself runs Python for some microseconds only; whoever hands it work sees to that (a thread that
computes takes the GIL from the loop for 5 ms at a time). Nothing here is retried, and nothing is cancelled:
what was handed over is run. Made after the fork, closed before the loop is.
"""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class OneThread:
    """`run` calls back on the loop; `call` is the same for those who may wait."""

    def __init__(self, loop: AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._queue: SimpleQueue[tuple[Callable[[], Any], Callable[[Any], object]] | None] = SimpleQueue()
        # A daemon: a disk that hangs must not keep the process from ending. What it does is safe to kill.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], T], done: Callable[[T | Exception], object]) -> None:
        """Runs `work` in the thread, then `done` on the loop with its result or the exception it raised."""
        self._queue.put((work, done))

    async def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. When the caller is cancelled, `work` is run all the same."""
        answer: T | Exception = await self._answer(work)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        """Runs what was handed over, then ends the thread."""
        await self.call(lambda: None)
        self._queue.put(None)
        self._thread.join()

    async def _answer(self, work: Callable[[], T]) -> T | Exception:
        future = self._loop.create_future()
        self.run(work, lambda answer: None if future.done() else future.set_result(answer))
        result: T | Exception = await future
        return result

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            work, done = item
            try:
                answer = work()
            except Exception as error:
                answer = error
            try:
                self._loop.call_soon_threadsafe(partial(done, answer))
            except RuntimeError:  # the loop was closed: nobody is left to be told
                return
