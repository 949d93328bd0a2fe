"""Servers under test: started, watched from outside through /proc, stopped by their process id.

In: a command and the port it listens on. Out: CPU time and memory of all its processes. CPU is what the kernel counted
in user and system mode: by the process's own clock (nanoseconds, all threads, also ended ones) and, for children that
were waited for, by /proc/PID/stat (10 ms). What the kernel does in its own threads (writeback, journal) is nobody's.
Not here: what load there is. On failure: LoadError, with the last line that the server said.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import LoadError

START_SECONDS = 20.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.1
QUIET_SECONDS = 1.0
QUIET_CPU = 0.01  # seconds of CPU in QUIET_SECONDS: an idle server's clocks take less, any work takes more
_TICKS = os.sysconf("SC_CLK_TCK")
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def find_program(name: str, package: str) -> str:
    """Where a program lies. Raises LoadError."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise LoadError(f"{name} is missing: apt-get install {package}")
    return found


def free_port() -> int:
    """One that nobody listens on, and that the kernel gives to no client: it is still free when a server restarts."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            try:
                stream.bind(("127.0.0.1", port))
                datagrams.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: a process's name may hold blanks and brackets."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def family(root: int) -> list[int]:
    """A process and all that descend from it, ancestors first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                children.setdefault(int(_stat(int(entry))[1]), []).append(int(entry))
            except OSError:
                pass  # ended meanwhile
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """What a process, its descendants and those that they have waited for have used so far."""
    total = 0.0
    for pid in reversed(family(root)):  # whoever ends meanwhile is found again in its parent's account
        try:
            waited_for = sum(map(int, _stat(pid)[13:15]))  # cutime, cstime
            # The kernel's number for the clock CPUCLOCK_SCHED of a process: clock_getcpuclockid(3)
            total += time.clock_gettime((~pid << 3) | 2) + waited_for / _TICKS
        except OSError:
            pass
    return total


def _kilobytes(pid: int, file: str, field: str) -> int:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LoadError(f"/proc/{pid}/{file} has no {field}")


def proportional_memory(root: int) -> int:
    """Octets of a process and its descendants; a page that several share counts as a part for each."""
    return sum(_kilobytes(pid, "smaps_rollup", "Pss") for pid in family(root)) * 1024


class Growth:
    """How much memory processes come to hold at most, above what they hold now."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._before = {}
        for pid in family(root):
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts anew: proc(5)
            self._before[pid] = _kilobytes(pid, "status", "VmRSS")

    def peak(self) -> int:
        """Octets by which the one that grew most has grown."""
        return max(_kilobytes(pid, "status", "VmHWM") - rss for pid, rss in self._before.items()) * 1024


class Server:
    """A server under test and the processes that it has."""

    def __init__(self, name: str, command: Sequence[str], port: int, log: Path, tls: bool = False) -> None:
        self.name = name
        self.port = port
        self._tls = tls
        self._log = log
        with log.open("wb") as output:
            # No session of its own: where sessions share processors out (sched(7), autogroup), niceness counts only
            # within one, and a server's threads of idle priority would take as much as who sends to it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )
        self.pid = self._process.pid
        self._processes: list[int] = []

    def cpu(self) -> float:
        """Seconds that all its processes have used. Raises LoadError when one is not the one that started."""
        if self._process.poll() is not None or family(self.pid) != self._processes:
            raise LoadError(f"{self.name}: a process has ended ({self._last_words()})")
        return cpu_seconds(self.pid)

    def settle(self, limit: float) -> float:
        """Waits until the server has nothing left to do; how long it had, in seconds. Raises LoadError."""
        started = quiet_since = time.monotonic()
        mark = self.cpu()
        while time.monotonic() - quiet_since < QUIET_SECONDS:
            time.sleep(POLL_SECONDS)
            used = self.cpu()
            if used - mark > QUIET_CPU:
                mark, quiet_since = used, time.monotonic()
            if time.monotonic() - started > limit:
                raise LoadError(f"{self.name} is still busy {limit:.0f} s after the load")
        return quiet_since - started

    def wait_ready(self) -> None:
        """Until it greets. Raises LoadError."""
        deadline = time.monotonic() + START_SECONDS
        while not self._greets():
            if self._process.poll() is not None:
                raise LoadError(f"{self.name} did not start: {self._last_words()}")
            if time.monotonic() > deadline:
                raise LoadError(f"{self.name} does not greet within {START_SECONDS:.0f} s: {self._last_words()}")
            time.sleep(0.05)
        self._processes = family(self.pid)

    def stop(self) -> int:
        """Ends it, by force where it does not want to; its exit code, negative for a signal."""
        processes = family(self.pid)
        self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in processes:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            return self._process.wait()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ready inside of the block; behind it, it has ended well. Raises LoadError."""
        try:
            self.wait_ready()
            yield
        finally:
            code = self.stop()
        self.check_end(code)

    def check_end(self, code: int) -> None:
        """A server that lost its way has measured nothing. Raises LoadError."""
        for line in self._log.read_text(errors="replace").splitlines():
            if '"level":"error"' in line:
                raise LoadError(f"{self.name} logged an error: {line[:500]}")
        if code:
            raise LoadError(f"{self.name} ended with exit code {code}: {self._last_words()}")

    def _greets(self) -> bool:
        # It listens before it serves: only its first octets say that every process is there.
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5) as connection:
                if not self._tls:
                    return connection.recv(512).startswith(b"220")
                with unverified().wrap_socket(connection) as secured:
                    return secured.recv(512).startswith(b"220")
        except OSError:
            return False

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "it said nothing")


