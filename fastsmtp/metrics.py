"""What a server counts: the one table of its counters, with their names and help texts.

A counter's number is its index in the workers' shared memory (`_shared.Shared`), its name in lower case is the
metric's name. What is refused is counted by reason, the word that stands in log and `check --as` too: each refusal that
reply.py has, has a row here by itself. Behind the rows stand RULES more counters, for the operator's rules by name.
Counters only ever grow, from the start of the supervisor on; they outlive a worker and a reload.
Counting is `shared.add(worker, Counter.X, n)`. How they are shown is not decided here (counters_command.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

from .reply import REFUSALS

RULE = "rule-"  # begins the reason of what a rule refuses; its name stands behind it
RULES = 100  # that have a counter of their own


class Counter(IntEnum):
    """A row of the table; `help` says what one unit of it is. `reason` is the word of the refusals that it counts."""

    _ignore_ = "_rows _given _reason _said"

    help: str
    reason: str

    def __new__(cls, help_text: str, reason: str = "") -> Counter:
        row = int.__new__(cls, len(cls.__members__))
        row._value_ = len(cls.__members__)
        row.help = help_text
        row.reason = reason
        return row

    SESSIONS = "Connections that were given a session"
    SESSIONS_REFUSED = "Connections turned away before a session began"
    ADDRESS_FULL = "Connections turned away: their address had its sessions open", "address-full"
    NETWORK_FULL = "Connections turned away: their network had its sessions open", "network-full"
    SESSION_RATE = "Connections turned away: their client had connected too often", "session-rate"
    FAILURE_RATE = "Connections, MAIL and RCPT refused: their client had been refused too often", "failure-rate"
    MESSAGE_RATE = "MAIL commands refused: their client had sent too many messages", "message-rate"
    RECIPIENT_RATE = "RCPT commands refused: their client had named too many recipients", "recipient-rate"
    TLS_HANDSHAKES = "TLS handshakes completed"
    TLS_FAILURES = "TLS handshakes that failed"
    OCTETS_RECEIVED = "Octets read from clients, inside TLS"
    COMMANDS_REJECTED = "Commands answered 500 to 504 or 555: unknown, malformed or out of order"
    RECIPIENTS_ACCEPTED = "Recipients of messages that were kept, the members of aliases among them"
    RECIPIENTS_REFUSED = "RCPT commands refused for now or for good"
    MESSAGES_ACCEPTED = "Messages kept and answered 250"
    MESSAGES_REFUSED = "Messages refused at or after DATA or BDAT"
    RECIPIENTS_DELIVERED = "Recipients delivered to"
    RECIPIENTS_DEFERRED = "Attempts to deliver to a recipient that will be repeated"
    RECIPIENTS_FAILED = "Recipients given up"
    COMMITS = "Commits of the spool that were flushed"
    COMMITS_FAILED = "Commits of the spool that failed"
    LOG_LINES_DROPPED = "Log lines dropped because the log was not read fast enough"
    REPORTS = "Delivery reports written"
    DESTINATIONS_DEAD = "Times that a destination was found dead"
    LOOKUP_FAILED = "Look-ups of mailboxes that had no answer: a database or a server was away, slow or wrong"
    LIST_KEPT = "Lists that could not be read or were wrong: the version before stayed in force"
    AUTHENTICATED = "AUTH commands answered 235"
    AUTH_FAILED = "Authentications that failed, or could not be done"
    REFUSED_BY_RULE = "Clients, and MAIL and RCPT commands, that a [[rule]] refused for now or for good"
    QUOTA_MESSAGES = "MAIL commands refused: their user had sent too many messages", "quota-messages"
    QUOTA_RECIPIENTS = "RCPT commands refused: their user had named too many recipients", "quota-recipients"
    DROPPED = "Connections closed without a word: the peer speaks another protocol, or speaks too early", "dropped"
    POLICY = "Refusals in words that a program gave", "policy"

    _rows = vars()
    _given = frozenset(row[1] for row in _rows.values() if isinstance(row, tuple))
    for _reason, _said in REFUSALS.items():
        if _reason not in _given:
            _rows[f"REFUSED_{_reason.upper().replace('-', '_')}"] = (f"Refusals: {_said}", _reason)


SIZE = len(Counter) + RULES  # of the shared memory

# Counted where the limits are, also for who has no session (policy/limits.py)
_BY_LIMITS = (
    *(Counter.ADDRESS_FULL, Counter.NETWORK_FULL, Counter.SESSION_RATE),
    *(Counter.FAILURE_RATE, Counter.MESSAGE_RATE, Counter.RECIPIENT_RATE),
)
_BY_REASON = {row.reason: row for row in Counter if row.reason and row not in _BY_LIMITS}


def counter_of(reason: str) -> Counter | None:
    """What counts refusals of a reason; None: nothing does, or who refused has counted it (policy/limits.py)."""
    return Counter.REFUSED_BY_RULE if reason.startswith(RULE) else _BY_REASON.get(reason)


def tell(total: Callable[[int], int], rules: Mapping[str, int]) -> list[dict[str, Any]]:
    """All counters as they are now. `total` gives one by its number, `rules` has the numbers of the rules by name."""
    told = [{"name": row.name.lower(), "reason": row.reason, "help": row.help, "value": total(row)} for row in Counter]
    told += [
        {"name": "rule", "reason": f"{RULE}{name}", "help": f"Refusals by the rule {name}", "value": total(number)}
        for name, number in rules.items()
    ]
    return told
