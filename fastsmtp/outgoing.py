"""The ways out of one worker: transports and routes, made from the configuration.

In: a configuration, and what the supervisor made before the fork (passwords, the runner of commands). Out: `Ways`: the
transports by name, `route` for the queue, and what sessions must know of what comes behind them: what the next host of
one of our domains takes, whether a message can be kept to verified connections. Routes that say how their hosts are
spoken to, or how many at once, have a transport of their own, shared by those that say the same; its name is that of
the transport and of the first such route. All that goes by DNS shares one cache. After a reload what is configured as
before is taken over from the ways before, with its connections and all it has heard.
Not here: what transports do, who may send. Raises OSError and ssl.SSLError for files that cannot be used.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Protocol

from . import config as tables
from . import local_socket
from .access import aliases_of, mailboxes_of
from .address import Address, parse_address
from .config import AheadLookup, Config, Discard, Endpoint, Lmtp, Maildir, Odmr, Pipe, Route, Smtp, SqlLookup, Unix
from .delivery import Transport
from .delivery import discard as discard_transport
from .delivery import maildir as maildir_transport
from .delivery import odmr as odmr_transport
from .delivery import pipe as pipe_transport
from .delivery import smtp as smtp_transport
from .delivery.ahead import KEPT
from .delivery.client_tls import Mode, Tls
from .delivery.hosts import Finder
from .delivery.login import Credentials
from .delivery.offers import Offers, Terms
from .delivery.pool import Limits
from .dns import Resolver
from .domains import Domain, Domains, Lookup
from .list_watch import folder_of
from .lists import Lists
from .log import Log
from .lookups import Lookups
from .metrics import Counter
from .nameservers import NameServers
from .routes import Routes
from .seat import Settings
from .sql import Database
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


class Closable(Protocol):
    """What is to be ended when nobody needs it any more."""

    async def close(self) -> None: ...


class _Found:
    """How hosts are found."""

    def __init__(self, config: Config) -> None:
        self.by = (config.dns, config.hostname, config.relay.own_addresses)
        self._nameservers = NameServers(config.dns.servers)
        self._resolver = Resolver(self._nameservers.ask)
        self.finder = Finder(
            self._resolver,
            config.hostname,
            own_addresses=config.relay.own_addresses,
            allow_loopback=config.dns.allow_loopback,
        )

    async def close(self) -> None:
        await self._resolver.close()
        await self._nameservers.close()


class _Turned:
    """The folder of the sockets of servers that fetch their mail."""

    def __init__(self, data_dir: Path) -> None:
        self.folder = local_socket.open_turned(data_dir)

    async def close(self) -> None:
        os.close(self.folder)


class _Runner:
    """Where the runner of commands is asked. It ends when all who could ask have closed this."""

    def __init__(self, asks: socket.socket) -> None:
        self.asks = asks

    async def close(self) -> None:
        self.asks.close()


class Ways:
    """Made on the loop, then built. `identity` is a short word of the data directory. `log` is for what transports see.
    `asks` is where the runner of commands is asked, if it is another than that of the ways `before`."""

    domains: Domains
    route: Callable[[Address], tuple[str, Address]]

    def __init__(
        self,
        settings: Settings,
        worker: int,
        log: Log,
        identity: str,
        asks: socket.socket | None = None,
        before: Ways | None = None,
        lists: Lists | None = None,
        databases: Mapping[str, Database] | None = None,
        count: Callable[[Counter, int], None] = lambda _counter, _n: None,
    ) -> None:
        config = self._config = settings.config
        self._passwords = settings.passwords
        self._worker = worker
        self._log = log
        self._identity = identity
        self._lists = lists or Lists(folder_of(config))
        self._lookups = Lookups(databases or {}, self._make_asked, log, count)
        by = (config.dns, config.hostname, config.relay.own_addresses)
        self._found: _Found = before._found if before is not None and before._found.by == by else _Found(config)
        self._turned: _Turned | None = before._turned if before is not None else None
        self._runner: _Runner | None = before._runner if before is not None else None
        if asks is not None:
            self._runner = _Runner(asks)
        self._before = before
        self._made: dict[str, tuple[object, Transport]] = {}  # with all that each was made of
        self.transports: dict[str, Transport] = {}
        self._own_ways: dict[tuple[str, Tls | None, int], str] = {}  # names of transports that routes have

    def build(self) -> None:
        """Raises OSError: what was made until then is among the parts."""
        config = self._config
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
        self._before = None

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

    @property
    def demands_tls(self) -> bool:
        """Whether mail goes to some hosts of others over TLS only."""
        return any(isinstance(way, smtp_transport.Smtp) and way.demands_tls for way in self.transports.values())

    def waits(self, domain: str) -> bool:
        """Whether the mail of a domain waits until its server comes for it."""
        name, _ = self.route(Address("anybody", domain))  # postmaster may be elsewhere
        return isinstance(self._config.transport.get(name.partition("/")[0]), Odmr)

    def parts(self) -> list[Closable]:
        """All that is to be closed some day, in this order; some of it may be shared with other ways."""
        others = (self._lookups, self._found, self._turned, self._runner)
        return [*self.transports.values(), *(one for one in others if one is not None)]

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
        return Domain(
            row.name,
            row.transport,
            row.recipients if isinstance(row.recipients, tuple) else None,
            row.case_sensitive,
            self._next_hop(row.transport),
            listed=mailboxes_of(row, self._lists),
            ask=self._lookup_of(row),
            detail=row.detail,
            catch_all=parse_address(row.catch_all) if row.catch_all else None,
            aliases=aliases_of(row, self._lists),
        )

    def _lookup_of(self, row: tables.Domain) -> Lookup | None:
        """Who else is asked for its mailboxes."""
        known = row.recipients
        return self._lookups.make(known, row.case_sensitive) if isinstance(known, SqlLookup | AheadLookup) else None

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
            self.transports[name] = self._make(route.transport, section, concurrency, tls, name)
        return name

    def _make(
        self, name: str, section: tables.Transport, concurrency: int, tls: Tls | None = None, own_name: str = ""
    ) -> Transport:
        """That of the ways before if it would be the same. `tls`: in place of what the section says; `own_name` is
        that of a route's transport."""
        own_name = own_name or name
        made_of = (
            section, concurrency, tls, self._config.hostname, self._passwords.get(name), self._found, self._runner
        )  # fmt: skip
        same = self._before._made.get(own_name) if self._before is not None else None
        is_file = isinstance(section, Smtp) and section.ca_file is not None  # which may have changed
        made = same[1] if same is not None and same[0] == made_of and not is_file else None
        made = made or self._make_anew(name, section, concurrency, tls)
        self._made[own_name] = (made_of, made)
        return made

    def _make_asked(self, name: str) -> smtp_transport.Smtp:
        """For call-ahead: connections of its own."""
        transport = self._make_anew(name, self._config.transport[name], self._config.queue.concurrency, None, KEPT)
        assert isinstance(transport, smtp_transport.Smtp)
        return transport

    def _make_anew(
        self,
        name: str,
        section: tables.Transport,
        concurrency: int,
        tls: Tls | None,
        limits: Limits | None = None,
    ) -> Transport:
        config = self._config
        match section:
            case Discard():
                return discard_transport.Discard()
            case Maildir():
                return maildir_transport.Maildir(
                    section.path, self._worker, config.hostname, self._identity, section.sync
                )
            case Pipe():
                assert self._runner is not None
                return pipe_transport.Pipe(
                    name, section.command[0], self._runner.asks, config.data_dir, section.concurrency,
                    crlf=section.crlf, fields=section.fields,
                )  # fmt: skip
            case Lmtp():
                return self._make_lmtp(section, concurrency, limits)
            case Odmr():
                return self._make_odmr(section)
            case Smtp():
                tls = tls or Tls(MODES[section.tls], section.tls_minimum)
                return self._make_smtp(name, section, concurrency, tls, limits)

    def _make_lmtp(self, section: Lmtp, concurrency: int, limits: Limits | None) -> Transport:
        terms = Terms(
            self._config.hostname,
            lmtp=True,
            eight_bit=section.eight_bit,
            patience=smtp_transport.patience_within(section.timeout),
        )
        to = section.address
        way = to.path if isinstance(to, Unix) else smtp_transport.ToHost(self._found.finder, to.host, to.port)
        return smtp_transport.Smtp(way, terms, log=self._log, concurrency=concurrency, limits=limits)

    def _make_odmr(self, section: Odmr) -> Transport:
        if self._turned is None:
            self._turned = _Turned(self._config.data_dir)
        terms = Terms(self._config.hostname, patience=smtp_transport.patience_within(section.timeout))
        return odmr_transport.OnDemand(partial(local_socket.find_turned, self._turned.folder), terms, self._log)

    def _make_smtp(self, name: str, section: Smtp, concurrency: int, tls: Tls, limits: Limits | None) -> Transport:
        credentials = None
        if section.user:
            mechanisms = {"mechanisms": ("XOAUTH2",)} if section.auth == "xoauth2" else {}
            credentials = Credentials(section.user, self._passwords[name], **mechanisms)
        terms = Terms(
            section.helo or self._config.hostname,
            credentials=credentials,
            eight_bit=section.eight_bit,
            bare=section.bare,
            patience=smtp_transport.patience_within(section.timeout),
        )
        host = section.smarthost
        finder = self._found.finder
        way = smtp_transport.ToHost(finder, host.host, host.port) if host else smtp_transport.ByMx(finder)
        return smtp_transport.Smtp(
            way,
            terms,
            log=self._log,
            tls=tls,
            ca_file=section.ca_file,
            source=section.source,
            concurrency=concurrency,
            limits=limits,
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
