"""Name servers on loopback: a real one with zones of the test's own, and a scripted one for what no real one does.

`nameserver` runs NSD on a free port: in, zone text (names below `test.` as a rule); out, "127.0.0.1:port", for as long
as the block runs. It is authoritative, asks nobody, and refuses what is in none of its zones. `Scripted` answers from
within the test's loop, by UDP and TCP, what a function says: octets, several, or nothing.
On failure: AssertionError with what NSD said; a missing NSD skips, or fails in CI.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import dns.message
import dns.rcode
import dns.rrset
from needs import SYSTEM_PATH, needs

from loadtest.processes import free_port

START = 60.0  # seconds for what takes a tenth of one

# What every zone begins with. Negative answers may be kept for 300 seconds (the last field), records for 600.
_HEAD = """\
$ORIGIN {name}.
$TTL 600
@ 900 IN SOA ns hostmaster 1 3600 600 86400 300
@ IN NS ns
ns IN A 127.0.0.1
"""
_CONFIGURATION = """\
server:
  ip-address: 127.0.0.1@{port}
  zonesdir: "{folder}"
  pidfile: ""
  logfile: "{folder}/log"
  username: ""
  zonelistfile: "{folder}/zone.list"
  xfrdfile: "{folder}/xfrd.state"
  xfrdir: "{folder}"
  server-count: 1
  rrl-ratelimit: 0
remote-control:
  control-enable: no
"""


@contextmanager
def nameserver(folder: Path, zones: str | Mapping[str, str]) -> Iterator[str]:
    """Serves `zones`, text by name; a text alone is the zone `test`. SOA and NS are added."""
    needs("nsd")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    configuration = _CONFIGURATION.format(port=port, folder=folder)
    for name, text in ({"test": zones} if isinstance(zones, str) else zones).items():
        (folder / f"{name}.zone").write_text(_HEAD.format(name=name) + text)
        configuration += f'zone:\n  name: "{name}"\n  zonefile: "{name}.zone"\n'
    (folder / "nsd.conf").write_text(configuration)
    process = subprocess.Popen(
        ["nsd", "-d", "-c", str(folder / "nsd.conf")],
        env={**os.environ, "PATH": SYSTEM_PATH},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        _wait(port, process, folder / "log")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.communicate(timeout=5.0)  # NSD is several processes, and waits for the others
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers."""
    query = dns.message.make_query("test.", "SOA").to_wire()
    deadline = time.monotonic() + START
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(0.05)
        client.connect(("127.0.0.1", port))
        while True:
            try:
                client.send(query)
                client.recv(65_535)
                return
            except OSError:
                story = log.read_text() if log.exists() else ""
                if process.poll() is not None and process.stderr is not None:
                    raise AssertionError(f"NSD has ended: {process.stderr.read().decode()}{story}") from None
                assert time.monotonic() < deadline, f"NSD does not answer: {story}"
                time.sleep(0.01)


Script: TypeAlias = Callable[[dns.message.Message, str], "bytes | dns.message.Message | Sequence[bytes] | None"]


class Scripted(asyncio.DatagramProtocol):
    """`answer` gets each query and "udp" or "tcp"; what it returns is sent, a message with the query's id. All that was
    asked stands in `queries`, with the port it came from. Without `tcp` nothing listens there."""

    def __init__(self, answer: Script, *, tcp: bool = True) -> None:
        self.answer = answer
        self._tcp = tcp
        self.queries: list[tuple[dns.message.Message, str, int]] = []
        self.address = ""
        self._transport: asyncio.DatagramTransport
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        port = free_port()
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", port))
        if self._tcp:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.address = f"127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.close()
        if self._server is not None:
            self._server.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        for message in self._answers(data, "udp", addr[1]):
            self._transport.sendto(message, addr)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        for message in self._answers(data, "tcp", writer.get_extra_info("peername")[1]):
            writer.write(len(message).to_bytes(2, "big") + message)
        writer.close()

    def _answers(self, data: bytes, way: str, port: int) -> Sequence[bytes]:
        query = dns.message.from_wire(data)
        self.queries.append((query, way, port))
        answer = self.answer(query, way)
        if isinstance(answer, dns.message.Message):
            answer = answer.to_wire(max_size=65_535)
        if answer is None:
            return ()
        return (answer,) if isinstance(answer, bytes) else answer


def response(
    query: dns.message.Message,
    *answers: str,
    code: dns.rcode.Rcode = dns.rcode.NOERROR,
    authority: Sequence[str] = (),
    flags: int = 0,
) -> dns.message.Message:
    """A response with records as in "example.test. 600 IN A 192.0.2.1". `flags` are added."""
    message = dns.message.make_response(query, recursion_available=True)
    message.set_rcode(code)
    message.flags |= flags
    for section, lines in ((message.answer, answers), (message.authority, authority)):
        for line in lines:
            name, ttl, _, kind, data = line.split(" ", 4)
            section.append(dns.rrset.from_text(name, int(ttl), "IN", kind, data))
    return message
