"""The ways out of one worker: transports and routes, made from the configuration.

In: a configuration, and what the supervisor made before the fork (passwords, the runner of commands). Out: `Ways`: the
transports by name, `route` for the queue, and what sessions must know of what comes behind them: what the next host of
one of our domains takes, whether a message can be kept to verified connections. Routes that say how their hosts are
spoken to, or how many at once, have a transport of their own, shared by those that say the same; its name is that of
the transport and of the first such route. All that goes by DNS shares one cache.
Not here: what transports do, who may send. Raises OSError and ssl.SSLError for files that cannot be used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from ipaddress import ip_address
from typing import Literal

from . import config as tables
from . import local_socket
from .address import Address, parse_address
from .config import Config, Discard, Endpoint, Lmtp, Maildir, Odmr, Pipe, Route, Smtp, Unix
from .delivery import Transport
from .delivery import discard as discard_transport
from .delivery import maildir as maildir_transport
from .delivery import odmr as odmr_transport
from .delivery import pipe as pipe_transport
from .delivery import smtp as smtp_transport
from .delivery.client_tls import Mode, Tls
from .delivery.hosts import Finder
from .delivery.login import Credentials
from .delivery.offers import Offers, Terms
from .dns import Resolver
from .domains import Domain, Domains
from .log import Log
from .nameservers import NameServers
from .routes import Routes
from .seat import Seat
from .verdict import NextHop

# What the words of a configuration mean to a transport.
MODES: Mapping[str, Mode] = {
    "opportunistic": "opportunistic",
    "required": "required",
    "verified": "verified",
    "starttls": "verified",
    "implicit": "implicit",
    "off": "off",
}
VERIFIED = ("verified", "implicit")


class Ways:
    """Made on the loop. `identity` is a short word of the data directory. `log` is for what transports see."""

    def __init__(self, config: Config, seat: Seat, log: Log, identity: str) -> None:
        self._config = config
        self._seat = seat
        self._log = log
        self._identity = identity
        self._nameservers = NameServers(config.dns.servers)
        self._resolver = Resolver(self._nameservers.ask)
        self._finder = Finder(
            self._resolver,
            config.hostname,
            own_addresses=config.relay.own_addresses,
            allow_loopback=config.dns.allow_loopback,
        )
        self.transports: dict[str, Transport] = {}
        self._turned = -1  # the folder of the sockets of servers that fetch their mail
        self._own_ways: dict[tuple[str, Tls | None, int], str] = {}  # names of transports that routes have
        for name, section in config.transport.items():
            self.transports[name] = self._make(name, section, config.queue.concurrency)
        ways = {route.domain: self._way_of(route) for route in config.route}
        self.domains = Domains(
            map(self._make_domain, config.domain),
            config.hostname,
            parse_address(config.postmaster) if config.postmaster else None,
        )
        # Where nothing leaves but by [[domain]], the queue asks the domains themselves.
        relays = bool(ways or config.relay.transport)
        self.route = Routes(self.domains, ways, config.relay.transport).route if relays else self.domains.route

    @property
    def any_octets(self) -> bool:
        """Whether all mail for our own domains ends in transports that take any octets."""
        return all(self.transports[row.transport].any_octets for row in self._config.domain)

    @property
    def keeps_tls(self) -> Literal["nobody", "strangers", "all"]:
        """For whose messages REQUIRETLS can be promised (RFC 8689)."""
        config = self._config
        if not all(self._is_kept(row.transport) for row in config.domain):
            return "nobody"
        others = {config.relay.transport, *(route.transport for route in config.route)} - {""}
        return "all" if all(map(self._is_kept, others)) else "strangers"

    def waits(self, domain: str) -> bool:
        """Whether the mail of a domain waits until its server comes for it."""
        name, _ = self.route(Address("anybody", domain))  # postmaster may be elsewhere
        return isinstance(self._config.transport.get(name.partition("/")[0]), Odmr)

    async def close(self) -> None:
        """Ends what was made here and is no transport's own; transports are closed before."""
        await self._resolver.close()
        await self._nameservers.close()
        if self._turned >= 0:
            os.close(self._turned)
            self._turned = -1

    def _is_kept(self, name: str) -> bool:
        """Whether its mail stays on this machine or goes to a host that is verified by name."""
        section = self._config.transport[name]
        if isinstance(section, Smtp):
            told = [tls_of(route, section) for route in self._config.route if route.transport == name]
            modes = [MODES[section.tls], *(tls.mode for tls in told if tls is not None)]
            return section.smarthost is not None and all(mode in VERIFIED for mode in modes)
        if isinstance(section, Lmtp):
            return _is_local(section.address)
        return not isinstance(section, Odmr)

    def _make_domain(self, row: tables.Domain) -> Domain:
        recipients = None if row.recipients == "any" else row.recipients
        return Domain(row.name, row.transport, recipients, row.case_sensitive, self._next_hop(row.transport))

    def _next_hop(self, name: str) -> Callable[[], NextHop | None] | None:
        """What the one host behind a transport takes, as far as that was heard; None where there is no such host."""
        section, transport = self._config.transport[name], self.transports[name]
        by_mx = isinstance(section, Smtp) and section.smarthost is None
        if not isinstance(section, Smtp | Lmtp) or by_mx or not isinstance(transport, smtp_transport.Smtp):
            return None
        bounces = section.eight_bit == "bounce"
        heard: tuple[Offers | None, NextHop | None] = (None, None)

        def next_hop() -> NextHop | None:
            nonlocal heard
            offers = transport.heard
            if offers is not heard[0]:
                heard = (offers, None if offers is None else read_offers(offers, bounces))
            return heard[1]

        return next_hop

    def _way_of(self, route: Route) -> str:
        """The name of the transport that serves a route, which is made where it is another than the one named there."""
        section = self._config.transport[route.transport]
        tls = tls_of(route, section) if isinstance(section, Smtp) else None
        if tls is None and not route.concurrency:
            return route.transport
        key = (route.transport, tls, route.concurrency)
        name = self._own_ways.get(key)
        if name is None:
            name = self._own_ways[key] = f"{route.transport}/{route.domain}"
            concurrency = route.concurrency or self._config.queue.concurrency
            self.transports[name] = self._make(route.transport, section, concurrency, tls)
        return name

    def _make(self, name: str, section: tables.Transport, concurrency: int, tls: Tls | None = None) -> Transport:
        """`tls`: in place of what the section says."""
        config = self._config
        match section:
            case Discard():
                return discard_transport.Discard()
            case Maildir():
                return maildir_transport.Maildir(
                    section.path, self._seat.index, config.hostname, self._identity, section.sync
                )
            case Pipe():
                assert self._seat.asks is not None
                return pipe_transport.Pipe(
                    name, section.command[0], self._seat.asks, config.data_dir, section.concurrency,
                    crlf=section.crlf, fields=section.fields,
                )  # fmt: skip
            case Lmtp():
                return self._make_lmtp(section, concurrency)
            case Odmr():
                return self._make_odmr(section)
            case Smtp():
                return self._make_smtp(name, section, concurrency, tls or Tls(MODES[section.tls], section.tls_minimum))

    def _make_lmtp(self, section: Lmtp, concurrency: int) -> Transport:
        terms = Terms(
            self._config.hostname,
            lmtp=True,
            eight_bit=section.eight_bit,
            patience=smtp_transport.patience_within(section.timeout),
        )
        to = section.address
        way = to.path if isinstance(to, Unix) else smtp_transport.ToHost(self._finder, to.host, to.port)
        return smtp_transport.Smtp(way, terms, log=self._log, concurrency=concurrency)

    def _make_odmr(self, section: Odmr) -> Transport:
        if self._turned < 0:
            self._turned = local_socket.open_turned(self._config.data_dir)
        terms = Terms(self._config.hostname, patience=smtp_transport.patience_within(section.timeout))
        return odmr_transport.OnDemand(partial(local_socket.find_turned, self._turned), terms, self._log)

    def _make_smtp(self, name: str, section: Smtp, concurrency: int, tls: Tls) -> Transport:
        credentials = None
        if section.user:
            mechanisms = {"mechanisms": ("XOAUTH2",)} if section.auth == "xoauth2" else {}
            credentials = Credentials(section.user, self._seat.passwords[name], **mechanisms)
        terms = Terms(
            section.helo or self._config.hostname,
            credentials=credentials,
            eight_bit=section.eight_bit,
            bare=section.bare,
            patience=smtp_transport.patience_within(section.timeout),
        )
        host = section.smarthost
        way = smtp_transport.ToHost(self._finder, host.host, host.port) if host else smtp_transport.ByMx(self._finder)
        return smtp_transport.Smtp(
            way,
            terms,
            log=self._log,
            tls=tls,
            ca_file=section.ca_file,
            source=section.source,
            concurrency=concurrency,
        )


def tls_of(route: Route, section: Smtp) -> Tls | None:
    """What a route makes of its transport's TLS; None: it stays as it is."""
    told = route.model_fields_set
    if not (told & {"tls", "tls_minimum"} or route.ignore):
        return None
    mode = MODES[route.tls if "tls" in told else section.tls]
    minimum = route.tls_minimum if "tls_minimum" in told else section.tls_minimum
    return Tls(mode, minimum, frozenset(route.ignore))


def read_offers(offers: Offers, bounces: bool) -> NextHop:
    """What a host takes, by its last answer to EHLO or LHLO. `bounces`: it is not sent what it has not offered."""
    return NextHop(offers.size, offers.eight_bit or not bounces, offers.utf8)


def _is_local(endpoint: Endpoint) -> bool:
    if isinstance(endpoint, Unix) or endpoint.host == "localhost":
        return True
    try:
        return ip_address(endpoint.host).is_loopback
    except ValueError:
        return False
