"""Session, the life of a connection: it decides and never waits.

In: lines, ends of data, verdicts and the spool's answers. Out: an Answer, one for each of them: a Reply, an `Ask`
(a policy decides, `resume` takes its verdict), a `Chunk` (BDAT octets follow, then `take_end`) or a `Store` (the
spool keeps the message, `resume` takes its answer). What a reply brings about is said by the reply itself.
A transaction that ends, however it ends, is forgotten as a whole: `self.transaction = None`. HELO, TLS and every
counter outlive it. Rules that hold for many verbs are columns of the verb table and are applied in `receive`.
Not here: octets and their limits (parser), time-outs and early talkers (connection), who may send to whom (policy),
what one mail gathers until it is whole (transaction.py) and what is checked then (arrival.py).
RFC 5321 3.1, 3.3, 4.1.4, 4.5.3; RFC 2033; RFC 2920; RFC 3030; RFC 3207; RFC 6531;
RFC 4954; RFC 1985; RFC 2645.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

from ._parser import BodyEnd, FrameError, Line
from .address import Address
from .arrival import take_whole
from .auth import MECHANISMS, Attempt, available
from .auth_exchange import Exchange
from .commands import (
    FOREIGN,
    NONE,
    NOT_IMPLEMENTED,
    REQUIRED,
    TABLE,
    VERBS,
    Verb,
    parse_auth,
    parse_bdat,
    parse_domains,
    parse_mail,
    parse_name,
    parse_node,
    parse_rcpt,
)
from .extensions import CommandError, without_success
from .message import Envelope, Recipient, protocol_word, received_from
from .reply import (
    R220_READY_FOR_TLS,
    R221_BYE,
    R250_CHUNK_OK,
    R250_OK,
    R250_RECIPIENT_OK,
    R250_SENDER_OK,
    R252_CANNOT_EXPN,
    R252_CANNOT_VRFY,
    R354_GO_AHEAD,
    R421_TOO_MANY_ERRORS,
    R421_TOO_MANY_GUESSES,
    R421_TOO_MANY_USELESS,
    R452_TOO_MANY_RECIPIENTS,
    R454_NO_TLS,
    R500_AUTH_LINE_TOO_LONG,
    R500_BARE_LF,
    R500_LINE_TOO_LONG,
    R500_LINE_TOO_LONG_CLOSING,
    R500_NOT_LMTP,
    R500_SYNTAX,
    R500_USE_LHLO,
    R501_ARGUMENT_NEEDED,
    R501_BAD_BDAT,
    R501_BAD_PARAMETER,
    R501_NO_ARGUMENT,
    R502_NOT_IMPLEMENTED,
    R503_AUTHENTICATED,
    R503_BDAT_UNDER_WAY,
    R503_BINARYMIME_NEEDS_BDAT,
    R503_HELO_FIRST,
    R503_IN_TLS,
    R503_MAIL_FIRST,
    R503_NESTED_MAIL,
    R503_RCPT_AFTER_BDAT,
    R503_RCPT_FIRST,
    R503_REFUSED,
    R504_UNKNOWN_MECHANISM,
    R530_AUTH_NEEDED,
    R538_TLS_NEEDED,
    R552_HOP_TOO_BIG,
    R552_TOO_BIG,
    R552_TOO_BIG_CLOSING,
    R553_NEEDS_SMTPUTF8,
    R554_LOOP,
    R554_NO_VALID_RECIPIENTS,
    R555_UNKNOWN_PARAMETER,
    SILENT_CLOSE,
    Reply,
    Then,
    help_with,
    joined,
    queued,
    softened,
)
from .terms import Terms
from .transaction import Transaction
from .verdict import Ask, Client, Refused, Stage, Store, Stored, Verdict


class Chunk:
    """`size` octets of BDAT follow; `keep`: they are part of a message, and `first` of a new one."""

    __slots__ = ("first", "keep", "last", "size")

    def __init__(self, size: int, last: bool, keep: bool, first: bool) -> None:
        self.size = size
        self.last = last
        self.keep = keep
        self.first = first


class Hello(NamedTuple):
    """A HELO, EHLO or LHLO that a policy is asked about."""

    name: str
    esmtp: bool


GUESSES = 3  # failed authentications, after which the session is closed

# Names of this module: on Python 3.11 looking up an Enum's member costs 0.05 µs each time.
CONNECT, HELO, AUTH, MAIL, RCPT = Stage.CONNECT, Stage.HELO, Stage.AUTH, Stage.MAIL, Stage.RCPT
ETRN, ATRN = Stage.ETRN, Stage.ATRN

Answer: TypeAlias = Reply | Ask | Chunk | Store


class Session:
    """A connection's state. `client.tls` says whether TLS is in use: after a handshake comes a new Session."""

    __slots__ = (
        "asked", "attempt", "client", "errors", "esmtp", "exchange", "from_part", "guesses", "messages", "pending",
        "refused", "subject", "terms", "transaction", "useless", "withheld",
    )  # fmt: skip

    def __init__(
        self,
        terms: Terms,
        client: Client,
        withheld: frozenset[str] = frozenset(),
        before: Session | None = None,
    ) -> None:
        """`before` is the session of the same connection in clear: its counters go on."""
        self.terms = terms
        self.client = client
        self.withheld = withheld
        self.esmtp = False
        self.from_part = ""  # of the Received field, empty before HELO
        self.transaction: Transaction | None = None
        self.refused = False  # at CONNECT: only QUIT is left
        self.subject: Address | None = None  # what MAIL or RCPT has just said, for the log; None: no address
        self.exchange: Exchange | None = None  # AUTH is under way: what comes are responses, not commands
        self.attempt: Attempt | None = None  # of the AUTH that has just ended, for the log
        self.asked: Ask | Store | None = None  # what was returned and has not been resumed
        self.pending: Hello | Envelope | Recipient | None = None  # what an Ask is about
        self.errors: int = before.errors if before else 0
        self.useless: int = before.useless if before else 0
        self.guesses: int = before.guesses if before else 0
        self.messages: int = before.messages if before else 0

    # What comes in

    def greet(self) -> Answer:
        if self.terms.ask_connect:
            return self._ask(Ask(CONNECT, self.client), None)
        return self.terms.greeting

    def receive(self, line: Line) -> Answer:
        """The answer to a command."""
        row = ROWS.get(line.verb)
        if row is None:
            return self._unknown(line)
        verb, handler = row
        rest = line.rest
        if line.too_long:
            # How many octets of BDAT follow is not known then.
            return self._count(TOO_LONG.get(verb.name, R500_LINE_TOO_LONG))
        if self.refused and verb.name not in ("QUIT", "BDAT"):
            return self._count(R503_REFUSED)
        if rest:
            if verb.argument is NONE:
                return self._count(R501_NO_ARGUMENT)
        elif verb.argument is REQUIRED:
            return self._count(R501_ARGUMENT_NEEDED)
        if verb.after_helo and not self.from_part:
            return self._count(R503_HELO_FIRST)
        if self.terms.submission and not verb.open and not self.client.user:
            return self._count(R530_AUTH_NEEDED)
        if self.terms.odmr and not verb.odmr:
            return self._count(R502_NOT_IMPLEMENTED)
        # The first EHLO has its use.
        if verb.useless and (self.from_part or not verb.greets) and self._useless():
            return R421_TOO_MANY_USELESS
        try:
            answer = handler(self, line)
        except CommandError as error:
            answer = error.reply
        if type(answer) is Reply and answer.code >= 500:
            answer = self._count(answer)
            return softened(answer) if self.terms.soft else answer
        return answer

    def take_end(self, end: BodyEnd, head: bytes | bytearray, header_end: int = -1) -> Answer:
        """The answer to end-of-data, or to the end of a BDAT chunk. `head` is the message's beginning, with at least
        its header section; a chunk that is not the last needs none. `header_end` is where that ends in a message whose
        lines are not as the parser saw them."""
        transaction = self.transaction
        if transaction is None:
            return self._count(self._why_no_mail())
        if transaction.failure is not None:
            return self._finish(transaction.failure) if end.last else transaction.failure
        if not end.last:
            if end.too_big:
                transaction.failure = R552_TOO_BIG
                return R552_TOO_BIG
            return R250_CHUNK_OK
        whole = take_whole(self.terms, self.client, self.from_part, transaction, end, head, header_end)
        if type(whole) is not Store:
            assert type(whole) is Reply
            return self._finish(whole)
        self.asked = whole
        return whole

    def resume(self, result: Verdict | Stored | Refused) -> Answer:
        """Goes on where an Ask or a Store was returned, with what came of it."""
        asked = self.asked
        self.asked = None
        if isinstance(result, Verdict):
            assert type(asked) is Ask
            if asked.stage is AUTH:
                assert self.exchange is not None
                return self._authenticate(self.exchange.resume(result))
            reply = DECIDED[asked.stage](self, result)
            return softened(reply) if self.terms.soft and asked.stage is not CONNECT else reply
        return self._stored(result)

    def lost(self, error: FrameError) -> Reply:
        """The last reply of a connection whose octets cannot be interpreted any further."""
        return FRAME_REPLIES[error.kind]

    # Rules for all commands

    def _count(self, reply: Reply) -> Reply:
        """Counts a bad command (not a refusal); the one too many ends the session."""
        if 500 <= reply.code <= 504 or reply.code == 555:
            self.errors += 1
            if self.errors >= self.terms.errors:
                return R421_TOO_MANY_ERRORS
        return reply

    def _useless(self) -> bool:
        """Counts a command that does nothing. Each message makes room for one more: clients send RSET between
        messages."""
        if self.transaction is None or not self.transaction.envelope.recipients:
            self.useless += 1
        return self.useless > self.terms.useless + self.messages

    def _unknown(self, line: Line) -> Answer:
        if self.exchange is not None:
            # A line of an exchange has no verb.
            answer = self._authenticate(self.exchange.respond(line))
            return self._count(answer) if type(answer) is Reply else answer
        if line.verb in FOREIGN:
            return SILENT_CLOSE
        if self.refused:
            return self._count(R503_REFUSED)
        if line.verb in NOT_IMPLEMENTED:
            return self._count(R502_NOT_IMPLEMENTED)
        return self._count(R500_LINE_TOO_LONG if line.too_long else R500_SYNTAX)

    def _why_no_mail(self) -> Reply:
        """What BDAT is answered where there is no transaction."""
        if self.refused:
            return R503_REFUSED
        if not self.from_part:
            return R503_HELO_FIRST
        if self.terms.odmr:
            return R502_NOT_IMPLEMENTED
        return R530_AUTH_NEEDED if self.terms.submission and not self.client.user else R503_MAIL_FIRST

    def _ask(self, ask: Ask, pending: Hello | Envelope | Recipient | None) -> Ask:
        self.asked = ask
        self.pending = pending
        return ask

    def _finish(self, reply: Reply) -> Reply:
        """Ends the transaction with its last reply; LMTP has one for each recipient."""
        if self.terms.soft:
            reply = softened(reply)
        transaction = self.transaction
        self.transaction = None
        if transaction is not None:
            self.subject = transaction.envelope.reverse_path
        if self.terms.lmtp and transaction is not None and len(transaction.accepted) > 1:
            return joined([reply] * len(transaction.accepted))
        return reply

    # Commands

    def _ehlo(self, line: Line) -> Answer:
        return R500_USE_LHLO if self.terms.lmtp else self._greeted(line.rest, esmtp=True)

    def _helo(self, line: Line) -> Answer:
        return R500_USE_LHLO if self.terms.lmtp else self._greeted(line.rest, esmtp=False)

    def _lhlo(self, line: Line) -> Answer:
        return self._greeted(line.rest, esmtp=True) if self.terms.lmtp else R500_NOT_LMTP

    def _greeted(self, rest: bytes, esmtp: bool) -> Answer:
        name = rest.decode("utf-8", "replace").lstrip(" ")
        if self.terms.ask_helo:
            return self._ask(Ask(HELO, self.client, helo=name), Hello(name, esmtp))
        return self._welcome(name, esmtp)

    def _welcome(self, name: str, esmtp: bool) -> Reply:
        self.transaction = None
        self.client.helo = name
        self.esmtp = esmtp
        self.from_part = received_from(self.client)
        if esmtp:
            return self._offer()
        return self.terms.helo

    def _mail(self, line: Line) -> Answer:
        if self.transaction is not None:
            return R503_NESTED_MAIL
        self.subject = None
        reverse_path, values = parse_mail(line, self.terms.brackets)
        self.subject = reverse_path
        envelope = Envelope(reverse_path)
        size = 0
        if values:
            size = int(values.get("SIZE", 0))
            if size > self.terms.message_size:
                return R552_TOO_BIG
            envelope.size = size
            envelope.body = str(values.get("BODY", ""))
            envelope.utf8 = "SMTPUTF8" in values
            envelope.ret = str(values.get("RET", ""))
            envelope.envid = str(values.get("ENVID", ""))
            if envelope.body == "BINARYMIME" and not self._offers("BINARYMIME"):
                return R501_BAD_PARAMETER
            envelope.require_tls = "REQUIRETLS" in values
            if envelope.require_tls and not self._offers("REQUIRETLS"):
                return R555_UNKNOWN_PARAMETER
            if "AUTH" in values and not self._has_auth():
                return R555_UNKNOWN_PARAMETER
        if (full := self.terms.room(size)) is not None:
            return full
        if self.terms.ask_mail:
            return self._ask(Ask(MAIL, self.client, reverse_path), envelope)
        self.transaction = Transaction(envelope)
        return R250_SENDER_OK

    def _rcpt(self, line: Line) -> Answer:
        self.subject = None
        transaction = self.transaction
        if transaction is None:
            return R503_MAIL_FIRST
        if transaction.begun:
            return R503_RCPT_AFTER_BDAT
        transaction.tried = True
        address, is_ascii, values = parse_rcpt(line, self.terms.brackets)
        envelope = transaction.envelope
        self.subject = address
        if not is_ascii and not envelope.utf8:
            return R553_NEEDS_SMTPUTF8
        recipient = Recipient(address)
        if values:
            recipient.notify = str(values.get("NOTIFY", ""))
            if "SUCCESS" in recipient.notify and not self._offers("DSN"):
                recipient.notify = without_success(recipient.notify)
            recipient.orcpt = str(values.get("ORCPT", ""))
            if not recipient.orcpt.isascii() and not envelope.utf8:
                return R501_BAD_PARAMETER
        if len(transaction.accepted) >= self.terms.recipients:
            return R452_TOO_MANY_RECIPIENTS
        if self.terms.ask_rcpt:
            return self._ask(Ask(RCPT, self.client, envelope.reverse_path, address), recipient)
        transaction.add(recipient)
        return R250_RECIPIENT_OK

    def _data(self, line: Line) -> Answer:
        transaction = self.transaction
        if transaction is None:
            return R503_MAIL_FIRST
        if transaction.begun:
            return R503_BDAT_UNDER_WAY
        if not transaction.envelope.recipients:
            return self._no_recipients(transaction)
        if transaction.envelope.body == "BINARYMIME":
            return R503_BINARYMIME_NEEDS_BDAT
        self._begin(transaction.envelope)
        return R354_GO_AHEAD

    def _no_recipients(self, transaction: Transaction) -> Reply:
        # RFC 2033 4.2 wants 503 of an LMTP server either way.
        return R554_NO_VALID_RECIPIENTS if transaction.tried and not self.terms.lmtp else R503_RCPT_FIRST

    def _bdat(self, line: Line) -> Answer:
        bdat = parse_bdat(line.rest)
        if bdat.size > 2 * self.terms.message_size:
            return R552_TOO_BIG_CLOSING
        transaction = self.transaction
        if transaction is None:
            return Chunk(bdat.size, bdat.last, keep=False, first=True)
        transaction.announced += bdat.size
        if transaction.announced > 10 * self.terms.message_size:  # as in DATA
            return R552_TOO_BIG_CLOSING
        first = not transaction.begun
        if first:
            transaction.begun = True
            if transaction.envelope.recipients:
                self._begin(transaction.envelope)
            else:
                transaction.failure = self._no_recipients(transaction)
        return Chunk(bdat.size, bdat.last, keep=transaction.failure is None, first=first)

    def _begin(self, envelope: Envelope) -> None:
        """The message's octets are about to come: it gets its name."""
        envelope.id = self.terms.next_id()
        envelope.client = self.client.ip
        envelope.helo = self.client.helo
        base = "LMTP" if self.terms.lmtp else "ESMTP" if self.esmtp else "SMTP"
        envelope.protocol = protocol_word(base, envelope.utf8, bool(self.client.tls), bool(self.client.user))

    def _rset(self, line: Line) -> Answer:
        self.transaction = None
        return R250_OK

    def _noop(self, line: Line) -> Answer:
        return R250_OK

    def _quit(self, line: Line) -> Answer:
        return R221_BYE

    def _help(self, line: Line) -> Answer:
        return help_with([verb.name for verb in TABLE if self._does(verb)])

    def _does(self, verb: Verb) -> bool:
        """Whether a verb has any use for this client."""
        done = DONE.get(verb.name)
        return (verb.odmr or not self.terms.odmr) and (done is None or done(self))

    def _vrfy(self, line: Line) -> Answer:
        if not self.terms.ask_vrfy:
            return R252_CANNOT_VRFY
        return self._ask(Ask(Stage.VRFY, self.client, recipient=parse_name(line.rest)), None)

    def _expn(self, line: Line) -> Answer:
        if not self.terms.ask_expn:
            return R252_CANNOT_EXPN
        return self._ask(Ask(Stage.EXPN, self.client, recipient=parse_name(line.rest)), None)

    def _etrn(self, line: Line) -> Answer:
        if not (self.client.fetches or self.client.user):
            return R530_AUTH_NEEDED if self.terms.odmr else R502_NOT_IMPLEMENTED
        if self.transaction is not None:
            return R503_NESTED_MAIL
        return self._ask(Ask(ETRN, self.client, nodes=(parse_node(line.rest),)), None)

    def _atrn(self, line: Line) -> Answer:
        if not self.terms.odmr:
            return R502_NOT_IMPLEMENTED
        if not (self.client.fetches or self.client.user):
            return R530_AUTH_NEEDED
        return self._ask(Ask(ATRN, self.client, nodes=parse_domains(line.rest)), None)

    def _starttls(self, line: Line) -> Answer:
        if self.client.tls:
            return R503_IN_TLS
        return R220_READY_FOR_TLS if self._offers("STARTTLS") else R454_NO_TLS

    def _offers(self, keyword: str) -> bool:
        return f"{keyword}\r\n".encode() in self._offer().wire

    def _offer(self) -> Reply:
        return self.terms.ehlo_reply(self.client, self._mechanisms(), self.withheld)

    # AUTH

    def _has_auth(self) -> bool:
        return bool(self.terms.mechanisms) and "AUTH" not in self.withheld

    def _mechanisms(self) -> tuple[str, ...]:
        """Those that can succeed now."""
        return available(self.terms.mechanisms, self.client, self.terms.auth_clear) if self._has_auth() else ()

    def _auth(self, line: Line) -> Answer:
        if not self._has_auth():
            return R502_NOT_IMPLEMENTED
        if not self.from_part:
            return R503_HELO_FIRST
        if self.client.user:
            return R503_AUTHENTICATED
        if self.transaction is not None:
            return R503_NESTED_MAIL
        name, initial = parse_auth(line.rest)
        possible = self._mechanisms()
        if name not in possible:
            in_clear = not (self.client.tls or self.terms.auth_clear)
            return R538_TLS_NEEDED if in_clear and name in MECHANISMS else R504_UNKNOWN_MECHANISM
        self.exchange = Exchange(name, self.client, possible)
        return self._authenticate(self.exchange.begin(initial))

    def _authenticate(self, answer: Reply | Ask) -> Reply | Ask:
        """Goes on with an exchange. Its end is its last reply; a client that guesses hears 421 instead of it."""
        assert self.exchange is not None
        if type(answer) is Ask:
            self.asked = answer
            return answer
        assert type(answer) is Reply
        if answer.then is Then.LINE:
            return answer
        self.attempt = self.exchange.attempt
        self.exchange = None
        if self.attempt.reason and answer.code >= 500:
            self.guesses += 1
            if self.guesses >= GUESSES:
                return R421_TOO_MANY_GUESSES
        return answer

    # What was decided

    def _connected(self, verdict: Verdict) -> Reply:
        self.refused = verdict.reply is not None
        return verdict.reply or self.terms.greeting

    def _helo_decided(self, verdict: Verdict) -> Reply:
        assert type(self.pending) is Hello
        return verdict.reply or self._welcome(*self.pending)

    def _mail_decided(self, verdict: Verdict) -> Reply:
        if verdict.reply is not None:
            return verdict.reply
        assert type(self.pending) is Envelope
        self.transaction = Transaction(self.pending)
        return R250_SENDER_OK

    def _rcpt_decided(self, verdict: Verdict) -> Reply:
        assert self.transaction is not None
        assert type(self.pending) is Recipient
        if verdict.reply is not None:
            return verdict.reply
        if verdict.members:
            return self.transaction.add_members(self.pending, verdict.members) or R250_RECIPIENT_OK
        if verdict.recipient is not None:
            self.pending.address = verdict.recipient
        if verdict.hop is not None or not verdict.ours:
            if verdict.hop is not None and 0 < verdict.hop.size < self.transaction.envelope.size:
                return R552_HOP_TOO_BIG
            self.transaction.note(self.pending, verdict.hop)
        self.transaction.add(self.pending)
        return R250_RECIPIENT_OK

    def _fetched(self, verdict: Verdict) -> Reply:
        return verdict.reply or R502_NOT_IMPLEMENTED

    def _verified(self, verdict: Verdict) -> Reply:
        return verdict.reply or R252_CANNOT_VRFY

    def _stored(self, result: Stored | Refused) -> Reply:
        transaction = self.transaction
        assert transaction is not None
        if isinstance(result, Refused):
            return SILENT_CLOSE if result.reply is None else self._finish(result.reply)
        self.messages += 1
        self.transaction = None
        reply = queued(transaction.envelope.id)
        if not self.terms.lmtp:
            return reply
        loop = softened(R554_LOOP) if self.terms.soft else R554_LOOP
        return joined([loop if recipient.fault else reply for recipient in transaction.accepted])


