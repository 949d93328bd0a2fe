"""A client that says exactly what a test wants, in blocking calls on a real socket.

In: an address as the server's log shows it ("host:port" or "unix:/path"), octets or command lines. Out: replies,
whole, as text with a line for each line. Nothing is corrected, and nothing is sent that was not asked for.
`GoneError` is raised when the connection ends before a reply is whole: what became of the message is then unknown.
A TimeoutError says what was waited for. Not here: what a reply must be.
"""

from __future__ import annotations

import re
import socket
import ssl
from types import TracebackType
from typing import Self

_END = re.compile(rb"^[0-9]{3}(?: [^\r\n]*)?\r\n", re.MULTILINE)


class GoneError(Exception):
    """The connection has ended."""


def stuff(octets: bytes) -> bytes:
    """A message as it follows DATA's 354, with its end; a last line without CRLF gets one (RFC 5321 4.1.1.4)."""
    if octets and not octets.endswith(b"\r\n"):
        octets += b"\r\n"
    stuffed = octets.replace(b"\r\n.", b"\r\n..")
    return (b"." if stuffed.startswith(b".") else b"") + stuffed + b".\r\n"


def unverified() -> ssl.SSLContext:
    """TLS with any certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Peer:
    """A connection to `address`; `hello` is said when the greeting was read, "" for nothing. `source` is the address
    it comes from."""

    def __init__(
        self,
        address: str,
        hello: str = "EHLO client.test",
        *,
        implicit_tls: bool = False,
        timeout: float = 60,
        source: str = "",
    ) -> None:
        try:
            if address.startswith("unix:"):
                self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self.socket.settimeout(timeout)
                self.socket.connect(address.removeprefix("unix:"))
            else:
                host, _, port = address.rpartition(":")
                self.socket = socket.create_connection((host, int(port)), timeout, (source, 0) if source else None)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: no connection to {address}") from None
        if implicit_tls:
            self.socket = unverified().wrap_socket(self.socket, server_hostname="mx.here.test")
        self._unread = b""
        self._said = b""  # the begin of what was sent last
        self._replies = 0  # that were read
        if hello:
            self.greeting = self.reply()
            self.hello = self.ask(hello)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, octets: bytes) -> None:
        self._said = octets[:60]
        try:
            self.socket.sendall(octets)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self._whereabouts()}, {len(octets)} octets are not taken") from None
        except (BrokenPipeError, ConnectionResetError) as error:
            raise GoneError(str(error)) from None

    def reply(self) -> str:
        """The next reply, whole."""
        while (match := _END.search(self._unread)) is None:
            try:
                octets = self.socket.recv(65536)
            except ConnectionResetError as error:
                raise GoneError(str(error)) from None
            except TimeoutError as error:
                what = f"reply {self._replies + 1}" if self._replies else "the greeting"
                raise TimeoutError(f"{error}: {self._whereabouts()}, {what} is missing") from None
            if not octets:
                raise GoneError(f"end of connection behind {self._unread!r}")
            self._unread += octets
        self._replies += 1
        octets, self._unread = self._unread[: match.end()], self._unread[match.end() :]
        return octets.decode("ascii").replace("\r\n", "\n").removesuffix("\n")

    def _whereabouts(self) -> str:
        return f"from {self.socket.getsockname()}, said last {self._said!r}, unread {self._unread!r}"

    def replies(self, n: int) -> list[str]:
        return [self.reply() for _ in range(n)]

    def ask(self, command: str) -> str:
        """One command, one reply."""
        self.send(command.encode() + b"\r\n")
        return self.reply()

    def ended(self) -> bool:
        """Waits for the end of the connection; False when something else comes."""
        try:
            return not self._unread and not self.socket.recv(1)
        except ConnectionResetError:
            return True

    def start_tls(self) -> None:
        assert self.ask("STARTTLS").startswith("220 "), "no STARTTLS"
        self.socket = unverified().wrap_socket(self.socket, server_hostname="mx.here.test")

    def envelope(self, recipients: list[str], sender: str = "s@client.test", parameters: str = "") -> list[str]:
        """MAIL and RCPT in one group; their replies."""
        lines = [f"MAIL FROM:<{sender}>{parameters}", *(f"RCPT TO:<{recipient}>" for recipient in recipients)]
        self.send("".join(f"{line}\r\n" for line in lines).encode())
        return self.replies(len(lines))

    def data(self, recipients: list[str], octets: bytes, sender: str = "s@client.test", parameters: str = "") -> str:
        """A transaction with DATA; the reply to its end, or the first refusal before."""
        for reply in self.envelope(recipients, sender, parameters):
            if not reply.startswith("250 "):
                return reply
        go_on = self.ask("DATA")
        if not go_on.startswith("354 "):
            return go_on
        self.send(stuff(octets))
        return self.reply()

    def bdat(self, recipients: list[str], *chunks: bytes, sender: str = "s@client.test", parameters: str = "") -> str:
        """A transaction with BDAT, all in one write; the reply to the last chunk, or the first refusal."""
        lines = [f"MAIL FROM:<{sender}>{parameters}", *(f"RCPT TO:<{recipient}>" for recipient in recipients)]
        out = "".join(f"{line}\r\n" for line in lines).encode()
        for number, chunk in enumerate(chunks, 1):
            out += b"BDAT %d%s\r\n%s" % (len(chunk), b" LAST" if number == len(chunks) else b"", chunk)
        self.send(out)
        replies = self.replies(len(lines) + len(chunks))
        return next((reply for reply in replies if not reply.startswith("250 ")), replies[-1])
