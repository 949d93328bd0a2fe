"""TLS contexts for listeners and for hosts that mail goes to, and what is known of a TLS connection.

A listener's context holds its ticket keys and no certificate: it is made before the workers fork, so that a client may
resume on any of them, and tickets of one listener are of no use on another. Certificates stand in contexts of their
own, one for each set that a name may be answered with; `Entrance` chooses by the name that the client asks for (SNI).
So all of them are exchanged at once, tickets stay good, and a set that cannot be used changes nothing. Keys come from
memory: who gave up its privileges cannot read the files. Renegotiation and compression are off.
Not here: files (certificates.py). Raises ssl.SSLError and OSError. RFC 3207, 5929 (end-points), 6066 3 (SNI), 8996.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

MINIMUM = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
# Forward secrecy and authenticated encryption only. TLS 1.3's suites are not chosen by such a list.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class Pair(NamedTuple):
    """A certificate with its chain, and its key, as PEM. `names` are those it is for, lower case; `kind` is the type
    of its key, of which a server has one for each name; `end_point` is its hash for channel bindings (RFC 5929 4.1).
    `file` is where it came from, `expires` seconds since the epoch."""

    chain: bytes
    key: bytes
    names: tuple[str, ...]
    kind: str
    end_point: bytes
    file: str
    expires: float


class Demands(NamedTuple):
    """What a listener wants of a handshake. `client`: whether a client is asked for a certificate, signed by one of
    `client_ca` (PEM)."""

    minimum: Literal["1.2", "1.3"] = "1.2"
    ciphers: str = CIPHERS
    client: Literal["off", "optional", "required"] = "off"
    client_ca: str = ""


VERIFY = {"off": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


class Certified(ssl.SSLContext):
    """A context with certificates: one for each type of key."""

    end_points: tuple[bytes, ...] = ()


class Entrance:
    """The context of a listener, and the certificates that it answers with."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self._names: Mapping[str, Certified] = {}
        self._default: Certified | None = None

    def use(self, demands: Demands, pairs: Sequence[Pair]) -> None:
        """Answers with these from now on; where they cannot be used, with those before. The first is for clients that
        ask for no name, or for an unknown one. Sessions and handshakes that have begun keep theirs."""
        made: dict[tuple[Pair, ...], Certified] = {}
        names: dict[str, Certified] = {}
        for name, chosen in choose(pairs).items():
            if chosen not in made:
                made[chosen] = _certify(demands, chosen)
            names[name] = made[chosen]
        _demand(self.context, demands)
        self._names = names
        self._default = names[""]
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        """Called for each handshake, also without a name."""
        found = self._default
        if name:
            lowered = name.lower()
            found = self._names.get(lowered) or self._names.get(f"*.{lowered.partition('.')[2]}") or found
        if found is not None:
            connection.context = found


def choose(pairs: Sequence[Pair]) -> dict[str, tuple[Pair, ...]]:
    """The pairs for each name, the first of each type of key; under "" the default, the first pair with those of other
    types that are for its first name too."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair.names))
    chosen = {name: _first_of_each_kind([pair for pair in pairs if name in pair.names]) for name in names}
    chosen[""] = _first_of_each_kind([pairs[0], *(chosen[pairs[0].names[0]] if pairs[0].names else ())])
    return chosen


def _first_of_each_kind(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    return tuple({pair.kind: pair for pair in reversed(pairs)}.values())


def _certify(demands: Demands, pairs: Sequence[Pair]) -> Certified:
    context = Certified(ssl.PROTOCOL_TLS_SERVER)
    _demand(context, demands)
    if demands.client_ca:
        context.load_verify_locations(cadata=demands.client_ca)
    for pair in pairs:
        load(context, pair.chain, pair.key)
    context.end_points = tuple(dict.fromkeys(pair.end_point for pair in pairs))
    return context


def load(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Gives a context a certificate and its key, from memory."""
    memory = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(memory, chain + b"\n" + key)
        # An encrypted key would ask at the terminal; an unattended server cannot answer.
        context.load_cert_chain(f"/proc/self/fd/{memory}", password=_no_password)
    finally:
        os.close(memory)


def _demand(context: ssl.SSLContext, demands: Demands) -> None:
    """Of the listener's context and of those with certificates: a connection takes some from either."""
    context.minimum_version = MINIMUM[demands.minimum]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_ciphers(demands.ciphers)
    context.verify_mode = VERIFY[demands.client]


def bare_context() -> ssl.SSLContext:
    """The context of a listener-to-be, for an Entrance: ticket keys, no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 1  # a client of mail comes back on one connection at a time; two tickets cost twice
    return context


def server_context(certificate: Path, key: Path, minimum: Literal["1.2", "1.3"] = "1.2") -> ssl.SSLContext:
    """A context with one certificate, from files. `certificate` is a PEM chain, leaf first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _demand(context, Demands(minimum))
    context.load_cert_chain(certificate, key, password=_no_password)
    return context


def client_context(verify: bool, minimum: str = "1.2", ca_file: Path | None = None) -> ssl.SSLContext:
    """A context for hosts that mail goes to. `verify`: certificate and name are checked, against the certificates of
    `ca_file` or the system's. Without, any certificate will do: opportunistic TLS is for those who only listen."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = MINIMUM[minimum]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca_file is not None:
        context.load_verify_locations(ca_file)
    else:
        context.load_default_certs()
    return context


def _no_password() -> str:
    raise ssl.SSLError("the key is encrypted; store it without a passphrase")


def describe(connection: ssl.SSLObject) -> str:
    """Version and cipher as the Received field shows them, such as "TLSv1.3 TLS_AES_256_GCM_SHA384"."""
    cipher = connection.cipher()
    return f"{connection.version()} {cipher[0]}" if cipher else ""


def end_points(context: ssl.SSLContext) -> tuple[bytes, ...]:
    """What channels may be bound to: a client sees one of the certificates, which one is not known here."""
    return context.end_points if isinstance(context, Certified) else ()


def identity(connection: ssl.SSLObject) -> str:
    """Whom a client's certificate names, if it showed one and that was verified: its mail address, else its common
    name; "" without. Also for a session that was resumed."""
    shown: Mapping[str, Any] = connection.getpeercert() or {}
    addresses = [value for kind, value in shown.get("subjectAltName", ()) if kind == "email"]
    common = [value for part in shown.get("subject", ()) for kind, value in part if kind == "commonName"]
    return str(next(iter((*addresses, *common)), ""))
