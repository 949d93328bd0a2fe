"""CPU of a TLS handshake: python -m loadtest.handshake [NAME ...] [--rounds N] [--messages N] [--json FILE].

In: the fastsmtp of this Python, and OpenSSL's s_server with the same key (ECDSA P-256). Out: rows of figures, one for
each round. A client of TLS 1.3 connects, shakes hands, waits for what the server says behind it (tickets, and a
greeting), and closes; the CPU is that of all processes of the server for one such connection. Resumed handshakes offer
the ticket of the connection before, as `s_time -reuse` does not in TLS 1.3. With two workers the kernel chooses which
one is met, so that most resume on another than that which gave the ticket. A connection that should have resumed and
did not ends the measurement. Not here: the goals (report). On failure: LoadError.
"""

from __future__ import annotations

import select
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import LoadError
from .measurements import Bench, Measurements, say
from .processes import Server, fastsmtp, find_program, free_port, unverified
from .receive import main
from .report import Row

HANDSHAKES = 2000
WARM_UP = 0.1  # of a round's handshakes
PATIENCE = 20.0  # seconds for a server to say something
SETTLE = 60.0


class SServer(Server):
    """OpenSSL's server, which says nothing of its own accord."""

    def _greets(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5) as plain:
                unverified().wrap_socket(plain).close()
                return True
        except OSError:
            return False


@contextmanager
def s_server(folder: Path) -> Iterator[Server]:
    """It serves one connection after the other, with the certificate in `folder`, as long as the block runs."""
    port = free_port()
    command = [find_program("openssl", "openssl"), "s_server", "-accept", f"127.0.0.1:{port}", "-www", "-quiet"]
    command += ["-cert", str(folder / "cert.pem"), "-key", str(folder / "key.pem")]
    server = SServer("s_server", command, port, folder / "s_server.log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def shake_hands(port: int, count: int, resume: bool) -> None:
    """So many connections, one after the other. Raises LoadError."""
    context = unverified()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    session: ssl.SSLSession | None = None
    for number in range(count):
        try:
            with (
                socket.create_connection(("127.0.0.1", port), PATIENCE) as plain,
                context.wrap_socket(plain, session=session) as secured,
            ):
                if resume and number and not secured.session_reused:
                    raise LoadError(f"connection {number} resumed nothing")
                _take_what_comes(secured)
                if resume:
                    session = secured.session
        except OSError as error:
            raise LoadError(f"connection {number}: {error.strerror or error}") from None


def _take_what_comes(secured: ssl.SSLSocket) -> None:
    """Reads tickets and greeting; a server that has none of the latter has said all when its tickets are there."""
    if not select.select([secured], [], [], PATIENCE)[0]:
        raise LoadError("the server says nothing behind its handshake")
    secured.setblocking(False)
    try:
        secured.recv(4096)
    except ssl.SSLWantReadError:
        pass


def measure(server: Server, count: int, resume: bool) -> float:
    """Microseconds of CPU for one connection. Raises LoadError."""
    shake_hands(server.port, max(2, int(count * WARM_UP)), resume)
    server.settle(SETTLE)
    before = server.cpu()
    shake_hands(server.port, count, resume)
    server.settle(SETTLE)
    return (server.cpu() - before) / count * 1e6


def compare(bench: Bench, name: str, resume: bool, workers: int = 1) -> list[Row]:
    """Both servers in turn, so that they see the same machine."""
    count = bench.count(HANDSHAKES)
    ours: list[float] = []
    theirs: list[float] = []
    with (
        bench.room() as folder,
        fastsmtp(folder, "none", "discard", tls=True, workers=workers) as server,
        s_server(folder) as other,
    ):
        for number in range(bench.rounds):
            ours.append(measure(server, count, resume))
            theirs.append(measure(other, count, resume))
            say(f"{name}: round {number + 1}: {ours[-1]:.0f} µs, s_server {theirs[-1]:.0f} µs")
    ratios = [one / two for one, two in zip(ours, theirs, strict=True)]
    middle = sorted(theirs)[len(theirs) // 2]
    notes = [f"{count:,} connections a round; s_server takes {middle:.0f} µs; {_openssl()}"]
    return [Row(name, ratios, fastsmtp_us=ours, notes=notes)]


def _openssl() -> str:
    return " ".join(ssl.OPENSSL_VERSION.split()[:2])


def full(bench: Bench) -> list[Row]:
    return compare(bench, "handshake", resume=False)


def resumed(bench: Bench) -> list[Row]:
    return compare(bench, "resumed", resume=True)


def elsewhere(bench: Bench) -> list[Row]:
    return compare(bench, "resumed-elsewhere", resume=True, workers=2)


MEASUREMENTS: Measurements = {"handshake": full, "resumed": resumed, "resumed-elsewhere": elsewhere}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "loadtest.handshake", "Measures TLS handshakes.", MEASUREMENTS))
