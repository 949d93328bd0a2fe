"""What one table of the configuration must know of another: names that lead nowhere, keys that contradict each other.

In: the raw document, or the models made of it; tables are mappings or models here, and may hold anything. The raw
document is asked too, so that these answers stand among the errors of single keys. Out: a place and what is wrong
there, in no order. Nothing is raised, whatever the document holds: a value that is no value of its key is passed over,
for its own error says so.
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .address import parse_address
from .config_values import Endpoint, Inet, as_list, check_domain, check_hostname, parse_endpoint, parse_hop, parse_ip
from .toml_lines import Place

Conflicts = Iterator[tuple[Place, str]]

# What a password may go over, and what makes no sense where hosts are found by MX.
VERIFIED = ("verified", "starttls", "implicit")
SMARTHOST_ONLY = ("starttls", "implicit")
# Keys that say how a smarthost is spoken to, or that only a transport of type smtp knows.
LOGIN = ("user", "password_file")
SMTP_ROUTE = ("tls", "tls_minimum", "ignore")
# Where passwords may be, and how a token may be checked: one of each. What a client of an introspection has.
PASSWORDS = ("users_file", "sql", "dovecot")
TOKENS = ("introspection", "keys_file", "keys_url")
CLIENT = ("client_id", "client_secret_file")
# Why a route has no say in how many deliveries there are at once.
CONCURRENCY = {"pipe": "has a concurrency of its own", "odmr": "is of type odmr, which has one connection for a domain"}


def find_conflicts(config: object) -> Conflicts:
    """Where it is wrong, and what."""
    yield from _listener_conflicts(config)
    yield from _domain_conflicts(config)
    yield from _rule_conflicts(config)
    yield from _transport_conflicts(config)
    yield from _route_conflicts(config)
    yield from _relay_conflicts(config)
    yield from _customer_conflicts(config)
    yield from _auth_conflicts(config)


def nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant, as the end of a sentence."""
    near = difflib.get_close_matches(name, known, 1)
    return f'; did you mean "{near[0]}"?' if near else ""


def serves(pattern: str, domain: str) -> bool:
    """Whether the name of a row is that of a domain."""
    return pattern in ("*", domain) or (pattern.startswith("*.") and domain.endswith(pattern[1:]))


def _get(table: object, key: str) -> Any:
    return table.get(key) if isinstance(table, Mapping) else getattr(table, key, None)


def _given(table: object, key: str) -> bool:
    """Whether the file says it; a model knows which of its values are defaults."""
    return key in table if isinstance(table, Mapping) else key in getattr(table, "model_fields_set", ())


def _items(table: object, key: str) -> Iterator[tuple[int, Any]]:
    value = _get(table, key)
    yield from enumerate(value if isinstance(value, list | tuple) else ())


def _transports(config: object) -> Mapping[str, Any]:
    found = _get(config, "transport")
    return found if isinstance(found, Mapping) else {}


def _valid(parse: Callable[[Any], Any], value: object) -> Any:
    try:
        return parse(value)
    except (ValueError, TypeError, AttributeError):
        return None


def _listener_conflicts(config: object) -> Conflicts:
    taken: set[Endpoint] = set()
    for i, listener in _items(config, "listener"):
        if _get(listener, "tls") in ("starttls", "implicit") and _get(config, "tls") is None:
            yield ("listener", i, "tls"), "there is no [tls] table that names a certificate"
        yield from _client_certificate_conflicts(config, i, listener)
        yield from _login_conflicts(config, i, listener)
        for address in as_list(_get(listener, "address")):
            endpoint = _valid(parse_endpoint, address)
            port = _get(endpoint, "port")
            if port == 25 and _get(listener, "role") == "lmtp":
                yield ("listener", i, "address"), "LMTP never runs on port 25 (RFC 2033 5)"
            if endpoint in taken:
                yield ("listener", i, "address"), f"{endpoint} stands twice"
            if endpoint is not None and port != 0:
                taken.add(endpoint)


def _client_certificate_conflicts(config: object, i: int, listener: object) -> Conflicts:
    asked = _get(listener, "client_certificate") in ("optional", "required")
    if asked and not _get(listener, "client_ca"):
        yield ("listener", i, "client_certificate"), "there is no client_ca, whose signatures would be believed"
    elif _get(listener, "client_ca") and (_get(listener, "tls") == "off" or _get(config, "tls") is None):
        yield ("listener", i, "client_ca"), "certificates are shown in TLS only, and tls is off"