def configuration(
    folder: Path, port: int, durability: str, end: str, tls: bool, sink: int | str = 0, workers: int = 1
) -> str:
    """A fastsmtp that takes mail for every address of y.test; it ends in `discard`, in a `maildir`, or
    by `relay` (SMTP) or `lmtp` at the port or unix socket `sink`. What is for `discard.test` vanishes in any case."""
    ways = {
        "discard": 'type = "discard"',
        "maildir": f'type = "maildir"\npath = {json.dumps(f"{folder}/mail/{{domain}}/{{local}}")}',
        "relay": f'type = "smtp"\nsmarthost = "127.0.0.1:{sink}"\ntls = "off"',
        "lmtp": f'type = "lmtp"\naddress = "{sink}"',
    }
    certificate = (
        f"[tls]\ncertificate = {json.dumps(f'{folder}/cert.pem')}\nkey = {json.dumps(f'{folder}/key.pem')}\n"
        if tls
        else ""
    )
    return f"""\
hostname = "mx.y.test"
data_dir = {json.dumps(f"{folder}/data")}
workers = {workers}
postmaster = "b@y.test"

[[listener]]
address = "127.0.0.1:{port}"
tls = "{"implicit" if tls else "off"}"

{certificate}
[limits]
sessions = 20000

[spool]
durability = "{durability}"

[log]
format = "json"

[[domain]]
name = "y.test"
recipients = "any"
transport = "t"

[transport.t]
{ways[end]}

[[domain]]
name = "discard.test"
recipients = "any"
transport = "discard"

[transport.discard]
type = "discard"
"""


@contextmanager
def fastsmtp(
    folder: Path, durability: str, end: str, tls: bool = False, sink: int | str = 0, workers: int = 1
) -> Iterator[Server]:
    """A fastsmtp with its data, its log and its mailboxes in `folder`, as long as the block runs."""
    port = free_port()
    if tls:
        make_certificate(folder)
    file = folder / "fastsmtp.toml"
    file.write_text(configuration(folder, port, durability, end, tls, sink, workers))
    command = [sys.executable, "-m", "fastsmtp", "serve", "--config", str(file)]
    server = Server("fastsmtp", command, port, folder / "fastsmtp.log", tls)
    with server.running():
        yield server


@contextmanager
def smtp_sink() -> Iterator[Server]:
    """Postfix's smtp-sink, as long as the block runs."""
    port = free_port()
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    command = [find_program("smtp-sink", "postfix"), *user, "-c", f"127.0.0.1:{port}", "1000"]
    server = Server("smtp-sink", command, port, Path(os.devnull))
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def unverified() -> ssl.SSLContext:
    """A client's TLS that takes any certificate, such as the one made here."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def make_certificate(folder: Path) -> None:
    """key.pem and cert.pem, ECDSA P-256, self-signed. Raises LoadError."""
    command = [find_program("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]
    command += ["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=mx.y.test"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise LoadError(f"openssl made no certificate: {made.stderr.strip().splitlines()[-1]}")


def mail_in(folder: Path) -> int:
    """How many messages stand in the new/ of all mailboxes below `folder`."""
    count = 0
    for new in folder.glob("mail/*/*/new"):
        with os.scandir(new) as entries:
            count += sum(1 for _ in entries)
    return count
