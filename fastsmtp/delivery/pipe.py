"""Pipe: a transport that hands each message to a command, one recipient at a time, as Postfix's pipe(8) does.

In: deliveries. Out: an Outcome for each recipient, by the command's exit code (sysexits.h, MEANINGS below) and the
first line that it printed. The command is a list of arguments, never a shell. It is run by the process of runner.py,
for a worker has no privileges left: as the transport's `user`, with a clean environment, `/` as its folder, in a
session of its own, and with no descriptor but 0, 1 and 2. In its arguments stand cleaned values from mail; `fields`
puts the exact envelope into the message, as Return-Path and Delivered-To.
The message is a nameless file when the command starts, not a pipe that is being filled: a worker or runner that dies
never makes half a message look like a whole one, and a command need not read what it does not want. Line ends are LF,
as pipe(8) has them, unless `crlf`; what is not convertible stays as it is.
A command that had not ended when its worker died is killed and run again later: it may see a message twice.
On failure: that recipient waits, or fails. RFC 5321 4.4; RFC 9228; sysexits(3).
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path
from tempfile import TemporaryFile

from ..address import Address
from ..message import Message, Recipient
from . import DELIVERED, Delivery, Outcome, Result, Scope
from .body import BodyError, OutgoingBody
from .runner import ANSWER_LIMIT

NULL_SENDER = "MAILER-DAEMON"  # {sender} of the null reverse-path: an empty argument would make its neighbour a value
LINE_LIMIT = 400  # characters of the output's first line that are kept
PIECE = 65_536  # octets converted at once: 20 µs with the GIL held
ASKING = 10.0  # seconds for the runner to take a request

# What an exit code says; not in it: UNKNOWN. The codes and statuses of Postfix, but 126 and 127, by which a shell says
# that there is no such program: a mistake in the configuration gives up no mail.
MEANINGS: dict[int, tuple[str, str]] = {
    64: ("5.3.0", "command line usage error"),
    65: ("5.6.0", "data format error"),
    66: ("5.3.0", "cannot open input"),
    67: ("5.1.1", "user unknown"),
    68: ("5.1.2", "host name unknown"),
    69: ("5.3.0", "service unavailable"),
    70: ("5.3.0", "internal software error"),
    71: ("4.3.0", "system resource problem"),
    72: ("5.3.0", "critical OS file missing"),
    73: ("5.2.0", "cannot create user output file"),
    74: ("5.3.0", "input/output error"),
    75: ("4.3.0", "temporary failure"),
    76: ("5.5.0", "remote error in protocol"),
    77: ("5.7.0", "permission denied"),
    78: ("5.3.5", "local configuration error"),
    126: ("4.3.5", "program not executable"),
    127: ("4.3.5", "program not found"),
}
UNKNOWN = ("5.3.0", "failed")
_HOST_WIDE = (126, 127)

_STATUS = re.compile(r"[45]\.[0-9]{1,3}\.[0-9]{1,3}(?= |$)")
_UNSAFE_IN_FIELD = str.maketrans("\r\n\0", "???")


class Pipe:
    """The Transport to the command `name` of the runner, asked through `asks`.

    `program` is for people. `folder` is where the messages stand that are handed over, without names. `concurrency`
    is how many commands run at once; the runner holds it for all workers together.
    """

    any_octets = True
    needs_body = True

    def __init__(
        self,
        name: str,
        program: str,
        asks: socket.socket,
        folder: Path,
        concurrency: int,
        crlf: bool = False,
        fields: bool = False,
    ) -> None:
        self.concurrency = concurrency
        self._name = name
        self._program = program
        self._asks = asks
        self._folder = folder
        self._crlf = crlf
        self._fields = fields
        self._room = asyncio.Semaphore(concurrency)
        self._executor = ThreadPoolExecutor(2, "pipe")

    def destination(self, recipient: Address) -> str:
        """All its commands stand in one line."""
        return ""

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Sequence[Outcome]]:
        """Runs the command once for each recipient."""
        return await asyncio.gather(*[self._deliver(delivery) for delivery in deliveries])

    async def close(self) -> None:
        """Nothing is under way: the queue has waited for it."""
        self._executor.shutdown()

    async def _deliver(self, delivery: Delivery) -> Sequence[Outcome]:
        return await asyncio.gather(*[self._run(delivery.message, recipient) for recipient in delivery.recipients])

    async def _run(self, message: Message, recipient: Recipient) -> Outcome:
        loop = asyncio.get_running_loop()
        async with self._room:
            try:
                answer = await loop.run_in_executor(self._executor, self._ask, message, recipient)
                with answer:  # closed before there is one, the command is killed
                    said = await loop.sock_recv(answer, ANSWER_LIMIT)
            except BodyError as error:
                return Outcome(Result.DEFERRED, "4.3.0", error.text, Scope.MESSAGE)
            except OSError as error:
                status = "4.3.1" if error.errno == ENOSPC else "4.3.0"
                return self._unable(status, f"cannot be run: {error.strerror or error}")
        return self._outcome(said)

    def _outcome(self, said: bytes) -> Outcome:
        how, _, output = said.decode("utf-8", "replace").partition("\n")
        word, _, number = how.partition(" ")
        line = _first_line(output)
        if word == "exit":
            return self._exit_outcome(int(number), line)
        if word == "signal":
            return self._deferred("4.3.0", f"killed by signal {number}", line)
        if word == "time-out":
            return self._deferred("4.3.0", "did not end in time, and was killed", line)
        if word == "cannot":
            return self._unable("4.3.5", f"cannot be run: {line}")
        return self._unable("4.3.0", "cannot be run: the runner has ended")

    def _exit_outcome(self, code: int, line: str) -> Outcome:
        if code == 0:
            return DELIVERED
        status, meaning = MEANINGS.get(code, UNKNOWN)
        own = _STATUS.match(line)
        # A status that the command prints is better than ours; that of an unknown code decides.
        if own is not None and (own[0][0] == status[0] or code not in MEANINGS):
            status = own[0]
        text = f"{meaning} (exit code {code})"
        if status[0] == "5":
            return Outcome(Result.FAILED, status, self._text(text, line))
        return self._unable(status, text, line) if code in _HOST_WIDE else self._deferred(status, text, line)

    def _deferred(self, status: str, text: str, line: str) -> Outcome:
        return Outcome(Result.DEFERRED, status, self._text(text, line))

    def _unable(self, status: str, text: str, line: str = "") -> Outcome:
        """As it would be for any other message."""
        return Outcome(Result.DEFERRED, status, self._text(text, line), Scope.HOST)

    def _text(self, text: str, line: str) -> str:
        return f"{self._program}: {text}{': ' if line else ''}{line}"

    # What follows runs in a thread.

    def _ask(self, message: Message, recipient: Recipient) -> socket.socket:
        """Writes the message down and asks for the command; what the answer will come from."""
        address = recipient.address
        sender = message.envelope.reverse_path
        values = (str(sender) or NULL_SENDER, str(address), address.local, address.domain, message.id)
        request = "\0".join((self._name, *values)).encode("utf-8", "replace")
        with TemporaryFile(dir=self._folder) as file:
            for piece in self._octets(message, address):
                file.write(piece)
            file.flush()
            # Another open file than the one that was written: at its start, and for reading only.
            content = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            ours.setblocking(False)
            self._send(request, [content, theirs.fileno()])
        except OSError:
            ours.close()
            raise
        finally:
            os.close(content)
            theirs.close()
        return ours

    def _send(self, request: bytes, descriptors: list[int]) -> None:
        while True:
            try:
                socket.send_fds(self._asks, [request], descriptors)
                return
            except BlockingIOError:  # it has much to read
                poll = select.poll()
                poll.register(self._asks, select.POLLOUT)
                if not poll.poll(ASKING * 1000):
                    raise TimeoutError("the runner does not answer") from None

    def _octets(self, message: Message, address: Address) -> Iterator[bytes | memoryview]:
        strip = message.convertible and not self._crlf
        if self._fields:
            end = "\r\n" if self._crlf or not message.convertible else "\n"
            sender = _one_line(message.envelope.reverse_path)
            yield f"Return-Path: <{sender}>{end}Delivered-To: {_one_line(address)}{end}".encode("utf-8", "replace")
        body = OutgoingBody(message, stuffed=False)
        while not body.finished:
            view = memoryview(body.read())
            for start in range(0, len(view), PIECE):
                piece = view[start : start + PIECE]
                # No bare CR is in it: every one belongs to a line end, also the one that a piece ends with.
                yield bytes(piece).replace(b"\r", b"") if strip else piece


def _first_line(output: str) -> str:
    """What a command said, for people: its first line that is not empty, printable, not too long."""
    line = next((line for line in map(str.strip, output.splitlines()) if line), "")[:LINE_LIMIT]
    return line if line.isprintable() else "".join([each if each.isprintable() else "?" for each in line])


def _one_line(address: Address) -> str:
    return str(address).translate(_UNSAFE_IN_FIELD)
