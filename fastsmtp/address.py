"""Mailboxes and paths: their syntax, and the one value that stands for an address everywhere.

In: the octets of a path as MAIL and RCPT carry it, or text from the configuration. Out: an `Address`, used by
policy, routing, storage and logs alike; equal addresses are equal values, however they were written. It never
holds a control character, its domain is lower-case A-labels or a normalised literal, and its wire form always
fits into a path. Percent and bang forms are plain local-parts; source routes are checked and dropped.
Stricter than the grammar: an empty local-part (`""@d`) is no mailbox. Looser: underscores in domains, which
real mail has (a hyphen at a label's end stays refused, as by Postfix), and no limit of 64 for local-parts.
Not here: whether non-ASCII was allowed (SMTPUTF8), who is local, what may be relayed.
Failure: `AddressError`; its text never quotes the input.
RFC 5321 4.1.2, 4.1.3, 4.5.3.1; RFC 6531 3.3; UTS 46.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from unicodedata import normalize

import idna

PATH_LIMIT = 256  # octets, with the brackets
DOMAIN_LIMIT = 255
LABEL_LIMIT = 63


class AddressError(ValueError):
    """Not an address. `text` says why, for people; it holds nothing of the input."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Address:
    """A mailbox; immutable by convention.

    `local` is the local-part without quotes, case kept; `domain` is lower-case A-labels, `[192.0.2.1]` or
    `[ipv6:2001:db8::1]`, and "" for a bare postmaster. `wire`, also its `str()`, is how it stands on the wire, without
    brackets. A mailbox of a case-sensitive domain is given its own key. `plain`: the local-part needs no quotes.
    """

    __slots__ = ("_mailbox", "domain", "local", "wire")

    def __init__(self, local: str, domain: str, mailbox: str = "", plain: bool = False) -> None:
        if not plain and local and not _DOT_STRING.fullmatch(local):
            quoted = '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'
        else:
            quoted = local
        self.local = local
        self.domain = domain
        self.wire = f"{quoted}@{domain}" if domain else quoted
        self._mailbox = mailbox

    @property
    def mailbox(self) -> str:
        """The key by which mailboxes are compared: case-folded NFC local-part, "@", domain; "" for NULL."""
        if not self._mailbox and self.wire:
            local = self.local.lower()
            if not local.isascii():
                # Unicode D145: folded after decomposition, for what composes differently once it is folded
                local = normalize("NFC", normalize("NFD", self.local).casefold())
            self._mailbox = f"{local}@{self.domain}"
        return self._mailbox

    def __bool__(self) -> bool:
        return bool(self.wire)

    def __str__(self) -> str:
        return self.wire

    def __repr__(self) -> str:
        return f"Address({self.local!r}, {self.domain!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Address):
            return NotImplemented
        return self.local == other.local and self.domain == other.domain

    def __hash__(self) -> int:
        return hash((self.local, self.domain))


_ATEXT = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]++"
_UTF8_ATEXT = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\x80-\U0010ffff-]++"
_LDH = r"[A-Za-z0-9_]++(?:(?:-++|\.)[A-Za-z0-9_]++)*"  # no label empty, none with a hyphen at its ends

_DOT_STRING = re.compile(rf"{_UTF8_ATEXT}(?:\.{_UTF8_ATEXT})*")
_DOMAIN = re.compile(_LDH)
_LONG_LABEL = re.compile(rf"[^.]{{{LABEL_LIMIT + 1}}}")
# C1 controls and the two line separators: legal by RFC 6531, but some readers of logs end a line there
_UNICODE_CONTROL = re.compile("[\x80-\x9f\u2028\u2029]")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")

NULL = Address("", "")

# Splits a path where it must be split; what stands between the marks is checked afterwards.
_WORD = rb'[^\x00-\x20\x7f<>()\[\]\\,;:@"]++'
_HOST = rb"(?:" + _WORD + rb'|\[[^\x00-\x20\x7f<>\[\]\\@"]*+\])'
_QUOTED = rb'"(?:[^\x00-\x1f\x7f"\\]|\\[\x20-\x7e])*"'
_PATH = re.compile(
    rb"(?:(?P<route>@" + _HOST + rb"(?:,@" + _HOST + rb")*):)?"
    rb"(?:(?P<word>" + _WORD + rb")|(?P<quoted>" + _QUOTED + rb"))"
    rb"(?:@(?P<domain>" + _HOST + rb"))?"
)
# A domain of at most 63 octets has no label that is longer.
_PLAIN = re.compile(rf"<({_ATEXT}(?:\.{_ATEXT})*)@(?=[^>]{{1,{LABEL_LIMIT}}}>)({_LDH})>")


