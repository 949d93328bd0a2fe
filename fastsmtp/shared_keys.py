"""What the keys in shared memory are about: a number for each kind, all of them here, so that no two are the same.

In: nothing. Out: `KeyKind`, the first argument of `Shared.key` (_shared.pyx). Two kinds never share a bucket, whatever
the octets behind them are: who fills the bucket of his address has not touched that of a user who has the same name.
The memory lives as long as the server, over workers and reloads, and is gone with it: numbers may change between
versions. Not here: what is counted under a key, and how much of it there may be.
"""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class KeyKind(IntEnum):
    """Each row says of what the octets of the key are."""

    # policy/limits.py: the open sessions of an address, and of its network
    SESSIONS_OF_ADDRESS = 0
    SESSIONS_OF_NETWORK = 1
    # and what a client may in a time
    NEW_SESSIONS = 2
    MESSAGES = 3
    RECIPIENTS = 4
    FAILURES = 5
    # credentials/guessing.py: failures of an address, those for a user, which of both have succeeded within a day, and
    # failures of those
    GUESSES_OF_ADDRESS = 100
    GUESSES_FOR_USER = 101
    LOGGED_IN_LATELY = 102
    GUESSES_OF_BOTH = 103
    # policy/quota.py: what a user has sent
    QUOTA = 200
