"""Where an operator's command meets the queue: the workers of a running server, or the spools of a stopped one.

In: a configuration and requests (see control.py). Out: their answers, as iterators of values, one for each worker. The
lock of the data directory decides: who gets it knows that no server runs, keeps it as long as the spools are open and
answers its own requests; root becomes the directory's owner for that, so that every file stays the server's. Else
every worker is asked through its control socket; one that is just being started is waited for.
Blocking code, for a program of its own. Everything that an operator can cause is a ConsoleError with one line.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .config import Config
from .local_socket import CONTROL, connect

if TYPE_CHECKING:
    from .control import Place
    from .spool import Spool

WAIT = 10.0  # seconds for a worker that is being started
PATIENCE = 120.0  # seconds for the next line of an answer

Request = Mapping[str, Any]
Answer = Iterator[dict[str, Any]]


class ConsoleError(Exception):
    """It cannot be asked; one line says why."""


class Console(Protocol):
    """`ask` gives an iterator for each worker: `item` and `progress`, then `done`. A worker's `error` is raised."""

    def ask(self, request: Request) -> list[Answer]: ...


@contextmanager
def reach(config: Config) -> Iterator[Console]:
    """The workers that have the queue of this configuration. Raises ConsoleError."""
    data_dir = config.data_dir
    with ExitStack() as stack:
        try:
            lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, lock)
            if (workers := _find_server(data_dir, lock)) is not None:
                yield _Running(data_dir, workers)
                return
            os.truncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
            _become_owner(data_dir)
        except FileNotFoundError:
            raise ConsoleError(f"data_dir {data_dir}: no server has run with it") from None
        except OSError as error:
            raise ConsoleError(_explain(data_dir, error)) from None
        stopped = _Stopped(config)
        stack.callback(stopped.close)
        yield stopped


def ask_server(config: Config, request: Request) -> dict[str, Any]:
    """What a running server answers that is asked through its first worker. Raises ConsoleError."""
    data_dir = config.data_dir
    with ExitStack() as stack:
        try:
            lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, lock)
            if _find_server(data_dir, lock) is None:
                raise ConsoleError(f"data_dir {data_dir}: no server runs with it")
        except FileNotFoundError:
            raise ConsoleError(f"data_dir {data_dir}: no server has run with it") from None
        except OSError as error:
            raise ConsoleError(_explain(data_dir, error)) from None
        *_, last = _Running(data_dir, 1).ask(request)[0]
    done: dict[str, Any] = last["done"]
    return done


def _find_server(data_dir: Path, lock: int) -> int | None:
    """How many workers the server has; None: there is none, and the lock is ours. A server that is starting or ending
    is neither for a moment."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pass
        try:
            line, hello = _greet(data_dir, 0)
            line.close()
            return int(hello["workers"])
        except (FileNotFoundError, ConnectionError):
            if time.monotonic() > deadline:
                pid = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
                raise ConsoleError(f"data_dir {data_dir} is in use by process {pid}, which does not answer") from None
        time.sleep(0.05)


def _explain(path: Path, error: OSError) -> str:
    if isinstance(error, PermissionError):
        try:
            owner = f"; it belongs to user {path.stat().st_uid}"
        except OSError:
            owner = ""
        return f"{path}: no permission for user {os.geteuid()}{owner}"
    return f"{path}: {error.strerror or error}"


def _become_owner(data_dir: Path) -> None:
    owner = data_dir.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.setgroups([])
        os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
        os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)


class _Line:
    """A connection to a worker: lines of JSON."""

    def __init__(self, data_dir: Path, worker: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(PATIENCE)
        try:
            connect(self._socket, data_dir, CONTROL, worker)
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")

    def send(self, request: Request) -> None:
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def read(self) -> dict[str, Any]:
        """Raises OSError: it has ended."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def _greet(data_dir: Path, worker: int) -> tuple[_Line, dict[str, Any]]:
    """A connection over which the worker has said something. Raises OSError."""
    line = _Line(data_dir, worker)
    try:
        line.send({"do": "hello"})
        return line, line.read()["done"]
    except OSError:
        line.close()
        raise


