"""What a worker serves by one configuration: ways out, checks, and the service of each listener.

In: a configuration, and the `Tools` of the worker, which outlive it. Out: services for new sessions, and what queues
send by. After a reload a new generation is made, and may fail without harm: nothing is taken from the old one before
`adopt`. Sessions that began in the old one end in it; it is closed when the last of them is gone and nothing is sent by
its transports any more. Transports that are configured as before go over to the new generation, with what they know.
Not here: sockets and processes (server.py), who decides that there is a reload (supervisor.py). Raises OSError.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from . import local_socket
from .access import Exempt, make_aliases, make_rule_checks, make_verify_checks
from .address import NULL, Address, parse_address
from .aliases import Aliases, ExpansionError
from .colleagues import Colleagues
from .config import Listener, Unix
from .credentials import Authority
from .credentials.opening import open_authority
from .customers import Customers, Fetch, QueueRun
from .dsn import Reporter
from .lists import Lists
from .log import Log
from .memory_spool import MemorySpool
from .metrics import Counter
from .outgoing import Closable, Ways
from .policy import Check, Policy
from .policy.limits import Limits
from .policy.quota import Quota
from .policy.recipients import Recipients
from .policy.relay import Relay, Trust
from .policy.senders import Senders
from .reply import R421_NOT_TAKING_MAIL, R452_NO_ROOM, Reply
from .reporting import Reports
from .schedule import Schedule
from .seat import Seat, Settings
from .service import Service, Times
from .spool import Spool
from .sql import Database
from .submission import Handling
from .terms import Terms
from .tls import Entrance
from .verdict import Member, Stage

LOCAL = -1  # the number of the listener for programs of this machine, which no configuration names
LOCAL_RECIPIENTS = 10_000  # at least so many for them: their mail goes to all of them or to none, so in one message


@dataclass(frozen=True, slots=True)
class Tools:
    """What a worker has over all configurations. `identity` is a short word of the data directory; `keeper` its own
    spool; `entrances` the TLS contexts by their number in the seat; `lists` those that are open; `ending`: whether the
    worker is about to stop."""

    loop: asyncio.AbstractEventLoop
    log: Log
    seat: Seat
    now: Callable[[], float]
    identity: str
    keeper: Spool | MemorySpool
    colleagues: Colleagues
    entrances: list[Entrance]
    lists: Lists
    ending: Callable[[], bool]

    def count(self, counter: Counter, n: int) -> None:
        self.seat.shared.add(self.seat.index, counter, n)


class Generation:
    """Made on the loop, then built. `before` is the generation that it follows; `asks` is where the runner of commands
    is asked, if it is another than before."""

    aliases: Aliases | None

    def __init__(
        self,
        settings: Settings,
        tools: Tools,
        asks: socket.socket | None = None,
        before: Generation | None = None,
    ) -> None:
        config = settings.config
        self.config = config
        self.settings = settings
        self._tools = tools
        self.databases = {
            name: Database(section, settings.passwords.get(f"[sql.{name}]", "")) for name, section in config.sql.items()
        }
        ways = before.ways if before is not None else None
        self.ways: Ways = Ways(
            settings, tools.seat.index, tools.log, tools.identity, asks, ways, tools.lists, self.databases, tools.count
        )
        self.authority: Authority | None = None
        self._limits: Limits | None = None
        self._rules: list[Check] = []
        self._users_terms: list[Terms] = []  # where users can log in
        self.services: dict[int, Service] = {}

    def build(self) -> None:
        """Raises OSError: what was made until then is among the parts."""
        config, settings, tools = self.config, self.settings, self._tools
        self.ways.build()
        self.aliases = make_aliases(config, self.ways.domains, tools.lists)
        self._rules = make_rule_checks(config, tools.lists, self._count_rule)
        self._trust = Trust(config.relay.networks)
        self._limits = self._make_limits()
        self.authority = open_authority(
            config.auth,
            config.data_dir,
            databases=self.databases,
            passwords=settings.passwords,
            shared=tools.seat.shared,
            unlimited=Trust(config.auth.unlimited),
            log=tools.log,
        )
        self._customers = Customers(config.customer)
        for number, listener in enumerate(config.listener):
            relays = bool(config.relay.networks) and listener.role not in ("lmtp", "odmr")
            self.services[number] = self._make_service(number, listener, self._trust if relays else None)
        where = Unix(config.data_dir / local_socket.SUBMIT / str(tools.seat.index))
        local = Listener(address=(where,), early_talker="allow", bare="normalize")
        self.services[LOCAL] = self._make_service(LOCAL, local, lambda _: True)

    def tick(self) -> None:
        """Called about once a second: what EHLO offers follows the users."""
        if self._users_terms:
            mechanisms = self._mechanisms(self.authority)
            for terms in self._users_terms:
                terms.mechanisms = mechanisms

    def schedule(self) -> Schedule:
        queue = self.config.queue
        return Schedule(
            queue.retry, queue.retry_max, queue.lifetime, queue.report_lifetime, queue.delay_report, queue.soft_bounce
        )

    def reports(self, keeper: Spool | MemorySpool) -> Reports:
        """For the queue of `keeper`: a report is kept in the spool of the mail that it is about."""
        config, tools = self.config, self._tools
        postmaster = NULL
        if config.queue.report_postmaster:
            postmaster = parse_address(config.postmaster) if config.postmaster else Address("postmaster", "")
        return Reports(
            keeper,
            Reporter(config.hostname),
            log=tools.log,
            count=tools.count,
            now=tools.now,
            postmaster=postmaster,
            expand=self.expand,
        )

    def expand(self, address: Address) -> Sequence[Member] | None:
        """What an address stands for as an alias; None: it is none, or stands for too many."""
        try:
            return self.aliases.expand(address) if self.aliases is not None else None
        except ExpansionError:
            return None

    def is_implicit(self, number: int) -> bool:
        """Whether TLS begins with the first octet there."""
        return number != LOCAL and self.config.listener[number].tls == "implicit"

    @property
    def has_sessions(self) -> bool:
        return any(service.handshakes or service.connections() for service in self.services.values())

    def parts(self) -> list[Closable]:
        """What is to be closed when nobody needs it any more, in this order: sessions are gone, and no queue sends by
        these transports. What another generation has, too, stays open."""
        authority = [self.authority] if self.authority is not None else []
        limits = [self._limits] if self._limits is not None else []
        return [*self.ways.parts(), *authority, *self.databases.values(), *limits]

    def _make_service(self, number: int, listener: Listener, trusts: Callable[[str], bool] | None) -> Service:
        """`trusts`: who may send to any domain, by address; None: nobody."""
        config, tools = self.config, self._tools
        limits, timeouts = config.limits, config.timeouts
        entrance = self.settings.tickets.get(number)
        context = None if entrance is None else tools.entrances[entrance].context
        ways = self.ways
        checks: list[Check] = [Recipients(ways.domains, self.aliases)]
        authority = self.authority if listener.auth and number != LOCAL else None
        # What comes by LMTP is for mailboxes of ours, whoever hands it over (RFC 2033 1).
        if (trusts is not None or authority is not None) and listener.role not in ("lmtp", "odmr"):
            checks.insert(0, Relay(ways.domains, ways.route))
        fetches = bool(config.customer) and listener.role != "lmtp" and number >= 0
        if fetches:
            checks.append(QueueRun(self._customers, tools.colleagues, tools.log))
        if fetches and listener.role == "odmr":
            checks.append(self._make_fetch())
        # What comes by LMTP or from a program of this machine is our own mail.
        per_client = self._limits if listener.role != "lmtp" and number != LOCAL else None
        if listener.role == "mx" and number != LOCAL:
            checks[:0] = self._rules
        if per_client is not None:
            checks[:0] = per_client.checks()
        tells = trusts is not None or authority is not None
        checks += make_verify_checks(listener, tells and listener.role != "odmr", ways.domains, self.aliases)
        if authority is not None:
            checks.append(authority)
            checks[:0] = self._make_user_checks(authority)
        policy = Policy(checks, tools.log)
        terms = Terms(
            config.hostname,
            listener.role,
            next_id=tools.keeper.next_id,
            room=_make_room(tools.keeper),
            now=tools.now,
            asks=policy.stages,
            # A member of an alias may be anywhere.
            any_octets=ways.any_octets and self.aliases is None,
            reports="all" if listener.dsn else "trusted",
            keeps_tls="nobody" if self.aliases is not None and ways.keeps_tls != "all" else ways.keeps_tls,
            soft=config.queue.soft_bounce,
            waivable=ways.demands_tls,
            tls=listener.tls == "starttls" and context is not None,
            mechanisms=self._mechanisms(authority),
            auth_clear=listener.auth_clear,
            handling=self._handling(listener) if authority is not None else None,
            brackets=listener.brackets,
            bare_data=listener.bare != "reject",
            bare_bdat=listener.bare_bdat == "keep",
            message_size=limits.message_size,
            recipients=limits.recipients if number != LOCAL else max(limits.recipients, LOCAL_RECIPIENTS),
            hops=limits.received,
            errors=limits.errors,
            useless=limits.useless,
        )
        if authority is not None:
            self._users_terms.append(terms)
        return Service(
            str(listener.address[0]),
            terms,
            loop=tools.loop,
            keeper=tools.keeper,
            policy=policy,
            log=tools.log,
            shared=tools.seat.shared,
            worker=tools.seat.index,
            times=Times(
                timeouts.command,
                timeouts.data,
                timeouts.data_rate,
                timeouts.tls,
                timeouts.session,
                timeouts.oversize,
                timeouts.write,
                listener.greet_delay,
            ),
            context=context,
            early_refused=listener.early_talker == "refuse",
            session_limit=limits.sessions,
            withheld=_withheld(listener),
            trusts=trusts,
            fetches=self._customers.fetches if fetches else None,
            limits=per_client,
            command_line=limits.command_line,
            auth_line=limits.auth_line,
            text_line=limits.text_line,
            header=limits.header,
            bare=listener.bare,
        )

    def _make_user_checks(self, authority: Authority) -> list[Check]:
        """Who may send as whom, and how much. They come before what lets a recipient in."""
        section, shared = self.config.submission, self._tools.seat.shared
        quotas = {Stage.MAIL: section.messages, Stage.RCPT: section.recipients}
        held = [Quota(stage, rates, shared, time.monotonic) for stage, rates in quotas.items() if rates]
        return [Senders(authority.rights), *held]

    def _handling(self, listener: Listener) -> Handling:
        section = self.config.submission
        submits = listener.role == "submission"
        rewrite = section.rewrite and submits
        return Handling(section.header_from, submits, section.remove_bcc, section.hide_client, rewrite)

    def _mechanisms(self, authority: Authority | None) -> frozenset[str]:
        """What of SASL can succeed, as far as it is wanted."""
        if authority is None:
            return frozenset()
        wanted = self.config.auth.mechanisms
        return authority.mechanisms.intersection(wanted) if wanted else authority.mechanisms

    def _make_limits(self) -> Limits | None:
        """How much each client may; None where everyone may do anything."""
        config, tools = self.config, self._tools
        inbound = config.inbound
        if not inbound.counts:
            return None
        exempt = Exempt(config, tools.lists)
        shared, worker = tools.seat.shared, tools.seat.index
        return Limits(
            inbound, exempt, hostname=config.hostname, log=tools.log, shared=shared, worker=worker,
            version=exempt.version,
        )  # fmt: skip

    def _count_rule(self, name: str) -> None:
        """The rule has refused."""
        number = self.settings.rules.get(name)
        if number is not None:
            self._tools.seat.shared.add(self._tools.seat.index, number, 1)

    def _make_fetch(self) -> Fetch:
        return Fetch(
            self._customers,
            self._tools.colleagues,
            self.config.data_dir,
            self.config.hostname,
            waits=self.ways.waits,
            log=self._tools.log,
            ending=self._tools.ending,
        )


def _make_room(keeper: Spool | MemorySpool) -> Callable[[int], Reply | None]:
    def room(size: int) -> Reply | None:
        if keeper.room(size):
            return None
        return R452_NO_ROOM if keeper.healthy else R421_NOT_TAKING_MAIL

    return room


def _withheld(listener: Listener) -> Callable[[str], frozenset[str]] | None:
    """The keywords that a client is not offered, by its address; None when every client is offered all."""
    rules = [(frozenset(rule.keywords), rule.networks) for rule in listener.withhold]
    if not rules:
        return None

    def withheld(ip: str) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for keywords, networks in rules:
            if not networks or (ip and any(ip_address(ip) in network for network in networks)):
                found |= keywords
        return found

    return withheld
