"""Asks name servers: a name and a type in, an Answer out, by UDP, by TCP where that is too small.

Each server has a few connected UDP sockets, used for many questions and then replaced; every try has an id and a
socket by chance, and only a datagram from that server, on that socket, with that id and that question is heard. So who
forges answers has to guess id, port and socket; where many wrong ones come, the questions go to TCP (RFC 5452 9.2).
A server that is silent or fails is followed by the next, an answer to an earlier try still counts, and one that was
silent comes last for a while. CNAMEs are followed, within bounds.
Not here: what octets mean (dns_message.py), the cache, and who asks once for many (dns.py).
Failure: an Answer that says which server said or did what.
RFC 1035 4.2, RFC 5452, RFC 7766.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from errno import ESHUTDOWN
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeAlias, cast

from .dns import Answer, Kind, Status
from .dns_message import (
    ENDLESS,
    MAX_TTL,
    Alias,
    Fault,
    matches,
    read_message,
    render_query,
    render_question,
    truncated,
)

PORT = 53
SHARES = (0.2, 0.3, 0.5)  # of the time-out, for the rounds through all servers
SOCKETS = 8  # per server
QUESTIONS = 1_000  # asked on a socket before another port takes its place
UNWANTED = 100  # datagrams nobody asked for, on one socket: more is an attack, or a server that is late all the time
AT_ONCE = 1_000  # questions in flight; more wait
PENALTY = 30.0  # seconds for which a silent server is asked last
CHAIN = 8  # CNAMEs that are asked for one by one; those within one message are bounded by its reader
MAX_SERVERS = 3  # of resolv.conf, as the C library has it

FORGED = Fault("too many forged answers")  # ask by TCP
Heard: TypeAlias = "bytes | Fault"


class Server:
    """`silent_until` is in the loop's time. `edns`: it has not been seen to choke on it. `gone`: it gets no sockets."""

    __slots__ = ("edns", "gone", "host", "opening", "port", "silent_until", "sockets")

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.edns = True
        self.gone = False
        self.opening = asyncio.Lock()
        self.silent_until = 0.0
        self.sockets: dict[int, Socket] = {}

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Question:
    """One question and what came of its tries. `octets` as `render_question` makes them."""

    __slots__ = ("_heard", "_tries", "kind", "octets")

    def __init__(self, kind: Kind, octets: bytes) -> None:
        self.kind = kind
        self.octets = octets
        self._heard: asyncio.Queue[tuple[Server, Heard]] = asyncio.Queue()
        self._tries: list[tuple[Socket, int]] = []

    def send(self, socket: Socket) -> None:
        self._tries.append((socket, socket.ask(self)))

    def hear(self, server: Server, heard: Heard) -> None:
        """Called by the socket of a try, once for each."""
        self._heard.put_nowait((server, heard))

    async def wait(self, until: float) -> tuple[Server, Heard] | None:
        """What is heard next; None when it is too late (the loop's time)."""
        try:
            async with asyncio.timeout_at(until):
                return await self._heard.get()
        except TimeoutError:
            return None

    def forget(self) -> None:
        """What comes now is not wanted any more."""
        for socket, number in self._tries:
            socket.forget(number)