class _Running:
    """The workers of a server, each behind its socket."""

    def __init__(self, data_dir: Path, workers: int) -> None:
        self._data_dir = data_dir
        self._workers = workers

    def ask(self, request: Request) -> list[Answer]:
        # All have answered before the first is asked: a worker that is missing is an error before anything is done.
        lines = [self._connect(worker) for worker in range(self._workers)]
        return [self._ask(worker, line, request) for worker, line in enumerate(lines)]

    def _ask(self, worker: int, line: _Line, request: Request) -> Answer:
        try:
            line.send(request)
        except OSError:
            pass  # its answer will not come either
        return self._answer(worker, line)

    def _connect(self, worker: int) -> _Line:
        """One that is just being started is waited for."""
        deadline = time.monotonic() + WAIT
        while True:
            try:
                return _greet(self._data_dir, worker)[0]
            except (FileNotFoundError, ConnectionError):
                if time.monotonic() > deadline:
                    why = "does not answer; is the server starting or ending?"
                    raise ConsoleError(f"worker {worker} of {self._data_dir} {why}") from None
                time.sleep(0.05)
            except OSError as error:
                raise ConsoleError(_explain(self._data_dir / CONTROL, error)) from None

    def _answer(self, worker: int, line: _Line) -> Answer:
        try:
            while True:
                answer = line.read()
                if "error" in answer:
                    raise ConsoleError(f"worker {worker}: {answer['error']}")
                yield answer
                if "done" in answer:
                    return
        except TimeoutError:
            raise ConsoleError(f"worker {worker} says nothing for {PATIENCE:.0f} s") from None
        except OSError:
            raise ConsoleError(f"worker {worker} ended before its answer did") from None
        finally:
            line.close()


class _Stopped:
    """The spools of a server that does not run."""

    def __init__(self, config: Config) -> None:
        # The database's library comes with these; asking a running server needs none of it.
        from .control import Desk
        from .log import Log
        from .spool import Spool, SpoolError

        self._runner = asyncio.Runner()
        # What it would say to the operator's log is said to the operator where it matters.
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._log = Log(self._null, False, time.time, threaded=False)
        self._spools: list[Spool] = []
        try:
            self._runner.run(self._open(config, Spool))
        except (SpoolError, OSError) as error:
            self.close()
            raise ConsoleError(str(error)) from None
        if not self._spools and config.spool.durability != "none":  # its start has failed
            self.close()
            raise ConsoleError(f"data_dir {config.data_dir}: no server has run with it")
        places: list[Place] = [(spool.administration, lambda _: None) for spool in self._spools]
        self._desk = Desk(places, 1, time.time, self._log)

    async def _open(self, config: Config, make_spool: type[Spool]) -> None:
        folder = config.data_dir / "spool"
        names = os.listdir(folder) if folder.is_dir() else []
        for number in sorted(int(name) for name in names if name.isdecimal()):
            spool = make_spool(
                folder / str(number),
                number,
                loop=asyncio.get_running_loop(),
                log=self._log,
                inline=config.spool.inline,
                min_free=config.spool.min_free,
                memory=config.limits.memory,
            )
            await _open_spool(spool)
            self._spools.append(spool)

    def close(self) -> None:
        async def close() -> None:
            for spool in self._spools:
                await spool.close()

        self._runner.run(close())
        self._runner.close()
        os.close(self._null)

    def ask(self, request: Request) -> list[Answer]:
        return [self._converse(request)]

    def _converse(self, request: Request) -> Answer:
        lines = self._desk.answer(request, os.getuid())
        while (answer := self._runner.run(anext(lines, None))) is not None:
            if "error" in answer:
                raise ConsoleError(str(answer["error"]))
            yield answer


async def _open_spool(spool: Spool) -> None:
    """A worker that was killed lets its spool go a moment after the data directory."""
    from .spool import SpoolLockedError

    deadline = time.monotonic() + WAIT
    while True:
        try:
            spool.open()
            return
        except SpoolLockedError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.05)
