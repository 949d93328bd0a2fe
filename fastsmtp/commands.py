"""The verb table, and how the arguments of each command are read.

In: a verb and the octets behind it, as the parser cut them. Out: the row of the verb, and a typed value for the
commands that carry one. The rules that hold for many verbs (which listeners know it, what must have come before,
whether it takes an argument, whether it counts as useless) are columns here and are applied in one place, in
session.py. Nothing here knows the state of a session.
Raises CommandError with the reply for the client. RFC 5321 4.1.1; RFC 3030 2; RFC 2033 4; RFC 4954 4; RFC 1985;
RFC 2645.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple

from ._parser import Line
from .address import NULL, Address, AddressError, parse_address, parse_domain, parse_path
from .extensions import (
    MAIL_PARAMETERS,
    NO_PARAMETERS,
    RCPT_PARAMETERS,
    CommandError,
    parse_parameters,
)
from .reply import (
    R501_BAD_BDAT,
    R501_BAD_DOMAINS,
    R501_BAD_NODE,
    R501_BAD_RECIPIENT,
    R501_BAD_SENDER,
    R553_NEEDS_SMTPUTF8,
    Reply,
)


class Argument(Enum):
    """Whether a verb has something behind it."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


class Verb(NamedTuple):
    """A row of the table. `barrier`: the octets behind the command mean what our answer makes of them.
    `greets`: HELO, EHLO or LHLO. `open`: allowed on `submission` before AUTH (RFC 4954 6). `after_helo`: 503
    before it. `useless`: counted when it comes too often without mail. `odmr`: known where mail is only fetched
    (RFC 2645 4)."""

    name: str
    argument: Argument = Argument.OPTIONAL
    barrier: bool = False
    greets: bool = False
    open: bool = False
    after_helo: bool = False
    useless: bool = False
    odmr: bool = False


NONE: Final = Argument.NONE
REQUIRED: Final = Argument.REQUIRED

TABLE = (
    Verb("EHLO", REQUIRED, greets=True, open=True, useless=True, odmr=True),
    Verb("HELO", REQUIRED, greets=True, open=True, useless=True, odmr=True),
    Verb("LHLO", REQUIRED, greets=True, open=True, useless=True),
    Verb("MAIL", REQUIRED, after_helo=True),
    Verb("RCPT", REQUIRED, after_helo=True),
    Verb("DATA", NONE, barrier=True, after_helo=True),
    # RFC 3030 2: its octets are consumed whatever came before, so what must have come is asked behind them.
    Verb("BDAT", barrier=True, open=True, odmr=True),
    Verb("RSET", NONE, open=True, useless=True, odmr=True),
    Verb("NOOP", open=True, useless=True, odmr=True),
    Verb("QUIT", NONE, barrier=True, open=True, odmr=True),
    Verb("HELP", open=True, useless=True, odmr=True),
    # RFC 5321 4.1.4: also before HELO.
    Verb("VRFY", REQUIRED, useless=True),
    Verb("EXPN", REQUIRED, useless=True),
    Verb("STARTTLS", NONE, barrier=True, open=True, odmr=True),
    Verb("AUTH", REQUIRED, barrier=True, open=True, useless=True, odmr=True),
    Verb("ETRN", REQUIRED, after_helo=True, useless=True, odmr=True),
    # The octets behind it are those of another server.
    Verb("ATRN", barrier=True, after_helo=True, useless=True, odmr=True),
)
VERBS = {verb.name.encode(): verb for verb in TABLE}

# Known and not done: never "unknown". TURN hands the role over without proof, the next three left the protocol.
NOT_IMPLEMENTED = frozenset((b"TURN", b"SEND", b"SOML", b"SAML", b"XCLIENT", b"XFORWARD"))
# A web browser, or a page that makes one post a form to us: not a mail client.
FOREIGN = frozenset((b"GET", b"POST", b"CONNECT", b"PUT"))

BARRIERS = frozenset(verb.name.encode() for verb in TABLE if verb.barrier) | FOREIGN


class Bdat(NamedTuple):
    """BDAT size [LAST]."""

    size: int
    last: bool


