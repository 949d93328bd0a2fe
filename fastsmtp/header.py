"""Header sections read: fields with their places, and the addresses in From, Sender and the like.

In: octets with CRLF line ends. Out: a `Header`, whose fields say where they stand, so that one can be cut out; and, for
a field's value, its mailboxes by RFC 5322 3.4, with groups, comments, quoted strings, folding and the obsolete forms.
An encoded-word is text of a display name; in an address it is an error, as some readers would decode it there, and one
with a line end or NUL in it everywhere: what a reader shows may end there, or go on with another address.
Nothing is guessed: what the grammar does not have is a HeaderError, whose text holds nothing of the input.
Not here: what has to stand in a header, and who may. RFC 5322 2.2, 3.4, 4.4; RFC 6532 3.2; RFC 6854; RFC 2047 5.
"""

from __future__ import annotations

import re
from binascii import Error as Base64Error
from binascii import a2b_base64
from typing import NamedTuple

from .address import Address, AddressError, parse_address

VALUE_LIMIT = 16384  # octets of a field whose addresses are read: 3 ms
_MBOX = re.compile(rb"From [ \t]*[^: \t\r\n][^\r\n]*\r\n")
_NAME = re.compile(rb"([!-9;-~]+)[ \t]*:")


class HeaderError(ValueError):
    """Not an address list."""


class Field(NamedTuple):
    """One field: its name in lower case, where it begins and ends in the section, with its CRLF, and its value."""

    name: str
    start: int
    end: int
    value: bytes


class Header(NamedTuple):
    """`fields` stand from `start`, which is behind a line of an mbox file ("From ann ..."), up to `end`: there is an
    empty line, nothing, or what is no field."""

    fields: list[Field]
    start: int
    end: int


def read_header(octets: bytes) -> Header:
    """The header section at the start of a message."""
    mbox = _MBOX.match(octets)
    start = mbox.end() if mbox else 0
    fields: list[Field] = []
    place = start
    name, begin, colon = "", start, start
    while place < len(octets):
        line_end = octets.find(b"\r\n", place) + 2
        if line_end == 1:  # the last line, without its end
            line_end = len(octets)
        if octets[place] not in b" \t" or not name:
            match = _NAME.match(octets, place, line_end)
            if match is None:
                break
            if name:
                fields.append(Field(name, begin, place, octets[colon:place]))
            name, begin, colon = match[1].decode("ascii").lower(), place, match.end()
        place = line_end
    if name:
        fields.append(Field(name, begin, place, octets[colon:place]))
    return Header(fields, start, place)


_TOKEN = re.compile(
    r'(?P<blank>[ \t\r\n]++)|(?P<comment>\()|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<literal>\[[^\[\]\\]*+\])'
    r"|(?P<atom>[^\x00-\x20\x7f()<>\[\]:;@\\,.\"]++)|(?P<mark>[<>:;@,.])",
    re.DOTALL,
)
_COMMENT = re.compile(r"(?:[^()\\]++|\\.)*([()])", re.DOTALL)
_ENCODED = re.compile(r"=\?[^?]*\?[^?]*\?")
_WORD = re.compile(r"=\?([^?\s]*)\?([BbQq])\?([^?\s]*)\?=")
_OCTET = re.compile(r"=([0-9A-Fa-f]{2})")
# In which NUL and line ends are not their octets; a codec is never chosen by what came.
CHARSETS = {name: name for name in ("utf-7", "utf-16", "utf-16le", "utf-16be", "utf-32", "utf-32le", "utf-32be")}
WORDS = ("atom", "quoted")
END = ("end", "")


def parse_mailboxes(value: bytes, home: str = "") -> list[Address]:
    """The mailboxes of an address list, those in groups too. `home`: the domain of a name that has none; empty: it
    must have one. Raises HeaderError."""
    if len(value) > VALUE_LIMIT:
        raise HeaderError("the field is too long")
    text = value.decode("utf-8", "surrogateescape")
    if "=?" in text and any(map(_breaks, _WORD.finditer(text))):
        raise HeaderError("an encoded-word that holds a line end or NUL")
    return _List(_tokens(text), home).read()


