"""What a client says and which reply it waits for: the steps of a session, and the plan of a message.

In: Options, a Tally, and what the server offers. Out: a Role, which all sessions of one kind in a process share: their
steps with the latencies measured at each, and for each Mail its Plan, made once where the Mail comes again. Always: a
plan is a row of pairs, octets to write and the step whose reply is waited for then; no octets means that the reply is
one more to what was written before (RFC 2920). Octets behind a long message's last pair are written in pieces.
Not here: what a reply leads to (dialogue). On failure: LoadError when the server lacks what the options ask for.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from . import LoadError
from .content import Mail
from .options import Options
from .tally import Tally

if TYPE_CHECKING:
    from .connecting import Connector
    from .dialogue import Dialogue
    from .ledger import Ledger
    from .pacing import Pacer

Then: TypeAlias = Callable[
    [Any, float], None
]  # of a Session: the reply was the one that was expected; when it was read
Otherwise: TypeAlias = Callable[[Any, int], None]  # it was 4xx or 5xx

PIECE = 64 * 1024  # octets; longer messages are written piece by piece
PLANS = 10_000  # kept at most
NEVER = sys.maxsize


class Step:
    """A reply that is waited for, and what follows it; `then` is None where the next pair of the plan does.

    `want` and `skip` say what it must begin with, and from where its only line end is looked for. For a reply of
    several lines, once one was read in full, they say "the same octets again".
    """

    __slots__ = ("code", "note", "otherwise", "phase", "skip", "then", "values", "want")

    def __init__(self, phase: str, code: int, then: Then | None, otherwise: Otherwise) -> None:
        self.phase = phase
        self.code = code
        self.values: list[float] = []
        self.note = self.values.append
        self.then = then
        self.otherwise = otherwise
        self.want = b"%d " % code
        self.skip = 3

    def learn(self, reply: bytes) -> None:
        """This reply of several lines was right, so the same octets are right again."""
        self.want = reply
        self.skip = len(reply) - 1

    def never(self) -> Step:
        """No reply is this one's, unless one is learnt."""
        self.skip = NEVER
        return self


Pair: TypeAlias = tuple[bytes, Step]


class Plan(NamedTuple):
    """One message; `text` is what goes in pieces behind the pairs, or b""."""

    pairs: tuple[Pair, ...]
    text: bytes
    octets: int


class Steps(NamedTuple):
    """All steps of a role, by name. In `long_*` the reply lets the pieces of a long message go."""

    banner: Step
    hello: Step
    starttls: Step
    secure_hello: Step
    auth: Step
    challenge: Step
    mail: Step
    rcpt: Step
    long_rcpt: Step
    data: Step
    long_data: Step
    text: Step
    doomed: Step
    doomed_data: Step
    doomed_text: Step
    rset: Step
    quit: Step
    idle: Step  # code 0: no reply is expected
    securing: Step
    streaming: Step


class Role:
    """What the sessions of one kind share: ordinary ones, or those that send large messages."""

    def __init__(
        self, options: Options, tally: Tally, connector: Connector, steps: Steps, ledger: Ledger | None, pacer: Pacer
    ) -> None:
        self.options = options
        self.tally = tally
        self.connector = connector
        self.steps = steps
        self.ledger = ledger
        self.pacer = pacer
        self.loop = asyncio.get_running_loop()
        self.sessions: set[Dialogue] = set()
        self.hello = f"EHLO {options.helo}\r\n".encode()
        self.auth = render_auth(options)
        self.note_message = tally.values("message").append
        self.note_session = tally.values("session").append
        self._offers: frozenset[str] | None = None
        self._plans: dict[Mail, Plan] = {}
        for step in steps:
            tally.watch(step)

    def learn_offers(self, reply: bytes, last: bool) -> None:
        """What the EHLO says that counts, the `last` of a session. Raises LoadError for what is missing."""
        lines = [line[4:].strip().upper().decode("ascii", "replace") for line in reply.splitlines()[1:]]
        offers = frozenset(line.split(" ")[0] for line in lines)
        mechanisms = next((line.split(" ")[1:] for line in lines if line.startswith("AUTH ")), [])
        if not last:
            self._require("STARTTLS" in offers, "STARTTLS")
            return
        self._require(not self.options.pipelining or "PIPELINING" in offers, "PIPELINING")
        self._require(self.options.body == "data" or "CHUNKING" in offers, "CHUNKING, which BDAT belongs to")
        auth = self.options.auth.upper()
        self._require(not auth or auth in mechanisms, f"AUTH {auth}")
        if offers != self._offers:
            self._offers = offers
            self._plans.clear()

    def _require(self, offered: bool, what: str) -> None:
        if not offered:
            raise LoadError(f"{self.options.target} does not offer {what}")

    def plan(self, mail: Mail) -> Plan:
        return self._plans.get(mail) or self._make_plan(mail)

    def _make_plan(self, mail: Mail) -> Plan:
        command = mail.mail
        if mail.eight_bit and self._offers and "8BITMIME" in self._offers:
            command = command[:-2] + b" BODY=8BITMIME\r\n"
        plan = make_plan(self.steps, self.options, command, mail)
        # Messages that come once only are not kept: a ledger's can be a megabyte each.
        if self.ledger is None and len(self._plans) < PLANS:
            self._plans[mail] = plan
        return plan


def make_plan(steps: Steps, options: Options, command: bytes, mail: Mail) -> Plan:
    """`command` is MAIL with its parameters."""
    bdat = options.body == "bdat"
    text = b"BDAT %d LAST\r\n" % len(mail.raw) + mail.raw if bdat else mail.text
    long = len(text) > PIECE
    pairs = [(command, steps.mail), *((rcpt, steps.rcpt) for rcpt in mail.rcpts)]
    if not bdat:
        pairs.append((b"DATA\r\n", steps.long_data if long else steps.data))
    elif long:
        pairs[-1] = (pairs[-1][0], steps.long_rcpt)
    elif options.pipelining:
        pairs.append((text, steps.text))
    octets = sum(len(said) for said, _ in pairs)
    if options.pipelining:
        pairs = [(b"".join(said for said, _ in pairs), pairs[0][1]), *((b"", step) for _, step in pairs[1:])]
    if not long and not (bdat and options.pipelining):
        pairs.append((text, steps.text))
        octets += len(text)
    return Plan(tuple(pairs), text if long else b"", octets + (len(text) if long else 0))


def render_auth(options: Options) -> tuple[bytes, ...]:
    """The lines of the exchange: RFC 4616 for PLAIN; LOGIN has no RFC."""
    user, password = options.user.encode(), options.password.encode()
    if options.auth == "plain":
        return (b"AUTH PLAIN %s\r\n" % base64.b64encode(b"\0%s\0%s" % (user, password)),)
    if options.auth == "login":
        return (b"AUTH LOGIN\r\n", base64.b64encode(user) + b"\r\n", base64.b64encode(password) + b"\r\n")
    return ()
