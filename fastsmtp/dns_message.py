"""DNS messages: a query rendered, a response read into our own values. No I/O.

In: names, and the octets of a response. Out: the octets of a query, and an `Answer`, or the `Alias` at which the answer
ended, or the `Fault` of the server. Names come out as printable ASCII whatever stood in them. dnspython reads what
servers send; a query is twelve octets, a name and an OPT record, written here.
Not here: whom to ask, when to stop. Failure: a Fault; nothing is raised for what octets hold.
RFC 1035 4, RFC 2308 2, RFC 3596, RFC 6891.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import IPv6Address, ip_address
from typing import Any, NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype

from .dns import MX, Answer, IPAddress, Kind, Status

MAX_TTL = 2**31 - 1  # RFC 2181 8
RECORDS = 100  # of one answer; more are left out
PAYLOAD = 1_232  # octets of a datagram that is not cut into pieces on its way (RFC 9715 3.1)

_HEADER = struct.Struct("!HHHHHH")
_RECURSION_DESIRED = 0x0100
_OPT = struct.pack("!BHHIH", 0, 41, PAYLOAD, 0, 0)  # RFC 6891 6.1.2
_NO_EDNS = {dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.BADVERS}

ENDLESS: Answer[Any] = Answer(Status.FAILED, reason="a chain of CNAME records has no end")


class Alias(NamedTuple):
    """The name has another, and the answer ends there."""

    name: str
    ttl: int


class Fault(NamedTuple):
    """What a server did instead of answering. `edns`: without the OPT record it may answer."""

    text: str
    edns: bool = False


MALFORMED = Fault("a malformed answer")


def render_question(name: str, kind: Kind) -> bytes | None:
    """Name, type and class, as they stand in query and response; None for what is no domain name."""
    if not name.isascii():
        return None
    try:
        wire = dns.name.from_text(name).canonicalize().to_wire()
    except (dns.exception.DNSException, ValueError):
        return None
    assert wire is not None
    return wire + struct.pack("!HH", kind, 1)


def render_query(number: int, question: bytes, edns: bool) -> bytes:
    """`number` is the id."""
    header = _HEADER.pack(number, _RECURSION_DESIRED, 1, 0, 0, 1 if edns else 0)
    return header + question + (_OPT if edns else b"")


def matches(message: bytes, question: bytes) -> bool:
    """Whether it is a response to the question, apart from its id. A server that could not read the question, or
    will not, may leave it out."""
    if len(message) < 12 or message[2] & 0xF8 != 0x80:
        return False
    if message[4:6] == b"\0\1":
        # Lengths of labels, types and class have no octet that is a letter.
        return message[12 : 12 + len(question)].lower() == question
    return message[4:6] == b"\0\0" and message[3] & 0x0F not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)


def truncated(message: bytes) -> bool:
    """Whether there is more, by TCP."""
    return bool(message[2] & 0x02)


def read_message(message: bytes, kind: Kind) -> Answer[Any] | Alias | Fault:
    """What a response to a question of this kind says. RFC 1035 4.3.2, RFC 2308 2."""
    try:
        read = dns.message.from_wire(message, ignore_trailing=True)
        code = read.rcode()
        if code not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            return Fault(dns.rcode.to_text(code), edns=code in _NO_EDNS)
        if not isinstance(read, dns.message.QueryMessage):
            return MALFORMED
        chain = read.resolve_chaining()
    except dns.message.ChainTooLong:
        return ENDLESS
    except (dns.exception.DNSException, ValueError):
        return MALFORMED
    size = len(message)
    if chain.answer is not None:
        records = tuple(_READERS[kind](chain.answer))[:RECORDS]
        return Answer(Status.RECORDS, records, chain.minimum_ttl, octets=size)
    authority = {rrset.rdtype for rrset in read.authority}
    # Without a SOA record there is no telling how long it holds (RFC 2308 5).
    ttl = chain.minimum_ttl if dns.rdatatype.SOA in authority else 0
    if code == dns.rcode.NXDOMAIN:
        return Answer(Status.NO_NAME, ttl=ttl, reason="no such name", octets=size)
    if dns.rdatatype.SOA not in authority:
        if chain.cnames:
            return Alias(_text(chain.canonical_name), chain.minimum_ttl)
        if dns.rdatatype.NS in authority and not read.flags & dns.flags.AA:
            # To take it for an absence would bounce mail because of our own server's configuration.
            return Fault("a referral: this name server does not ask others")
    return Answer(Status.NO_RECORDS, ttl=ttl, reason=f"no {kind.name} records", octets=size)


def _text(name: dns.name.Name) -> str:
    """Printable ASCII, whatever its octets are; lower-case, without last dot; "" for the root."""
    return name.to_text(omit_final_dot=True).lower() if len(name) > 1 else ""


def _addresses(records: Iterable[Any]) -> Iterator[IPAddress]:
    for record in records:
        address = ip_address(record.address)
        yield (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


_READERS: Mapping[Kind, Callable[[Iterable[Any]], Iterable[Any]]] = {
    Kind.A: _addresses,
    Kind.AAAA: _addresses,
    Kind.PTR: lambda records: (_text(record.target) for record in records),
    Kind.MX: lambda records: sorted(MX(record.preference, _text(record.exchange)) for record in records),
    Kind.TXT: lambda records: (b"".join(record.strings) for record in records),
}