def _breaks(word: re.Match[str]) -> bool:
    """Whether what it encodes ends a line, or a text as C has them."""
    charset, encoding, text = word.groups()
    if encoding in "Qq":
        octets = _OCTET.sub(lambda octet: chr(int(octet[1], 16)), text).encode("latin-1", "replace")
    else:
        try:
            octets = a2b_base64(f"{text}===".encode("ascii", "replace"))
        except Base64Error:
            return False  # nobody can read it
    shown = octets.decode(CHARSETS.get(charset.partition("*")[0].lower(), "latin-1"), "replace")
    return not {"\0", "\r", "\n"}.isdisjoint(shown)


def _tokens(text: str) -> list[tuple[str, str]]:
    """Kind and text of each, without blanks and comments, which may stand between any two."""
    found: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise HeaderError("a character that no address has, or a quote that does not end")
        place = match.end()
        kind = str(match.lastgroup)
        if kind == "comment":
            depth = 1
            while depth:
                inner = _COMMENT.match(text, place)
                if inner is None:
                    raise HeaderError("a comment that does not end")
                depth += 1 if inner[1] == "(" else -1
                place = inner.end()
        elif kind != "blank":
            found.append((match[0] if kind == "mark" else kind, match[0]))
    return found


class _List:
    """An address list that is being read. A token's kind is that of _TOKEN; a mark is its own kind."""

    def __init__(self, tokens: list[tuple[str, str]], home: str) -> None:
        self._tokens = tokens
        self._home = home
        self._place = 0
        self._found: list[Address] = []

    def read(self) -> list[Address]:
        self._read_addresses(END[0])
        return self._found

    @property
    def _next(self) -> str:
        return self._tokens[self._place][0] if self._place < len(self._tokens) else END[0]

    def _take(self, *kinds: str) -> str:
        if self._next not in kinds:
            raise HeaderError("an address was expected, or a comma behind one")
        self._place += 1
        return self._tokens[self._place - 1][1]

    def _read_addresses(self, last: str) -> None:
        """Up to `last`; empty elements are obsolete syntax (RFC 5322 4.4)."""
        while self._next != last:
            if self._next != ",":
                self._read_address(in_group=last == ";")
            if self._next != last:
                self._take(",")

    def _read_address(self, in_group: bool) -> None:
        start = self._place
        while self._next in (*WORDS, "."):
            self._place += 1
        words = self._tokens[start : self._place]
        if words and (self._next == "@" or (self._home and self._next in (",", ";", END[0]))):
            self._place = start
            self._read_spec()
        elif self._next == "<":
            self._take("<")
            self._read_route()
            self._read_spec()
            self._take(">")
        elif self._next == ":" and words and not in_group:
            self._take(":")
            self._read_addresses(";")
            self._take(";")
        else:
            raise HeaderError("an address was expected")

    def _read_route(self) -> None:
        """Obsolete, and without a meaning: "@a,@b:"."""
        if self._next not in ("@", ","):
            return
        while self._next != ":":
            while self._next == ",":
                self._take(",")
            self._take("@")
            self._read_domain()
            if self._next != ":":
                self._take(",")
        self._take(":")

    def _read_spec(self) -> None:
        local = self._read_word()
        while self._next == ".":
            self._take(".")
            local += f".{self._read_word()}"
        domain = self._home
        if not domain or self._next == "@":
            self._take("@")
            domain = self._read_domain()
        if _ENCODED.search(local) or _ENCODED.search(domain):
            raise HeaderError("an encoded-word in an address")
        try:
            self._found.append(parse_address(Address(local, domain).wire))
        except AddressError as error:
            raise HeaderError(error.text) from None

    def _read_word(self) -> str:
        word = self._take(*WORDS)
        if not word.startswith('"'):
            return word
        return re.sub(r"\\(.)", r"\1", re.sub(r"\r\n", "", word[1:-1]), flags=re.DOTALL)

    def _read_domain(self) -> str:
        if self._next == "literal":
            return re.sub(r"\s", "", self._take("literal"))
        domain = self._take("atom")
        while self._next == ".":
            self._take(".")
            domain += f".{self._take('atom')}"
        return domain