class Socket(asyncio.DatagramProtocol):
    """One port of ours, connected to one server: the kernel drops what others send."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._waiting: dict[int, Question] = {}
        self._transport: asyncio.DatagramTransport | None = None
        self._asked = 0
        self._unwanted = 0
        self._retired = False

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._retired and self._asked < QUESTIONS

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's own is no DatagramTransport by class
        self._transport = cast("asyncio.DatagramTransport", transport)

    def ask(self, question: Question) -> int:
        """Sends it; the id."""
        number = secrets.randbits(16)
        while number in self._waiting:
            number = secrets.randbits(16)
        self._waiting[number] = question
        self._asked += 1
        assert self._transport is not None
        try:
            self._transport.sendto(render_query(number, question.octets, self._server.edns))
        except OSError as error:
            self.error_received(error)
        return number

    def datagram_received(self, data: bytes, addr: object) -> None:
        number = int.from_bytes(data[:2], "big")
        question = self._waiting.get(number)
        if question is not None and matches(data, question.octets):
            self.forget(number)
            question.hear(self._server, data)
            return
        self._unwanted += 1
        if self._unwanted > UNWANTED:
            self._end(FORGED)

    def error_received(self, exc: Exception) -> None:
        # ICMP: nothing listens there, or no way leads there. Which question it was for is not said.
        self._end(Fault(_reason(exc)))

    def _end(self, fault: Fault) -> None:
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self.retire()
        for question in waiting:
            question.hear(self._server, fault)

    def forget(self, number: int) -> None:
        self._waiting.pop(number, None)
        if self._retired:
            self.retire()

    def retire(self) -> None:
        """Closes it as soon as nobody waits for an answer on it."""
        self._retired = True
        if not self._waiting and self._transport is not None:
            self._transport.close()


class NameServers:
    """`servers` are asked in their order, each as `parse_server` has it. Without any, those of `resolv_conf`, which is
    read again when they fail and it has changed. `timeout` is in seconds, for a question as a whole. Raises ValueError
    for what is no server."""

    def __init__(
        self,
        servers: Sequence[str] = (),
        *,
        timeout: float = 10.0,
        resolv_conf: Path = Path("/etc/resolv.conf"),
        at_once: int = AT_ONCE,
    ) -> None:
        self._timeout = timeout
        self._resolv_conf = None if servers else resolv_conf
        self._read_at = b""
        self._servers = [Server(*parse_server(server)) for server in servers]
        self._room = asyncio.Semaphore(at_once)
        self._read_again()

    async def ask(self, kind: Kind, name: str) -> Answer[Any]:
        """Never raises for what servers do or names are."""
        ttl = MAX_TTL
        async with self._room:
            for _ in range(CHAIN):
                octets = render_question(name, kind)
                if octets is None:
                    return Answer(Status.NO_NAME, reason="not a domain name")
                answer = await self._ask(Question(kind, octets))
                if isinstance(answer, Alias):
                    name, ttl = answer.name, min(ttl, answer.ttl)
                elif answer.ttl <= ttl:
                    return answer
                else:
                    return Answer(answer.status, answer.records, ttl, answer.reason, answer.octets)
        return ENDLESS

    async def _ask(self, question: Question) -> Answer[Any] | Alias:
        """Tries the servers in rounds until one answers, all have failed, or it has taken too long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._timeout
        servers = sorted(self._servers, key=lambda server: server.silent_until > loop.time())
        faults: dict[Server, Fault] = {}
        try:
            for share in SHARES:
                for server in servers:
                    if server in faults:
                        continue
                    try:
                        question.send(await self._socket(server))
                    except OSError as error:  # no way leads there, or no descriptor is left
                        faults[server] = Fault(_reason(error))
                        continue
                    until = min(end, loop.time() + self._timeout * share / len(servers))
                    # An earlier one may fail meanwhile, or answer.
                    while server not in faults and (heard := await question.wait(until)):
                        result = await self._read(question, *heard, end)
                        if isinstance(result, Fault):
                            faults[heard[0]] = result
                        elif result is not None:
                            return result
                    if server not in faults:
                        server.silent_until = loop.time() + PENALTY
        finally:
            question.forget()
        self._read_again()
        told = [f"{server}: {faults[server].text if server in faults else 'no answer'}" for server in servers]
        return Answer(Status.FAILED, reason=", ".join(told) or "no name server is known")

    async def _read(
        self, question: Question, server: Server, heard: Heard, end: float
    ) -> Answer[Any] | Alias | Fault | None:
        """What came of a try; None when it is repeated without EDNS."""
        if heard is FORGED or (isinstance(heard, bytes) and truncated(heard)):
            until = min(end, asyncio.get_running_loop().time() + self._timeout / 2)  # another may be quicker
            heard = await _ask_by_tcp(question, server, until)
        if isinstance(heard, Fault):
            return heard
        server.silent_until = 0.0
        result = read_message(heard, question.kind)
        if isinstance(result, Fault) and result.edns and server.edns:
            server.edns = False
            try:
                question.send(await self._socket(server))
            except OSError as error:
                return Fault(_reason(error))
            return None
        return result

    async def _socket(self, server: Server) -> Socket:
        """One of the server's, by chance; made when it has none in that place. Raises OSError."""
        place = secrets.randbelow(SOCKETS)
        socket = server.sockets.get(place)
        if socket is not None and socket.usable:
            return socket
        async with server.opening:  # many may want one at once
            old = server.sockets.get(place)
            if old is not None:
                if old.usable:
                    return old
                old.retire()
            # The kernel chooses the port, by chance.
            _, socket = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: Socket(server), remote_addr=(server.host, server.port)
            )
            if server.gone:
                socket.retire()
                raise OSError(ESHUTDOWN, "no longer asked")
            server.sockets[place] = socket
        return socket

    def _read_again(self) -> None:
        """Takes the servers of resolv.conf if it is another than before."""
        if self._resolv_conf is None:
            return
        try:
            text = self._resolv_conf.read_bytes()
        except OSError:
            text = b""
        if text != self._read_at or not self._servers:
            self._read_at = text
            self._retire()
            self._servers = [Server(*address) for address in parse_resolv_conf(text)]

    def _retire(self) -> None:
        for server in self._servers:
            server.gone = True
            for socket in server.sockets.values():
                socket.retire()

    async def close(self) -> None:
        """Closes the sockets, each when nobody waits on it any more."""
        self._retire()


async def _ask_by_tcp(question: Question, server: Server, until: float) -> Heard:
    """A connection for one question (RFC 7766 5)."""
    writer = None
    try:
        async with asyncio.timeout_at(until):
            reader, writer = await asyncio.open_connection(server.host, server.port)
            number = secrets.randbits(16)
            message = render_query(number, question.octets, server.edns)
            writer.write(len(message).to_bytes(2, "big") + message)
            answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
    except TimeoutError:
        return Fault("no answer by TCP")
    except (OSError, EOFError) as error:
        return Fault(f"by TCP: {_reason(error)}")
    finally:
        if writer is not None:
            writer.close()
    if answer[:2] != message[:2] or not matches(answer, question.octets):
        return Fault("another answer by TCP than was asked for")
    return answer


def _reason(error: Exception) -> str:
    """For people; Python's own texts name files and numbers."""
    return (error.strerror if isinstance(error, OSError) else None) or "the connection was closed"


def parse_server(text: str) -> tuple[str, int]:
    """Address and port of a name server; the port is 53 unless said. Raises ValueError."""
    host, port = text, str(PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if rest else port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    try:
        address = ip_address(host)
        if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
            raise ValueError
    except ValueError:
        raise ValueError('an IP address, "address:port" or "[IPv6]:port"') from None
    return str(address), int(port)


def parse_resolv_conf(text: bytes) -> list[tuple[str, int]]:
    """The name servers of resolv.conf(5), the machine itself when there is none. What is no address is left out."""
    found = []
    for line in text.decode("latin-1").splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append((str(ip_address(words[1])), PORT))
            except ValueError:
                continue
    return found[:MAX_SERVERS] or [("127.0.0.1", PORT)]
