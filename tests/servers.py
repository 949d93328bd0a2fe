"""The real server as a process of its own, watched through its log, and what it put into mailboxes.

In: a folder and a configuration. Out: a `Server` that has said it accepts, its addresses, its workers, its log
as dicts, its exit code. The log of all starts of one object stands in one file. It leads a process group of its
own: `running` kills the whole group at the end, whatever became of the supervisor.
`mailbox` reads what was delivered without any code of the server: trace fields apart, as RFC 5321 4.4 has them.
Not here: what is sent (peer.py), what has to be found (loadtest.rules). On failure: AssertionError with the log.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0  # seconds for what takes less than one; the machine may be busy

LISTENER = '[[listener]]\naddress = "127.0.0.1:0"\n'
ANY_DOMAIN = '[[domain]]\nname = "*"\nrecipients = "any"\ntransport = "boxes"\n'

_OF_MAIL = ("accepted", "delivered", "session")  # events
_STATES = {"01": "open", "02": "asks", "03": "asked", "04": "ends", "05": "ends", "08": "told the end", "0A": "listens"}
_TIME_WAIT = "06"

# What stands before the sender's octets in a mailbox. The Received field of a message that is kept as sent ends its
# lines in CRLF.
_TRACE = re.compile(
    rb"Return-Path: <(?P<sender>[^\n]*)>\n"
    rb"Delivered-To: (?P<recipient>[^\n]*)\n"
    rb"(?P<received>Received: from [^\r\n]*\r?\n"
    rb"(?:\t\([^\r\n]*\)\r?\n)?"
    rb"\tby [^\r\n]* with (?P<protocol>[A-Z0-9]+) id (?P<id>[0-9a-v]+)"
    rb"(?:\r?\n\tfor <[^\r\n]*>)?;\r?\n"
    rb"\t[^\r\n]*\r?\n)"
)


def toml(
    folder: Path,
    *,
    workers: int = 1,
    top: str = "",
    listeners: str = LISTENER,
    domains: str = ANY_DOMAIN,
    tables: str = "",
) -> str:
    """A configuration with its data and its mail in `folder`; `top` are more keys, `tables` more tables."""
    return f"""\
hostname = "mx.here.test"
data_dir = {json.dumps(f"{folder}/data")}
workers = {workers}
{top}
{listeners}
{domains}
[transport.boxes]
type = "maildir"
path = {json.dumps(f"{folder}/mail/{{domain}}/{{local}}")}