def parse_mail(line: Line, brackets: bool) -> tuple[Address, Mapping[str, int | str]]:
    """MAIL FROM:<reverse-path> and its parameters by upper-case keyword.

    Plain tuples on the path of every message: a NamedTuple costs 0.25 µs more.
    """
    address, is_ascii, tail = _parse_path(line, b"FROM:", brackets, R501_BAD_SENDER)
    parameters = parse_parameters(tail, MAIL_PARAMETERS) if tail else NO_PARAMETERS
    if not is_ascii and "SMTPUTF8" not in parameters:
        raise CommandError(R553_NEEDS_SMTPUTF8)
    return address, parameters


def parse_rcpt(line: Line, brackets: bool) -> tuple[Address, bool, Mapping[str, int | str]]:
    """RCPT TO:<forward-path>, whether the path is ASCII, and its parameters."""
    address, is_ascii, tail = _parse_path(line, b"TO:", brackets, R501_BAD_RECIPIENT)
    if address is NULL:
        raise CommandError(R501_BAD_RECIPIENT)
    return address, is_ascii, parse_parameters(tail, RCPT_PARAMETERS) if tail else NO_PARAMETERS


def _parse_path(line: Line, word: bytes, brackets: bool, bad: Reply) -> tuple[Address, bool, bytes]:
    """The address, whether its path is ASCII, and what stands behind it. Blanks before the word and before the path are
    tolerated: clients send them."""
    rest = line.rest
    if line.local is not None:
        address = Address(line.local, line.domain, plain=True) if line.domain else NULL
        end = line.tail
        is_ascii = True
    else:
        rest = rest.lstrip(b" ")
        if rest[: len(word)].upper() != word:
            raise CommandError(bad)
        path = rest[len(word) :].lstrip(b" ")
        try:
            address, end = parse_path(path, brackets=brackets)
        except AddressError:
            raise CommandError(bad) from None
        is_ascii = path[:end].isascii()
        end += len(rest) - len(path)
    if end == len(rest):
        return address, is_ascii, b""
    tail = rest[end:]
    if tail[:1] != b" ":
        raise CommandError(bad)
    return address, is_ascii, tail


def parse_name(rest: bytes) -> Address:
    """What VRFY and EXPN ask about: a mailbox, or what stands before the "@" of one here, with brackets or without."""
    text = rest.decode("utf-8", "replace").strip(" ")
    if text.upper().endswith(" SMTPUTF8"):  # RFC 6531 3.7.4.2
        text = text[: -len(" SMTPUTF8")].rstrip(" ")
    text = text.removeprefix("<").removesuffix(">")
    bare = "@" not in text
    try:
        address = parse_address(f"{text}@local.invalid" if bare else text)
    except AddressError:
        raise CommandError(R501_BAD_RECIPIENT) from None
    return Address(address.local, "") if bare else address


_BDAT = re.compile(rb"([0-9]{1,20})( +LAST)?", re.IGNORECASE)


def parse_bdat(rest: bytes) -> Bdat:
    match = _BDAT.fullmatch(rest)
    if match is None:
        raise CommandError(R501_BAD_BDAT)
    return Bdat(int(match[1]), match[2] is not None)


def parse_auth(rest: bytes) -> tuple[str, bytes]:
    """AUTH mechanism [initial-response]: the mechanism's name, and what stands behind it."""
    mechanism, _, initial = rest.partition(b" ")
    return mechanism.decode("ascii", "replace").upper(), initial


_QUEUE = re.compile(r"#[A-Za-z0-9._-]{1,64}")


def parse_node(rest: bytes) -> str:
    """What ETRN asks for (RFC 1985 5.1): a domain, `@domain` for it and all below it, or `#queue`."""
    text = rest.decode("utf-8", "replace").strip(" ")
    if _QUEUE.fullmatch(text):
        return text
    sign = "@" if text.startswith("@") else ""
    return sign + _parse_node_domain(text[len(sign) :], R501_BAD_NODE)


def parse_domains(rest: bytes) -> tuple[str, ...]:
    """What ATRN asks for (RFC 2645 5.2.1): domains, each once; none: all that there are."""
    text = rest.decode("utf-8", "replace").strip(" ")
    domains = [_parse_node_domain(each.strip(" "), R501_BAD_DOMAINS) for each in text.split(",")] if text else []
    return tuple(dict.fromkeys(domains))


def _parse_node_domain(text: str, bad: Reply) -> str:
    try:
        return parse_domain(text)
    except AddressError:
        raise CommandError(bad) from None
