"""The named scenarios: each a sentence and the options that make it.

In: a name. Out: a Scenario, whose options the command line may override one by one. What is not named has its default
(options). Nothing here does anything. On failure: LoadError for a name that does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import LoadError


@dataclass(frozen=True)
class Scenario:
    """`sentence` is what people read; `options` are fields of Options."""

    sentence: str
    options: dict[str, Any] = field(default_factory=dict)


SCENARIOS = {
    "mx-small": Scenario(
        "An MX that gets small mail: 1 KB, a few messages in a connection, 1,000 mailboxes.",
        {"sessions": 100, "size": "1KB", "per_connection": 3, "recipient": "user{1..1000}@y.test"},
    ),
    "mx-mixed": Scenario(
        "An MX with the sizes of real mail, a few messages in a connection, 1,000 mailboxes.",
        {"sessions": 100, "sizes": "mixed", "per_connection": 3, "recipient": "user{1..1000}@y.test"},
    ),
    "mx-large": Scenario(
        "An MX that gets large mail: 1 MB, a message in a connection.",
        {"sessions": 20, "size": "1MB", "per_connection": 1, "recipient": "user{1..1000}@y.test"},
    ),
    "churn": Scenario(
        "A connection for each message of 1 KB.",
        {"sessions": 100, "per_connection": 1},
    ),
    "persistent": Scenario(
        "100 connections that stay open, 1 KB, each message as soon as the one before was answered.",
        {"sessions": 100},
    ),
    "tls-churn": Scenario(
        "A connection for each message, STARTTLS with a full handshake each time.",
        {"sessions": 100, "per_connection": 1, "tls": "starttls", "resumption": False},
    ),
    "pipelined": Scenario(
        "100 connections that stay open, 1 KB, MAIL, RCPT and DATA in one go.",
        {"sessions": 100, "pipelining": True},
    ),
    "crowd": Scenario(
        "10,000 sessions that stay open, of which 5 % send at a time.",
        {"sessions": 10_000, "active": 0.05, "duration": 20.0},
    ),
    "hostile": Scenario(
        "Ordinary mail beside drip senders, idlers, hang-ups, early talkers, RSET storms and oversize messages.",
        {
            "sessions": 200,
            "per_connection": 3,
            "duration": 20.0,
            "misbehave": {"drip": 0.05, "idle": 0.10, "hangup": 0.05, "early": 0.05, "rset": 0.03, "oversize": 0.02},
        },
    ),
    "big": Scenario(
        "Ten messages of 20 MB at a time beside small ones.",
        {"sessions": 110, "large": 10},
    ),
}


def find_scenario(name: str) -> Scenario:
    """Raises LoadError."""
    if name not in SCENARIOS:
        raise LoadError(f"no scenario is called {name}; there are {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
