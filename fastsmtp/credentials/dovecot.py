"""Users that Dovecot knows: its auth protocol 1.2 over a unix socket, as its LMTP and Postfix users already have it.

In: a name, a password, who the client is. Out: Dovecot's answer, and the user name as Dovecot has it. One connection
serves a worker; requests go over it side by side, each with its number. When it breaks, whatever waited is asked once
more over a new one (Dovecot was started again). What takes too long, cannot be connected, or is a failure of Dovecot's
own, is UnavailableError: not a wrong password. Nothing that a client sent reaches the line but in base64 or escaped.
A password is asked about by PLAIN; SCRAM would need Dovecot's keys, which it does not give away.
doc.dovecot.org, "Dovecot Authentication Protocol".
"""

from __future__ import annotations

import asyncio
import secrets
from asyncio import Future, StreamReader, StreamWriter, Task
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..verdict import Client, Password
from . import Account, Answer, Asked, Denied, UnavailableError, canonical, own_rights

VERSION = (1, 2)
LINE_LIMIT = 16384  # octets; Dovecot ends the connection for a longer one, and with it what others have asked
CONNECT_SECONDS = 5.0
# A tab ends a parameter, and a line end the request.
_ESCAPES = str.maketrans({"\0": "\x010", "\x01": "\x011", "\t": "\x01t", "\r": "\x01r", "\n": "\x01n"})


class Reply(NamedTuple):
    """OK, FAIL or CONT, with its parameters; those without a value have an empty one."""

    word: str
    parameters: Mapping[str, str]


class _BrokenError(Exception):
    """The connection has ended under the request."""


class Dovecot:
    """A store. `domain` stands behind names that are no addresses."""

    label = "auth.dovecot"
    questions: frozenset[type] = frozenset((Password,))
    mechanisms: frozenset[str] = frozenset(("PLAIN", "LOGIN"))

    def __init__(self, socket: Path, timeout: float, domain: str) -> None:
        self._socket = socket
        self._timeout = timeout
        self._domain = domain
        self._line: _Line | None = None
        self._connecting = asyncio.Lock()

    def stamp(self, name: str) -> object:
        return None

    async def check(self, question: Asked, client: Client, known: bool = False) -> Answer:
        if not isinstance(question, Password):
            return Denied()
        request = render_request(question, client)
        if len(request) > LINE_LIMIT - 32:  # what stands before it
            return Denied()
        try:
            async with asyncio.timeout(self._timeout):
                reply = await self._ask(request)
        except TimeoutError:
            raise UnavailableError(f"{self._socket}: no answer within {self._timeout:g} s") from None
        if reply.word == "OK":
            name = canonical(reply.parameters.get("user") or question.name)
            return Account(name, own_rights(name, self._domain))
        if "temp" in reply.parameters or reply.parameters.get("code") == "temp_fail":
            raise UnavailableError(f"{self._socket}: {reply.parameters.get('reason') or 'a failure of its own'}")
        return Denied()

    def find(self, name: str) -> Account:
        return Account(name, own_rights(name, self._domain))

    async def close(self) -> None:
        if self._line is not None:
            self._line.close()

    async def _ask(self, request: str) -> Reply:
        try:
            return await (await self._connect()).ask(request)
        except _BrokenError:
            pass
        try:
            return await (await self._connect()).ask(request)
        except _BrokenError:
            raise UnavailableError(f"{self._socket}: the connection ended without an answer") from None

    async def _connect(self) -> _Line:
        async with self._connecting:
            if self._line is None or self._line.ended:
                try:
                    async with asyncio.timeout(CONNECT_SECONDS):
                        self._line = await _Line.open(self._socket)
                except TimeoutError:
                    raise UnavailableError(f"{self._socket}: no greeting within {CONNECT_SECONDS:g} s") from None
                except (OSError, ValueError) as error:
                    raise UnavailableError(
                        f"{self._socket}: {getattr(error, 'strerror', None) or error or 'it ended'}"
                    ) from None
            return self._line


class _Line:
    """A connection that has been greeted. `ended`: another one is needed."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.ended = False
        self._reader = reader
        self._writer = writer
        self._number = 0
        self._waiting: dict[str, Future[Reply]] = {}
        self._task: Task[None] | None = None

    @classmethod
    async def open(cls, socket: Path) -> _Line:
        """Raises OSError and ValueError."""
        reader, writer = await asyncio.open_unix_connection(socket, limit=LINE_LIMIT)
        line = cls(reader, writer)
        try:
            # The second is one that no other connection has: a process id would be the same after a reload.
            writer.write(b"VERSION\t%d\t%d\nCPID\t%d\n" % (*VERSION, secrets.randbelow(2**31 - 1) + 1))
            await line._greet()
        except BaseException:
            writer.close()
            raise
        line._task = asyncio.create_task(line._read())
        return line

    async def ask(self, request: str) -> Reply:
        """Raises _BrokenError."""
        if self.ended:
            raise _BrokenError
        self._number += 1
        number = str(self._number)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(f"AUTH\t{number}\t{request}\n".encode())
            reply: Reply = await future
            return reply
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._end()

    async def _greet(self) -> None:
        mechanisms = set()
        while (words := await self._take())[0] != "DONE":
            if words[0] == "VERSION" and words[1:2] != [str(VERSION[0])]:
                raise ValueError(f"it speaks version {'.'.join(words[1:])} of the protocol")
            if words[0] == "MECH":
                mechanisms.update(words[1:2])
        if "PLAIN" not in mechanisms:
            raise ValueError("it takes no PLAIN (auth_mechanisms)")

    async def _read(self) -> None:
        try:
            while True:
                words = await self._take()
                future = self._waiting.get(words[1] if len(words) > 1 else "")
                if words[0] in ("OK", "FAIL", "CONT") and future is not None and not future.done():
                    pairs = [word.partition("=") for word in words[2:]]
                    future.set_result(Reply(words[0], {key: value for key, _, value in pairs}))
        except (OSError, ValueError):
            pass
        finally:
            self._end()

    async def _take(self) -> list[str]:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        return [_unescape(word) for word in line[:-1].decode("utf-8", "replace").split("\t")]

    def _end(self) -> None:
        self.ended = True
        self._writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_BrokenError())


def render_request(question: Password, client: Client) -> str:
    """What follows the number; `resp` must stand last."""
    words = ["PLAIN", "service=smtp"]
    if client.ip:
        words.append(f"rip={client.ip.translate(_ESCAPES)}")
    host, _, port = client.listener.rpartition(":")
    if port.isdecimal() and host.strip("[]") not in ("", "0.0.0.0", "::"):
        words.append(f"lip={host.strip('[]').translate(_ESCAPES)}")
    if client.tls:
        words.append("secured")
    response = b64encode(f"\0{question.name}\0{question.password}".encode()).decode()
    return "\t".join([*words, f"resp={response}"])


def _unescape(word: str) -> str:
    if "\x01" not in word:
        return word
    first, *rest = word.split("\x01")
    meant = {"0": "\0", "1": "\x01", "t": "\t", "r": "\r", "n": "\n"}
    return first + "".join(meant.get(piece[:1], piece[:1]) + piece[1:] for piece in rest)
