"""A small SMTP server in a thread, whose behaviour a test chooses, for the load generator to run against.

In: a function from what was said to what is answered. Out: its address, and how many connections it had. An answer is
octets; b"" closes the connection, None says nothing, and RESET breaks it. Everything is answered at once but in what
`stall` names: while it is set, nothing is.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Answer: TypeAlias = Callable[[str], bytes | None]

RESET = b"\0reset"
ORDINARY = {
    "": b"220 mx.test\r\n",
    "EHLO": b"250-mx.test\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-STARTTLS\r\n250-AUTH PLAIN\r\n250 8BITMIME\r\n",
    "AUTH": b"235 ok\r\n",
    "MAIL": b"250 ok\r\n",
    "RCPT": b"250 ok\r\n",
    "DATA": b"354 go\r\n",
    ".": b"250 kept\r\n",
    "RSET": b"250 ok\r\n",
    "STARTTLS": b"220 go\r\n",
    "QUIT": b"221 bye\r\n",
}


def ordinary(said: str) -> bytes | None:
    """`said` is a verb, "" for the connection itself, "." for the end of data."""
    return ORDINARY.get(said, b"500 what\r\n")


def but(**changes: bytes | None) -> Answer:
    """As usual, but for some verbs; `end` is the end of data and `open` the connection."""
    names = {"end": ".", "open": ""}
    changed = {names.get(verb, verb): answer for verb, answer in changes.items()}
    return lambda said: changed[said] if said in changed else ordinary(said)


class LoadServer:
    """`stall` holds back every answer while it is set."""

    def __init__(self, answer: Answer, context: ssl.SSLContext | None = None, implicit: bool = False) -> None:
        self._answer = answer
        self._context = context
        self._implicit = implicit
        self.connections = 0
        self.commands: list[str] = []
        self.mails: Counter[int] = Counter()  # by connection, counted from 1
        self.stall = threading.Event()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        tls = self._context if self._implicit else None
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1000, ssl=tls, limit=1 << 20)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._converse(reader, writer)
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = ""
        number = self.connections
        while True:
            while self.stall.is_set():
                await asyncio.sleep(0.01)
            answer = self._answer(said)
            if answer == RESET:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
                return
            if answer == b"":
                return
            if answer:
                writer.write(answer)
                await writer.drain()
            if said == "QUIT":
                return
            if said == "STARTTLS" and answer and answer.startswith(b"220"):
                if self._context is None:
                    return
                await writer.start_tls(self._context)
            if said == "DATA" and answer and answer.startswith(b"354"):
                await reader.readuntil(b"\r\n.\r\n")
                said = "."
                continue
            line = await reader.readuntil(b"\r\n")
            said = line.split()[0].decode("ascii", "replace").upper() if line.strip() else "?"
            if said == "BDAT":
                await reader.readexactly(int(line.split()[1]))
                said = "."
            self.mails[number] += said == "MAIL"
            self.commands.append(line.decode("ascii", "replace").strip())


@contextmanager
def load_server(
    answer: Answer = ordinary, context: ssl.SSLContext | None = None, implicit: bool = False
) -> Iterator[LoadServer]:
    server = LoadServer(answer, context, implicit)
    try:
        yield server
    finally:
        server.stop()
