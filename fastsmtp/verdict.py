"""The words between session, policy and spool: facts in, verdict out.

A session that needs a decision returns an `Ask`; a policy answers it with a `Verdict`. At end-of-data it
returns a `Store`; the spool answers with `STORED` or a `Refused`. All of them are values: nothing here waits,
does I/O or knows who decides.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from .address import NULL, Address

if TYPE_CHECKING:
    from .job import Turned
    from .message import Envelope
    from .reply import Reply


class Stage(StrEnum):
    """Where in a session a check may be asked. Strings hash in C: 0.2 µs less for each question."""

    CONNECT = "connect"
    HELO = "helo"
    MAIL = "mail"
    RCPT = "rcpt"
    ETRN = "etrn"
    ATRN = "atrn"


class Client:
    """What is known of the peer for the life of its connection.

    `ip` is without brackets and unmapped (`::ffff:192.0.2.1` is `192.0.2.1`), empty on a unix socket;
    `tls` is empty in clear, else version and cipher as they stand in the Received field. `trusted`: it may send to any
    domain, and ask for reports. `fetches`: mail waits here for domains of its own, which it may ask for.
    """

    __slots__ = ("fetches", "helo", "ip", "listener", "port", "rdns", "tls", "trusted", "uid")

    def __init__(self, ip: str, port: int, listener: str) -> None:
        self.ip = ip
        self.port = port
        self.listener = listener
        self.rdns = ""
        self.helo = ""
        self.tls = ""
        self.trusted = False
        self.fetches = False
        self.uid = -1  # of the user at the other end of a unix socket; -1: not known


class NextHop:
    """What the next host of a mailbox of ours was last heard to take: a message of so many octets (0: of any size),
    8-bit content, SMTPUTF8. What it cannot take is refused while the sender waits, not returned later."""

    __slots__ = ("eight_bit", "size", "utf8")

    def __init__(self, size: int = 0, eight_bit: bool = True, utf8: bool = True) -> None:
        self.size = size
        self.eight_bit = eight_bit
        self.utf8 = utf8


class Ask:
    """A question to the policy of one stage, with the facts known there. At HELO, `helo` is the name that is asked
    about; `client.helo` is the one that was accepted before. At ETRN and ATRN, `nodes` are what is asked for:
    domains, or `@domain`, `#queue`; none: all that there are."""

    __slots__ = ("client", "helo", "nodes", "recipient", "reverse_path", "stage")

    def __init__(
        self,
        stage: Stage,
        client: Client,
        reverse_path: Address = NULL,
        recipient: Address = NULL,
        helo: str = "",
        nodes: tuple[str, ...] = (),
    ) -> None:
        self.stage = stage
        self.client = client
        self.helo = helo
        self.nodes = nodes
        self.reverse_path = reverse_path
        self.recipient = recipient


class Verdict:
    """A decision: `reply` refuses (None accepts), or answers ETRN and ATRN; `recipient` replaces the one asked
    about.

    `reason` is one constant word, the same in log, metric and check output. `hop` is where a recipient's mail goes
    next, None when that takes everything or has not been heard. `ours`: the mailbox is in a domain served here.
    `turned`: what the connection becomes when the reply was sent (ATRN).
    """

    __slots__ = ("hop", "ours", "reason", "recipient", "reply", "turned")

    def __init__(
        self,
        reason: str,
        reply: Reply | None = None,
        recipient: Address | None = None,
        hop: NextHop | None = None,
        ours: bool = True,
        turned: Turned | None = None,
    ) -> None:
        self.reason = reason
        self.reply = reply
        self.recipient = recipient
        self.hop = hop
        self.ours = ours
        self.turned = turned


class Store:
    """End-of-data came and the message is whole: keep it, then answer. `arrived` is in seconds since the epoch."""

    __slots__ = ("arrived", "envelope", "prefix")

    def __init__(self, envelope: Envelope, prefix: bytes, arrived: float) -> None:
        self.envelope = envelope
        self.prefix = prefix
        self.arrived = arrived


class Stored(Enum):
    """The message is as durable as the configuration promises."""

    STORED = "stored"


STORED = Stored.STORED


class Refused:
    """The message was not kept. `reply` is what the client hears; None: it must hear nothing (the fate of the
    message is unknown), the connection is closed without an answer."""

    __slots__ = ("reason", "reply")

    def __init__(self, reason: str, reply: Reply | None) -> None:
        self.reason = reason
        self.reply = reply
