"""link: what only shows where the transport keeps octets back, or a host is slow on purpose."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from sending import LIMITS, Fixed, run, sending, terms, to, told

from fastsmtp.delivery import Result
from fastsmtp.delivery.body import PIECE
from fastsmtp.delivery.client_tls import Manner, Mode, Tls
from fastsmtp.delivery.link import Link


class Kept(asyncio.Transport):
    """What is written stays in it, `unsent` octets of it for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.unsent = 0

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def close(self) -> None:
        pass

    abort = pause_reading = close


def make_link(executor: ThreadPoolExecutor, mode: Mode) -> Link:
    return Link(
        "mx.test", Manner(Tls(mode), terms()), clear=False, local=False, most=1, executor=executor,
        on_end=lambda _: None, on_gone=lambda _: None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "unsent", "expected"),
    [
        (PIECE + 1, 0, "delivered 2.0.0 recipient relayed"),
        (PIECE + 1, 1, "deferred 4.5.0 host"),
        (10, 1, "delivered 2.0.0 recipient relayed"),  # it left with the group: other replies come first
    ],
)
def test_a_message_whose_end_has_not_left_is_not_taken(size: int, unsent: int, expected: str) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            link = make_link(executor, "off")
            transport = Kept()
            running = link.run([to("ann", octets=b"x" * size)])
            link.connection_made(transport)
            link.data_received(b"220 mx\r\n")
            link.data_received(b"250-mx\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
            link.data_received(b"250 ok\r\n250 ok\r\n")
            if size > PIECE:
                link.data_received(b"250 ok\r\n")  # to the first chunk
            assert b" LAST\r\n" in transport.written
            transport.unsent = unsent
            link.data_received(b"250 taken\r\n")
            assert told(await running) == [[expected]]
            link.connection_lost(None)

    run(main)


def test_a_handshake_that_fails_in_no_way_that_is_known_is_answered_too() -> None:
    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            link = make_link(executor, "implicit")
            running = link.run([to("ann")])
            link.connection_made(Kept())  # the loop takes its own transports only: TypeError
            (((outcome,),),) = [await asyncio.wait_for(running, 5)]
            assert (outcome.result, outcome.status) == (Result.DEFERRED, "4.7.5")
            assert "TypeError" in outcome.text

    run(main)


def test_a_host_that_always_does_a_little_does_not_hold_a_slot_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes some octets now and then, so that no time-out of the protocol is ever over."""
    monkeypatch.setattr("fastsmtp.delivery.link.LONGEST", 0.5)
    monkeypatch.setattr("fastsmtp.delivery.link.SLOWEST", 1e12)
    taken = 0

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        writer.write(b"220 mx\r\n")
        for reply in (b"250 mx\r\n", b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"):
            await reader.readline()
            writer.write(reply)
        with suppress(OSError):
            while octets := await reader.read(20_000):
                taken += len(octets)
                await asyncio.sleep(0.01)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(trickle, "127.0.0.1", 0, limit=1000)
        port = server.sockets[0].getsockname()[1]
        async with server, sending(Fixed(port, "127.0.0.1"), limits=LIMITS._replace(tick=0.05)) as transport:
            results = await transport.deliver([to("ann", octets=b"x" * 78 * 400_000)])
            assert told(results) == [["deferred 4.4.2 host next-host"]]
            assert results[0][0].text == "mx0.test timed out (message)"
        assert taken > 100_000

    run(main)
