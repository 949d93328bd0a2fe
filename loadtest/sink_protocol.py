"""One session of a sink: SMTP or LMTP, everything that one read brought answered with one write.

In: octets from the transport. Out: replies in the order of the commands; each message recorded before its 250. A stage
with a plan may answer otherwise, later or wrongly (sink_plan); a reply that waits holds up all that follows it.
Always: commands in the wrong order, parameters and extensions that are not offered are refused, so that a client that
relies on them is seen. Only CRLF ends a command.
Not here: sockets and processes (sink_server), what is offered (sink_service), where a message ends (sink_framing).
On failure: 451 where a message cannot be recorded. RFC 5321, 2033 (LMTP), 2920, 1870, 3030 (BDAT), 3207, 4954.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import ssl
from collections.abc import Callable
from functools import partial
from typing import cast

from .sink_auth import MECHANISMS, Exchange, decode
from .sink_framing import Reader
from .sink_record import Client, Recipient
from .sink_replies import (
    R220_TLS,
    R221_BYE,
    R235_AUTHENTICATED,
    R250_KEPT,
    R250_OK,
    R250_RECIPIENT,
    R250_SENDER,
    R252_VRFY,
    R354_GO_ON,
    R451_RECORD,
    R500_LINE_END,
    R500_UNKNOWN,
    R501_CANCELLED,
    R501_SYNTAX,
    R503_ORDER,
    R504_MECHANISM,
    R530_AUTH,
    R535_AUTH,
    R552_SIZE,
    R554_PASTED,
    R555_PARAMETER,
    Said,
    address_of,
    heard_answers,
)
from .sink_service import Service

HANDSHAKE_SECONDS = 30.0

_PATH = rb'<((?:"(?:[^"\\\r\n]|\\[^\r\n])*")?[^<>"\s]*)>(?: ([^\r\n]+))?\r\n'
_MAIL = re.compile(rb"MAIL FROM: ?" + _PATH, re.IGNORECASE)
_RCPT = re.compile(rb"RCPT TO: ?" + _PATH, re.IGNORECASE)
_BDAT = re.compile(rb"BDAT ([0-9]{1,15})( LAST)?\r\n", re.IGNORECASE)
_SIZE = re.compile(r"\bSIZE=([0-9]{1,20})\b", re.IGNORECASE)


class Session(Reader):
    """A connection."""

    __slots__ = (
        "_bdat_last", "_bdat_refused", "_client", "_esmtp", "_expected", "_helo", "_peer", "_plain", "_recipients",
        "_refused", "_secured", "_sender", "_task", "_user",
    )  # fmt: skip

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(service, loop)
        self._plain = service.recorder is None and "end" not in service.plan and not service.lmtp and not service.size
        self._task: asyncio.Task[None] | None = None
        self._secured = ""  # the version of TLS
        self._expected: Callable[[bytes], None] | None = None  # takes the next line of AUTH
        self._peer = self._user = self._helo = ""
        self._esmtp = False
        self._client = ""  # rendered for the record
        self._refused = False  # at the greeting
        self._forget()

    def _forget(self) -> None:
        """No transaction is open."""
        self._sender: re.Match[bytes] | None = None  # MAIL as it was said
        self._recipients: list[re.Match[bytes]] = []
        self._read_lines()
        self._bdat_last = False
        self._bdat_refused = b""

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name: no isinstance here.
        self._transport = cast("asyncio.Transport", transport)
        self._write = self._transport.write
        self._service.opened(self)
        self._note_tls()
        peer = transport.get_extra_info("peername")
        self._peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        self._refused = not self._answer("banner", self._service.greeting, self._peer.rpartition(":")[0] or "unix")
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._over = True
        self._service.sessions.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        """The sink ends."""
        self._over = True
        self._transport.abort()

    def _take_line(self, line: bytes) -> None:
        if self._expected is not None:
            expected, self._expected = self._expected, None
            expected(line)
            return
        on_command = VERBS.get(line[:4]) or VERBS.get(line[:4].upper())
        if on_command is None:
            self._refuse(R500_UNKNOWN)
        elif line[-2:] != b"\r\n":
            self._refuse(R500_LINE_END)
        elif self._refused and on_command is not Session._on_quit:
            self._refuse(R503_ORDER)
        else:
            on_command(self, line)

    # Commands

    def _on_ehlo(self, line: bytes) -> None:
        """EHLO, HELO and LHLO."""
        verb = line[:4].upper()
        helo = line[5:].strip().decode("utf-8", "replace")
        if (verb == b"LHLO") != self._service.lmtp:
            self._refuse(R500_UNKNOWN)
        elif not helo:
            self._refuse(R501_SYNTAX)
        else:
            esmtp = verb != b"HELO"
            reply = self._service.ehlo[bool(self._secured)] if esmtp else self._service.helo
            if self._answer("ehlo", reply, helo):
                self._forget()
                self._helo, self._esmtp, self._client = helo, esmtp, ""

    def _on_mail(self, line: bytes) -> None:
        found = _MAIL.fullmatch(line)
        if not self._helo or self._sender is not None:
            self._refuse(R503_ORDER)
        elif self._service.account.user and not self._user:
            self._refuse(R530_AUTH)
        elif found is None:
            self._refuse(R501_SYNTAX)
        elif found[2] and (refusal := self._check_parameters(found[2])):
            self._refuse(refusal)
        elif self._answer("mail", R250_SENDER, found):
            self._sender = found

    def _on_rcpt(self, line: bytes) -> None:
        found = _RCPT.fullmatch(line)
        if self._sender is None or self._octets:
            self._refuse(R503_ORDER)
        elif found is None or not found[1]:
            self._refuse(R501_SYNTAX)
        elif found[2] and (refusal := self._check_parameters(found[2])):
            self._refuse(refusal)
        elif self._answer("rcpt", R250_RECIPIENT, found):
            self._recipients.append(found)

    def _check_parameters(self, said: bytes) -> bytes:
        """A refusal, or nothing."""
        parameters = said.decode("utf-8", "replace")
        for parameter in parameters.upper().split(" "):
            allowed = self._service.parameters if self._esmtp else ()
            if parameter not in allowed and parameter.partition("=")[0] not in allowed:
                return R555_PARAMETER
        size = _SIZE.search(parameters)
        return R552_SIZE if size and self._service.size and int(size[1]) > self._service.size else b""

    def _on_data(self, line: bytes) -> None:
        if not self._recipients or self._octets:
            self._refuse(R503_ORDER)
        elif line[4:] != b"\r\n":
            self._refuse(R501_SYNTAX)
        elif self._answer("data", R354_GO_ON, *self._recipients):
            self._reading = True

    def _on_bdat(self, line: bytes) -> None:
        found = _BDAT.fullmatch(line)
        if "CHUNKING" not in self._service.offered:
            self._refuse(R500_UNKNOWN)
        elif found is None:
            self._refuse(R501_SYNTAX)
            self._end()  # where the next command begins is unknown
        else:
            self._left = int(found[1])
            self._bdat_last = found[2] is not None
            self._bdat_refused = b"" if self._recipients else R503_ORDER
            if not self._left:
                self._end_chunk()

    def _end_chunk(self) -> None:
        if self._bdat_refused:
            self._forget()
            self._refuse(R503_ORDER)
        elif self._bdat_last:
            self._finish(dotted=False)
        elif not self._answer("data", R250_OK, *self._recipients):
            self._forget()

    def _on_rset(self, line: bytes) -> None:
        self._forget()
        self._out.append(R250_OK)

    def _on_noop(self, line: bytes) -> None:
        self._out.append(R250_OK)

    def _on_vrfy(self, line: bytes) -> None:
        self._out.append(R252_VRFY)

    def _on_quit(self, line: bytes) -> None:
        if self._answer("quit", R221_BYE, self._helo):
            self._pending.append(self._end)
            self._say_pending()

    def _on_starttls(self, line: bytes) -> None:
        if line.upper() != b"STARTTLS\r\n" or self._secured or "STARTTLS" not in self._service.offered:
            self._refuse(R500_UNKNOWN)
        elif self._follows:
            self._refuse(R554_PASTED)
            self._end()
        else:
            self._tls_due = self._answer("starttls", R220_TLS, self._helo)

    def _on_auth(self, line: bytes) -> None:
        words = line.split()
        mechanism = words[1].upper() if len(words) > 1 else b""
        if "AUTH" not in self._service.offered or not self._esmtp:
            self._refuse(R500_UNKNOWN)
        elif self._user or self._sender is not None:
            self._refuse(R503_ORDER)
        elif mechanism not in MECHANISMS or len(words) > 3:
            self._refuse(R504_MECHANISM)
        else:
            exchange = MECHANISMS[mechanism]()
            question = next(exchange)
            if len(words) == 3:
                self._take_response(exchange, words[2])
            else:
                self._out.append(question)
                self._expected = partial(self._take_response, exchange)

    def _take_response(self, exchange: Exchange, line: bytes) -> None:
        try:
            self._out.append(exchange.send(decode(line.strip())))
            self._expected = partial(self._take_response, exchange)
        except StopIteration as ended:
            self._authenticate(*ended.value)
        except ValueError:
            self._refuse(R501_CANCELLED if line.strip() == b"*" else R501_SYNTAX)

    def _authenticate(self, user: bytes, password: bytes) -> None:
        account = self._service.account
        right = hmac.compare_digest(user, account.user) & hmac.compare_digest(password, account.password)
        name = user.decode("utf-8", "replace")
        if self._answer("auth", R235_AUTHENTICATED if right else R535_AUTH, name):
            self._user, self._client = name, ""

    # The end of a message

    def _finish(self, dotted: bool) -> None:
        plan = self._plan.get("end")
        if plan is not None and plan.delay:
            self._wait(plan.delay, partial(self._conclude, dotted))
        else:
            self._conclude(dotted)

    def _conclude(self, dotted: bool) -> None:
        """Records it, and answers: once, or with LMTP for each recipient."""
        recipients = self._recipients
        if self._plain:
            self._service.kept(len(recipients), self._octets, self._loop.time())
            self._forget()
            self._out.append(R250_KEPT)
            return
        times = len(recipients) if self._service.lmtp else 1
        replies = [(R250_KEPT, "")] * times
        if self._service.size and self._octets > self._service.size:
            replies = [(R552_SIZE, "")] * times
        elif "end" in self._plan:
            replies = self._choose_replies()
        answers = heard_answers(replies, len(recipients))
        if self._service.recorder is not None:
            try:
                self._record(dotted, answers)
            except OSError:
                self._service.counts.unrecorded += 1
                replies = [(R451_RECORD, "")] * times
                answers = []
        kept = sum(answer[:1] == "2" for answer in answers)
        if kept:
            self._service.kept(kept, self._octets, self._loop.time())
        self._forget()
        self._pending += [partial(self._emit, "end", *reply) for reply in replies]
        self._say_pending()

    def _choose_replies(self) -> list[Said]:
        plan = self._plan["end"]
        addresses = [address_of(recipient) for recipient in self._recipients]
        acts = [plan.choose(each) for each in addresses] if self._service.lmtp else [plan.choose(*addresses)]
        return [(R250_KEPT, "") if act is None else (act.reply or R250_KEPT, act.fault) for act in acts]

    def _record(self, dotted: bool, answers: list[str]) -> None:
        """Raises OSError."""
        assert self._service.recorder is not None
        assert self._sender is not None
        octets = b"".join(self._chunks)
        if dotted:
            octets = octets[:-3]
            if octets.startswith(b".") or b"\r\n." in octets:
                octets = (b"\r\n" + octets).replace(b"\r\n.", b"\r\n")[2:]
        if not self._client:
            kind = "LMTP" if self._service.lmtp else "ESMTP" if self._esmtp else "SMTP"
            kind += ("S" if self._secured else "") + ("A" if self._user else "")  # RFC 3848
            self._client = Client(self._peer, self._helo, kind, self._secured, self._user).render()
        recipients = [_make_path(recipient) for recipient in self._recipients]
        self._service.recorder.write(self._client, _make_path(self._sender), recipients, answers, octets)

    # TLS

    def _note_tls(self) -> None:
        secured = self._transport.get_extra_info("ssl_object")
        if secured is not None:
            self._secured = str(secured.version())
            self._service.counts.tls += 1

    def _begin_tls(self) -> None:
        self._tls_due = False
        if self._unread:
            self._refuse(R554_PASTED)
            self._end()
            return
        self._waiting = True
        self._task = self._loop.create_task(self._start_tls())

    async def _start_tls(self) -> None:
        context = self._service.tls
        assert context is not None
        try:
            transport = await self._loop.start_tls(
                self._transport, self, context, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except (OSError, ssl.SSLError, RuntimeError):
            transport = None
        if transport is None or self._over:
            self._service.counts.tls_failed += 1
            self._over = True
            self._transport.abort()
            return
        # Nothing that was said before counts any more, RFC 3207 4.2.
        self._transport = transport
        self._write = transport.write
        self._note_tls()
        self._forget()
        self._helo = self._user = self._client = ""
        self._go_on()


def _make_path(found: re.Match[bytes]) -> Recipient:
    return Recipient(address_of(found), (found[2] or b"").decode("utf-8", "replace"))


VERBS: dict[bytes, Callable[[Session, bytes], None]] = {
    b"EHLO": Session._on_ehlo,
    b"HELO": Session._on_ehlo,
    b"LHLO": Session._on_ehlo,
    b"MAIL": Session._on_mail,
    b"RCPT": Session._on_rcpt,
    b"DATA": Session._on_data,
    b"BDAT": Session._on_bdat,
    b"RSET": Session._on_rset,
    b"NOOP": Session._on_noop,
    b"VRFY": Session._on_vrfy,
    b"QUIT": Session._on_quit,
    b"STAR": Session._on_starttls,
    b"AUTH": Session._on_auth,
}
