"""Sessions that do not behave: what each kind does, and how its end is counted.

In: a Context for each session. Out: an asyncio.Protocol that plays its part by itself, and `done(outcome, detail)`,
called once, when its connection is gone. A kind is a script: a generator of steps, each the octets to write and what to
wait for then; so the kinds hold what they do, and the Session below everything else. Always: a reply 4xx or 5xx, the
loss of the connection or the deadline ends it in any state; no timer outlives it.
Not here: which share of the sessions misbehaves, opening connections. Misbehaviour begins on an open connection, in TLS
where that is implicit; it says neither STARTTLS nor AUTH. On failure: an outcome. RFC 5321, RFC 2920, RFC 1870.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import Enum, auto
from random import Random
from typing import NamedTuple, TypeAlias, cast

from .content import Mail
from .messages import LINE, make_lines

# How a session ended.
OUTCOMES = {
    "completed": "it was let do what it wanted, to its end or to the deadline",
    "refused": "the server answered 4xx or 5xx, or with what is no SMTP reply",
    "closed": "the server closed the connection without such an answer",
    "reset": "the connection broke",
    "silent": "the server owed a reply at the deadline, and for half the time before it",
}

RESETS = 1000
OVERSIZE = 60_000_000  # octets at least, where the server names no limit
LONGEST_REPLY = 64 * 1024  # octets
MOST_REPLIES = 1000  # that nobody has waited for yet

_REPLY_LINE = re.compile(rb"[2-5][0-9]{2}[ \r\n-]")
_SIZE = re.compile(rb"^250[ -]SIZE ([0-9]{1,18})\r?$", re.MULTILINE | re.IGNORECASE)
_PIECE = make_lines(900 * LINE)

# What early talkers do: whether they let the server greet first, and how much they then say at once.
_EARLY = {
    "EHLO before the greeting": (False, 1),
    "everything at once": (True, None),
    "everything at once, before the greeting": (False, None),
}


class Wait(Enum):
    """What a session waits for when it has written the octets of a step."""

    REPLY = auto()
    PAUSE = auto()  # as long as the context says
    ROOM = auto()  # until the octets have left, or nearly so
    END = auto()  # for nothing of its own: the server or the deadline ends it


class Reply(NamedTuple):
    """All lines of a reply, with their ends."""

    code: int
    text: bytes


Step: TypeAlias = tuple[bytes, Wait]
# Is given the reply that it waited for; its value says in a few words what it did.
Script: TypeAlias = Generator[Step, Reply | None, str]


def no_preface(_: asyncio.BaseTransport) -> bytes:
    return b""


@dataclass(frozen=True)
class Context:
    """What a session needs. `done` is given one of OUTCOMES and a few words; `deadline` and `pause` are seconds;
    `preface` gives what goes first and is no part of the dialogue: a PROXY header."""

    mail: Callable[[], Mail]
    rng: Random
    loop: asyncio.AbstractEventLoop
    done: Callable[[str, str], None]
    deadline: float
    ehlo: bytes = b"EHLO client.test\r\n"
    preface: Callable[[asyncio.BaseTransport], bytes] = no_preface
    pause: float = 1.0


@dataclass(frozen=True)
class Kind:
    """A way to misbehave."""

    name: str
    sentence: str
    script: Callable[[Context], Script]

    def factory(self, context: Context) -> asyncio.Protocol:
        """The protocol for one connection."""
        return Session(context, self.script(context))


def _dialogue(context: Context) -> list[bytes]:
    """What a client says behind the greeting, each part answered by one reply."""
    mail = context.mail()
    return [context.ehlo, mail.mail, *mail.rcpts, b"DATA\r\n", mail.text, b"QUIT\r\n"]


def drip(context: Context) -> Script:
    parts = _dialogue(context)
    # Servers have less patience with commands than with messages: half of the sessions come as far as that.
    quick = context.rng.choice((0, len(parts) - 2))
    yield b"", Wait.REPLY
    for part in parts[:quick]:
        yield part, Wait.REPLY
    for part in parts[quick:]:
        for position in range(len(part)):
            yield part[position : position + 1], Wait.PAUSE
        yield b"", Wait.REPLY
    return "said everything"


def idle(context: Context) -> Script:
    *parts, text, _ = _dialogue(context)
    parts.append(text[: len(text) // 2])
    said = context.rng.randrange(len(parts) + 1)
    yield b"", Wait.REPLY
    for part in parts[:said]:
        yield part, Wait.ROOM if part is parts[-1] else Wait.REPLY
    yield b"", Wait.END
    return ""


def hangup(context: Context) -> Script:
    parts = _dialogue(context)
    at = left = context.rng.randrange(sum(map(len, parts)) + 1)
    if left:
        yield b"", Wait.REPLY
    for part in parts:
        if left <= len(part):
            yield part[:left], Wait.ROOM
            break
        yield part, Wait.REPLY
        left -= len(part)
    return f"hung up at octet {at}"


def early(context: Context) -> Script:
    parts = _dialogue(context)
    how = context.rng.choice(list(_EARLY))
    greeted, count = _EARLY[how]
    count = count or len(parts)
    if greeted:
        yield b"", Wait.REPLY
    yield b"".join(parts[:count]), Wait.REPLY
    for _ in range(count - greeted):
        yield b"", Wait.REPLY
    for part in parts[count:]:
        yield part, Wait.REPLY
    return how


def rset(context: Context) -> Script:
    yield b"", Wait.REPLY
    yield context.ehlo, Wait.REPLY
    for _ in range(RESETS):
        yield b"RSET\r\n", Wait.REPLY
    yield b"QUIT\r\n", Wait.REPLY
    return f"{RESETS} times RSET"


def oversize(context: Context) -> Script:
    mail = context.mail()
    yield b"", Wait.REPLY
    hello = yield context.ehlo, Wait.REPLY
    found = _SIZE.search(hello.text if hello else b"")
    limit = int(found[1]) if found else 0  # 0 is no limit too, RFC 1870 section 4
    for part in (mail.mail, *mail.rcpts, b"DATA\r\n"):
        yield part, Wait.REPLY
    pieces = (limit or OVERSIZE) // len(_PIECE) + 2
    for _ in range(pieces):
        yield _PIECE, Wait.ROOM
    yield b".\r\n", Wait.REPLY
    yield b"QUIT\r\n", Wait.REPLY
    return f"{pieces * len(_PIECE)} octets"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("drip", "Says an octet each second, from the first command on or in the message.", drip),
        Kind("idle", "Falls silent anywhere, from before EHLO to amid the message, and stays.", idle),
        Kind("hangup", "Closes the connection behind any octet of the dialogue.", hangup),
        Kind("early", "Talks before the greeting, or all at once whether PIPELINING is offered or not.", early),
        Kind("rset", f"Says RSET {RESETS:,} times.", rset),
        Kind("oversize", f"Sends more than SIZE allows, or {OVERSIZE // 10**6} MB, until it is refused.", oversize),
    )
}


class Session(asyncio.Protocol):
    """Plays a script on one connection."""

    __slots__ = (
        "_context", "_deadline", "_detail", "_outcome", "_partial", "_paused", "_replies", "_script", "_since",
        "_timer", "_transport", "_wait",
    )  # fmt: skip

    def __init__(self, context: Context, script: Script) -> None:
        self._context = context
        self._script = script
        self._transport: asyncio.Transport
        self._deadline: asyncio.TimerHandle
        self._timer: asyncio.Handle | None = None  # for the next step
        self._wait = Wait.END
        self._since = 0.0  # when the last step was made
        self._paused = False
        self._partial = b""
        self._replies: deque[Reply] = deque()
        self._outcome = ""  # empty while the script plays
        self._detail = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name: no isinstance here.
        self._transport = cast("asyncio.Transport", transport)
        self._deadline = self._context.loop.call_later(self._context.deadline, self._on_deadline)
        self._transport.write(self._context.preface(transport))
        self._advance(None)

    def data_received(self, data: bytes) -> None:
        data = self._partial + data
        begin = line = 0
        while not self._outcome and (end := data.find(b"\n", line) + 1):
            if not _REPLY_LINE.match(data, line) or data[line : line + 3] != data[begin : begin + 3]:
                self._end("refused", f"no SMTP reply: {_show(data[line:end])}")
            elif data[line + 3 : line + 4] != b"-":
                self._on_reply(Reply(int(data[line : line + 3]), data[begin:end]))
                begin = end
            line = end
        self._partial = data[begin:]
        if len(self._partial) > LONGEST_REPLY:
            self._end("refused", f"no SMTP reply: {_show(self._partial)}")

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._wait is Wait.ROOM and not self._outcome:
            self._advance(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._deadline.cancel()
        self._end("reset" if error else "closed", str(error) if error else "by the server")
        self._context.done(self._outcome, self._detail)

    def _on_reply(self, reply: Reply) -> None:
        if reply.code >= 400:
            self._end("refused", _show(reply.text))
        elif self._wait is Wait.REPLY:
            self._advance(reply)
        elif len(self._replies) < MOST_REPLIES:
            self._replies.append(reply)
        else:
            self._end("refused", f"more than {MOST_REPLIES} replies that nobody asked for")

    def _on_deadline(self) -> None:
        waited = self._context.loop.time() - self._since
        silent = self._wait is Wait.REPLY and waited > self._context.deadline / 2
        self._end("silent" if silent else "completed", f"after {self._context.deadline:g} s")
        self._transport.abort()  # also where the script has ended and its last octets do not leave

    def _advance(self, reply: Reply | None) -> None:
        self._since = self._context.loop.time()
        try:
            octets, self._wait = self._script.send(reply)
            self._transport.write(octets)
            while self._wait is Wait.REPLY and self._replies:
                octets, self._wait = self._script.send(self._replies.popleft())
                self._transport.write(octets)
        except StopIteration as end:
            self._end("completed", end.value)
            return
        if self._wait is Wait.PAUSE:
            self._timer = self._context.loop.call_later(self._context.pause, self._advance, None)
        elif self._wait is Wait.ROOM and not self._paused:
            # Not at once: other sessions have their turn between two pieces.
            self._timer = self._context.loop.call_soon(self._advance, None)

    def _end(self, outcome: str, detail: str) -> None:
        """The first call counts. What the script has written still leaves where it played to its end."""
        if self._outcome:
            return
        self._outcome, self._detail = outcome, detail
        if self._timer is not None:
            self._timer.cancel()
        self._script.close()
        if outcome == "completed":
            self._transport.close()
        else:
            self._transport.abort()


def _show(octets: bytes) -> str:
    """The last line of a reply, for people."""
    return octets.strip().rpartition(b"\n")[2].decode("ascii", "backslashreplace")[:200]