def _login_conflicts(config: object, i: int, listener: object) -> Conflicts:
    in_clear = _get(listener, "auth_clear") is True
    endpoints = [_valid(parse_endpoint, address) for address in as_list(_get(listener, "address"))]
    if in_clear and not all(is_local(endpoint) for endpoint in endpoints if endpoint is not None):
        yield ("listener", i, "auth_clear"), "passwords would cross the network in clear"
    # Role submission has it by default, and takes no mail then: a warning says so.
    if _get(listener, "auth") is not True or not _given(listener, "auth"):
        return
    if not any(_get(_get(config, "auth"), key) for key in (*PASSWORDS, "oauth")):
        yield ("listener", i, "auth"), "nobody can log in: [auth] names no users"
    if not in_clear and (_get(listener, "tls") == "off" or _get(config, "tls") is None):
        yield ("listener", i, "auth"), "nobody can log in without TLS, and tls is off"


def is_local(endpoint: Endpoint) -> bool:
    """Whether what is said there stays on this machine."""
    if not isinstance(endpoint, Inet) or endpoint.host == "localhost":
        return True
    ip = _valid(ipaddress.ip_address, endpoint.host)
    return ip is not None and bool(ip.is_loopback)


def _domain_conflicts(config: object) -> Conflicts:
    names: list[str | None] = []
    for i, domain in _items(config, "domain"):
        yield from _no_transport(config, ("domain", i, "transport"), _get(domain, "transport"))
        yield from _lookup_conflicts(config, ("domain", i, "recipients"), _get(domain, "recipients"))
        name = _valid(check_domain, _get(domain, "name"))
        if name is not None and name in names:
            yield ("domain", i, "name"), f"{name} stands twice"
        names.append(name)
    at = _valid(lambda text: parse_address(text).domain, _get(config, "postmaster"))
    if at and None not in names and not any(serves(name, at) for name in names if name):
        yield ("postmaster",), f"no [[domain]] serves {at}"

    for i, domain in _items(config, "domain"):
        at = _valid(lambda text: parse_address(text).domain, _get(domain, "catch_all"))
        if at and None not in names and not any(serves(name, at) for name in names if name):
            yield ("domain", i, "catch_all"), f"no [[domain]] serves {at}"


def _rule_conflicts(config: object) -> Conflicts:
    names: list[object] = []
    for i, rule in _items(config, "rule"):
        name = _get(rule, "name") or str(i + 1)
        if name in names:
            yield ("rule", i, "name"), f"a rule before it is called {name}"
        names.append(name)
        if _get(rule, "action") == "allow" and _get(rule, "text"):
            yield ("rule", i, "text"), "nobody is told anything who is let in"


def _lookup_conflicts(config: object, place: Place, source: object) -> Conflicts:
    """Who is asked for recipients."""
    if name := _get(source, "sql"):
        known = _get(config, "sql") or {}
        if isinstance(name, str) and isinstance(known, Mapping) and name not in known:
            yield place, f"there is no [sql.{name}]{nearest(name, known)}"
    elif name := _get(source, "ask"):
        yield from _no_transport(config, place, name)
        kind = _get(_transports(config).get(name) if isinstance(name, str) else None, "type")
        if isinstance(kind, str) and kind not in ("smtp", "lmtp"):
            yield place, f"[transport.{name}] is of type {kind}; smtp and lmtp have a server that can be asked"


def _no_transport(config: object, place: Place, name: object) -> Conflicts:
    transports = _get(config, "transport") or {}
    if isinstance(name, str) and isinstance(transports, Mapping) and name not in transports:
        yield place, f"there is no [transport.{name}]{nearest(name, transports)}"


def _transport_conflicts(config: object) -> Conflicts:
    for name, transport in _transports(config).items():
        place = ("transport", name)
        kind = _get(transport, "type")
        if kind == "smtp":
            yield from _smtp_conflicts(place, transport)
        for key in ("smarthost", "address"):
            endpoint = _valid(parse_hop, _get(transport, key))
            if endpoint is not None and endpoint in _own(config):
                yield (*place, key), f"{endpoint} is this server itself"


def _smtp_conflicts(place: Place, transport: object) -> Conflicts:
    by_mx = not _get(transport, "smarthost")
    user, file = (bool(_get(transport, key)) for key in LOGIN)
    tls = _get(transport, "tls")
    for key in LOGIN:
        if by_mx and _get(transport, key):
            yield (*place, key), "a login is for a smarthost, and none is named"
    if not by_mx and user != file:
        yield (*place, "user" if user else "password_file"), f"there is no {'password_file' if user else 'user'}"
    if by_mx and tls in SMARTHOST_ONLY:
        yield (*place, "tls"), f'"{tls}" is for a smarthost, and none is named'
    elif user and isinstance(tls, str) and tls not in VERIFIED:
        yield (*place, "tls"), f'a password goes over a verified connection only, and "{tls}" is none'
    addresses = [_valid(parse_ip, text) for text in as_list(_get(transport, "source") or ())]
    for version in (4, 6):
        if sum(_get(address, "version") == version for address in addresses) > 1:
            yield (*place, "source"), f"more than one IPv{version} address"


