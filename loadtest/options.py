"""What a run can be told: one frozen dataclass, whose fields are the long options of `python -m loadtest run`.

In: values, from a scenario and the command line. Out: an Options that every part of the generator reads and that stands
in the result as it was. A field is declared once, here, with its default, its help and what it may hold; the command
line is made from that. Always: what contradicts itself is refused when the Options is made.
Not here: what patterns, sizes and shares of misbehaviour mean (content, misbehave), which options a scenario has
(scenarios). On failure: LoadError.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from . import LoadError

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_TARGET = re.compile(r"(?:\[(?P<six>[^]]+)\]|(?P<host>[^:]+)):(?P<port>[0-9]{1,5})")


def parse_seconds(text: str) -> float:
    """`10`, `10s`, `1.5m`, `200ms` or `1h` as seconds. Raises LoadError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(ms|s|m|h)?", text)
    if found is None:
        raise LoadError(f"{text!r} is no time; 30s, 5m or 200ms would be")
    return float(found[1]) * _UNITS[found[2] or "s"]


def parse_share(text: str) -> float:
    """`5%` or `0.05` as 0.05. Raises LoadError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(%?)", text)
    share = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0 <= share <= 1:
        raise LoadError(f"{text!r} is no share; 5% or 0.05 would be")
    return share


def parse_shares(text: str) -> dict[str, float]:
    """`drip=1%,idle=5%` as {"drip": 0.01, "idle": 0.05}. Raises LoadError."""
    shares: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, separator, share = part.partition("=")
        if not separator or not name.strip() or name.strip() in shares:
            raise LoadError(f"{part!r} is no share of a kind; drip=1% would be, each kind once")
        shares[name.strip()] = parse_share(share.strip())
    if sum(shares.values()) > 1:
        raise LoadError(f"{text!r} is more than all sessions")
    return shares


def parse_target(text: str) -> tuple[str, int]:
    """`mx.example:25` or `[::1]:25` as host and port. Raises LoadError."""
    found = _TARGET.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 65536:
        raise LoadError(f"{text!r} is no HOST:PORT; 127.0.0.1:2525 or [::1]:2525 would be")
    return found["six"] or found["host"], int(found["port"])


def parse_sources(text: str) -> tuple[str, ...]:
    """`127.0.0.2,127.0.0.3` as addresses. Raises LoadError."""
    sources = tuple(filter(None, (part.strip() for part in text.split(","))))
    for source in sources:
        try:
            ipaddress.ip_address(source)
        except ValueError:
            raise LoadError(f"{source!r} is no IP address to connect from") from None
    return sources


def _option(
    default: Any,
    what: str,
    *,
    flag: str = "",
    metavar: str = "",
    least: float | None = None,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A field that is an option: `--field-name`, or `flag`; `parse` makes its value of the text that was given."""
    facts = {"help": what, "flag": flag, "metavar": metavar, "least": least, "choices": choices, "parse": parse}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=facts)
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class Options:
    """Times are seconds, sizes octets, shares between 0 and 1. Raises LoadError for what cannot be."""

    scenario: str = ""
    target: str = ""  # HOST:PORT

    # How much.
    sessions: int = _option(100, "Sessions open at a time; with --rate those opened beforehand.", metavar="N", least=1)
    rate: float = _option(
        0.0,
        "Open loop: so many messages a second, due at random times (Poisson) whether the server keeps up or not; "
        "latency counts from the time at which one was due. 0: closed loop, a session sends when it was answered.",
        metavar="R",
        least=0,
    )
    max_sessions: int = _option(
        0, "Open loop: open no more sessions than this; 0: what the descriptor limit allows.", metavar="N", least=0
    )
    active: float = _option(
        1.0,
        "Closed loop: share of the sessions that send at a time, each in its turn.",
        metavar="SHARE",
        parse=parse_share,
    )
    duration: float = _option(10.0, "How long to send.", metavar="TIME", parse=parse_seconds)
    messages: int = _option(0, "End after so many messages; 0: when the time is over.", metavar="N", least=0)
    processes: int = _option(0, "Processes that send; 0: as few as the descriptor limit allows.", metavar="N", least=0)

    # What is sent.
    sender: str = _option("a@x.test", "Sender: an address or a pattern.", flag="--from", metavar="PATTERN")
    recipient: str = _option("b@y.test", "Recipient: an address or a pattern.", flag="--to", metavar="PATTERN")
    recipients: int = _option(1, "Recipients of each message.", metavar="N", least=1)
    size: str = _option("1KB", "Size of each message.", metavar="SIZE")
    sizes: str = _option(
        "", "Sizes with their shares, such as 1KB:60,100KB:40; a file of such lines; or `mixed`.", metavar="SIZES|FILE"
    )
    corpus: str = _option("", "Send the files of this folder instead.", metavar="DIR")
    large: int = _option(0, "Sessions of which each sends large messages instead.", metavar="N", least=0)
    large_size: str = _option("20MB", "Size of each large message.", metavar="SIZE")

    # How it is sent.
    per_connection: int = _option(0, "Messages in a connection; 0: no bound.", metavar="N", least=0)
    think: float = _option(0.0, "Pause of a session after each message.", metavar="TIME", parse=parse_seconds)
    pipelining: bool = _option(False, "Send MAIL, RCPT and DATA at once (RFC 2920).")
    body: str = _option("data", "Command that carries the message (RFC 5321, RFC 3030).", choices=("data", "bdat"))
    helo: str = _option("client.test", "Name given with EHLO.", metavar="NAME")
    tls: str = _option("off", "When TLS begins.", choices=("off", "starttls", "implicit"))
    resumption: bool = _option(True, "Resume TLS sessions where the server offers it.")
    auth: str = _option("", "Authenticate (RFC 4954), with --user and --password.", choices=("", "plain", "login"))
    user: str = _option("", "For --auth.", metavar="NAME")
    password: str = _option("", "For --auth; better in the environment as LOADTEST_PASSWORD.", metavar="TEXT")
    proxy: str = _option("", "Begin each connection with a PROXY header.", choices=("", "v1", "v2"))
    source: tuple[str, ...] = _option(
        (),
        "Addresses to connect from, comma-separated; without: one, and 127.0.0.2 and on when its ports run out.",
        metavar="ADDRESSES",
        parse=parse_sources,
    )
    misbehave: Mapping[str, float] = _option(
        {}, "Shares of sessions that misbehave, such as drip=1%,idle=5%.", metavar="KIND=SHARE,...", parse=parse_shares
    )

    # Bounds and bookkeeping.
    connect_timeout: float = _option(10.0, "For a connection.", metavar="TIME", parse=parse_seconds)
    timeout: float = _option(60.0, "For each answer of the server.", metavar="TIME", parse=parse_seconds)
    grace: float = _option(10.0, "For what is under way when the time is over.", metavar="TIME", parse=parse_seconds)
    seed: int = _option(0, "Of all that is drawn at random; 0: another one each time.", metavar="N", least=0)
    ledger: str = _option("", "Record the fate of each message here, for `verify`.", metavar="FILE")
    json: str = _option("", "Write the result here, for programs.", metavar="FILE")
    report: str = _option("", "Write the result here, as a page with plots.", metavar="FILE.html")

    def __post_init__(self) -> None:
        if self.target:
            parse_target(self.target)
        if self.auth and not (self.user and self.password):
            raise LoadError("--auth needs --user and --password")
        if self.duration <= 0:
            raise LoadError("--duration must be more than nothing")
        if min(self.timeout, self.connect_timeout) <= 0:
            raise LoadError("--timeout and --connect-timeout must be more than nothing")
        if self.sizes and self.corpus:
            raise LoadError("--sizes and --corpus exclude each other")
        if self.rate and self.think:
            raise LoadError("--think belongs to the closed loop, --rate makes an open one")
        if self.max_sessions and self.max_sessions < self.sessions:
            raise LoadError("--max-sessions is less than --sessions")
        if self.sessions * self.active < 1:
            raise LoadError("--active leaves no session that sends")
        if self.large >= self.sessions or (self.large and self.active < 1):
            raise LoadError("--large must be less than --sessions, and does not go with --active")
        if not re.fullmatch(r"[!-~]{1,255}", self.helo):
            raise LoadError("--helo is no host name")
        for name in ("user", "password"):
            if not getattr(self, name).isprintable():
                raise LoadError(f"--{name} holds control characters")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the server."""
        return parse_target(self.target)

    def public(self) -> dict[str, Any]:
        """All options, for the result; no password."""
        return asdict(self) | {"password": "***" if self.password else ""}


def declared() -> Iterator[Field[Any]]:
    """The fields that are options, in their order."""
    return (each for each in fields(Options) if "help" in each.metadata)
