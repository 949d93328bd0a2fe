"""A client's side of a connection: how it opens, how replies are read, how it ends, and what becomes of a message.

In: octets from the server. Out: octets to the server; counts and latencies in the Role that it shares, and a word to
the pacer when it is ready and when it is gone. `data_received` takes the one reply that is expected and whole, without
task, future or generator; anything else goes through `_read`, which means the same however the octets were cut.
Always: every reply is read and checked; a message has one fate: accepted, refused, unknown (lost after its end was
sent) or lost before; after an error the connection ends, and the error is counted once.
Not here: messages (session), when one is sent (pacing), how to connect. Nothing raises. RFC 5321, RFC 3207, RFC 4954.
"""

from __future__ import annotations

import asyncio
import re
from time import perf_counter
from typing import TYPE_CHECKING, cast

from . import LoadError
from .ledger import outcome_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .content import Mail
    from .steps import Pair, Plan, Role, Step

LONGEST_REPLY = 64 * 1024  # octets
SHUTDOWN = 421

_REPLY_LINE = re.compile(rb"[2-5][0-9]{2}[ \r\n-]")


class Dialogue(asyncio.Protocol):
    """One connection. `failures` counts those before it that ended in an error, without a message in between."""

    __slots__ = (
        "_at", "_born", "_code", "_due", "_mail", "_over", "_partial", "_paused", "_plan", "_position", "_refused",
        "_rest", "_role", "_step", "_transport", "_write", "failures", "ready", "sent",
    )  # fmt: skip

    def __init__(self, role: Role, born: float, failures: int) -> None:
        self._role = role
        self._born = born  # when the connection was begun
        self._step = role.steps.idle
        self._partial = b""  # of a reply
        self._mail: Mail | None = None  # whose fate is open
        self._over = False  # its end was counted
        self._paused = False
        self._refused: list[str] = []  # recipients of this message
        self.failures = failures
        self.ready = False  # for messages: it has been greeted
        self.sent = 0  # messages that got an answer
        self._at: float  # when octets were last written
        self._code: int  # why the message is refused in any case
        self._due: float
        self._plan: Plan
        self._position: int  # in the plan's text
        self._rest: Iterator[Pair]
        self._transport: asyncio.Transport

    @property
    def busy(self) -> bool:
        """A message is under way."""
        return self._mail is not None

    @property
    def over(self) -> bool:
        return self._over

    # What the pacer says.

    def send(self, mail: Mail, due: float, now: float) -> None:
        """The next message; `due` is from when its latency counts."""
        raise NotImplementedError

    def quit(self) -> None:
        self._say(b"QUIT\r\n", self._role.steps.quit)

    def dismiss(self) -> None:
        """The run is over: it quits when it has nothing under way, and ends at once when it is not open yet."""
        steps = self._role.steps
        if self._over:
            return
        if self._step is steps.idle:
            self.quit()
        elif self._mail is None and self._step not in (steps.rset, steps.quit):
            self.abandon()

    def abandon(self) -> None:
        """Ends without a word, and without an error."""
        self._over = True
        self._step = self._role.steps.idle
        self._transport.abort()

    def fail(self, kind: str) -> None:
        """Ends it, for a reason out of ERRORS."""
        if self._over:
            return
        self._role.tally.errors[kind] += 1
        self._lose_message()
        self._close()

    def check_time(self, now: float, timeout: float) -> None:
        """Ends it when the server owes an answer for too long."""
        if now - self._at > timeout and self._step is not self._role.steps.idle:
            self.fail("timeout")

    # What the connection says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name: no isinstance here.
        self._transport = cast("asyncio.Transport", transport)
        self._write = self._transport.write
        role = self._role
        role.sessions.add(self)
        role.tally.ever = True
        self._at = now = perf_counter()
        role.connector.note_connect(now - self._born)
        if preface := role.connector.preface(transport):
            self._write(preface)
        if role.options.tls == "implicit":
            self._secure(now)
        else:
            self._step = role.steps.banner

    def data_received(self, data: bytes) -> None:
        step = self._step
        if data.startswith(step.want) and data.find(b"\n", step.skip) + 1 == len(data) and not self._partial:
            now = perf_counter()
            step.note(now - self._at)
            if step.then is not None:
                step.then(self, now)
                return
            octets, self._step = next(self._rest)
            if octets:
                self._at = now
                self._write(octets)
        else:
            self._read(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.fail("reset")
        role = self._role
        role.sessions.discard(self)
        if self.ready:
            role.tally.on_close()
        role.pacer.on_closed(self)

    def pause_writing(self) -> None:
        self._paused = True

    # Replies.

    def _read(self, data: bytes) -> None:
        data = self._partial + data
        self._partial = b""
        begin = line = 0
        while not self._over and (end := data.find(b"\n", line) + 1):
            if not _REPLY_LINE.match(data, line) or data[begin : begin + 3] != data[line : line + 3]:
                self.fail("protocol")
            elif data[line + 3 : line + 4] != b"-":
                written = self._at
                self._on_reply(int(data[line : line + 3]), data[begin:end])
                begin = end
                if end < len(data) and self._at != written and not data.startswith(b"421", end):
                    self.fail("protocol")  # it cannot be the answer to what was said just now
            line = end
        self._partial = data[begin:]
        if len(self._partial) > LONGEST_REPLY:
            self.fail("protocol")

    def _on_reply(self, code: int, reply: bytes) -> None:
        step, tally, steps = self._step, self._role.tally, self._role.steps
        now = perf_counter()
        if not step.code:
            tally.odd[code] += 1
            self._on_unasked(code)
            return
        step.note(now - self._at)
        if code != step.code:
            tally.odd[code] += 1
            tally.odd[step.code] -= 1
        if code >= 400:
            tally.errors["refused"] += 1
            if code == SHUTDOWN:
                self._refuse_message(code)
                self._close()
            else:
                step.otherwise(self, code)
        elif code // 100 == step.code // 100:
            hello = step is steps.hello or step is steps.secure_hello
            if hello or reply.count(b"\n") > 1:
                step.learn(reply)
            if hello:
                try:
                    self._role.learn_offers(reply, step.then is not Dialogue.on_hello)
                except LoadError as error:
                    self._role.pacer.give_up(error)
                    self._close()
                    return
            self._advance(step, now)
        else:
            self.fail("protocol")

    def _advance(self, step: Step, now: float) -> None:
        if step.then is not None:
            step.then(self, now)
            return
        octets, self._step = next(self._rest)
        if octets:
            self._at = now
            self._write(octets)

    def _on_unasked(self, code: int) -> None:
        """421 may come at any time (RFC 5321 3.8), and a refusal before the end of a message does."""
        if code == SHUTDOWN or (code >= 400 and self._mail is not None):
            self._role.tally.errors["refused"] += 1
            self._refuse_message(code)
            self._close()
        else:
            self.fail("protocol")

    # Opening. `then` of the steps; which one follows which is decided once, in make_steps.

    def on_banner(self, now: float) -> None:
        self._at = now
        self._step = self._role.steps.hello
        self._write(self._role.hello)

    def on_hello(self, now: float) -> None:
        """With STARTTLS, before TLS."""
        self._say(b"STARTTLS\r\n", self._role.steps.starttls)

    def on_last_hello(self, now: float) -> None:
        """With AUTH."""
        steps = self._role.steps
        *first, last = self._role.auth
        self._rest = iter([*((line, steps.challenge) for line in first), (last, steps.auth)])
        octets, self._step = next(self._rest)
        self._at = now
        self._write(octets)

    def on_open(self, now: float) -> None:
        self._step = self._role.steps.idle
        self.ready = True
        self._role.tally.on_open()
        self._role.pacer.on_ready(self, now)

    def on_starttls(self, now: float) -> None:
        self._secure(now)

    def _secure(self, now: float) -> None:
        self._step = self._role.steps.securing
        self._at = now
        self._role.connector.start_tls(self._transport, self, self.on_secured, self.on_insecure)

    def on_secured(self, transport: asyncio.Transport, resumed: bool) -> None:
        if self._over:
            return
        role = self._role
        now = perf_counter()
        role.tally.values("tls").append(now - self._at)
        role.tally.resumed += resumed
        self._transport = transport
        self._write = transport.write
        self._at = now
        if role.options.tls == "implicit":
            self._step = role.steps.banner
        else:
            self._step = role.steps.secure_hello
            self._write(role.hello)

    def on_insecure(self) -> None:
        self.fail("tls")

    # The fate of a message.

    def _refuse_message(self, code: int) -> None:
        if self._mail is not None:
            self._role.tally.refused += 1
            self._record(code)
            self._mail = None
            self.failures = 0
            self.sent += 1

    def _lose_message(self) -> None:
        if self._mail is not None:
            if self._step is self._role.steps.text:
                self._role.tally.unknown += 1
            else:
                self._role.tally.lost += 1
            self._record(0)
            self._mail = None

    def _record(self, code: int) -> None:
        ledger = self._role.ledger
        if ledger is not None:
            assert self._mail is not None
            try:
                ledger.write(self._mail, outcome_of(code), code, self._refused)
            except LoadError as error:
                self._role.pacer.give_up(error)
        self._refused = []

    # Ending.

    def on_quit(self, now: float) -> None:
        role = self._role
        role.note_session(now - self._born)
        role.connector.remember_tls(self._transport)
        self._over = True
        self._step = role.steps.idle
        self._transport.close()

    def on_refused(self, code: int) -> None:
        """A command without which there is no session."""
        self._close()

    def _close(self) -> None:
        self._lose_message()
        self.failures += 1
        self._over = True
        self._step = self._role.steps.idle
        self._transport.abort()

    def _say(self, octets: bytes, step: Step) -> None:
        self._at = perf_counter()
        self._step = step
        self._write(octets)
