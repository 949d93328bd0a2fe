"""The EHLO keywords, a row each: when it is offered; and the parameters of MAIL and RCPT, a row each.

An extension is offered when its duty can be done: `Offer` says what a listener can do in the state the session is
in. Parameters are parsed strictly, with a greatest length for each value; which of them are taken follows from the
table, not from what was offered, save that BODY=BINARYMIME and REQUIRETLS need their keywords, AUTH a listener that has
it. xtext that decodes to
anything but printable ASCII is refused: decoded CR LF has been a way into headers and queue files.
Raises CommandError with the reply for the client. RFC 5321 4.1.1.11, 1870, 6152, 3030, 6531, 3461, 3207, 8689, 9422,
4954, 1985, 2645.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .reply import R501_BAD_PARAMETER, R555_UNKNOWN_PARAMETER, Reply


class CommandError(Exception):
    """A command is refused with `reply`."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Offer:
    """What a listener can do for a session in its present state."""

    message_size: int
    recipients: int
    starttls: bool  # a certificate is there, and TLS is not in use yet
    any_octets: bool  # every message ends in a transport that takes any octets
    withheld: frozenset[str] = frozenset()
    reports: bool = False  # delivery reports are made, and this client may ask for them
    keeps_tls: bool = False  # TLS is in use, and every message stays here or goes to a host verified by name
    fetches: bool = False  # mail waits here for domains of the client
    odmr: bool = False  # mail is only fetched here
    mechanisms: tuple[str, ...] = ()  # of AUTH, that can succeed now


class Extension(NamedTuple):
    keyword: str
    line: Callable[[Offer], str]  # what EHLO shows; empty: not offered
    needs: str = ""  # a keyword without which this one is not offered
    odmr: bool = False  # also where mail is only fetched


EXTENSIONS = (
    Extension("PIPELINING", lambda _: "PIPELINING"),
    Extension("SIZE", lambda offer: f"SIZE {offer.message_size}"),
    Extension("8BITMIME", lambda _: "8BITMIME"),
    Extension("SMTPUTF8", lambda _: "SMTPUTF8", needs="8BITMIME"),
    Extension("CHUNKING", lambda _: "CHUNKING"),
    Extension("BINARYMIME", lambda offer: "BINARYMIME" if offer.any_octets else "", needs="CHUNKING"),
    Extension("ENHANCEDSTATUSCODES", lambda _: "ENHANCEDSTATUSCODES", odmr=True),
    Extension("DSN", lambda offer: "DSN" if offer.reports else ""),
    Extension("REQUIRETLS", lambda offer: "REQUIRETLS" if offer.keeps_tls else ""),
    Extension("LIMITS", lambda offer: f"LIMITS RCPTMAX={offer.recipients}"),
    Extension("STARTTLS", lambda offer: "STARTTLS" if offer.starttls else "", odmr=True),
    Extension("AUTH", lambda offer: " ".join(["AUTH", *offer.mechanisms]) if offer.mechanisms else "", odmr=True),
    Extension("ETRN", lambda offer: "ETRN" if offer.fetches else "", odmr=True),
    Extension("ATRN", lambda offer: "ATRN" if offer.odmr else "", odmr=True),
    Extension("HELP", lambda _: "HELP", odmr=True),
)


def offered(offer: Offer) -> Mapping[str, str]:
    """The offered keywords and the line of each, in the order of EHLO's answer."""
    lines: dict[str, str] = {}
    for extension in EXTENSIONS:
        line = extension.line(offer) if extension.odmr or not offer.odmr else ""
        # The table has what is needed before what needs it.
        if line and extension.keyword not in offer.withheld and (not extension.needs or extension.needs in lines):
            lines[extension.keyword] = line
    return lines


_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")
_HEX = re.compile(r"\+([0-9A-F]{2})")
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20=\x7f]+))?")


