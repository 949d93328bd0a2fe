"""A sink as a server: in a program's own loop, as a process, or as several.

In: Settings. Out: an address that takes mail, a record of what came, counts at the end. `async with Sink(settings)` and
`with SinkProcess("--lmtp")` last as long as the block. With several processes each has its socket on the same port, and
the kernel shares the connections out.
Always: SIGTERM and SIGINT end it in order, with its counts; its processes end when the first one does, however.
Not here: a session (sink_protocol), its answers (sink_plan), the command line (sink). On failure: LoadError.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import uvloop

from . import LoadError
from .processes import make_certificate
from .sink_plan import Rule, make_plan
from .sink_protocol import Session
from .sink_record import Recorder
from .sink_service import Account, Counts, Service

BACKLOG = 4096
LISTENING = "listening on "
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Settings:
    """What a sink is told. `address` is HOST:PORT, with port 0 for any, or unix:PATH."""

    address: str = "127.0.0.1:0"
    lmtp: bool = False
    hostname: str = "sink.test"
    rules: tuple[Rule, ...] = ()
    delays: tuple[tuple[str, float], ...] = ()
    without: frozenset[str] = frozenset()
    size: int = 0  # octets of a message; 0: no bound
    tls: str = "off"  # starttls, implicit
    certificate: Path | None = None  # None: one is made
    key: Path | None = None
    user: str = ""
    password: str = ""
    record: Path | None = None
    keep: Path | None = None
    fsync: bool = False
    processes: int = 1
    seed: int | None = None
    drip: float = 1.0  # seconds between two octets of the fault that drips

    def __post_init__(self) -> None:
        if self.processes > 1 and any(rule.first for rule in self.rules):
            raise LoadError("`first N` counts in one process only")


def bind(address: str, count: int) -> list[socket.socket]:
    """So many listening sockets on one address; one for all where it is a path. Raises LoadError."""
    try:
        if address.startswith("unix:"):
            return [_bind_path(address.removeprefix("unix:"))] * count
        host, separator, port = address.rpartition(":")
        if not separator or not port.isdecimal() or int(port) > 65535:
            raise LoadError(f"{address!r} is no address; 127.0.0.1:2525, [::1]:2525 or unix:/run/sink would be")
        sockets: list[socket.socket] = []
        for _ in range(count):
            # All but the first are bound to the port that the first was given.
            number = sockets[0].getsockname()[1] if sockets else int(port)
            sockets.append(_bind_port(host.strip("[]"), number))
        return sockets
    except OSError as error:
        raise LoadError(f"cannot listen on {address}: {error.strerror}") from None


def _bind_port(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(where)
    listening.listen(BACKLOG)
    return listening


def _bind_path(path: str) -> socket.socket:
    """A socket that is left over from before goes; anything else that stands there stays."""
    if os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode):
        os.unlink(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(path)
    listening.listen(BACKLOG)
    return listening


def shown_address(listening: socket.socket) -> str:
    """As `Settings.address` has it."""
    where = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix:{where}"
    return f"[{where[0]}]:{where[1]}" if listening.family == socket.AF_INET6 else f"{where[0]}:{where[1]}"


def make_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    """For a server; without a certificate one is made. Raises LoadError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        else:
            with tempfile.TemporaryDirectory(prefix="sink-") as folder:
                make_certificate(Path(folder))
                context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
    except OSError as error:  # SSLError is one
        raise LoadError(f"the certificate {certificate} cannot be used: {error.strerror or error}") from None
    return context