HANDLERS: Mapping[bytes, Callable[[Session, Line], Answer]] = {
    b"EHLO": Session._ehlo,
    b"HELO": Session._helo,
    b"LHLO": Session._lhlo,
    b"MAIL": Session._mail,
    b"RCPT": Session._rcpt,
    b"DATA": Session._data,
    b"BDAT": Session._bdat,
    b"RSET": Session._rset,
    b"NOOP": Session._noop,
    b"QUIT": Session._quit,
    b"HELP": Session._help,
    b"VRFY": Session._vrfy,
    b"EXPN": Session._expn,
    b"STARTTLS": Session._starttls,
    b"AUTH": Session._auth,
    b"ETRN": Session._etrn,
    b"ATRN": Session._atrn,
}
ROWS: Final = {verb: (VERBS[verb], handler) for verb, handler in HANDLERS.items()}
# Verbs of the table that are not always done, for HELP: when they are.
DONE: Mapping[str, Callable[[Session], bool]] = {
    "EHLO": lambda session: not session.terms.lmtp,
    "HELO": lambda session: not session.terms.lmtp,
    "LHLO": lambda session: session.terms.lmtp,
    "BDAT": lambda session: not session.terms.odmr,  # known there only so that its octets are no commands
    "EXPN": lambda session: session.terms.ask_expn,
    "STARTTLS": lambda session: not session.client.tls and session._offers("STARTTLS"),
    "AUTH": lambda session: bool(session._mechanisms()) and not session.client.user,
    "ETRN": lambda session: session.client.fetches or bool(session.client.user),
    "ATRN": lambda session: session.terms.odmr and (session.client.fetches or bool(session.client.user)),
}
DECIDED: Mapping[Stage, Callable[[Session, Verdict], Reply]] = {
    Stage.CONNECT: Session._connected,
    Stage.HELO: Session._helo_decided,
    Stage.MAIL: Session._mail_decided,
    Stage.RCPT: Session._rcpt_decided,
    Stage.ETRN: Session._fetched,
    Stage.ATRN: Session._fetched,
    Stage.VRFY: Session._verified,
    Stage.EXPN: Session._verified,
}
TOO_LONG: Mapping[str, Reply] = {"AUTH": R500_AUTH_LINE_TOO_LONG, "BDAT": R501_BAD_BDAT}
FRAME_REPLIES: Mapping[str, Reply] = {
    "tls": SILENT_CLOSE,
    "bare_lf": R500_BARE_LF,
    "line_too_long": R500_LINE_TOO_LONG_CLOSING,
    "too_much": R552_TOO_BIG_CLOSING,
}
