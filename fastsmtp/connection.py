"""A client's connection: octets to the parser, its events to the session, replies back; and everything about time.

Each step is a plain call: feed, next, receive, write. Only what has to wait makes the connection `busy` (a policy that
must look something up, the spool's commit): nothing more is interpreted until the answer is there, what arrives waits
in the parser, and above 64 KB the client is not read. Replies of a pipelined group leave in one write.
`check` is called every few seconds and ends what has timed out: no timer is set per command or connection.
Not here: what a command means (session), where messages are kept (spool), who is accepted (policy), listening (server).
A bug is logged once and answered 421; exception text never goes to the peer. RFC 5321 4.5.3.2; RFC 2920; RFC 3207.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import time
from collections.abc import Awaitable
from enum import IntFlag
from typing import Final, cast

from . import log as logs
from ._parser import Body, BodyEnd, FrameError, Line
from .job import Draft, Turned
from .message import Content, Message
from .metrics import Counter, counter_of
from .reply import (
    R421_BUG,
    R421_SESSION_TOO_OLD,
    R421_SHUTTING_DOWN,
    R421_TIMEOUT,
    R421_TOO_MANY_GUESSES,
    R421_TOO_MANY_SESSIONS,
    R552_TOO_BIG_CLOSING,
    R554_EARLY_TALKER,
    SILENT_CLOSE,
    Reply,
    Then,
    named,
    reason,
)
from .rewrite import Rewriter
from .service import Service
from .session import Answer, Chunk, Session
from .tls import describe, end_points, identity
from .tls_transport import TlsTransport
from .verdict import Ask, Client, Refused, Store, Stored, Verdict

UNREAD_LIMIT: Final = 65536  # octets fed and not interpreted, above which the client is not read
# Replies that leave in one write; behind them other clients have their turn. Of the dearest commands (addresses with
# U-labels) so many take 15 ms.
GROUP_LIMIT: Final = 50
NAME_SHOWN = 64  # characters of a user name in the log: some type their password there
LINGER = 5.0  # seconds that a client has to take our last words while it still sends

# Names of this module: on Python 3.11 looking up an Enum's member costs 0.05 µs each time.
NO_CONTENT: Final = Content.NONE
ACCEPTED: Final = Counter.MESSAGES_ACCEPTED
RECIPIENTS: Final = Counter.RECIPIENTS_ACCEPTED
SESSIONS: Final = Counter.SESSIONS
OCTETS: Final = Counter.OCTETS_RECEIVED

# The octets behind these verbs belong to our answer: whoever sends them before is guessing it.
EARLY = frozenset((b"EHLO", b"HELO", b"LHLO", b"DATA", b"AUTH"))

# A refusal for good behind these is about a client or a message, not a sign of guessing or junk.
NO_FAILURES = frozenset((b"CONNECT", b"MAIL", b"DATA", b"BDAT", b"."))
HELLO = frozenset((b"EHLO", b"HELO", b"LHLO"))


class Pause(IntFlag):
    """Why the client is not read."""

    NONE = 0
    UNREAD = 1  # enough has been read that is not interpreted yet
    DRAFT = 2  # the message's octets are not on disk yet
    OUTPUT = 4  # the client does not take our replies


NO_PAUSE: Final = Pause.NONE


class Connection(asyncio.Protocol):
    """One client, from accept to close."""

    __slots__ = (
        "body_since", "busy", "client", "closing", "draft", "end", "head_open", "marked", "message", "octets", "opened",
        "out", "parser", "paused", "peer", "pumping", "rewriter", "round", "service", "session", "since", "stalled",
        "too_big_since", "transport", "yielded",
    )  # fmt: skip

    def __init__(self, service: Service, peer: tuple[str, int] | None = None) -> None:
        """`peer`: who it is, where the limits have let it in before (doors.py, gate.py)."""
        self.service = service
        self.peer = peer
        self.transport: asyncio.Transport | None = None
        self.draft: Draft | None = None
        self.message: Message | None = None  # which the spool has been given
        self.rewriter: Rewriter | None = None  # through which the draft's octets go
        self.out: list[bytes] = []
        self.paused = NO_PAUSE
        self.busy = True  # something is waited for: no command is interpreted; at first the greeting
        self.pumping = False
        self.yielded = False  # there is more to interpret: other clients have their turn before
        self.closing = False
        self.head_open = False  # the draft has not been told yet that the header is whole
        self.end = ""  # why the session ended
        self.octets = 0
        self.opened = 0.0
        self.since = 0.0  # when the last event was first seen by a check; 0: after the last check
        self.stalled = 0.0  # since when the client takes no replies; 0: it does
        self.body_since = 0.0  # since when, and from which count of octets on, the rate of data is measured
        self.marked = 0
        self.too_big_since = 0.0

    # What the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        service = self.service
        self.transport = cast("asyncio.Transport", transport)
        through_gate = isinstance(transport, TlsTransport)
        if self.peer is not None:
            ip, port = self.peer
        else:
            peer = peer_of(transport)
            if peer is None:
                self.closing = True
                self.transport.abort()
                return
            ip, port = peer
            if service.limits is not None:
                refusal = service.limits.admit(ip)
                if refusal is not None:
                    self._turn_away(refusal)
                    return
        self.client = Client(ip, port, service.name)
        if not ip:
            self.client.uid = peer_uid(transport.get_extra_info("socket"))
        if service.trusts is not None:
            self.client.trusted = service.trusts(self.client.ip)
        if service.fetches is not None:
            self.client.fetches = service.fetches(self.client.ip)
        if through_gate:
            self._secured(transport.get_extra_info("ssl_object"))
        self.opened = time.monotonic()
        self.round = service.rounds[service.turn - 1]
        self.round.add(self)
        self._begin(None)
        service.count(SESSIONS)
        if not through_gate and service.shared.open_session(service.worker) > service.session_limit:
            service.count(Counter.SESSIONS_REFUSED)
            self._bye(R421_TOO_MANY_SESSIONS, "too many sessions")
        elif service.draining:
            self._bye(R421_SHUTTING_DOWN, "shutdown")
        elif service.times.greet_delay:
            service.loop.call_later(service.times.greet_delay, self._greet)
        else:
            self._greet()

    def _turn_away(self, refusal: bytes) -> None:
        """For a client over its limits nothing is made that a session needs."""
        assert self.transport is not None
        self.closing = True
        self.service.turn_away()
        self.transport.write(refusal)
        self.transport.close()

    def _secured(self, connection: ssl.SSLObject) -> None:
        """TLS is in use from here on."""
        client = self.client
        client.tls = describe(connection)
        if self.service.terms.mechanisms:
            client.bindings = end_points(connection.context)
            client.certificate = identity(connection)
        self.service.count(Counter.TLS_HANDSHAKES)

    def _begin(self, before: Session | None) -> None:
        withheld = self.service.withheld
        keywords = withheld(self.client.ip) if withheld is not None else frozenset()
        self.parser = self.service.make_parser()
        self.session = Session(self.service.terms, self.client, keywords, before)

    def _greet(self) -> None:
        if self.transport is None or self.closing:
            return
        if self.parser.unread and self.service.times.greet_delay and self.service.early_refused:
            self._bye(R554_EARLY_TALKER, "early talker")
            return
        self.busy = False
        self._act(self.session.greet(), b"CONNECT")
        self._pump()

    def data_received(self, data: bytes) -> None:
        self.octets += len(data)
        if self.closing:
            return
        self.parser.feed(data)
        if self.busy:
            if self.parser.unread > UNREAD_LIMIT:
                self._pause(Pause.UNREAD)
        else:
            self._pump()

    def eof_received(self) -> bool:
        # What was sent before is answered; then the transport closes. TLS has no half-open connections.
        self.end = self.end or "eof"
        self.service.send()
        unanswered = self.busy or self.yielded or self.stalled > 0
        return unanswered and not self.closing and not self.client.tls

    def connection_lost(self, exc: Exception | None) -> None:
        service = self.service
        self.transport = None
        if not self.opened:  # it was turned away
            return
        self.closing = True
        self.round.discard(self)
        self._abandon()
        if service.limits is not None:
            service.limits.leave(self.client.ip)
        service.shared.close_session(service.worker)
        service.count(OCTETS, self.octets)
        client = self.client
        service.log.write(
            logs.SESSION, client.ip, client.port, client.listener, client.helo, client.tls, client.user or None,
            self.session.messages, time.monotonic() - self.opened, self.end or ("reset" if exc else "eof"),
        )  # fmt: skip

    def pause_writing(self) -> None:
        self.stalled = time.monotonic()
        self._pause(Pause.OUTPUT)

    def resume_writing(self) -> None:
        self.stalled = 0.0
        self._resume(Pause.OUTPUT)
        if not self.busy:
            self._pump()

    def _pause(self, why: Pause) -> None:
        if not self.paused and self.transport is not None and not self.closing:
            self.transport.pause_reading()
        self.paused |= why

    def _resume(self, why: Pause) -> None:
        if not self.paused:
            return
        self.paused &= ~why
        if not self.paused and self.transport is not None and not self.closing:
            self.transport.resume_reading()

    # From event to reply

    def _pump(self) -> None:
        """Interprets what was read, until nothing is left or something has to be waited for."""
        if self.pumping:
            return
        self.pumping = True
        parser = self.parser
        try:
            while not self.busy and not self.stalled:
                event = parser.next()
                if event is None:
                    if parser.in_text:
                        # Of a message over its limit nothing is handed out, but its octets came.
                        self.since = 0.0
                    break
                self.since = 0.0
                if type(event) is Line:
                    more = parser.unread > 0
                    answer = self._receive_early(event) if more else self.session.receive(event)
                    if type(answer) is Reply and answer.plain and self.draft is None and not self.service.draining:
                        # What _act does for nearly every command.
                        self.out.append(answer.wire)
                        if parser.stopped:
                            parser.command()
                        if not more:
                            break
                    else:
                        self._act(answer, event.verb)
                elif type(event) is Body:
                    self._write(event.chunk)
                elif type(event) is BodyEnd:
                    self._act(self._take_end(event), b".")
                if len(self.out) >= GROUP_LIMIT:
                    self._yield()
                    break
        except FrameError as error:
            self._act(self.session.lost(error), b"")
        except Exception as error:
            self._bug(error)
        finally:
            self.pumping = False
        out = self.out
        if out:
            if self.transport is not None:
                self.service.post(self.transport, out[0] if len(out) == 1 else b"".join(out))
            out.clear()
        ended = self.end == "eof" and not (self.busy or self.yielded or self.stalled or self.closing)
        if ended and self.transport is not None:
            self.service.send()
            self.transport.close()
        if self.paused and self.paused & Pause.UNREAD and parser.unread <= UNREAD_LIMIT:
            self._resume(Pause.UNREAD)

    def _yield(self) -> None:
        """Goes on with what was read when other clients had their turn."""
        if not self.yielded:
            self.yielded = True
            self.service.loop.call_soon(self._go_on)
        if self.parser.unread > UNREAD_LIMIT:
            self._pause(Pause.UNREAD)

    def _go_on(self) -> None:
        self.yielded = False
        if not self.busy and not self.closing:
            self._pump()

    def _receive_early(self, line: Line) -> Answer:
        """The answer to a command behind which more was sent already."""
        if line.verb == b"STARTTLS" or (line.verb == b"ATRN" and self.session.terms.odmr):
            # Nothing of it may be executed, inside or outside TLS; or taken for what a server says.
            return SILENT_CLOSE
        # A line of an AUTH exchange has no verb.
        if self.service.early_refused and (line.verb in EARLY or self.session.exchange is not None):
            return R554_EARLY_TALKER
        return self.session.receive(line)

    def _write(self, chunk: bytes) -> None:
        draft = self.draft
        if draft is None:
            return
        if self.rewriter is not None and not (chunk := self.rewriter.feed(chunk)):
            return
        if not draft.write(chunk):
            self._pause(Pause.DRAFT)
        if self.head_open and self.parser.header_end >= 0:
            self.head_open = False
            draft.header_done()

    def _drained(self) -> None:
        self._resume(Pause.DRAFT)

    def _take_end(self, end: BodyEnd) -> Answer:
        draft = self.draft
        if draft is None:
            return self.session.take_end(end, b"")
        if end.chunk:
            self._write(end.chunk)
        size, header_end = end.size, -1
        if self.rewriter is not None and end.last and not end.too_big:
            if rest := self.rewriter.end():
                draft.write(rest)
            size, header_end = draft.size, self.rewriter.header_end
            self.rewriter = None
        answer = self.session.take_end(end, draft.head if end.last else b"", header_end)
        if type(answer) is Store:
            content = NO_CONTENT
            if end.bare or end.eight_bit or end.eight_bit_header or answer.envelope.body == "BINARYMIME":
                content = Content(
                    Content.BARE * end.bare
                    | Content.EIGHT_BIT * end.eight_bit
                    | Content.EIGHT_BIT_HEADER * end.eight_bit_header
                    | Content.BINARY * (answer.envelope.body == "BINARYMIME")
                )
            message = Message(
                answer.envelope, answer.prefix, None, size, answer.header_end, content, answer.arrived, cuts=answer.cuts
            )
            self.draft = None
            self._resume(Pause.DRAFT)
            self.message = message
            self.busy = True
            self.service.keeper.append(message, draft, self._on_stored)
        return answer

    def _on_stored(self, result: Stored | Refused) -> None:
        """The spool's answer; the connection may be gone by now, the message is kept all the same."""
        self.busy = False
        service = self.service
        session = self.session
        message = self.message
        self.message = None
        if message is not None and type(result) is Stored:
            envelope = message.envelope
            service.shared.add(service.worker, ACCEPTED, 1)
            service.shared.add(service.worker, RECIPIENTS, len(envelope.recipients))
            service.log.write(
                logs.ACCEPTED, envelope.id, envelope.client, self.client.user or None,
                envelope.reverse_path.wire or "<>",
                tuple([recipient.address.wire for recipient in envelope.recipients]), message.size,
            )  # fmt: skip
        try:
            answer = session.resume(result)
            if self.transport is not None and not self.closing:
                self._act(answer, b".")
                self._pump()
        except Exception as error:
            # The spool answers many sessions in a row.
            self._bug(error)

    def _act(self, answer: Answer, stage: bytes) -> None:
        """Does what an answer says; `stage` is the verb that it answers, "." for end-of-data."""
        while type(answer) is Ask:
            verdict = self.service.policy.evaluate(answer)
            if not isinstance(verdict, Verdict):
                self.busy = True
                self.service.run(self._await(verdict, stage))
                return
            answer = self.session.resume(verdict)
        if type(answer) is Reply:
            self.out.append(answer.wire)
            if answer.code >= 400:
                self._refused(answer, stage)
            if answer.plain or answer.then is Then.CONTINUE:
                if self.parser.stopped:
                    self.parser.command()
                if self.session.transaction is None:
                    # A draft lives as long as its transaction.
                    self._abandon()
                if self.service.draining and self.session.transaction is None:
                    self._bye(R421_SHUTTING_DOWN, "shutdown")
            elif answer.then is Then.DATA:
                self._open_draft()
                self.parser.data(self.session.terms.message_size)
            elif answer.then is Then.LINE:
                self.parser.line()
            elif answer.then is Then.USER:
                self.service.count(Counter.AUTHENTICATED)
                self.parser.command()
                if self.service.draining:
                    self._bye(R421_SHUTTING_DOWN, "shutdown")
            elif answer.then is Then.TLS:
                self.busy = True
                self._flush()
                self._start_tls()
            else:
                self._close(answer, "quit" if stage == b"QUIT" else answer.text or "dropped")
        elif type(answer) is Chunk:
            if answer.keep and answer.first:
                self._open_draft()
            limit = self.session.terms.message_size if answer.keep else 0
            self.parser.bdat(answer.size, answer.last, limit, answer.first)

    def _open_draft(self) -> None:
        transaction = self.session.transaction
        assert transaction is not None
        self.draft = self.service.keeper.draft(transaction.envelope.id, self._drained)
        self.head_open = True
        handling = self.session.terms.handling
        if handling is not None and handling.rewrite and self.client.user:
            self.rewriter = Rewriter()

    def _abandon(self) -> None:
        if self.draft is not None:
            self.draft.abandon()
            self.draft = None
            self.rewriter = None
            self._resume(Pause.DRAFT)

    async def _await(self, verdict: Awaitable[Verdict], stage: bytes) -> None:
        """Goes on when a policy that had to wait has decided."""
        decided = await verdict
        self.busy = False
        if self.transport is not None and not self.closing:
            try:
                self._act(self.session.resume(decided), stage)
            except Exception as error:
                self._bug(error)
            if decided.turned is None or self.closing:
                self._pump()
            elif self.parser.unread or self.stalled:  # it did not wait for our answer
                self._close(SILENT_CLOSE, "early talker")
            else:
                self._turn(decided.turned)
                return
        elif self.session.exchange is not None:
            # A guess that is not waited for is a guess all the same.
            answer = self.session.resume(decided)
            if type(answer) is Reply and answer.code >= 400:
                self._refused(answer, stage)
        if decided.turned is not None:
            decided.turned.abandon()

    def _turn(self, turned: Turned) -> None:
        """The client is the server from here on. For everything but its octets this stays the connection."""
        transport = self.transport
        assert transport is not None
        self._flush()
        self.busy = True
        self.end = "turned"
        turned.begin(transport, self.connection_lost)

    def _refused(self, reply: Reply, stage: bytes) -> None:
        service = self.service
        attempt = self.session.attempt if stage in (b"AUTH", b"") else None
        bad = reply.code >= 500 or reply is R421_TOO_MANY_GUESSES
        # One telephone with an old password must not turn its office away: guesses have buckets of their own.
        guessed = attempt is not None and attempt.reason != "" and self.session.terms.submission
        why = reason(reply)
        if (counter := counter_of(why)) is not None:
            service.count(counter)
        if service.limits is not None and bad and stage not in NO_FAILURES and not guessed:
            service.limits.fail(self.client)
        if attempt is not None:
            self.session.attempt = None
            if attempt.reason:
                service.count(Counter.AUTH_FAILED)
                service.log.write(
                    logs.AUTH_FAILED, self.client.ip, self.client.port, self.client.listener, attempt.mechanism,
                    attempt.name[:NAME_SHOWN], attempt.reason, f"{reply.code} {reply.enhanced} {reply.text}",
                )  # fmt: skip
                return
        if stage == b"RCPT":
            service.count(Counter.RECIPIENTS_REFUSED)
        elif stage in (b".", b"DATA", b"BDAT"):
            service.count(Counter.MESSAGES_REFUSED)
        elif stage not in (b"MAIL", b"CONNECT") and (stage not in HELLO or 500 <= reply.code <= 504):
            service.count(Counter.COMMANDS_REJECTED)
            return
        session = self.session
        transaction = session.transaction
        reverse_path = transaction.envelope.reverse_path if transaction else session.subject
        sender = None if reverse_path is None else str(reverse_path) or "<>"
        recipient = str(session.subject or "") if stage == b"RCPT" else ""
        service.log.write(
            logs.REFUSED, self.client.ip, "end-of-data" if stage == b"." else stage.decode(), why,
            f"{reply.code} {reply.enhanced} {reply.text}", sender, recipient,
        )  # fmt: skip

    def _flush(self) -> None:
        """Sends now what is waiting, in its order."""
        if self.out and self.transport is not None:
            self.service.post(self.transport, b"".join(self.out))
        self.out.clear()
        self.service.send()

    def _bug(self, error: Exception) -> None:
        self.service.log.write(logs.BUG, "connection", repr(error), logs.trace(error))
        if not self.closing:
            self._bye(R421_BUG, "bug")

    # The end

    def _bye(self, reply: Reply, end: str) -> None:
        """Ends the session with a reply of our own accord."""
        if (counter := counter_of(reason(reply))) is not None:
            self.service.count(counter)
        reply = named(reply, self.service.terms.hostname)
        self.out.append(reply.wire)
        self._close(reply, end)

    def _close(self, reply: Reply, end: str) -> None:
        """Sends what is waiting and closes. A client that is in the middle of sending would lose a refusal to the
        reset that answers its next octets: it is given some seconds to read it."""
        self.end = end
        self.closing = True
        self.since = 0.0
        self.round.discard(self)
        self.round = self.service.leaving
        self.round.add(self)
        self.parser.discard()
        transport = self.transport
        if transport is None:
            return
        if reply.code >= 400 and reply is not SILENT_CLOSE and transport.can_write_eof():
            self._flush()
            if self.paused:
                transport.resume_reading()
            transport.write_eof()
        else:
            self.service.post_last(transport, b"".join(self.out), not self.client.tls)
            self.out.clear()

    def drain(self) -> None:
        """Ends the session now if no message is under way; else its last reply will."""
        if not (self.busy or self.closing or self.parser.in_text) and self.session.transaction is None:
            self._bye(R421_SHUTTING_DOWN, "shutdown")

    def abort(self, end: str) -> None:
        """Cuts the connection; what was not answered is not kept."""
        self.end = end
        self.closing = True
        self.parser.discard()
        if self.transport is not None:
            self.transport.abort()

    def check(self, now: float) -> None:
        """Ends what has timed out. `now` is monotonic, in seconds."""
        times = self.service.times
        if not self.since:
            self.since = now
        if self.closing:
            if now - self.since > LINGER:
                self.abort(self.end)
        elif self.stalled:
            self.since = now
            if now - self.stalled > times.write:
                self.abort("takes no replies")
        elif self.busy:
            self.since = now
        elif self.parser.in_text:
            self._check_body(now)
        elif now - self.since > times.command:
            self._bye(R421_TIMEOUT, "timeout")
        elif now - self.opened > times.session * (1 if self.session.transaction is None else 2):
            # Between transactions; but a client may never be between two, or never end one.
            self._bye(R421_SESSION_TOO_OLD, "session too old")
        else:
            self.body_since = self.too_big_since = 0.0

    def _check_body(self, now: float) -> None:
        times = self.service.times
        if self.paused:
            self.since = self.body_since = now
            self.marked = self.octets
        if not self.body_since:
            self.body_since = now
            self.marked = self.octets
        if self.parser.too_big:
            self.too_big_since = self.too_big_since or now
            if now - self.too_big_since > times.oversize:
                self.out.append(R552_TOO_BIG_CLOSING.wire)
                self._close(R552_TOO_BIG_CLOSING, "message too big")
                return
        else:
            self.too_big_since = 0.0
        measured = now - self.body_since
        slow = measured >= times.data and self.octets - self.marked < times.data_rate * measured
        if slow or now - self.since > times.data:
            self._bye(R421_TIMEOUT, "timeout")
        elif measured >= times.data:
            self.body_since = now
            self.marked = self.octets

    # STARTTLS

    def _start_tls(self) -> None:
        """Puts TLS under the session. What arrives is the handshake's until that is over."""
        service = self.service
        transport = self.transport
        if transport is None or service.context is None:
            return
        tls = TlsTransport(self, service.context, service.loop, service.times.tls, self._on_handshake)
        transport.set_protocol(tls)
        tls.connection_made(transport)

    def _on_handshake(self, tls: TlsTransport, error: Exception | None) -> None:
        if error is not None:
            self.end = "TLS failed"
            self.service.count(Counter.TLS_FAILURES)
            self.service.log.write(logs.TLS_FAILED, self.client.ip, self.client.port, self.service.name, str(error))
            return
        self.transport = cast("asyncio.Transport", tls)
        self._secured(tls.get_extra_info("ssl_object"))
        self.client.helo = self.client.user = ""
        self.busy = False
        self._begin(self.session)


def peer_of(transport: asyncio.BaseTransport) -> tuple[str, int] | None:
    """As `name_peer`; None: a client that was gone before it could be asked who it is, and might be anybody."""
    address = transport.get_extra_info("peername")
    if not isinstance(address, tuple):
        client = transport.get_extra_info("socket")
        if client is not None and client.family != socket.AF_UNIX:
            return None
    return name_peer(address)


def name_peer(address: object) -> tuple[str, int]:
    """Address and port of a client, as the kernel has them; empty for a unix socket. A mapped address is its IPv4
    address in every list, limit and trace."""
    return (address[0].removeprefix("::ffff:"), address[1]) if isinstance(address, tuple) else ("", 0)


def peer_uid(client: socket.socket | None) -> int:
    """The user at the other end of a unix socket, as the kernel knows it (unix(7) SO_PEERCRED); -1: not known."""
    if client is None or client.family != socket.AF_UNIX:
        return -1
    _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)
