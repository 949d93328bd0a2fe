"""What the supervisor hands to a worker: what is made before the fork, and the settings, which a reload exchanges.

Everything in a `Seat` is the worker's to use; it closes what it has done with. The descriptors of other workers are
not in it: the child closed them. `Settings` are values: they are sent to a worker that runs already, too. Both agree
on an exit code. Not here: how settings are sent (reload.py).
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ._shared import Shared
from .config import Config
from .tls import Demands, Pair

BACKLOG = 4096  # clients that may wait in the kernel to be accepted: its somaxconn
EXIT_CANNOT_START = 78  # EX_CONFIG: what a worker returns that cannot start; it has logged why


class Bound(NamedTuple):
    """A socket that is listened on. `number` stays the same as long as the address is bound; `listener` is an index of
    `config.listener`, which a reload may change."""

    number: int
    listener: int
    socket: socket.socket


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration, and what was read for it with every privilege. `passwords`: those of transports, by name.
    `pairs`: the server's certificates with their keys. By listener: what it wants of a TLS handshake, and which of the
    seat's contexts is its own; listeners without TLS are not there. `rules`: the counters of the rules, by name."""

    config: Config
    passwords: Mapping[str, str] = field(default_factory=dict, repr=False)
    pairs: tuple[Pair, ...] = field(default=(), repr=False)
    demands: Mapping[int, Demands] = field(default_factory=dict, repr=False)
    tickets: Mapping[int, int] = field(default_factory=dict)
    rules: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker's place.

    `contexts`: bare TLS contexts, the same in all workers, for the listeners of now and of later reloads. `alive`:
    reading end of a pipe; at EOF the supervisor is gone. `ready`: writing end of a pipe; the worker writes one byte
    once it accepts. `orders`: where the supervisor is heard and answered. `asks`: where the runner of commands is
    asked; None where no transport has one.
    """

    index: int
    workers: int
    sockets: list[Bound]
    contexts: list[ssl.SSLContext]
    shared: Shared
    alive: int
    ready: int
    settings: Settings
    orders: socket.socket | None = None
    asks: socket.socket | None = None
