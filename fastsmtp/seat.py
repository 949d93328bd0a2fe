"""What the supervisor hands to a worker when it forks it, and the exit code that they agree on.

Everything in it was made before the fork and is the worker's to use; it closes what it has done with. The
descriptors of other workers are not in it: the child closed them.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field

from ._shared import Shared

BACKLOG = 4096  # clients that may wait in the kernel to be accepted: its somaxconn
EXIT_CANNOT_START = 78  # EX_CONFIG: what a worker returns that cannot start; it has logged why


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker's place.

    `sockets`: the listening sockets, each with its listener's index in `config.listener`. `contexts`: the TLS
    context of each listener that has one, by the same index. `alive`: reading end of a pipe; at EOF the
    supervisor is gone. `ready`: writing end of a pipe; the worker writes one byte once it accepts. `passwords`: those
    of transports, by name. `asks`: where the runner of commands is asked; None where no transport has one.
    """

    index: int
    workers: int
    sockets: list[tuple[int, socket.socket]]
    contexts: dict[int, ssl.SSLContext]
    shared: Shared
    alive: int
    ready: int
    passwords: Mapping[str, str] = field(default_factory=dict, repr=False)
    asks: socket.socket | None = None
