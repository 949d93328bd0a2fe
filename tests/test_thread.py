"""One thread and its results."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from keeping import run

from fastsmtp.thread import OneThread


def test_work_is_run_in_order_and_answers_come_on_the_loop() -> None:
    async def main() -> None:
        thread = OneThread(asyncio.get_running_loop(), "x")
        seen: list[tuple[object, bool]] = []
        here = threading.get_ident()
        for n in range(5):
            thread.run(lambda n=n: (n, threading.get_ident() != here), lambda got: seen.append(got))
        await thread.close()
        assert seen == [(n, True) for n in range(5)]

    run(main())


def test_what_work_raises_is_an_answer() -> None:
    async def main() -> None:
        thread = OneThread(asyncio.get_running_loop(), "x")

        def fail() -> None:
            raise OSError("no")

        seen: list[object] = []
        thread.run(fail, seen.append)
        with pytest.raises(OSError, match="no"):
            await thread.call(fail)
        assert isinstance(seen[0], OSError)
        assert await thread.call(lambda: 7) == 7
        await thread.close()

    run(main())


def test_a_cancelled_caller_harms_nobody() -> None:
    async def main() -> None:
        thread = OneThread(asyncio.get_running_loop(), "x")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(thread.call(lambda: time.sleep(0.1)), 0.01)
        assert await thread.call(lambda: 7) == 7
        await thread.close()

    run(main())


def test_a_loop_that_is_gone_ends_the_thread_quietly() -> None:
    async def main() -> OneThread:
        thread = OneThread(asyncio.get_running_loop(), "x")
        thread.run(lambda: time.sleep(0.2), print)
        return thread

    thread: OneThread = run(main())
    thread._thread.join(5)
    assert not thread._thread.is_alive()