def decode_xtext(text: str) -> str:
    """RFC 3461 4. Raises ValueError for what is no xtext, or decodes outside printable ASCII."""
    if not _XTEXT.fullmatch(text):
        raise ValueError("not xtext")
    decoded = _HEX.sub(lambda match: chr(int(match[1], 16)), text)
    if not (decoded.isascii() and decoded.isprintable()):
        raise ValueError("xtext holds what is not printable")
    return decoded


def _size(value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ValueError("not a number")
    return int(value)


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        word = value.upper()
        if word not in words:
            raise ValueError("not a known word")
        return word

    return parse


def _envid(value: str) -> str:
    decode_xtext(value)
    return value


def _auth(value: str) -> str:
    """Whom a relay says the message is from. It is believed of nobody here: every value stands for `<>`."""
    decode_xtext(value)
    return "<>"


def _notify(value: str) -> str:
    words = value.upper().split(",")
    known = words == ["NEVER"] or {*words} <= {"SUCCESS", "FAILURE", "DELAY"}
    if not known or len({*words}) != len(words):
        raise ValueError("not NEVER, nor a list of SUCCESS, FAILURE, DELAY")
    return ",".join(words)


def _orcpt(value: str) -> str:
    kind, semicolon, address = value.partition(";")
    if not (semicolon and address and kind.isascii() and kind.replace("-", "").isalnum()):
        raise ValueError("not type;address")
    if kind.lower() == "utf-8" and not address.isascii():
        if not address.isprintable():
            raise ValueError("the address holds what is not printable")
    else:
        decode_xtext(address)
    return value


class Parameter(NamedTuple):
    """How a value is read, and how many characters it may have; 0: the keyword takes no value."""

    parse: Callable[[str], int | str]
    longest: int


def _flag(_: str) -> int:
    return 1


MAIL_PARAMETERS: Mapping[str, Parameter] = {
    "SIZE": Parameter(_size, 20),  # RFC 1870 3
    "BODY": Parameter(_one_of("7BIT", "8BITMIME", "BINARYMIME"), 10),  # RFC 6152, RFC 3030 3
    "SMTPUTF8": Parameter(_flag, 0),  # RFC 6531 3.4
    "RET": Parameter(_one_of("FULL", "HDRS"), 4),  # RFC 3461 4.3
    "ENVID": Parameter(_envid, 100),  # RFC 3461 4.4
    "REQUIRETLS": Parameter(_flag, 0),  # RFC 8689 4.1
    "AUTH": Parameter(_auth, 500),  # RFC 4954 5
}
RCPT_PARAMETERS: Mapping[str, Parameter] = {
    "NOTIFY": Parameter(_notify, 28),  # RFC 3461 4.1
    "ORCPT": Parameter(_orcpt, 500),  # RFC 3461 4.2
}


def without_success(notify: str) -> str:
    """NOTIFY of a client that may not ask for reports of success. What it has asked for besides stays; RFC 3461 4.1
    has NEVER for nothing."""
    return ",".join([word for word in notify.split(",") if word != "SUCCESS"]) or "NEVER"


NO_PARAMETERS: Mapping[str, int | str] = {}


def parse_parameters(raw: bytes, table: Mapping[str, Parameter]) -> Mapping[str, int | str]:
    """The values by upper-case keyword. Raises CommandError (555 unknown keyword, 501 bad or repeated value)."""
    try:
        words = raw.decode().split(" ")
    except UnicodeDecodeError:
        raise CommandError(R501_BAD_PARAMETER) from None
    values: dict[str, int | str] = {}
    for word in filter(None, words):
        match = _PARAMETER.fullmatch(word)
        if match is None:
            raise CommandError(R501_BAD_PARAMETER)
        keyword, value = match[1].upper(), match[2] or ""
        row = table.get(keyword)
        if row is None:
            raise CommandError(R555_UNKNOWN_PARAMETER)
        if keyword in values or bool(value) != bool(row.longest) or len(value) > row.longest:
            raise CommandError(R501_BAD_PARAMETER)
        try:
            values[keyword] = row.parse(value)
        except ValueError:
            raise CommandError(R501_BAD_PARAMETER) from None
    return values
