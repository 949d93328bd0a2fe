"""How a sink's session answers: at once, later, or wrongly.

In: a stage, the reply that is due, and whom it is about. Out: octets to the transport: all replies of one pass in one
write, unless one waits (`_waiting`) or ends the session (`_over`). Always: replies keep the order of the commands.
Not here: which reply is due (sink_protocol), when it is another one (sink_plan).
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from .sink_plan import FAULTS, Fault, Then
from .sink_service import Service

ENDLESS_SECONDS = 0.01  # between two pieces of a reply without end
ENDLESS_PIECE = 1 << 16  # octets
Said: TypeAlias = tuple[bytes, str]  # a reply, and the fault with which it is said

R220_TLS = b"220 2.0.0 start TLS\r\n"
R221_BYE = b"221 2.0.0 bye\r\n"
R235_AUTHENTICATED = b"235 2.7.0 authenticated\r\n"
R250_OK = b"250 2.0.0 ok\r\n"
R250_SENDER = b"250 2.1.0 ok\r\n"
R250_RECIPIENT = b"250 2.1.5 ok\r\n"
R250_KEPT = b"250 2.0.0 kept\r\n"
R252_VRFY = b"252 2.1.5 send it, and see\r\n"
R354_GO_ON = b"354 go on\r\n"
R451_RECORD = b"451 4.3.0 the record cannot be written\r\n"
R500_LINE_END = b"500 5.5.2 a line ends with CRLF\r\n"
R500_LONG = b"500 5.5.2 line too long\r\n"
R500_UNKNOWN = b"500 5.5.1 unknown command\r\n"
R501_SYNTAX = b"501 5.5.4 syntax error\r\n"
R501_CANCELLED = b"501 5.7.0 cancelled\r\n"
R503_ORDER = b"503 5.5.1 not now\r\n"
R503_PIPELINING = b"503 5.5.1 PIPELINING is not offered\r\n"
R504_MECHANISM = b"504 5.5.4 unknown mechanism\r\n"
R530_AUTH = b"530 5.7.0 authentication required\r\n"
R535_AUTH = b"535 5.7.8 wrong name or password\r\n"
R552_SIZE = b"552 5.3.4 message too large\r\n"
R554_PASTED = b"554 5.5.1 octets behind STARTTLS\r\n"
R555_PARAMETER = b"555 5.5.4 parameter not offered\r\n"


def address_of(path: re.Match[bytes]) -> str:
    """Of a MAIL or RCPT command. Decoded where it is needed: most addresses never are."""
    return path[1].decode("utf-8", "replace")


def heard_answers(replies: list[Said], recipients: int) -> list[str]:
    """What each recipient is answered; nothing where the connection ends before."""
    answers: list[str] = []
    over = False
    for reply, name in replies:
        fault = FAULTS[name] if name else None
        heard = not over and (fault is None or fault.answers)
        if fault is not None and fault.then is Then.CLOSE:
            reply = fault.octets(reply)
        answers.append(reply.decode("utf-8", "replace").strip() if heard else "")
        over = over or (fault is not None and (fault.endless or fault.then is not Then.GO_ON)) or reply[:3] == b"421"
    return answers if len(replies) == recipients else answers * recipients


class Speaker(asyncio.Protocol):
    """The half of a session that speaks."""

    __slots__ = (
        "_loop",
        "_out",
        "_over",
        "_paused",
        "_pending",
        "_plan",
        "_service",
        "_timer",
        "_transport",
        "_waiting",
        "_write",
    )

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._plan = service.plan
        self._loop = loop
        self._transport: asyncio.Transport
        self._write: Callable[[bytes], None]
        self._out: list[bytes] = []
        self._pending: list[Callable[[], None]] = []  # what is said when nothing waits
        self._waiting = self._over = self._paused = False
        self._timer: asyncio.TimerHandle | None = None

    def _advance(self) -> None:
        """Takes up what has come meanwhile."""
        raise NotImplementedError

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False

    def _refuse(self, reply: bytes) -> None:
        self._emit("", reply, "")

    def _answer(self, stage: str, reply: bytes, *subjects: re.Match[bytes] | str) -> bool:
        """Says this, or what the plan says instead; whether the client may take it for accepted."""
        plan = self._plan.get(stage)
        if plan is None and reply[0] < 52:  # 2 and 3
            self._out.append(reply)
            return True
        about = [each if isinstance(each, str) else address_of(each) for each in subjects]
        act = plan.choose(*about) if plan is not None else None
        fault = ""
        if act is not None:
            reply, fault = act.reply or reply, act.fault
        if plan is not None and plan.delay:
            self._wait(plan.delay, partial(self._emit, stage, reply, fault))
        else:
            self._emit(stage, reply, fault)
        return reply[0] < 52 and (not fault or FAULTS[fault].answers)

    def _emit(self, stage: str, reply: bytes, fault: str) -> None:
        if reply[:1] in (b"4", b"5"):
            self._service.counts.refusals[reply[:3].decode()] += 1
        if fault:
            self._service.counts.faults[f"{fault}@{stage}"] += 1
            self._play(FAULTS[fault], reply)
            return
        self._out.append(reply)
        if reply.startswith(b"421"):
            self._end()

    def _say_pending(self) -> None:
        """What belongs behind one another, as far as it goes without waiting."""
        while self._pending and not self._waiting:
            self._pending.pop(0)()

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        """What was said goes out, the rest comes later."""
        self._flush()
        self._waiting = True
        self._timer = self._loop.call_later(seconds, self._go_on, then)

    def _go_on(self, then: Callable[[], None] | None = None) -> None:
        self._waiting = False
        self._timer = None
        if then is not None:
            then()
        self._say_pending()
        if not self._over:
            self._advance()

    def _flush(self) -> None:
        out = self._out
        if out:
            self._write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    def _end(self) -> None:
        """What was said goes out, and the connection is closed."""
        self._flush()
        self._waiting = self._over = True
        self._transport.close()

    def _play(self, fault: Fault, reply: bytes) -> None:
        octets = fault.octets(reply)
        if fault.slowly or fault.endless:
            self._flush()
            self._waiting = True
            if fault.endless:
                self._repeat(octets)
            else:
                self._drip(octets)
            return
        self._out.append(octets)
        if fault.then is Then.GO_ON:
            return
        self._flush()
        self._waiting = self._over = True
        if fault.then is Then.CLOSE:
            self._transport.close()
        elif fault.then is Then.RESET:
            connection = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()

    def _drip(self, octets: bytes) -> None:
        self._write(octets[:1])
        if len(octets) > 1:
            self._timer = self._loop.call_later(self._service.drip, self._drip, octets[1:])
        else:
            self._go_on()

    def _repeat(self, octets: bytes) -> None:
        if not self._paused:
            self._write(octets * (ENDLESS_PIECE // len(octets)))
        self._timer = self._loop.call_later(ENDLESS_SECONDS, self._repeat, octets)
