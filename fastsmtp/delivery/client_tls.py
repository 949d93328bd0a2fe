"""How a destination is spoken to: the terms of its dialogue, and the TLS under it.

In: a Tls, what the configuration says of a destination. Out: a Manner: the Terms with TLS and without, a context, and
whether what it lets through is verified. Opportunistic and required TLS take any certificate, for nobody said whose
it had to be; verified and implicit TLS check certificate and name. Sessions are resumed: a handshake with a host that
was spoken to before costs no signature. A context keeps its own, by the name that it was checked for, so that none
that was never verified is taken for one that was.
Not here: handshakes (link.py), when a host is spoken to in clear (smtp.py). Raises OSError and ssl.SSLError for a file
of certificates that cannot be used. RFC 3207, RFC 7435, RFC 8446 2.2.
"""

from __future__ import annotations

import ssl
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from ..tls import client_context
from .offers import Terms

Mode: TypeAlias = Literal["opportunistic", "required", "verified", "implicit", "off"]
SESSIONS = 1_000  # hosts whose last session is kept


class Tls(NamedTuple):
    """`implicit`: verified, from the first octet. `ignore`: EHLO keywords that count as not offered."""

    mode: Mode = "opportunistic"
    minimum: Literal["1.2", "1.3"] = "1.2"
    ignore: frozenset[str] = frozenset()


class Manner:
    """`terms` are for a session with TLS where there is to be any, `clear` for one without."""

    __slots__ = ("clear", "context", "implicit", "opportunistic", "sessions", "terms", "verified")

    def __init__(self, tls: Tls, terms: Terms, ca_file: Path | None = None) -> None:
        mode = tls.mode
        self.opportunistic = mode == "opportunistic"
        self.implicit = mode == "implicit"
        self.verified = mode in ("verified", "implicit")
        self.clear = replace(terms, starttls="off", ignore=terms.ignore | tls.ignore)
        self.terms = self.clear
        if self.opportunistic:
            self.terms = replace(self.clear, starttls="opportunistic")
        elif mode in ("required", "verified"):
            self.terms = replace(self.clear, starttls="required")
        self.sessions = Sessions()
        self.context: ssl.SSLContext | None = None
        if mode != "off":
            self.context = client_context(self.verified, tls.minimum, ca_file)
            if not self.verified:
                # A small key or SHA-1 is still more than no TLS at all, which is what would follow.
                self.context.set_ciphers("DEFAULT:@SECLEVEL=0")
            self.context.sslobject_class = self.sessions.make_class()


class Sessions:
    """The last session with each name; the one unused for longest goes first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, ssl.SSLSession] = OrderedDict()

    def keep(self, name: str, session: ssl.SSLSession | None) -> None:
        if session is None or not session.has_ticket:
            return
        self._kept[name] = session
        self._kept.move_to_end(name)
        if len(self._kept) > SESSIONS:
            self._kept.popitem(last=False)

    def find(self, name: str) -> ssl.SSLSession | None:
        return self._kept.get(name)

    def make_class(self) -> type[ssl.SSLObject]:
        """What a context is to make for each connection: event loops have no way to hand a session on."""
        find = self.find

        class Resumed(ssl.SSLObject):
            offered = False

            def do_handshake(self) -> None:
                if not self.offered:
                    self.offered = True
                    session = find(self.server_hostname or "")
                    if session is not None:
                        self.session = session
                super().do_handshake()

        return Resumed
