"""What a configuration may say, but seldom means: lines for people, as `check` shows them.

In: a configuration without errors. Out: one line for each thing, in the order of CHECKS, a function for each subject.
Nothing is refused for it, and the machine is not asked. Not here: what is wrong (config_values, config_conflicts).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .config_conflicts import is_local, serves
from .config_outgoing import Lmtp, Smtp
from .config_tables import Config
from .config_values import Inet

# Bits of a network, by version of IP: what has fewer is nobody's own. Private ones have 8 (10.0.0.0/8) or 7 (fc00::/7).
WIDE = {4: 8, 6: 7}

# Where systems keep the authorities that sign for anybody.
PUBLIC_AUTHORITIES = tuple(
    map(
        Path,
        (
            "/etc/ssl/certs/ca-certificates.crt",
            "/etc/ssl/cert.pem",
            "/etc/ssl/ca-bundle.pem",
            "/etc/pki/tls/certs/ca-bundle.crt",
            "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        ),
    )
)


def warnings(config: Config) -> list[str]:
    """What is allowed, but seldom meant."""
    return [line for check in CHECKS for line in check(config)]


def _check_domains(config: Config) -> Iterator[str]:
    if not config.domain:
        relays = bool(config.relay.networks or config.auth.stores)
        yield f"there is no [[domain]]: {'no mailbox is served here' if relays else 'every recipient is refused'}"
    if not config.postmaster and any(domain.name != "*" for domain in config.domain):
        yield "postmaster is not set: every domain must have one who is read (RFC 5321 4.5.1)"


def _check_spool(config: Config) -> Iterator[str]:
    if config.spool.durability == "none":
        yield 'spool.durability is "none": acknowledged mail is lost when the machine stops'


def _check_catch_all(config: Config) -> Iterator[str]:
    for row in config.domain:
        if row.catch_all and row.recipients == "any":
            yield f'[[domain]] {row.name}: catch_all gets nothing: recipients is "any", so no mailbox is unknown'


def _check_use(config: Config) -> Iterator[str]:
    """What nothing leads to."""
    used = {config.relay.transport, *(row.transport for row in config.domain), *(row.transport for row in config.route)}
    for name in config.transport:
        if name not in used:
            yield f"nothing uses [transport.{name}]"
    for route in config.route:
        for domain in config.domain:
            if not route.domain.startswith("*") and serves(domain.name, route.domain):
                yield f"[[route]] {route.domain} is never used: [[domain]] {domain.name} serves it"


def _check_relay(config: Config) -> Iterator[str]:
    """Who may send anywhere."""
    for network in config.relay.networks:
        if network.prefixlen < WIDE[network.version]:
            yield f"relay.networks: {network} makes this an open relay: anybody may send to any domain"
    for row in config.domain:
        if row.name == "*" and isinstance(config.transport[row.transport], Smtp):
            way = f"[transport.{row.transport}]"
            yield f"[[domain]] {row.name} makes this an open relay: whatever comes goes on by {way}"
    if not any(network.is_loopback for network in config.relay.networks):
        return
    for listener in config.listener:
        for address in listener.address:
            if listener.role == "mx" and isinstance(address, Inet) and is_local(address):
                yield (
                    f"{address}: programs of this machine may send to any domain over this mx listener, and so may "
                    "everybody whom a proxy or a tunnel brings there"
                )


def _check_ways(config: Config) -> Iterator[str]:
    everything = [*(row.name for row in config.domain), *(route.domain for route in config.route)]
    if config.domain and not config.relay.transport and "*" not in everything:
        yield "nothing takes mail to other domains: senders there are not told what fails (set relay.transport)"
    for name, way in config.transport.items():
        if isinstance(way, Lmtp) and not is_local(way.address):
            yield f"[transport.{name}]: mail crosses the network to {way.address} in clear"
    if config.dns.allow_loopback:
        yield "dns.allow_loopback is for tests: whoever has a domain can have mail sent to this machine"


def _check_listeners(config: Config) -> Iterator[str]:
    for listener in config.listener:
        where = ", ".join(map(str, listener.address))
        if listener.role == "submission" and not config.auth.stores:
            yield f"{where}: nobody can authenticate ([auth] names no users), so submission takes no mail"
        if listener.tls == "off" and not all(map(is_local, listener.address)):
            yield f"{where}: mail crosses the network in clear (tls is off)"
        if listener.client_ca is not None and _is_public(listener.client_ca):
            yield f"{where}: client_ca {listener.client_ca} is for servers of anybody, not for users of yours"
        if listener.role == "mx" and listener.client_certificate == "optional":
            yield (
                f"{where}: hosts that show a certificate of another authority than client_ca cannot send mail here "
                '(client_certificate is "optional")'
            )


def _check_customers(config: Config) -> Iterator[str]:
    for customer in config.customer:
        for network in customer.networks:
            if network.prefixlen < WIDE[network.version]:
                yield f"[[customer]] networks: {network} lets anybody ask for the mail of {', '.join(customer.domains)}"


def _is_public(path: Path) -> bool:
    return path.name == "cacert.pem" or path.resolve() in [known.resolve() for known in PUBLIC_AUTHORITIES]


CHECKS = (
    _check_domains,
    _check_spool,
    _check_catch_all,
    _check_use,
    _check_relay,
    _check_ways,
    _check_listeners,
    _check_customers,
)
