"""The words between session, policy and spool: facts in, verdict out.

A session that needs a decision returns an `Ask`; a policy answers it with a `Verdict`. At end-of-data it
returns a `Store`; the spool answers with `STORED` or a `Refused`. All of them are values: nothing here waits,
does I/O or knows who decides.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import TYPE_CHECKING, TypeAlias

from .address import NULL, Address

if TYPE_CHECKING:
    from .job import Turned
    from .message import Envelope
    from .reply import Reply
    from .rights import Rights


class Stage(StrEnum):
    """Where in a session a check may be asked. Strings hash in C: 0.2 µs less for each question."""

    CONNECT = "connect"
    HELO = "helo"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    ETRN = "etrn"
    ATRN = "atrn"
    VRFY = "vrfy"
    EXPN = "expn"


class Client:
    """What is known of the peer for the life of its connection.

    `ip` is without brackets and unmapped (`::ffff:192.0.2.1` is `192.0.2.1`), empty on a unix socket;
    `tls` is empty in clear, else version and cipher as they stand in the Received field. `trusted`: it may send to any
    domain, and ask for reports. `fetches`: mail waits here for domains of its own, which it may ask for.
    `user`: the canonical name of whom it has proved to be; empty before AUTH, and after STARTTLS again.
    `bindings`: tls-server-end-point data (RFC 5929 4) of every certificate of the TLS context in use; () in clear.
    `rights`: what the user may send as, looked up at each MAIL; None where nobody asked.
    `certificate`: who a client certificate that was *verified* names, by e-mail address, else common name; else empty.
    """

    __slots__ = (
        "bindings", "certificate", "fetches", "helo", "ip", "listener", "port", "rdns", "rights", "tls", "trusted",
        "uid", "user",
    )  # fmt: skip

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
        self.user = ""
        self.bindings: tuple[bytes, ...] = ()
        self.certificate = ""
        self.rights: Rights | None = None


class NextHop:
    """What the next host of a mailbox of ours was last heard to take: a message of so many octets (0: of any size),
    8-bit content, SMTPUTF8. What it cannot take is refused while the sender waits, not returned later."""

    __slots__ = ("eight_bit", "size", "utf8")

    def __init__(self, size: int = 0, eight_bit: bool = True, utf8: bool = True) -> None:
        self.size = size
        self.eight_bit = eight_bit
        self.utf8 = utf8


class Password:
    """Is this the password of that name? Both are prepared by SASLprep. Values with secrets have no repr."""

    __slots__ = ("name", "password")

    def __init__(self, name: str, password: str) -> None:
        self.name = name
        self.password = password


class ScramKeys:
    """What are the keys of that name (RFC 5802 3)? They are answered for unknown names too. How the proof came out is
    told by `Proved`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Proved:
    """A proof of SCRAM was right (`ok`) or wrong: not a question about the user, but about whether he may go on, and
    the answer to a wrong one takes as long as that to a wrong password. `paid` is that of the Verdict with the keys."""

    __slots__ = ("name", "ok", "paid")

    def __init__(self, name: str, ok: bool, paid: object = None) -> None:
        self.name = name
        self.ok = ok
        self.paid = paid


class Token:
    """Whose bearer token is this? `name` is who the client says it is, empty where it says nothing."""

    __slots__ = ("name", "token")

    def __init__(self, token: str, name: str) -> None:
        self.token = token
        self.name = name


class Identity:
    """Which user does a verified client certificate belong to that names this?"""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


Question: TypeAlias = Password | ScramKeys | Proved | Token | Identity


class Keys:
    """What a server keeps of a password for SCRAM-SHA-256 (RFC 5802 3): nobody logs in with it."""

    __slots__ = ("iterations", "salt", "server_key", "stored_key")

    def __init__(self, salt: bytes, iterations: int, stored_key: bytes, server_key: bytes) -> None:
        self.salt = salt
        self.iterations = iterations
        self.stored_key = stored_key
        self.server_key = server_key


class Ask:
    """A question to the policy of one stage, with the facts known there. At HELO, `helo` is the name that is asked
    about; `client.helo` is the one that was accepted before. At ETRN and ATRN, `nodes` are what is asked for:
    domains, or `@domain`, `#queue`; none: all that there are. At AUTH, `question` is what the credential stores are
    asked."""

    __slots__ = ("client", "helo", "nodes", "question", "recipient", "reverse_path", "stage")

    def __init__(
        self,
        stage: Stage,
        client: Client,
        reverse_path: Address = NULL,
        recipient: Address = NULL,
        helo: str = "",
        nodes: tuple[str, ...] = (),
        question: Question | None = None,
    ) -> None:
        self.stage = stage
        self.client = client
        self.question = question
        self.helo = helo
        self.nodes = nodes
        self.reverse_path = reverse_path
        self.recipient = recipient


class Member:
    """An address that an alias stands for. `sender`: from whom its mail comes, where that is a list's owner; `fault`:
    why it cannot be delivered to. `hop` and `ours` as in a Verdict."""

    __slots__ = ("address", "fault", "hop", "ours", "sender")

    def __init__(
        self, address: Address, sender: Address | None, hop: NextHop | None = None, ours: bool = True, fault: str = ""
    ) -> None:
        self.address = address
        self.sender = sender
        self.hop = hop
        self.ours = ours
        self.fault = fault


class Verdict:
    """A decision: `reply` refuses (None accepts), or answers ETRN, ATRN, VRFY and EXPN; `recipient` replaces the one
    asked about, and so do `members` where there are any.

    `reason` is one constant word, the same in log, metric and check output. `hop` is where a recipient's mail goes
    next, None when that takes everything or has not been heard. `ours`: the mailbox is in a domain served here.
    `turned`: what the connection becomes when the reply was sent (ATRN).
    At AUTH `user` is the canonical name of whom it is about; a Verdict without it grants nothing. `keys` answers
    ScramKeys, for unknown names with an empty `user`; `paid` is what the attempt cost. `problem` says why a token is
    refused, in a word of RFC 7628.
    """

    __slots__ = ("hop", "keys", "members", "ours", "paid", "problem", "reason", "recipient", "reply", "turned", "user")

    def __init__(
        self,
        reason: str,
        reply: Reply | None = None,
        recipient: Address | None = None,
        hop: NextHop | None = None,
        ours: bool = True,
        turned: Turned | None = None,
        user: str = "",
        keys: Keys | None = None,
        problem: str = "",
        members: tuple[Member, ...] = (),
        paid: object = None,
    ) -> None:
        self.reason = reason
        self.reply = reply
        self.recipient = recipient
        self.hop = hop
        self.ours = ours
        self.turned = turned
        self.user = user
        self.keys = keys
        self.problem = problem
        self.members = members
        self.paid = paid


class Store:
    """End-of-data came and the message is whole: keep it, then answer. `arrived` is in seconds since the epoch; `cuts`
    and `header_end` as in Message, where they are not as the parser found them."""

    __slots__ = ("arrived", "cuts", "envelope", "header_end", "prefix")

    def __init__(self, envelope: Envelope, prefix: bytes, arrived: float, header_end: int = -1) -> None:
        self.envelope = envelope
        self.prefix = prefix
        self.arrived = arrived
        self.cuts: tuple[tuple[int, int], ...] = ()
        self.header_end = header_end


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