class Sink:
    """A sink in the running loop. `counts` and `records` say what came. Raises LoadError."""

    def __init__(
        self,
        settings: Settings | None = None,
        listening: socket.socket | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        settings = settings or Settings()
        if settings.tls != "off" and tls is None:
            tls = make_context(settings.certificate, settings.key)
        self._settings = settings
        self._listening = listening or bind(settings.address, 1)[0]
        self._tls = tls
        self.address = shown_address(self._listening)
        self._server: asyncio.Server
        try:
            wanted = settings.record or settings.keep
            self._recorder = Recorder(settings.record, settings.keep, settings.fsync) if wanted else None
        except OSError as error:
            self._listening.close()
            raise LoadError(f"{error.filename} cannot be written: {error.strerror}") from None
        self._service = Service(
            hostname=settings.hostname,
            lmtp=settings.lmtp,
            without=settings.without,
            size=settings.size,
            plan=make_plan(settings.rules, settings.delays, settings.seed),
            recorder=self._recorder,
            tls=tls,
            implicit_tls=settings.tls == "implicit",
            account=Account(settings.user.encode(), settings.password.encode()),
            drip=settings.drip,
        )

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def counts(self) -> Counts:
        return self._service.counts

    def records(self) -> list[dict[str, Any]]:
        """What `Settings.record` holds."""
        assert self._settings.record is not None
        return [json.loads(line) for line in self._settings.record.read_bytes().splitlines()]

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        make: Callable[[], Session] = lambda: Session(self._service, loop)  # noqa: E731
        implicit = self._tls if self._settings.tls == "implicit" else None
        create = loop.create_unix_server if self._listening.family == socket.AF_UNIX else loop.create_server
        self._server = await create(make, sock=self._listening, backlog=BACKLOG, ssl=implicit)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for session in list(self._service.sessions):
            session.abort()
        await asyncio.sleep(0)  # the transports close in the loop's next round
        if self._recorder is not None:
            self._recorder.close()


async def _serve(settings: Settings, listening: socket.socket, tls: ssl.SSLContext | None, lead: int) -> Counts:
    """Until a signal, or until the process that leads is gone, whose pipe `lead` then ends."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if lead >= 0:
        loop.add_reader(lead, ended.set)
    # What is there now stays, and a session leaves no cycles behind: a full collection would only take time.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    async with Sink(settings, listening, tls) as sink:
        await ended.wait()
        if lead >= 0:
            loop.remove_reader(lead)
        return sink.counts


def serve(settings: Settings, on_ready: Callable[[str], None]) -> Counts:
    """Takes mail until SIGTERM or SIGINT; `on_ready` is given the address. Raises LoadError."""
    tls = make_context(settings.certificate, settings.key) if settings.tls != "off" else None
    sockets = bind(settings.address, settings.processes)
    address = shown_address(sockets[0])
    try:
        if settings.processes == 1:
            on_ready(address)
            return uvloop.run(_serve(settings, sockets[0], tls, -1))
        return _serve_in_processes(settings, sockets, tls, lambda: on_ready(address))
    finally:
        if address.startswith("unix:"):
            Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _serve_in_processes(
    settings: Settings, sockets: list[socket.socket], tls: ssl.SSLContext | None, on_ready: Callable[[], None]
) -> Counts:
    awaited = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    lead, held = os.pipe()
    results: dict[int, int] = {}  # process: where its counts are read
    for number, listening in enumerate(sockets):
        result, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(held)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
            seed = None if settings.seed is None else settings.seed + number
            _serve_as_child(replace(settings, seed=seed), listening, tls, lead, told)
        os.close(told)
        results[pid] = result
    on_ready()
    failed = signal.sigwait(awaited) == signal.SIGCHLD
    os.close(held)
    counts = Counts()
    for pid, result in results.items():
        with os.fdopen(result, "rb") as told_by:
            text = told_by.read()
        failed |= os.waitpid(pid, 0)[1] != 0
        if text:
            counts.add(json.loads(text))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
    if failed:
        raise LoadError("a process of the sink has failed")
    return counts


def _serve_as_child(
    settings: Settings, listening: socket.socket, tls: ssl.SSLContext | None, lead: int, told: int
) -> None:
    """Never returns."""
    code = 1
    try:
        counts = uvloop.run(_serve(settings, listening, tls, lead))
        os.write(told, json.dumps(counts.as_json()).encode())
        code = 0
    except LoadError as error:
        print(f"loadtest: {error}", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


class SinkProcess:
    """A sink as a process of its own, with the options of the command line; `counts` are there at its end.

    Raises LoadError."""

    def __init__(self, *options: str, address: str = "127.0.0.1:0") -> None:
        self._command = [sys.executable, "-m", "loadtest", "sink", "--json", *options, address]
        self._process: subprocess.Popen[str]
        self.address = ""
        self.counts: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def running(self) -> bool:
        return self._process.poll() is None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = cast("Any", self._process.stderr).readline()
        if not said.startswith(LISTENING):
            _, more = self._process.communicate()
            raise LoadError(f"the sink did not start: {(said + more).strip().splitlines()[-1]}")
        self.address = said.removeprefix(LISTENING).strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            said, wrong = self._process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said, wrong = self._process.communicate()
        if self._process.returncode == 0:
            self.counts = json.loads(said)
        elif kind is None:
            raise LoadError(f"the sink ended with {self._process.returncode}: {wrong.strip()[-500:]}")