def parse_path(raw: bytes, *, brackets: bool = True) -> tuple[Address, int]:
    """The path at the start of `raw`, and the offset behind it; what follows there is the caller's.

    `<>` is NULL. Without `brackets`, `a@b` up to the next space is taken too. Raises AddressError.
    RFC 5321 4.1.2; RFC 6531 3.3.
    """
    # ASCII only: the pattern has no character above 0x7f. 0.8 µs in place of 3 for _parse_any_path.
    plain = _PLAIN.match(raw.decode("latin-1"))
    if plain is not None and (end := plain.end()) <= PATH_LIMIT:
        local, domain = plain.groups()
        return Address(local, domain.lower(), plain=True), end
    return _parse_any_path(raw, brackets)


def parse_address(text: str) -> Address:
    """`local@domain` as it stands in a configuration: no brackets, no route, nothing behind it."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise AddressError("the address is not valid Unicode") from None
    if raw.startswith((b"<", b"@")):
        raise AddressError("local-part@domain was expected")
    address, end = _parse_any_path(raw, brackets=False)
    if end != len(raw) or not address.domain:
        raise AddressError("local-part@domain was expected")
    return address


def parse_domain(text: str) -> str:
    """The one form of a domain or literal: lower-case A-labels, IPv6 compressed, IPv4-mapped IPv6 unmapped.

    Raises AddressError. RFC 5321 4.1.2, 4.1.3; U-labels are mapped by UTS 46 and checked by IDNA 2008.
    """
    if text.startswith("["):
        return _parse_literal(text)
    if not text.isascii():
        try:
            labels = idna.uts46_remap(text, std3_rules=False).split(".")
            text = ""
            for label in labels:
                text += f".{label if label.isascii() else idna.alabel(label).decode('ascii')}"
                if len(text) > DOMAIN_LIMIT + 1:  # refused below; each label takes 10 µs
                    break
            text = text[1:]
        except UnicodeError:
            raise AddressError("the domain is not a valid internationalised name") from None
    if text.endswith("."):
        raise AddressError("the domain ends in a dot")
    if not _DOMAIN.fullmatch(text):
        raise AddressError("the domain has an empty label or a character that no domain has")
    if len(text) > DOMAIN_LIMIT:
        raise AddressError("the domain is longer than 255 octets")
    if _LONG_LABEL.search(text):
        raise AddressError("a label of the domain is longer than 63 octets")
    return text.lower()


def _parse_literal(text: str) -> str:
    """An address literal (RFC 5321 4.1.3). IPv6 is the only tag that was ever registered."""
    inner = text[1:-1]
    try:
        if not text.endswith("]") or "%" in inner:  # a zone is of this host, not of the network
            raise ValueError
        if inner[:5].lower() != "ipv6:":
            return f"[{IPv4Address(inner)}]"
        v6 = IPv6Address(inner[5:])
    except ValueError:
        raise AddressError("the address literal holds no IP address") from None
    return f"[{v6.ipv4_mapped}]" if v6.ipv4_mapped else f"[ipv6:{v6.compressed}]"


def _parse_any_path(raw: bytes, brackets: bool) -> tuple[Address, int]:
    """What parse_path says, for every form there is."""
    bracketed = raw.startswith(b"<")
    if brackets and not bracketed:
        raise AddressError("the address must stand in angle brackets")
    if raw.startswith(b"<>"):
        return NULL, 2
    path = _PATH.match(raw, 1 if bracketed else 0)
    end = path.end() if path else 0
    if path is None or (raw[end : end + 1] != b">" if bracketed else raw[end : end + 1] not in (b"", b" ")):
        if _CONTROL.search(raw):
            raise AddressError("the address holds a control character")
        raise AddressError("local-part@domain was expected")
    if bracketed:
        end += 1
    if end + (0 if bracketed else 2) > PATH_LIMIT:
        raise AddressError("the path is longer than 256 octets")
    try:
        route, word, quoted, domain = (part.decode() for part in path.groups(b""))
    except UnicodeDecodeError:
        raise AddressError("the address is not valid UTF-8") from None
    if route:
        if not bracketed or not domain:
            raise AddressError("a source route stands only before a mailbox in brackets")
        for host in route.split(","):
            parse_domain(host[1:])
    if not domain:
        if word.lower() != "postmaster":
            raise AddressError("the address has no domain")
        return Address(word, ""), end
    address = Address(_parse_local(word, quoted), parse_domain(domain))
    # A-labels can be longer than the U-labels that came: such an address could be sent to nobody
    if len(str(address).encode()) + 2 > PATH_LIMIT:
        raise AddressError("the path is longer than 256 octets")
    return address, end


def _parse_local(word: str, quoted: str) -> str:
    """The local-part without its quotes, from a dot-string or a quoted-string; the other one is empty."""
    if word and not _DOT_STRING.fullmatch(word):
        raise AddressError("the local-part has a dot at its end or two in a row")
    local = word or re.sub(r"\\(.)", r"\1", quoted[1:-1])
    if not local:
        raise AddressError("the local-part is empty")
    if _UNICODE_CONTROL.search(local):
        raise AddressError("the address holds a control character")
    return local
