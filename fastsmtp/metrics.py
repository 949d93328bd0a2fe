"""What a server counts: the one table of its counters, with their names and help texts.

A counter's number is its index in the workers' shared memory (`_shared.Shared`), its name in lower case is
the metric's name. Counters only ever grow, from the start of the supervisor on; they outlive a worker.
Counting is `shared.add(worker, Counter.X, n)`. How they are shown is not decided here.
"""

from __future__ import annotations

from enum import IntEnum


class Counter(IntEnum):
    """A row of the table; `help` says what one unit of it is."""

    help: str

    def __new__(cls, help_text: str) -> Counter:
        row = int.__new__(cls, len(cls.__members__))
        row._value_ = len(cls.__members__)
        row.help = help_text
        return row

    SESSIONS = "Connections that were given a session"
    SESSIONS_REFUSED = "Connections turned away before a session began"
    ADDRESS_FULL = "Connections turned away: their address had its sessions open"
    NETWORK_FULL = "Connections turned away: their network had its sessions open"
    SESSION_RATE = "Connections turned away: their client had connected too often"
    FAILURE_RATE = "Connections, MAIL and RCPT commands refused: their client had been refused too often"
    MESSAGE_RATE = "MAIL commands refused: their client had sent too many messages"
    RECIPIENT_RATE = "RCPT commands refused: their client had named too many recipients"
    TLS_HANDSHAKES = "TLS handshakes completed"
    TLS_FAILURES = "TLS handshakes that failed"
    OCTETS_RECEIVED = "Octets read from clients, inside TLS"
    COMMANDS_REJECTED = "Commands answered 500 to 504 or 555: unknown, malformed or out of order"
    RECIPIENTS_ACCEPTED = "RCPT commands answered 250"
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
    RECIPIENT_NOT_CHECKED = "RCPT commands answered 451: their mailbox could not be looked up"
    CHECK_FAILED = "Commands answered 451: a check failed or took too long"
    UNKNOWN_MAILBOX = "Commands refused: there is no such mailbox"
    RELAYING_DENIED = "RCPT commands refused: their domain is not served here, and their client may not send elsewhere"
    REFUSED_BY_RULE = "Clients, and MAIL and RCPT commands, that a [[rule]] refused for now or for good"
    AUTHENTICATED = "AUTH commands answered 235"
    AUTH_FAILED = "Authentications that failed, or could not be done"


# Refusals that are counted by their reason, which is the word in reply, log and `check --as`.
_BY_REASON = {
    counter.name.lower().replace("_", "-"): counter
    for counter in (
        *(Counter.RECIPIENT_NOT_CHECKED, Counter.CHECK_FAILED, Counter.UNKNOWN_MAILBOX, Counter.RELAYING_DENIED),
    )
}


def counter_of(reason: str) -> Counter | None:
    """What counts refusals of a reason; None: nothing does, or who refused has counted it (policy/limits.py)."""
    return Counter.REFUSED_BY_RULE if reason.startswith("rule-") else _BY_REASON.get(reason)
