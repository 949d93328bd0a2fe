"""The client side of SMTP and LMTP, sans I/O: the octets of a host in, octets for it and outcomes out.

A Dialogue is the life of one connection: its opening, then deliveries, each in one transaction or more. It never waits
and knows no socket. Each call returns a Step: what the transport is to do once it has written `take_output()`. Every
recipient of a delivery gets one Outcome.
Nothing that had come before a command was sent is taken for its reply: not behind STARTTLS's 220, not behind 354, not
before the end of a message has left; a host that says more than it was asked ends its session, and what it said in the
same breath counts only where every order of its replies means the same.
Not here: how a session begins (opening.py), what a failure means (failures.py), what a host can take (offers.py), one
mail (transaction.py), clocks and retries (the transport). RFC 5321 4.5.3.2; RFC 2033; RFC 3207; RFC 8689; RFC 9422.
"""

from __future__ import annotations

from enum import Enum

from . import Delivery, Outcome, Result
from .body import BodyError, OutgoingBody
from .failures import Answer, Finding, Stage, classify, failure, finding
from .offers import Terms, check_message, check_recipient
from .opening import Ending, Opening
from .replies import Reply, ReplyParser
from .transaction import Transaction, Wire


class Step(Enum):
    """What the transport is to do next, after it has written the output."""

    WAIT = "feed what comes, for `patience` seconds"
    TLS = "make the handshake, then call tls_started or tls_failed"
    BODY = "read `body` and call send_piece, as long as it is the same `body`"
    READY = "the outcomes are complete, a delivery may be sent"
    CLOSE = "close; the outcomes are complete"


# Names of this module: looking up an Enum's member costs 0.05 µs each time on Python 3.11.
WAIT, TLS, BODY, READY, CLOSE = Step.WAIT, Step.TLS, Step.BODY, Step.READY, Step.CLOSE
GARBAGE, CLOSING = Answer.GARBAGE, Answer.CLOSING
END, LMTP_END = Stage.END, Stage.LMTP_END
DELIVERED = Result.DELIVERED

EXCESS = "it says more than it was asked"


class _Work:
    """A delivery. `pending` are the places of the recipients that no transaction has had; `current` of those that
    are in one."""

    __slots__ = ("current", "delivery", "outcomes", "pending", "require_tls")

    def __init__(self, delivery: Delivery, require_tls: bool) -> None:
        self.delivery = delivery
        self.require_tls = require_tls
        self.outcomes: list[Outcome | None] = [None] * len(delivery.recipients)
        self.pending: list[int] = []
        self.current: list[int] = []


