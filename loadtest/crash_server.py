"""The fastsmtp that is broken on purpose: started, killed as a whole group, asked whether it is done.

In: a folder for its configuration and log, a configuration, the folder that holds the package. Out: a Server whose
processes form one group, so that nothing of it outlives `kill`; its log of all starts, as events; and how many
recipients are still queued, by its control sockets.
Always: it writes no metadata by io_uring (UV_USE_IO_URING=0), so that every call can be seen and struck.
Not here: what is sent, what must hold. On failure: CrashError, which is a finding, not the end of the command.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds for what takes one; a machine may be busy
POLL_SECONDS = 0.005
ROOT = Path(__file__).parents[1]


class CrashError(Exception):
    """The server does not do what it must: one line."""


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Raises CrashError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise CrashError(f"{what}: not within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)


def greets(host: str, port: int) -> bool:
    """Whether a session can begin: it listens before it serves, only its first octets say that it does."""
    try:
        with socket.create_connection((host, port), timeout=PATIENCE) as connection:
            return connection.recv(512).startswith(b"220")
    except OSError:
        return False


class Server:
    """`fastsmtp serve`. `package` is the folder that holds the package, `folder` must not lie on what is broken."""

    def __init__(self, folder: Path, package: Path, port: int, data: Path) -> None:
        self.folder = folder
        self.port = port
        self.data = data
        self.configuration = ""
        self.places = 1  # workers that it has, by its configuration
        self.host = "127.0.0.1"
        self.prefix: tuple[str, ...] = ()  # before its command, at every start
        self._package = package
        self._log = folder / "log"
        self._read = 0  # octets of the log that were understood
        self._events: list[dict[str, Any]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: list[int] = []
        self._begun = 0  # starts of which the log told, when it was last launched

    def launch(self, wrapper: Sequence[str] = ()) -> None:
        """Starts it and waits for nothing. `wrapper` stands before its command."""
        self._begun = len(self.events("start"))
        file = self.write_configuration()
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [*self.prefix, *wrapper, sys.executable, "-m", "fastsmtp", "serve", "--config", str(file)],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(self._package), "UV_USE_IO_URING": "0"},
            )  # fmt: skip
        self._groups.append(self._process.pid)

    def write_configuration(self) -> Path:
        """What it reads at its next start, or when it is told to."""
        file = self.folder / "fastsmtp.toml"
        file.write_text(self.configuration)
        return file

    def start(self, wrapper: Sequence[str] = ()) -> float:
        """Starts it; seconds until it accepted. Workers that lost their supervisor may still be busy with their end:
        then it is started again. Raises CrashError."""
        begun = time.monotonic()
        while True:
            self.launch(wrapper)
            while not self.started():
                if self._ended():
                    break
                if time.monotonic() - begun > PATIENCE:
                    raise CrashError(f"it does not start within {PATIENCE:.0f} s: {self.last_words()}")
                time.sleep(POLL_SECONDS)
            else:
                wait_until(lambda: greets(self.host, self.port), "a greeting")
                return time.monotonic() - begun
            if "is in use by process" not in self.last_words() or time.monotonic() - begun > PATIENCE:
                raise CrashError(f"it does not start: {self.last_words()}")
            time.sleep(0.02)

    def started(self) -> bool:
        """Whether every worker of the last launch accepts."""
        return len(self.events("start")) > self._begun

    def _ended(self) -> bool:
        """The supervisor has; what it said last is in the log."""
        return self.process.poll() is not None and not self.started()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise CrashError("it was never started")
        return self._process

    @property
    def supervisor(self) -> int:
        """Its process id; that of its tracer where it was started under one."""
        return self.process.pid

    def workers(self) -> list[int]:
        """The children of the supervisor that live."""
        return sorted(pid for pid, parent, _, state in _processes() if parent == self.supervisor and state != "Z")

    def signal_group(self, signum: int) -> None:
        for group in self._groups:
            try:
                os.killpg(group, signum)
            except ProcessLookupError:
                pass

    def kill(self) -> None:
        """Kills all of it; nothing of it runs any more when this returns. Also twice."""
        self.signal_group(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        groups = set(self._groups)
        wait_until(
            lambda: not any(group in groups and state != "Z" for _, _, group, state in _processes()),
            "the end of a process that was killed",
        )
        self._groups.clear()

    def stop(self) -> int:
        """Ends it in order; its exit code. Raises CrashError."""
        self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise CrashError(f"it does not end: {self.last_words()}") from None

    def queued(self) -> int | None:
        """Recipients that are neither delivered nor given up, by all workers; None: one of them does not answer yet.
        A report and the end of what it reports on are seen in one. Raises CrashError."""
        total = answers = 0
        for path in sorted((self.data / "control").iterdir()):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(PATIENCE)
                try:
                    folder = os.open(path.parent, os.O_PATH)
                    try:
                        connection.connect(f"/proc/self/fd/{folder}/{path.name}")
                    finally:
                        os.close(folder)
                    connection.sendall(b'{"do": "count", "everything": true}\n')
                    answer = json.loads(connection.makefile("rb").readline())
                    if "error" in answer:
                        continue  # its spool cannot be read now: it recovers
                    total += int(answer["done"]["recipients"])
                    answers += 1
                except ConnectionRefusedError:
                    continue  # of a worker that is no more, or not there yet
                except (OSError, ValueError, KeyError) as error:
                    raise CrashError(f"a control socket does not answer: {error!r}") from None
        return total if answers >= self.places else None

    def drain(self) -> None:
        """Waits until nothing is queued. Raises CrashError."""
        wait_until(lambda: self.queued() == 0, "an empty queue")

    def events(self, event: str) -> list[dict[str, Any]]:
        """The log's lines about one kind of event, of all starts."""
        if self._log.exists():
            with self._log.open("rb") as log:
                log.seek(self._read)
                whole = log.read().rpartition(b"\n")[0]
            if whole:
                self._read += len(whole) + 1
                self._events += [found for line in whole.split(b"\n") if (found := _parse_event(line))]
        return [found for found in self._events if found.get("event") == event]

    def forget_events(self) -> None:
        """What was logged so far is of no more interest."""
        self.events("")
        self._events.clear()
        self._begun = 0

    def last_words(self) -> str:
        """The last line that it said."""
        lines = self._log.read_text(errors="replace").splitlines()
        return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "it said nothing")


def _parse_event(line: bytes) -> dict[str, Any] | None:
    """None for what is no event: a message for people, a line that a kill has cut."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _processes() -> list[tuple[int, int, int, str]]:
    """Of all processes: id, parent, group, state."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            state, parent, group = (
                Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
            )
        except OSError:
            continue  # ended meanwhile
        found.append((int(entry), int(parent), int(group), state))
    return found
