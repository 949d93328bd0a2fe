"""Session, the life of a connection, and Transaction, the life of one mail: both decide and never wait.

In: lines, ends of data, verdicts and the spool's answers. Out: an Answer, one for each of them: a Reply, an `Ask`
(a policy decides, `resume` takes its verdict), a `Chunk` (BDAT octets follow, then `take_end`) or a `Store` (the
spool keeps the message, `resume` takes its answer). What a reply brings about is said by the reply itself.
A transaction that ends, however it ends, is forgotten as a whole: `self.transaction = None`. HELO, TLS and every
counter outlive it. Rules that hold for many verbs are columns of the verb table and are applied in `receive`.
Not here: octets and their limits (parser), time-outs and early talkers (connection), who may send to whom (policy).
RFC 5321 3.1, 3.3, 4.1.4, 4.5.3; RFC 2033; RFC 2920; RFC 3030; RFC 3207; RFC 6531;
RFC 1985; RFC 2645.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

from ._parser import BodyEnd, FrameError, Line
from .address import NULL
from .commands import (
    FOREIGN,
    NONE,
    NOT_IMPLEMENTED,
    REQUIRED,
    VERBS,
    parse_bdat,
    parse_domains,
    parse_mail,
    parse_node,
    parse_rcpt,
)
from .extensions import CommandError, Offer, offered, without_success
from .message import (
    Envelope,
    Recipient,
    date,
    protocol_word,
    received,
    received_from,
    trace,
)
from .reply import (
    R214_HELP,
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
    R421_TOO_MANY_USELESS,
    R452_TOO_MANY_RECIPIENTS,
    R454_NO_TLS,
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
    R503_BDAT_UNDER_WAY,
    R503_BINARYMIME_NEEDS_BDAT,
    R503_HELO_FIRST,
    R503_IN_TLS,
    R503_MAIL_FIRST,
    R503_NESTED_MAIL,
    R503_RCPT_AFTER_BDAT,
    R503_RCPT_FIRST,
    R503_REFUSED,
    R530_AUTH_NEEDED,
    R550_BARE_LINE_END,
    R550_HOP_NEEDS_ASCII,
    R550_LINE_TOO_LONG,
    R552_HEADER_TOO_BIG,
    R552_HOP_TOO_BIG,
    R552_TOO_BIG,
    R552_TOO_BIG_CLOSING,
    R553_NEEDS_SMTPUTF8,
    R554_HOP_NEEDS_7BIT,
    R554_LOOP,
    R554_NO_VALID_RECIPIENTS,
    R555_UNKNOWN_PARAMETER,
    SILENT_CLOSE,
    Reply,
    joined,
    named,
    queued,
    softened,
)
from .verdict import Ask, Client, NextHop, Refused, Stage, Store, Stored, Verdict


class Terms:
    """What one listener demands and offers: the same for all its sessions.

    `room(size)` is the refusal of a message that cannot be kept now; `next_id()` names a new message; `now()` is the
    time in seconds since the epoch. `asks` are the stages at which a policy wants to be asked. `reports`: whom DSN is
    offered to. `keeps_tls`: the same for REQUIRETLS; for "all" each message stays on this machine or goes to a host
    that is verified by name, for "strangers" those do that a stranger may send. `soft`: what would be refused for good
    is put off.
    """

    __slots__ = (
        "any_octets", "ask_connect", "ask_helo", "ask_mail", "ask_rcpt", "bare_bdat", "bare_data", "brackets",
        "ehlo", "errors", "greeting", "helo", "hops", "hostname", "keeps_tls", "lmtp", "message_size", "next_id", "now",
        "odmr", "recipients", "reports", "room", "soft", "submission", "tls", "useless",
    )  # fmt: skip

    def __init__(
        self,
        hostname: str,
        role: str,
        *,
        next_id: Callable[[], str],
        room: Callable[[int], Reply | None],
        now: Callable[[], float],
        asks: frozenset[Stage] = frozenset(),
        any_octets: bool = False,
        reports: Literal["nobody", "trusted", "all"] = "nobody",
        keeps_tls: Literal["nobody", "strangers", "all"] = "nobody",
        soft: bool = False,
        tls: bool = False,
        brackets: bool = True,
        bare_data: bool = False,
        bare_bdat: bool = True,
        message_size: int = 50 << 20,
        recipients: int = 1000,
        hops: int = 100,
        errors: int = 20,
        useless: int = 100,
    ) -> None:
        self.hostname = hostname
        self.lmtp = role == "lmtp"
        self.submission = role == "submission"
        self.odmr = role == "odmr"
        self.next_id = next_id
        self.room = room
        self.now = now
        self.ask_connect = Stage.CONNECT in asks
        self.ask_helo = Stage.HELO in asks
        self.ask_mail = Stage.MAIL in asks
        self.ask_rcpt = Stage.RCPT in asks
        self.any_octets = any_octets
        self.reports = reports
        self.keeps_tls = keeps_tls
        self.soft = soft
        self.tls = tls  # STARTTLS can be done
        self.brackets = brackets
        self.bare_data = bare_data  # a bare CR or LF in DATA is accepted
        self.bare_bdat = bare_bdat
        self.message_size = message_size
        self.recipients = recipients
        self.hops = hops
        self.errors = errors
        self.useless = useless
        self.helo = Reply(250, "", hostname)
        self.greeting = named(Reply(220, "", "LMTP fastsmtp" if self.lmtp else "ESMTP fastsmtp"), hostname)
        self.ehlo: dict[tuple[bool, bool, bool, frozenset[str]], Reply] = {}

    def ehlo_reply(self, in_tls: bool, trusted: bool, fetches: bool, withheld: frozenset[str]) -> Reply:
        """The answer to EHLO or LHLO, made once for each state. `trusted`: the client may send to any domain;
        `fetches`: mail waits here for its own."""
        reply = self.ehlo.get((in_tls, trusted, fetches, withheld))
        if reply is None:
            offer = Offer(
                self.message_size,
                self.recipients,
                starttls=self.tls and not in_tls,
                # What a host elsewhere takes is not known before it is asked.
                any_octets=self.any_octets and not trusted,
                withheld=withheld,
                reports=self.reports == "all" or (self.reports == "trusted" and trusted),
                keeps_tls=in_tls and (self.keeps_tls == "all" or (self.keeps_tls == "strangers" and not trusted)),
                fetches=fetches,
                odmr=self.odmr,
            )
            reply = Reply(250, "", "\n".join([self.hostname, *offered(offer).values()]))
            self.ehlo[in_tls, trusted, fetches, withheld] = reply
        return reply


class Transaction:
    """One mail on its way in. `failure` is what every further BDAT of it is answered; `accepted` has the recipient of
    each RCPT that was answered 250, in order, `seen` the same by mailbox; `announced` is the octets of its chunks.
    `foreign` are the recipients whose mailboxes are not ours, `hops` what the next hosts of the others take; None for
    none, as most messages have it."""

    __slots__ = ("accepted", "announced", "begun", "envelope", "failure", "foreign", "hops", "seen", "tried")

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self.accepted: list[Recipient] = []
        self.seen: dict[str, Recipient] = {}
        self.tried = False  # a RCPT was heard
        self.begun = False  # by BDAT: no more recipients, no DATA
        self.announced = 0
        self.failure: Reply | None = None
        self.foreign: list[Recipient] | None = None
        self.hops: list[NextHop] | None = None


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


# Names of this module: on Python 3.11 looking up an Enum's member costs 0.05 µs each time.
CONNECT, HELO, MAIL, RCPT = Stage.CONNECT, Stage.HELO, Stage.MAIL, Stage.RCPT
ETRN, ATRN = Stage.ETRN, Stage.ATRN

Answer: TypeAlias = Reply | Ask | Chunk | Store


class Session:
    """A connection's state. `client.tls` says whether TLS is in use: after a handshake comes a new Session."""

    __slots__ = (
        "asked", "client", "errors", "esmtp", "from_part", "messages", "pending", "refused", "subject", "terms",
        "transaction", "useless", "withheld",
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
        self.subject = NULL  # the address last heard, for the log
        self.asked: Ask | Store | None = None  # what was returned and has not been resumed
        self.pending: Hello | Envelope | Recipient | None = None  # what an Ask is about
        self.errors: int = before.errors if before else 0
        self.useless: int = before.useless if before else 0
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
            return self._count(R501_BAD_BDAT if verb.name == "BDAT" else R500_LINE_TOO_LONG)
        if self.refused and verb.name not in ("QUIT", "BDAT"):
            return self._count(R503_REFUSED)
        if rest:
            if verb.argument is NONE:
                return self._count(R501_NO_ARGUMENT)
        elif verb.argument is REQUIRED:
            return self._count(R501_ARGUMENT_NEEDED)
        if verb.after_helo and not self.from_part:
            return self._count(R503_HELO_FIRST)
        if self.terms.submission and not verb.open:
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

    def take_end(self, end: BodyEnd, head: bytes | bytearray) -> Answer:
        """The answer to end-of-data, or to the end of a BDAT chunk. `head` is the message's beginning, with at least
        its header section; a chunk that is not the last needs none."""
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
        envelope = transaction.envelope
        if end.too_big:
            return self._finish(R552_TOO_BIG)
        if end.bare and not (self.terms.bare_bdat if transaction.begun else self.terms.bare_data):
            return self._finish(R550_BARE_LINE_END)
        if end.long_line and envelope.body != "BINARYMIME":
            return self._finish(R550_LINE_TOO_LONG)
        if end.long_header:
            return self._finish(R552_HEADER_TOO_BIG)
        if (end.delivered or end.received > self.terms.hops) and self._loops(
            transaction, bytes(head[: end.header_end])
        ):
            return self._finish(R554_LOOP)
        arrived = self.terms.now()
        prefix = received(self.from_part, self.terms.hostname, envelope, date(int(arrived)))
        if transaction.hops is not None:
            for hop in transaction.hops:
                refusal = _unfit(end, envelope, prefix, hop)
                if refusal is not None:
                    return self._finish(refusal)
        self.asked = Store(envelope, prefix, arrived)
        return self.asked

    def _loops(self, transaction: Transaction, header: bytes) -> bool:
        """Whether a message comes back to us, by its trace fields. A recipient that has had it is marked; one of
        another domain may have had it there, and be sent it again."""
        hops, been_at = trace(header, self.terms.hops)
        if hops > self.terms.hops:
            return True
        envelope = transaction.envelope
        foreign = transaction.foreign or []
        for recipient in envelope.recipients:
            if recipient.address.mailbox in been_at and recipient not in foreign:
                recipient.fault = R554_LOOP.text
        sound = [recipient for recipient in envelope.recipients if not recipient.fault]
        if sound and self.terms.lmtp:
            # Each recipient is answered for itself; over SMTP the fault goes with the message.
            envelope.recipients = sound
        return not sound

    def resume(self, result: Verdict | Stored | Refused) -> Answer:
        """Goes on where an Ask or a Store was returned, with what came of it."""
        asked = self.asked
        self.asked = None
        if isinstance(result, Verdict):
            assert type(asked) is Ask
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

    def _unknown(self, line: Line) -> Reply:
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
        return R530_AUTH_NEEDED if self.terms.submission else R503_MAIL_FIRST

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
        if (full := self.terms.room(size)) is not None:
            return full
        if self.terms.ask_mail:
            return self._ask(Ask(MAIL, self.client, reverse_path), envelope)
        self.transaction = Transaction(envelope)
        return R250_SENDER_OK

    def _rcpt(self, line: Line) -> Answer:
        transaction = self.transaction
        if transaction is None:
            return R503_MAIL_FIRST
        if transaction.begun:
            return R503_RCPT_AFTER_BDAT
        transaction.tried = True
        self.subject = NULL
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
        return self._add(transaction, recipient)

    def _add(self, transaction: Transaction, recipient: Recipient) -> Reply:
        """The same mailbox twice is answered twice (in LMTP at the end too: RFC 2033 4.2) and delivered once."""
        recipients = transaction.envelope.recipients
        known = recipient
        if recipients:
            seen = transaction.seen
            if not seen:  # the second recipient: most messages have one, and need no keys
                seen[recipients[0].address.mailbox] = recipients[0]
            known = seen.setdefault(recipient.address.mailbox, recipient)
        if known is recipient:
            recipients.append(recipient)
        transaction.accepted.append(known)
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
        envelope.protocol = protocol_word(base, envelope.utf8, bool(self.client.tls), authenticated=False)

    def _rset(self, line: Line) -> Answer:
        self.transaction = None
        return R250_OK

    def _noop(self, line: Line) -> Answer:
        return R250_OK

    def _quit(self, line: Line) -> Answer:
        return R221_BYE

    def _help(self, line: Line) -> Answer:
        return R214_HELP

    def _vrfy(self, line: Line) -> Answer:
        return R252_CANNOT_VRFY

    def _expn(self, line: Line) -> Answer:
        return R252_CANNOT_EXPN

    def _etrn(self, line: Line) -> Answer:
        if not self.client.fetches:
            return R530_AUTH_NEEDED if self.terms.odmr else R502_NOT_IMPLEMENTED
        if self.transaction is not None:
            return R503_NESTED_MAIL
        return self._ask(Ask(ETRN, self.client, nodes=(parse_node(line.rest),)), None)

    def _atrn(self, line: Line) -> Answer:
        if not self.terms.odmr:
            return R502_NOT_IMPLEMENTED
        if not self.client.fetches:
            return R530_AUTH_NEEDED
        return self._ask(Ask(ATRN, self.client, nodes=parse_domains(line.rest)), None)

    def _starttls(self, line: Line) -> Answer:
        if self.client.tls:
            return R503_IN_TLS
        return R220_READY_FOR_TLS if self._offers("STARTTLS") else R454_NO_TLS

    def _offers(self, keyword: str) -> bool:
        return f"{keyword}\r\n".encode() in self._offer().wire

    def _offer(self) -> Reply:
        client = self.client
        return self.terms.ehlo_reply(bool(client.tls), client.trusted, client.fetches, self.withheld)

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
        if verdict.recipient is not None:
            self.pending.address = verdict.recipient
        if verdict.hop is not None:
            if 0 < verdict.hop.size < self.transaction.envelope.size:
                return R552_HOP_TOO_BIG
            hops = self.transaction.hops = self.transaction.hops or []
            if verdict.hop not in hops:
                hops.append(verdict.hop)
        elif not verdict.ours:
            foreign = self.transaction.foreign = self.transaction.foreign or []
            foreign.append(self.pending)
        return self._add(self.transaction, self.pending)

    def _fetched(self, verdict: Verdict) -> Reply:
        return verdict.reply or R502_NOT_IMPLEMENTED

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


def _unfit(end: BodyEnd, envelope: Envelope, prefix: bytes, hop: NextHop) -> Reply | None:
    """Why the next host would not take a message as it is."""
    if 0 < hop.size < end.size + len(prefix):
        return R552_HOP_TOO_BIG
    if not hop.utf8 and envelope.utf8 and (end.eight_bit_header or not prefix.isascii()):
        return R550_HOP_NEEDS_ASCII
    if not hop.eight_bit and (end.eight_bit or end.eight_bit_header):
        return R554_HOP_NEEDS_7BIT
    return None


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
    b"ETRN": Session._etrn,
    b"ATRN": Session._atrn,
}
ROWS = {verb: (VERBS[verb], handler) for verb, handler in HANDLERS.items()}
DECIDED: Mapping[Stage, Callable[[Session, Verdict], Reply]] = {
    Stage.CONNECT: Session._connected,
    Stage.HELO: Session._helo_decided,
    Stage.MAIL: Session._mail_decided,
    Stage.RCPT: Session._rcpt_decided,
    Stage.ETRN: Session._fetched,
    Stage.ATRN: Session._fetched,
}
FRAME_REPLIES: Mapping[str, Reply] = {
    "tls": SILENT_CLOSE,
    "bare_lf": R500_BARE_LF,
    "line_too_long": R500_LINE_TOO_LONG_CLOSING,
    "too_much": R552_TOO_BIG_CLOSING,
}