{tables}
"""


class Server:
    """`fastsmtp serve` in `folder`, started through `wrapper` where there is one (such as prlimit).

    `configuration` is written to a file at each start; None: the embedded default.
    """

    def __init__(self, folder: Path, configuration: str | None, wrapper: Sequence[str] = ()) -> None:
        self.folder = folder
        self.configuration = configuration
        self.mail = folder / "mail"
        self._wrapper = wrapper
        self._log = folder / "log"
        self._errors = folder / "errors"
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: list[int] = []
        self._read = 0  # octets of the log that have been read
        self._lines: list[bytes] = []
        self._events: list[dict[str, Any]] = []

    def launch(self) -> None:
        """Starts it, and waits for nothing."""
        command = [*self._wrapper, sys.executable, "-m", "fastsmtp", "serve"]
        if self.configuration is not None:
            (self.folder / "fastsmtp.toml").write_text(self.configuration)
            command += ["--config", "fastsmtp.toml"]
        with self._log.open("ab") as log, self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=errors, start_new_session=True,
            )  # fmt: skip
        self._groups.append(self._process.pid)

    def start(self) -> None:
        """Starts it, and returns when it accepts."""
        starts = len(self.events("start"))
        self.launch()
        self.wait(lambda: len(self.events("start")) > starts, "start")

    def start_again(self, seconds: float = PATIENCE) -> None:
        """Starts it while workers that lost their supervisor may still be busy with their end."""
        deadline = time.monotonic() + seconds
        while True:
            starts = len(self.events("start"))
            self.launch()
            while len(self.events("start")) == starts:
                assert time.monotonic() < deadline, self.story("not started again")
                if self.process.poll() is not None:
                    break
                time.sleep(0.01)
            else:
                return
            assert self.process.returncode == 1, self.story("a start failed")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self.process.pid

    def workers(self) -> list[int]:
        """The children of the supervisor."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                try:
                    state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
                except OSError:
                    continue  # ended meanwhile
                if int(parent) == self.pid and state != "Z":
                    found.append(int(entry))
        return sorted(found)

    def addresses(self) -> list[str]:
        """What it listens on, in the order of the configuration."""
        found: list[str] = self.events("start")[-1]["addresses"]
        return found

    @property
    def address(self) -> str:
        return self.addresses()[0]

    def lines(self) -> list[bytes]:
        """The log, without a line that is still being written."""
        if self._log.exists():
            with self._log.open("rb") as log:
                log.seek(self._read)
                octets = log.read().rpartition(b"\n")[0]
            if octets:
                self._read += len(octets) + 1
                self._lines += octets.split(b"\n")
        return self._lines

    def events(self, event: str = "", **values: object) -> list[dict[str, Any]]:
        """The log lines of an event with these values."""
        wanted = {"event": event, **values} if event else values
        lines = self.lines()
        self._events += [json.loads(line) for line in lines[len(self._events) :]]
        return [line for line in self._events if all(line.get(key) == value for key, value in wanted.items())]

    def errors(self) -> str:
        """What it said on standard error."""
        return self._errors.read_text()

    def wait(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Until it holds; fails when it takes longer or when the server ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.process.poll()
            if condition():
                return
            assert ended is None, self.story(f"{what}: the server has ended with {ended}")
            assert time.monotonic() < deadline, self.story(f"{what}: not within {seconds:.0f} s")
            time.sleep(0.01)

    def wait_for(self, event: str, n: int = 1, **values: object) -> list[dict[str, Any]]:
        """The log lines of an event once there are `n` of them."""
        self.wait(lambda: len(self.events(event, **values)) >= n, f"{n} {event} {values}")
        return self.events(event, **values)

    def wait_mail(self, n: int) -> None:
        """Until so many messages stand in the mailboxes."""
        self.wait(lambda: len(files(self.mail)) >= n, f"{n} messages in mailboxes")

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Its exit code, negative for a signal."""
        self.process.send_signal(signum)
        return self.ended()

    def ended(self) -> int:
        """Waits for its end; its exit code, negative for a signal."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.story("it does not end")) from None

    def kill(self) -> None:
        """Kills what is left of it, workers without a supervisor included."""
        for group in self._groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if self._process is not None:
            self._process.wait()

    def story(self, what: str) -> str:
        """What went wrong, with the end of the log. May be asked by any thread."""
        log = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        errors = self.errors() if self._errors.exists() else ""
        return "\n".join([what, *log[-30:], errors])

    def whereabouts(self, port: int) -> str:
        """What the processes and the sockets of a port are at, and what the log says beside mail."""
        log = self._log.read_text(errors="replace").splitlines()
        life = [line for line in log if not any(f'"event":"{event}"' in line for event in _OF_MAIL)]
        processes = [_describe(pid) for pid in (self.pid, *self.workers())]
        return "\n".join([*life[-40:], *processes, *sockets(port)])

    def check_bugs(self) -> None:
        assert not self.events("bug"), self.story("a bug")
        assert "Traceback" not in self.errors(), self.errors()


def _describe(pid: int) -> str:
    """A process and what its first thread waits for in the kernel."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return f"process {pid}: {state} in {Path(f'/proc/{pid}/wchan').read_text() or 'no call'}"
    except OSError as error:
        return f"process {pid}: {error.strerror}"


def sockets(port: int) -> list[str]:
    """The sockets of a port as the kernel has them, and which processes hold them; of one that listens, `rx` is how
    many wait to be accepted. proc(5), /proc/net/tcp."""
    holders: dict[str, set[str]] = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            holders.setdefault(os.readlink(link), set()).add(link.parts[2])
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, queues, _, _, _, _, inode, *_ = line.split()
        ports = [int(end.partition(":")[2], 16) for end in (local, remote)]
        if port in ports and state != _TIME_WAIT:
            held = " ".join(sorted(holders.get(f"socket:[{inode}]", ()))) or "nobody"
            sent, _, read = queues.partition(":")
            name = _STATES.get(state, state)
            found.append(f"socket {ports[0]} to {ports[1]}: {name}, tx {int(sent, 16)}, rx {int(read, 16)}, of {held}")
    return found


@contextmanager
def running(folder: Path, configuration: str | None = "", wrapper: Sequence[str] = ()) -> Iterator[Server]:
    """A server that accepts, as long as the block runs; with an empty configuration, `toml` of the folder."""
    server = Server(folder, toml(folder) if configuration == "" else configuration, wrapper)
    try:
        server.start()
        yield server
        server.check_bugs()
    finally:
        server.kill()


class Mail(NamedTuple):
    """A delivered message: what the trace fields say, and the sender's octets."""

    path: Path
    sender: str
    recipient: str
    received: bytes
    protocol: str
    id: str
    body: bytes


def files(mail: Path) -> list[Path]:
    """What a reader finds in the mailboxes below `mail`; what stands in tmp/ is nobody's mail."""
    return sorted(path for folder in ("new", "cur") for path in mail.glob(f"*/*/{folder}/*"))


def read_mail(path: Path) -> Mail:
    """Raises ValueError where the trace fields are not there."""
    octets = path.read_bytes()
    match = _TRACE.match(octets)
    if match is None:
        raise ValueError(f"{path} does not begin with the trace fields: {octets[:200]!r}")
    return Mail(
        path, match["sender"].decode(), match["recipient"].decode(), match["received"], match["protocol"].decode(),
        match["id"].decode(), octets[match.end() :],
    )  # fmt: skip


def mailbox(mail: Path, domain: str, local: str) -> list[Mail]:
    """The messages in one mailbox, by the names of its folders."""
    folder = mail / domain / local
    return [read_mail(path) for path in sorted([*folder.glob("new/*"), *folder.glob("cur/*")])]
