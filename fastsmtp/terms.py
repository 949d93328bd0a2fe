"""What one listener demands and offers: the same for all its sessions, and its answer to EHLO in each state.

In: the configuration's values, and functions that the session calls without waiting. Out: `Terms`, read by sessions
and never changed, but for `mechanisms`, which follow the users; a reload makes new ones for the sessions that begin
then. EHLO's answer is made once for each state that a session can be in, so a listener has a handful of them. Which
extension is offered when is decided by the table of extensions.py; which mechanisms of AUTH can succeed, by auth.py.
RFC 5321 4.1.1.1, 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from .extensions import Offer, offered
from .reply import Reply, named
from .submission import Handling
from .verdict import Client, Stage


class Terms:
    """What one listener demands and offers: the same for all its sessions.

    `room(size)` is the refusal of a message that cannot be kept now; `next_id()` names a new message; `now()` is the
    time in seconds since the epoch. `asks` are the stages at which a policy wants to be asked. `reports`: whom DSN is
    offered to. `keeps_tls`: the same for REQUIRETLS; for "all" each message stays on this machine or goes to a host
    that is verified by name, for "strangers" those do that a stranger may send. `soft`: what would be refused for good
    is put off. `waivable`: some hosts are only spoken to over TLS, so `TLS-Required: No` (RFC 8689) makes a difference.
    `mechanisms` of AUTH are those that the credential stores can answer; none: there is no AUTH.
    `auth_clear`: also without TLS.
    """

    __slots__ = (
        "any_octets", "ask_connect", "ask_expn", "ask_helo", "ask_mail", "ask_rcpt", "ask_vrfy", "auth_clear",
        "bare_bdat", "bare_data", "brackets", "ehlo", "errors", "greeting", "handling", "helo", "hops", "hostname",
        "keeps_tls", "lmtp", "mechanisms", "message_size", "next_id", "now", "odmr", "recipients", "reports", "room",
        "soft", "submission", "tls", "useless", "waivable",
    )  # fmt: skip

    def __init__(
        self,
        hostname: str,
        role: str,
        *,
        next_id: Callable[[], str],
        room: Callable[[int], Reply | None],
        now: Callable[[], float],
        asks: frozenset[Stage] = frozenset(),
        any_octets: bool = False,
        reports: Literal["nobody", "trusted", "all"] = "nobody",
        keeps_tls: Literal["nobody", "strangers", "all"] = "nobody",
        soft: bool = False,
        waivable: bool = False,
        handling: Handling | None = None,
        tls: bool = False,
        mechanisms: frozenset[str] = frozenset(),
        auth_clear: bool = False,
        brackets: bool = True,
        bare_data: bool = False,
        bare_bdat: bool = True,
        message_size: int = 50 << 20,
        recipients: int = 1000,
        hops: int = 100,
        errors: int = 20,
        useless: int = 100,
    ) -> None:
        self.hostname = hostname
        self.lmtp = role == "lmtp"
        self.submission = role == "submission"
        self.odmr = role == "odmr"
        self.next_id = next_id
        self.room = room
        self.now = now
        self.ask_connect = Stage.CONNECT in asks
        self.ask_helo = Stage.HELO in asks
        self.ask_mail = Stage.MAIL in asks
        self.ask_rcpt = Stage.RCPT in asks
        self.ask_vrfy = Stage.VRFY in asks
        self.ask_expn = Stage.EXPN in asks
        self.any_octets = any_octets
        self.reports = reports
        self.keeps_tls = keeps_tls
        self.soft = soft
        self.waivable = waivable
        self.handling = handling  # for messages of users
        self.tls = tls  # STARTTLS can be done
        self.mechanisms = mechanisms
        self.auth_clear = auth_clear
        self.brackets = brackets
        self.bare_data = bare_data  # a bare CR or LF in DATA is accepted
        self.bare_bdat = bare_bdat
        self.message_size = message_size
        self.recipients = recipients
        self.hops = hops
        self.errors = errors
        self.useless = useless
        self.helo = Reply(250, "", hostname)
        self.greeting = named(Reply(220, "", "LMTP fastsmtp" if self.lmtp else "ESMTP fastsmtp"), hostname)
        self.ehlo: dict[tuple[bool, bool, bool, tuple[str, ...], frozenset[str]], Reply] = {}

    def ehlo_reply(self, client: Client, mechanisms: tuple[str, ...], withheld: frozenset[str]) -> Reply:
        """The answer to EHLO or LHLO, made once for each state. `mechanisms` are those of AUTH that can succeed now."""
        in_tls = bool(client.tls)
        # Who may send to any domain. Whoever sends mail on `submission` is a user by then, and asks EHLO once.
        relays = client.trusted or bool(client.user) or self.submission
        key = (in_tls, relays, client.fetches, mechanisms, withheld)
        reply = self.ehlo.get(key)
        if reply is None:
            offer = Offer(
                self.message_size,
                self.recipients,
                starttls=self.tls and not in_tls,
                # What a host elsewhere takes is not known before it is asked.
                any_octets=self.any_octets and not relays,
                withheld=withheld,
                reports=self.reports == "all" or (self.reports == "trusted" and relays),
                keeps_tls=in_tls and (self.keeps_tls == "all" or (self.keeps_tls == "strangers" and not relays)),
                fetches=client.fetches,
                odmr=self.odmr,
                mechanisms=mechanisms,
            )
            reply = self.ehlo[key] = Reply(250, "", "\n".join([self.hostname, *offered(offer).values()]))
        return reply
