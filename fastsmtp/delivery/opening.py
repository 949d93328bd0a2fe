"""How a session with a host begins, sans I/O: greeting, EHLO or HELO or LHLO, TLS, login; then come deliveries.

In: the host's replies. Out: commands on the wire, and what is known then: what the host offers, and whether the channel
is secret and trusted. When `handshaking` is set the transport is to make the handshake, when `done` mail can be sent.
What was said before TLS is void behind it. A host that knows no EHLO is greeted by HELO, and one that refuses STARTTLS
is spoken to in clear, where the terms allow it. Credentials are given to a trusted channel.
On failure: an Ending, which is the outcome of every delivery. Not here: whose reply it is, deliveries (dialogue.py),
mechanisms (login.py). RFC 5321 3.1, 4.1.1.1; RFC 2033; RFC 3207; RFC 4954.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from . import Outcome
from .failures import Answer, Finding, Stage, classify, failure, finding
from .login import LoginError, Mechanism, choose, decode
from .offers import NOTHING, Offers, Terms, parse_offers
from .replies import Reply
from .transaction import Wire


class Ending(NamedTuple):
    """`polite`: a host that answered is taken leave of in words."""

    outcome: Outcome
    polite: bool


class Opening:
    """`secure`: TLS is in use; `trusted`: the channel is verified, or needs no proof, so it may see credentials."""

    def __init__(self, wire: Wire, terms: Terms, host: str, secure: bool, trusted: bool) -> None:
        self.secure = secure
        self.trusted = trusted
        self.offers: Offers = NOTHING
        self.handshaking = False
        self.done = False  # greeted, and logged in where that is wanted
        self._wire = wire
        self._terms = terms
        self._host = host
        self._plain_hello = False  # EHLO was refused, HELO is tried
        self._clear_only = False  # STARTTLS was refused
        self._mechanism: Mechanism | None = None
        wire.awaited.append(Stage.GREETING)

    def receive(self, stage: Stage, reply: Reply) -> Ending | None:
        """Goes on with the reply to what was said at a stage."""
        return _HANDLERS[stage](self, reply)

    def tls_started(self, trusted: bool) -> None:
        """The handshake is done. `trusted`: the certificate was verified."""
        self.handshaking = False
        self.secure = True
        self.trusted = trusted
        self._plain_hello = False
        self._hello()

    def _say(self, stage: Stage, line: str) -> None:
        self._wire.say(stage, f"{line}\r\n".encode())

    def _refused(self, stage: Stage, reply: Reply) -> Ending:
        answer = classify(reply)
        return Ending(failure(stage, answer, self._host, reply), answer in (Answer.TEMPORARY, Answer.PERMANENT))

    def _unfit(self, why: Finding) -> Ending:
        return Ending(finding(why, self._host), polite=True)

    def _on_greeting(self, reply: Reply) -> Ending | None:
        if reply.code >= 300:
            return self._refused(Stage.GREETING, reply)
        self._hello()
        return None

    def _hello(self) -> None:
        verb = "LHLO" if self._terms.lmtp else "HELO" if self._plain_hello else "EHLO"
        self._say(Stage.EHLO, f"{verb} {self._terms.hostname}")

    def _on_ehlo(self, reply: Reply) -> Ending | None:
        if reply.code < 300:
            self.offers = NOTHING if self._plain_hello else parse_offers(reply, self._terms.ignore)
            return self._greeted()
        if reply.code < 500 or self._plain_hello or self._terms.lmtp:
            return self._refused(Stage.EHLO, reply)
        self._plain_hello = True
        self._hello()
        return None

    def _greeted(self) -> Ending | None:
        """EHLO was answered: TLS comes first, then the login, then mail."""
        terms = self._terms
        if not self.secure and terms.starttls != "off" and self.offers.starttls and not self._clear_only:
            self._say(Stage.STARTTLS, "STARTTLS")
            return None
        if not self.secure and terms.starttls == "required":
            return self._unfit(Finding.NO_TLS)
        if terms.credentials is None:
            self.done = True
            return None
        if not self.trusted:
            return self._unfit(Finding.NO_CHANNEL)
        chosen = choose(terms.credentials, self.offers.mechanisms)
        if chosen is None:
            return self._unfit(Finding.NO_LOGIN)
        name, self._mechanism = chosen
        first = self._mechanism.initial
        self._say(Stage.AUTH, f"AUTH {name}" if first is None else f"AUTH {name} {b64encode(first).decode()}")
        return None

    def _on_starttls(self, reply: Reply) -> Ending | None:
        if reply.code < 300:
            self.handshaking = True
            return None
        if reply.code < 400 or self._terms.starttls != "opportunistic":
            return self._refused(Stage.STARTTLS, reply)
        self._clear_only = True
        return self._greeted()

    def _on_auth(self, reply: Reply) -> Ending | None:
        mechanism = self._mechanism
        assert mechanism is not None
        try:
            if reply.code == 334:
                self._say(Stage.AUTH, b64encode(mechanism.answer(decode(reply.lines[0].strip()))).decode())
                return None
            if reply.code >= 300:
                return self._refused(Stage.AUTH, reply)
            if not mechanism.finished:
                raise LoginError("the host did not prove that it knows the password")
        except LoginError as error:
            return Ending(failure(Stage.AUTH, Answer.GARBAGE, self._host, None, error.text), polite=False)
        self.done = True
        self._mechanism = None
        return None


_Handler: TypeAlias = Callable[[Opening, Reply], Ending | None]
_HANDLERS: Mapping[Stage, _Handler] = {
    Stage.GREETING: Opening._on_greeting,
    Stage.EHLO: Opening._on_ehlo,
    Stage.STARTTLS: Opening._on_starttls,
    Stage.AUTH: Opening._on_auth,
}
