"""A door in a flood of clients over their limits, which it turns away by itself, and when that is over."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from peer import unverified
from sending import make_certificate, run, until
from wire import Bench, make_service

from fastsmtp.config import Inbound
from fastsmtp.doors import FLOOD, Door, Guard
from fastsmtp.metrics import Counter
from fastsmtp.policy.limits import Limits

BAD, GOOD, OTHER = "127.0.7.1", "127.0.7.2", "127.0.7.3"
FULL = b"421 4.7.0 mx.here.test Too many sessions from your address (address-full)\r\n"
LOOPS = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])


class House:
    """A door on a socket of its own; an address may have one session."""

    def __init__(self, made: Bench, context: ssl.SSLContext | None) -> None:
        service = self.service = made.service
        self.made = made
        service.context = context
        service.limits = Limits(
            Inbound.model_validate({"sessions_per_address": 1}),
            lambda _: False,
            hostname="mx.here.test",
            log=service.log,
            shared=service.shared,
            worker=0,
        )
        listening = self.listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = listening.getsockname()
        doors: list[Door] = []
        self.guard = Guard(service.loop, doors, service.log)
        self.door = Door(0, service, listening, context is not None, self.guard)
        doors.append(self.door)
        self.context = unverified() if context else None

    async def connect(self, source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address, local_addr=(source, 0), ssl=self.context)

    async def hears(self, source: str) -> bytes:
        """All that a client hears that says nothing and closes when it was greeted."""
        try:
            reader, writer = await self.connect(source)
        except (OSError, ssl.SSLError):
            return b""
        try:
            return await reader.readline()
        finally:
            writer.close()

    async def flood(self) -> None:
        """Clients that are turned away, until the door does it by itself, and some more."""
        for number in range(FLOOD + 20):
            heard = await self.hears(BAD)
            assert heard == (b"" if self.context else FULL), number
        assert self.door.flooded
        await until(lambda: self.openings() == 1)

    def openings(self) -> int:
        """Descriptors of the listening socket: one is the door's, and while the loop accepts one is the loop's."""
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            try:
                found += os.path.sameopenfile(int(fd), self.listening.fileno())
            except OSError:
                pass  # that of the folder that was listed
        return found

    async def gone(self, sessions: int) -> None:
        await until(lambda: self.service.shared.open_sessions() == sessions)


@asynccontextmanager
async def house(context: ssl.SSLContext | None = None) -> AsyncIterator[House]:
    """Its only session of BAD is held."""
    made = make_service(asyncio.get_running_loop())
    house = House(made, context)
    await house.door.open()
    try:
        reader, writer = await house.connect(BAD)
        assert (await reader.readline()).startswith(b"220 ")
        with closing(writer):
            yield house
        await house.gone(0)
        made.check_bugs(0)
    finally:
        house.door.close_for_good()
        made.close()


def play(loop: str, story: Callable[[House], Awaitable[None]], context: ssl.SSLContext | None = None) -> None:
    async def main() -> None:
        async with house(context) as made:
            await story(made)

    run(main, loop)


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(tmp_path, "mx.here.test"))
    return context


@LOOPS
@pytest.mark.parametrize("implicit", [False, True], ids=["clear", "tls"])
def test_others_come_in_during_a_flood(loop: str, implicit: bool, tls: ssl.SSLContext) -> None:
    async def story(house: House) -> None:
        await house.flood()
        refused = house.made.counted(Counter.SESSIONS_REFUSED)
        assert refused == house.made.counted(Counter.ADDRESS_FULL) == house.service.turned_away == FLOOD + 20
        reader, writer = await house.connect(GOOD)
        assert (await reader.readline()).startswith(b"220 ")
        writer.write(b"EHLO a.test\r\n")
        assert (await reader.readline()).startswith(b"250-")
        assert sorted(each.client.ip for each in house.service.connections()) == [BAD, GOOD]
        assert await house.hears(GOOD) == (b"" if implicit else FULL), "it has what it may have"
        writer.close()
        await house.gone(1)
        assert (await house.hears(GOOD)).startswith(b"220 "), "and may have it again"
        await house.gone(1)

    play(loop, story, tls if implicit else None)


@LOOPS
def test_the_end_of_a_flood(loop: str) -> None:
    async def story(house: House) -> None:
        await house.flood()
        house.guard.tick()
        assert house.door.flooded, "there were many since the last tick"
        house.guard.tick()
        assert not house.door.flooded
        await until(lambda: house.openings() == 2)
        assert (await house.hears(GOOD)).startswith(b"220 ")
        assert await house.hears(BAD) == FULL
        assert not house.door.flooded
        await house.flood()
        house.door.use(house.service, False)
        house.guard.tick()
        assert not house.door.flooded, "what another service has refused is none of its own"
        await house.gone(1)

    play(loop, story)


@LOOPS
def test_a_few_refusals_are_no_flood(loop: str) -> None:
    async def story(house: House) -> None:
        for _ in range(4):
            for _ in range(FLOOD // 3):
                assert await house.hears(BAD) == FULL
            house.guard.tick()
        assert not house.door.flooded

    play(loop, story)


@LOOPS
def test_without_descriptors_clients_wait_in_a_flood_too(loop: str) -> None:
    async def story(house: House) -> None:
        await house.flood()
        await asyncio.sleep(0.1)  # the last client's descriptor is closed
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        client = socket.socket()
        client.setblocking(False)
        with closing(client):
            client.bind((GOOD, 0))
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limit[1]))
            try:
                client.connect_ex(house.address)  # it waits in the queue
                await until(lambda: not house.door.is_open)
                assert not house.door.flooded
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            assert len(house.made.logged("accept-paused")) == 1
            house.guard.tick()
            assert (await house.service.loop.sock_recv(client, 512)).startswith(b"220 ")
            house.guard.tick()
            assert len(house.made.logged("accept-resumed")) == 1
        await house.gone(1)

    play(loop, story)


@LOOPS
def test_before_tls_nothing_is_said_in_a_flood(loop: str, tls: ssl.SSLContext) -> None:
    async def story(house: House) -> None:
        await house.flood()
        house.context = None
        assert await house.hears(BAD) == b""

    play(loop, story, tls)


@LOOPS
def test_a_door_is_closed_for_good_in_a_flood(loop: str) -> None:
    async def story(house: House) -> None:
        await house.flood()
        house.door.close_for_good()
        house.door.close_for_good()
        with pytest.raises(ConnectionRefusedError):
            await house.connect(GOOD)

    play(loop, story)
