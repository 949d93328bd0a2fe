"""One connection to a host: octets to a Dialogue and from it, the handshake, the message's pieces, the clock.

In: deliveries, one after another over the same session. Out: their outcomes, once, when all were sent or the session
has ended. A delivery is sent in the callback that brought the last one's final reply: no task, no timer and no
future for each; what is said at once leaves in one write. A message that is read from the disk is read in a thread, and
no faster than the host takes it. `check`, called now and then, ends what waits for too long.
Always: with one call of `run` there is one answer, whatever befalls the connection.
Not here: which host, and when a connection is made or kept (smtp.py, pool.py); what a reply means (dialogue.py).
Failure: the outcomes say it, and `dialogue.failure`. RFC 5321 4.5.3.2, RFC 3207.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import cast

from . import Delivery, Outcome
from .body import BodyError, OutgoingBody
from .client_tls import Manner
from .dialogue import Dialogue, Step
from .failures import Answer, Stage

LINGER = 5.0  # seconds that a host has to take our last words
# A host that always does a little before its time is over holds a slot for at most so many seconds with a message, and
# one more for each so many octets.
LONGEST = 3600.0
SLOWEST = 10_000.0

# Names of this module: looking up an Enum's member costs 0.05 µs each time on Python 3.11.
WAIT, TLS, BODY, READY = Step.WAIT, Step.TLS, Step.BODY, Step.READY


class Link(asyncio.Protocol):
    """`name` is the host's, which a certificate is checked for; `clear`: without TLS; `local`: the host is the last one
    and on this machine, so REQUIRETLS asks nothing of it. `executor` reads files. `on_end` is called once, when nothing
    more can be sent; `on_gone` once, when the connection is no more."""

    __slots__ = (
        "_began", "_buffered", "_deliveries", "_done", "_early", "_executor", "_fetching", "_full", "_handshake",
        "_local", "_loop", "_manner", "_name", "_on_end", "_on_gone", "_progress", "_pumped", "_results", "_since",
        "_transport", "closing", "dialogue", "messages", "most", "no_handshake", "parked",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        manner: Manner,
        *,
        clear: bool,
        local: bool,
        most: int,
        executor: Executor,
        on_end: Callable[[Link], None],
        on_gone: Callable[[Link], None],
    ) -> None:
        implicit = manner.implicit and not clear
        self.dialogue = Dialogue(
            manner.clear if clear else manner.terms, name, secure=implicit, trusted=implicit and manner.verified
        )
        self.messages = 0
        self.most = most  # messages over this connection
        self.parked = False  # it waits for a delivery
        self.closing = False
        self.no_handshake = ""  # why there was no TLS
        self._name = name
        self._local = local
        self._manner = manner
        self._executor = executor
        self._on_end = on_end
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._handshake: asyncio.Task[None] | None = None
        self._deliveries: Sequence[Delivery] = ()
        self._results: list[list[Outcome]] = []
        self._done: asyncio.Future[list[list[Outcome]]] | None = None
        self._fetching: OutgoingBody | None = None  # a thread reads it
        self._early = False  # octets came in clear where TLS was to begin
        self._full = False  # the host takes less than we send
        self._progress = -1
        self._buffered = 0
        self._since = 0.0  # when a check first saw things as they are; 0: since the last check
        self._began = 0.0  # when a check first saw the message that is being sent; 0: since the last check
        self._pumped = False  # it was sent in pieces

    @property
    def reusable(self) -> bool:
        """Whether another delivery may be sent."""
        return not self.closing and self.messages < self.most and self.dialogue.reusable

    def run(self, deliveries: Sequence[Delivery]) -> asyncio.Future[list[list[Outcome]]]:
        """Sends them, also before there is a connection. The outcomes of as many as were sent, in their order: all of
        them, unless the session ended before, or takes no more."""
        self._deliveries = deliveries
        self._results = []
        self._done = done = self._loop.create_future()
        self._since = 0.0
        self.parked = False
        self._go_on(self._send(deliveries[0]))
        return done

    def park(self) -> None:
        """Nothing is sent for now."""
        self.parked = True
        self._since = 0.0

    def rested(self, now: float) -> float:
        """Seconds for which checks have seen it parked."""
        return now - self._since if self._since else 0.0

    def quit(self) -> None:
        """Ends the session between two deliveries."""
        self._go_on(self.dialogue.quit())

    def abort(self) -> None:
        """Cuts the connection."""
        self._go_on(self.dialogue.lost())
        if self._transport is not None:
            self._transport.abort()

    def check(self, now: float) -> None:
        """Ends what has waited for longer than the host may take. `now` is monotonic, in seconds."""
        transport = self._transport
        if transport is None or self._handshake is not None:
            return
        dialogue = self.dialogue
        buffered = transport.get_write_buffer_size()
        if not self._since or dialogue.progress != self._progress or buffered != self._buffered:
            self._since = now
            self._progress = dialogue.progress
            self._buffered = buffered
        elif self.closing:
            if now - self._since > LINGER:
                transport.abort()
        elif self._done is not None and now - self._since > dialogue.patience:
            self._give_up(transport)
        if self._done is not None and not self.closing:
            self._began = self._began or now
            octets = self._deliveries[len(self._results)].message.size
            if now - self._began > LONGEST + octets / SLOWEST:
                self._give_up(transport)

    def _give_up(self, transport: asyncio.Transport) -> None:
        self._go_on(self.dialogue.timed_out())
        transport.abort()

    # What the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name.
        self._transport = cast("asyncio.Transport", transport)
        if self.closing:
            self._transport.abort()
        elif self.dialogue.opening.secure:
            self._begin_handshake()

    def data_received(self, data: bytes) -> None:
        if self._handshake is None:
            early = self._pumped and self._transport is not None and self._transport.get_write_buffer_size() > 0
            self._go_on(self.dialogue.feed(data, early))
        else:
            self._early = True

    def eof_received(self) -> None:
        """Nothing more can be answered: the transport closes."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(_words(exc))

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self.dialogue.body is not None:
            self._go_on(BODY)

    # What the dialogue says

    def _go_on(self, step: Step) -> None:
        """Does what the dialogue wants, until it waits."""
        dialogue = self.dialogue
        while True:
            output = dialogue.take_output()
            if output and self._transport is not None and not self.closing:
                self._transport.write(output[0] if len(output) == 1 else b"".join(output))
            if step is WAIT:
                return
            if step is READY:
                if self._done is None:
                    return
                results = self._results
                results.append(dialogue.outcomes)
                if len(results) == len(self._deliveries) or not self.reusable:
                    self._finish()
                    return
                step = self._send(self._deliveries[len(results)])
            elif step is BODY:
                step = self._pump()
            elif step is TLS:
                self._begin_handshake()
                return
            else:
                self._end()
                return

    def _send(self, delivery: Delivery) -> Step:
        self.messages += 1
        self._began = 0.0
        self._pumped = False
        return self.dialogue.send(delivery, require_tls=delivery.message.envelope.require_tls and not self._local)

    def _pump(self) -> Step:
        """The next piece of the message, if the host takes it now."""
        body = self.dialogue.body
        if body is None or self._full or self._fetching is body:
            return WAIT
        self._pumped = True
        if body.blocking:
            self._fetching = body
            reading = self._loop.run_in_executor(self._executor, body.read)
            reading.add_done_callback(partial(self._on_piece, body))
            return WAIT
        try:
            return self.dialogue.send_piece(body.read())
        except BodyError as error:
            return self.dialogue.body_failed(error.text)

    def _on_piece(self, body: OutgoingBody, reading: asyncio.Future[bytes]) -> None:
        error = reading.exception()
        if self._fetching is body:
            self._fetching = None
        if self.dialogue.body is not body:
            return  # the host has refused it meanwhile, or is gone
        if error is None:
            self._go_on(self.dialogue.send_piece(reading.result()))
        else:
            self._go_on(self.dialogue.body_failed(error.text if isinstance(error, BodyError) else repr(error)))

    def _finish(self) -> None:
        done = self._done
        self._done = None
        self._deliveries = ()
        self._since = 0.0
        if done is not None and not done.done():
            done.set_result(self._results)

    def _end(self) -> None:
        """The dialogue is closed."""
        if self.closing:
            return
        self.closing = True
        self._since = 0.0
        if self._done is not None:
            self._results.append(self.dialogue.outcomes)
            self._finish()
        self._on_end(self)
        if self._handshake is not None:
            self._handshake.cancel()
        elif self._transport is not None:
            self._transport.close()

    def _lose(self, why: str) -> None:
        self._transport = None
        if not self.closing:
            self._go_on(self.dialogue.lost(why))
        self._on_gone(self)

    # TLS

    def _begin_handshake(self) -> None:
        # What arrives before TLS stands under the session is not to be read as if it came through it.
        assert self._transport is not None
        self._transport.pause_reading()
        self._handshake = self._loop.create_task(self._shake_hands(self._transport))

    async def _shake_hands(self, transport: asyncio.Transport) -> None:
        context = self._manner.context
        assert context is not None
        between = _Between()
        name = self._name.strip("[]")
        patience = self.dialogue.terms.patience[Stage.TLS]
        answer, why = Answer.GARBAGE, ""
        secured: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(patience):
                secured = await self._loop.start_tls(
                    transport, between, context, server_hostname=name, ssl_handshake_timeout=patience + 60
                )
                # What came in one segment with the end of the handshake uvloop hands on in its next round.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        except TimeoutError:
            answer = Answer.TIME_OUT
        except ssl.SSLError as error:
            why = _tls_words(error)
        except OSError as error:
            answer, why = Answer.HANG_UP, _words(error)
        except ValueError as error:  # a name that cannot be one
            why = str(error)
        except asyncio.CancelledError:
            transport.abort()
            self._on_gone(self)
            raise
        except Exception as error:  # whatever it is, whoever waits is answered
            why = repr(error)
        self._handshake = None
        implicit = self.dialogue.opening.secure
        if secured is not None and (self._early or (between.octets and not implicit)):
            # It comes before our EHLO, and would pass for the answer to it.
            why = "it speaks before it was spoken to"
        elif secured is not None and between.lost:
            answer = Answer.HANG_UP
        elif secured is not None:
            self._transport = secured
            secured.set_protocol(self)
            self._full = False
            if not implicit:
                self._go_on(self.dialogue.tls_started(self._manner.verified))
            elif between.octets:  # the greeting
                self._go_on(self.dialogue.feed(bytes(between.octets)))
            return
        self.no_handshake = why or answer.value
        self._go_on(self.dialogue.tls_failed(why, answer))
        (secured or transport).abort()
        self._transport = None
        self._on_gone(self)

    def keep_session(self) -> None:
        """For the next handshake with this host; TLS 1.3 has it once the host has spoken."""
        if self._transport is not None and self.dialogue.opening.secure:
            secured = self._transport.get_extra_info("ssl_object")
            if secured is not None:
                self._manner.sessions.keep(self._name.strip("[]"), secured.session)


class _Between(asyncio.Protocol):
    """Stands under TLS until the link does."""

    def __init__(self) -> None:
        self.octets = bytearray()
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.octets += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


def _words(error: Exception | None) -> str:
    if isinstance(error, ssl.SSLError):
        return _tls_words(error)
    return (error.strerror or "") if isinstance(error, OSError) else ""


def _tls_words(error: ssl.SSLError) -> str:
    """OpenSSL's own, without the place in its source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    return (error.reason or "").replace("_", " ").lower() or str(error)