class Dialogue:
    """`host` is the name that outcomes tell. `secure`: TLS is in use from the start; `trusted`: the channel is
    verified, or needs no proof, so it may see credentials."""

    def __init__(self, terms: Terms, host: str, *, secure: bool = False, trusted: bool = False) -> None:
        self.terms = terms
        self.host = host
        self.outcomes: list[Outcome] = []  # of the last delivery, in the order of its recipients
        self.failure: Outcome | None = None  # why the session ended, where it was a failure
        self.progress = 0  # grows with each reply and piece: patience begins anew
        self.closed = False
        self._replies = ReplyParser()
        self._wire = Wire()
        self.opening = Opening(self._wire, terms, host, secure, trusted)
        self._step = WAIT
        self._answered: Stage | None = None  # by the last reply of the read that is being looked at
        # By that read: a delivery, places in it, and whether its recipients were answered with the message
        self._decided: tuple[_Work, list[int], bool] | None = None
        self._early = False  # that read came before the end of the message had left
        self._work: _Work | None = None
        self._transaction: Transaction | None = None
        self._transactions = 0
        self._domains: set[str] = set()
        self._dirty = False  # the host may hold a transaction that is to be forgotten

    # What the transport calls

    @property
    def stage(self) -> Stage:
        """What is being waited for; between deliveries nothing is."""
        if self._wire.awaited:
            return self._wire.awaited[0]
        return Stage.TLS if self.opening.handshaking else Stage.BODY

    @property
    def patience(self) -> float:
        """Seconds without `progress` after which to call timed_out."""
        return self.terms.patience[self.stage]

    @property
    def reusable(self) -> bool:
        """Whether another delivery may be sent over this session."""
        most = self.opening.offers.transactions
        return self.opening.done and not self.closed and not (most and self._transactions >= most)

    @property
    def opened(self) -> bool:
        """Whether it got as far as deliveries."""
        return self.opening.done

    @property
    def idle(self) -> bool:
        """Whether it is between two deliveries."""
        return self.opening.done and self._work is None

    @property
    def body(self) -> OutgoingBody | None:
        """What is being sent in pieces."""
        return self._transaction.body if self._transaction is not None else None

    def take_output(self) -> list[bytes]:
        """What is to be written now."""
        output = self._wire.output
        self._wire.output = []
        return output

    def send(self, delivery: Delivery, *, require_tls: bool = False) -> Step:
        """Begins with a delivery; before the host has been greeted it waits for that. One at a time."""
        assert self._work is None
        assert not self.closed
        self._step = WAIT
        self.outcomes = []
        self._work = _Work(delivery, require_tls)
        if self.opening.done:
            self._start(self._work)
        return self._step

    def feed(self, data: bytes, early: bool = False) -> Step:
        """Takes what the host has sent. `early`: octets of a message have not left yet, which were written."""
        if self.closed:
            return CLOSE
        self._step = WAIT
        self._answered = None
        self._decided = None
        self._early = early
        wire = self._wire
        awaited = wire.awaited
        transaction = self._transaction
        if transaction is not None and transaction.whole and not (transaction.heard or self._replies.unread):
            count = len(awaited)
            if transaction.take_all(data):
                self.progress += count
                if transaction.finished:
                    self._finish(transaction)
                return self._step
        replies = self._replies.feed(data)
        wire.allowed = len(awaited) - (awaited.count(END) + awaited.count(LMTP_END) if early else 0)
        for reply in replies:
            if not wire.allowed:
                self._unasked(reply)
                return self._step
            self._receive(reply)
            if self.closed:
                return self._step
        error = self._replies.error
        if replies and not wire.allowed and (error or self._replies.unread):
            # Half a reply that nobody asked for: whole, it would pass for the answer to what is sent now.
            self._unasked()
        elif error:
            self._end_here(GARBAGE, why=error)
        return self._step

    def tls_started(self, trusted: bool) -> Step:
        """The handshake is done. `trusted`: the certificate was verified. All that was said before is void."""
        self._step = WAIT
        self._replies = ReplyParser()
        self.opening.tls_started(trusted)
        return self._step

    def tls_failed(self, why: str, answer: Answer = GARBAGE) -> Step:
        """There was no handshake, or a certificate that will not do; or the host hung up, or took too long."""
        self._wire.awaited.clear()  # where TLS comes first the greeting is
        self.opening.handshaking = True
        return self._broken(answer, why)

    def send_piece(self, piece: bytes) -> Step:
        """The next octets of `body`, as it was read."""
        assert self._transaction is not None
        self.progress += 1
        self._transaction.send_piece(piece)
        self._step = BODY if self._transaction.body is not None else WAIT
        return self._step

    def body_failed(self, why: str) -> Step:
        """The message cannot be read any further. Without its end the host has nothing."""
        self._close(finding(Finding.BODY_MISSING, self.host, why))
        return self._step

    def lost(self, why: str = "") -> Step:
        """The host has closed, or the network failed."""
        return self._broken(Answer.HANG_UP, why)

    def timed_out(self) -> Step:
        """`patience` is over."""
        return self._broken(Answer.TIME_OUT)

    def quit(self) -> Step:
        """Ends the session where no delivery is under way. The answer changes nothing, so nobody waits for it."""
        assert self._work is None
        if not self.closed:
            polite = not self._wire.awaited
            self._shut()
            if polite:
                self._wire.output.append(b"QUIT\r\n")
        return CLOSE

    # A delivery

    def _open(self, ending: Ending | None) -> None:
        """Goes on where the opening did."""
        if ending is not None:
            self._close(*ending)
        elif self.opening.handshaking:
            self._step = TLS
        elif self.opening.done and self._work is not None:
            self._start(self._work)
        elif self.opening.done:
            self._step = READY

    def _start(self, work: _Work) -> None:
        delivery, opening = work.delivery, self.opening
        offers = opening.offers
        why = check_message(delivery.message, offers, self.terms)
        if work.require_tls and not (opening.secure and opening.trusted and offers.require_tls):
            if delivery.message.envelope.reverse_path:
                why = Finding.REQUIRETLS
            else:  # RFC 8689 5: a report rather leaves without than not at all
                work.require_tls = False
        for place, recipient in enumerate(delivery.recipients):
            found = why or check_recipient(recipient, offers)
            if found is None:
                work.pending.append(place)
            else:
                work.outcomes[place] = finding(found, self.host)
        self._continue(work)

    def _continue(self, work: _Work) -> None:
        """The next transaction, or the end of the delivery."""
        self._transaction = None
        work.current = self._take_places(work) if work.pending else []
        if not work.current:
            self._complete(work)
            return
        delivery = work.delivery
        transaction = Transaction(self._wire, self.opening.offers, self.terms, self.host, delivery.message)
        self._transaction = transaction
        self._transactions += 1
        recipients = [delivery.recipients[place] for place in work.current]
        try:
            transaction.begin(recipients, reset=self._dirty, require_tls=work.require_tls, probe=delivery.probe)
        except BodyError as error:
            self.body_failed(error.text)

    def _take_places(self, work: _Work) -> list[int]:
        """The recipients of the next transaction, within what the host allows (RFC 9422 4)."""
        offers = self.opening.offers
        most = min(self.terms.recipients, offers.recipients or self.terms.recipients)
        if len(work.pending) <= most and not (offers.domains or offers.transactions):
            taken, work.pending = work.pending, []
            return taken
        taken = []
        left: list[int] = []
        if offers.transactions and self._transactions >= offers.transactions:
            most = 0
        for place in work.pending:
            domain = work.delivery.recipients[place].address.domain
            known = not offers.domains or domain in self._domains
            if len(taken) < most and (known or len(self._domains) < offers.domains):
                taken.append(place)
                if offers.domains:
                    self._domains.add(domain)
            else:
                left.append(place)
        work.pending = left
        if not taken:
            for place in left:
                work.outcomes[place] = finding(Finding.SESSION_FULL, self.host)
        return taken

    def _finish(self, transaction: Transaction) -> None:
        """A transaction is over."""
        work = self._work
        assert work is not None
        self._dirty = not transaction.clean
        self._gather(work, transaction)
        if transaction.again:
            work.pending[:0] = [work.current[place] for place in transaction.again]
        self._continue(work)

    def _gather(self, work: _Work, transaction: Transaction) -> None:
        """What the transaction has decided goes into the delivery."""
        for place, outcome in zip(work.current, transaction.outcomes, strict=True):
            if outcome is not None:
                work.outcomes[place] = outcome
        self._decided = (work, work.current, transaction.whole)

    def _complete(self, work: _Work) -> None:
        self.outcomes = [outcome for outcome in work.outcomes if outcome is not None]
        assert len(self.outcomes) == len(work.outcomes)
        self._work = None
        self._transaction = None
        self._step = READY

    # Replies

    def _receive(self, reply: Reply) -> None:
        wire, transaction = self._wire, self._transaction
        self.progress += 1
        if reply.code == 421:
            self._end_here(CLOSING, reply)
            return
        wire.allowed -= 1
        stage = self._answered = wire.awaited.popleft()
        if transaction is None:
            self._open(self.opening.receive(stage, reply))
            return
        body = transaction.body
        try:
            fault = transaction.receive(stage, reply)
        except BodyError as error:
            self.body_failed(error.text)
            return
        if fault is not None:
            self._end(*fault)
        elif transaction.finished:
            self._finish(transaction)
        elif transaction.body is not body:
            self._step = BODY if transaction.body is not None else WAIT

    def _unasked(self, reply: Reply | None = None) -> None:
        """A reply to nothing, or None: half of one. While a message is being sent it may be the host's last word on it.
        What was to be said in answer to the reply before it has not been, so it is that one's stage that failed."""
        answer = classify(reply) if reply is not None else GARBAGE
        if (self.body is not None or self._early) and answer is not GARBAGE:
            self._end(Stage.BODY, answer, reply)
            return
        if (code := self._replies.begun if reply is None else str(reply.code)) not in ("", "421"):
            self._doubt(code)
        why = ""
        if answer is not CLOSING:
            answer, reply, why = GARBAGE, None, EXCESS
        if self._answered is None or self.idle:
            self._end_here(answer, reply, why)
        else:
            self._end(self._answered, answer, reply, why)

    def _doubt(self, code: str) -> None:
        """There was a reply too many, and it may have been any of them: a "no" that came last was perhaps the answer to
        the message, and one before it another recipient's. Only where all of them said yes did this one too."""
        if self._transaction is not None and self.opening.offers.pipelining:
            self._transaction.outcomes = [None] * len(self._transaction.outcomes)
        if self._decided is None:
            return
        work, places, whole = self._decided
        found = [work.outcomes[place] for place in places]
        only_end = not whole and self._answered in (END, LMTP_END)  # the recipients were answered before 354
        one_reply = only_end and self._answered is END  # of LMTP's, one for each recipient, any may be another's
        if code < "3" and (one_reply or all(each and each.result is DELIVERED for each in found)):
            return
        doubtful = failure(Stage.END, GARBAGE, self.host, None, EXCESS)
        for place, outcome in zip(places, found, strict=True):
            if not only_end or (outcome and outcome.result is DELIVERED):
                work.outcomes[place] = doubtful
        if self._work is None:
            self._complete(work)

    # How a session ends

    def _broken(self, answer: Answer, why: str = "") -> Step:
        if not self.closed:
            self._end_here(answer, why=why)
        return CLOSE

    def _end_here(self, answer: Answer, reply: Reply | None = None, why: str = "") -> None:
        if self.idle:
            self._shut()  # nothing has failed
            return
        stage = self.stage
        if self._transaction is not None:
            stage = self._transaction.fault_stage(answer, first=self._transactions == 1)
        self._end(stage, answer, reply, why)

    def _end(self, stage: Stage, answer: Answer, reply: Reply | None = None, why: str = "") -> None:
        """Ends the session with a failure; a host that refused in words is taken leave of in words."""
        polite = answer in (Answer.TEMPORARY, Answer.PERMANENT) and self.body is None
        self._close(failure(stage, answer, self.host, reply, why), polite)

    def _close(self, outcome: Outcome, polite: bool = False) -> None:
        """The same outcome for everyone who has none."""
        self.failure = outcome
        work = self._work
        if work is not None:
            if self._transaction is not None:
                self._gather(work, self._transaction)
            work.outcomes = [each or outcome for each in work.outcomes]
            self._complete(work)
        self._shut()
        if polite:
            self._wire.output.append(b"QUIT\r\n")

    def _shut(self) -> None:
        """Nothing that is not written yet will be."""
        self.closed = True
        self._transaction = None
        self._wire.awaited.clear()
        self._wire.output = []
        self._step = CLOSE