def _own(config: object) -> Iterator[Inet]:
    """Where we listen. A wildcard is any of our addresses, of which our name is one."""
    hostname = _valid(check_hostname, _get(config, "hostname"))
    for _, listener in _items(config, "listener"):
        for address in as_list(_get(listener, "address")):
            endpoint = _valid(parse_endpoint, address)
            if isinstance(endpoint, Inet) and endpoint.port:
                yield endpoint
                if _get(_valid(ipaddress.ip_address, endpoint.host), "is_unspecified"):
                    names = (hostname, "localhost", "127.0.0.1", "::1")
                    yield from (Inet(name, endpoint.port) for name in names if name)


def _route_conflicts(config: object) -> Conflicts:
    names: list[str] = []
    for i, route in _items(config, "route"):
        to = _get(route, "transport")
        yield from _no_transport(config, ("route", i, "transport"), to)
        name = _valid(check_domain, _get(route, "domain"))
        if name is not None and name in names:
            yield ("route", i, "domain"), f"{name} stands twice"
        names.append(name)
        transport = _transports(config).get(to) if isinstance(to, str) else None
        if transport is None:
            continue
        kind, tls = _get(transport, "type"), _get(route, "tls")
        for key in SMTP_ROUTE:
            if kind != "smtp" and _given(route, key):
                yield ("route", i, key), f"[transport.{to}] is of type {kind}; this is for smtp"
        if kind not in ("smtp", "lmtp") and _given(route, "concurrency"):
            why = CONCURRENCY.get(kind, f"is of type {kind}, which delivers in batches")
            yield ("route", i, "concurrency"), f"[transport.{to}] {why}"
        if kind != "smtp" or not _given(route, "tls"):
            continue
        if _get(transport, "tls") == "implicit":
            yield ("route", i, "tls"), f"[transport.{to}] has TLS from the first octet; it cannot be changed here"
        elif _get(transport, "user") and tls != "verified":
            yield ("route", i, "tls"), f'[transport.{to}] sends a password, and "{tls}" is not verified'


def _relay_conflicts(config: object) -> Conflicts:
    relay = _get(config, "relay")
    to = _get(relay, "transport")
    if to:
        yield from _no_transport(config, ("relay", "transport"), to)
    everything = any(_valid(check_domain, _get(route, "domain")) == "*" for _, route in _items(config, "route"))
    if _get(relay, "networks") and not (to or everything):
        yield (
            ("relay", "networks"),
            "they may send to any domain, and nothing takes mail there; set relay.transport",
        )


def _customer_conflicts(config: object) -> Conflicts:
    """Mail that nobody can fetch would be returned when its lifetime is over."""
    customers = [customer for _, customer in _items(config, "customer")]
    for i, customer in enumerate(customers):
        if not (_get(customer, "networks") or _get(customer, "users")):
            yield ("customer", i), "nobody is this customer: there are neither networks nor users"
    fetching = [i for i, listener in _items(config, "listener") if _get(listener, "role") == "odmr"]
    if customers and _get(_get(config, "spool"), "durability") == "none":
        yield ("spool", "durability"), "mail that is kept in memory only cannot be asked for by a [[customer]]"
    if not customers:
        for i in fetching:
            yield ("listener", i, "role"), "there is no [[customer]] who could fetch mail"
    for name, transport in _transports(config).items():
        if _get(transport, "type") == "odmr" and not (customers and fetching):
            missing = "listener of role odmr" if customers else "[[customer]]"
            yield ("transport", name, "type"), f"nobody can fetch its mail: there is no {missing}"


def _auth_conflicts(config: object) -> Conflicts:
    auth = _get(config, "auth")
    for key in [key for key in PASSWORDS if _get(auth, key)][1:]:
        yield ("auth", key), "passwords come from one place: users_file, [auth.sql] or [auth.dovecot]"
    if sql := _get(auth, "sql"):
        name, known = _get(sql, "database"), _get(config, "sql") or {}
        if isinstance(name, str) and isinstance(known, Mapping) and name not in known:
            yield ("auth", "sql", "database"), f"there is no [sql.{name}]{nearest(name, known)}"
        if isinstance(query := _get(sql, "query"), str) and ":name" not in query and ":local" not in query:
            yield ("auth", "sql", "query"), "it does not ask for a user: there is neither :name nor :local in it"
    if oauth := _get(auth, "oauth"):
        yield from _oauth_conflicts(oauth)


def _oauth_conflicts(oauth: object) -> Conflicts:
    place = ("auth", "oauth")
    ways = [key for key in TOKENS if _get(oauth, key)]
    if len(ways) != 1:
        yield place, "one of introspection, keys_file and keys_url says how a token is checked"
    client = [bool(_get(oauth, key)) for key in CLIENT]
    if client[0] != client[1]:
        yield (*place, CLIENT[not client[0]]), f"there is no {CLIENT[client[0]]}"
    if ways and ways[0] != "introspection":
        for key in ("issuer", "audience"):
            if not _get(oauth, key):
                yield place, f"without {key} a token that was made for somebody else would do"
