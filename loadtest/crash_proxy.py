"""A wire that breaks: a TCP proxy that cuts a connection at a given octet, or swallows an answer.

In: where to connect to, and a Cut for each connection, in their order. Out: connections that are passed on octet for
octet until their Cut; then both ends are reset, as by a router that forgot them. `cuts_left` says how many are to come;
behind the last one connections are passed on whole.
A Cut counts the octets of one direction, or waits for a reply that it swallows.
Threads, for a proxy in the same process as a load of threads. Not here: what must hold (crash_network).
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST
TIMEOUT = 30.0


@dataclass(frozen=True)
class Cut:
    """Behind `octets` octets of what comes from the side that has called (`forward`) or from the other. `swallow`: a
    reply in whose place the cut comes, whatever `octets` says."""

    octets: int
    forward: bool
    swallow: bytes = b""


class Proxy:
    """Listens on `address`. `struck` is called, in a thread, just before a connection is cut."""

    def __init__(
        self, target: tuple[str, int], cuts: Sequence[Cut], struck: Callable[[], None], address: str = "127.0.0.1"
    ) -> None:
        self.target = target
        self.hits = 0  # connections that were cut
        self._cuts = list(reversed(cuts))
        self._struck = struck
        self._lock = threading.Lock()
        self._listening = socket.create_server((address, 0))
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def port(self) -> int:
        return int(self._listening.getsockname()[1])

    @property
    def cuts_left(self) -> int:
        return len(self._cuts)

    def order(self, cuts: Sequence[Cut]) -> None:
        """For the next connections."""
        with self._lock:
            self._cuts[:0] = reversed(cuts)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(TIMEOUT)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            with self._lock:
                cut = self._cuts.pop() if self._cuts else None
            thread = threading.Thread(target=self._pass_on, args=(near, cut), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass_on(self, near: socket.socket, cut: Cut | None) -> None:
        try:
            far = socket.create_connection(self.target, TIMEOUT)
        except OSError:
            near.close()
            return
        was_cut = False
        try:
            was_cut = _pump(near, far, cut)
        except OSError:
            pass  # one side has gone: so does the other
        if was_cut:
            with self._lock:
                self.hits += 1
            self._struck()
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        near.close()
        far.close()


def _pump(near: socket.socket, far: socket.socket, cut: Cut | None) -> bool:
    """Until one side ends (False) or the cut is reached (True)."""
    left = {near: -1, far: -1}
    swallowed = cut.swallow if cut is not None else b""
    if cut is not None and not swallowed:
        left[near if cut.forward else far] = cut.octets
    with selectors.DefaultSelector() as selector:
        for end in (near, far):
            selector.register(end, selectors.EVENT_READ)
        while 0 not in left.values():
            for key, _ in selector.select(TIMEOUT):
                source = near if key.fileobj is near else far
                sink = far if source is near else near
                octets = source.recv(65536)
                if not octets:
                    return False
                if swallowed and source is far and swallowed in octets:
                    sink.sendall(octets.partition(swallowed)[0])
                    return True
                if 0 <= left[source] <= len(octets):
                    octets = octets[: left[source]]
                    left[source] = 0
                elif left[source] > 0:
                    left[source] -= len(octets)
                sink.sendall(octets)
                if not left[source]:
                    return True
    return True
