"""A real PostgreSQL in a folder of its own, reachable by a unix socket and on a free port of the loopback address.

In: nothing. Out: a `Postgresql` that answers: `run` puts SQL into it, `url` is what a client is given, `stop`, `start`
and `frozen` are what an operator and a broken network do to it. It is made once for a whole run of the tests and
thrown away at its end; a test has what it makes in a schema, or a database, of its own.
Nothing of the system's PostgreSQL is read or touched. PostgreSQL does not run as root: it is started as `postgres`
(or `nobody`) there. On failure: AssertionError with its log.
"""

from __future__ import annotations

import atexit
import functools
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from needs import SYSTEM_PATH, lacks, public_folder

from loadtest.processes import free_port

START = 60.0  # seconds for what takes one

_SETTINGS = """\
listen_addresses = '127.0.0.1'
unix_socket_directories = '{folder}'
port = {port}
fsync = off
shared_buffers = 16MB
max_connections = 40
"""


class Postgresql:
    """`folder` is where its unix socket lies; its user is `fastsmtp` with the password `secret`, its database
    `postgres`."""

    def __init__(self, folder: Path, binaries: Path, user: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"postgresql://fastsmtp:secret@127.0.0.1:{self.port}/postgres"
        self._data = folder / "data"
        self._binaries = binaries
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        password = self.folder / "password"
        password.write_text("secret\n")
        self._give_away()
        self._execute(
            "initdb", "--pgdata", str(self._data), "--username", "fastsmtp", "--auth", "scram-sha-256",
            "--pwfile", str(password), "--encoding", "UTF8", "--locale", "C", "--no-sync",
        )  # fmt: skip
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(_SETTINGS.format(folder=self.folder, port=self.port))
        (self._data / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")

    def start(self) -> None:
        """Returns when it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", str(self._data)],
                user=self._user or None, group=self._group(), extra_groups=[] if self._user else None,
                env={"PATH": SYSTEM_PATH}, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START
        while not self._answers():
            assert self._process.poll() is None, f"PostgreSQL has ended: {self.log()}"
            assert time.monotonic() < deadline, f"PostgreSQL does not answer: {self.log()}"
            time.sleep(0.05)

    def stop(self) -> None:
        """All connections end at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(10.0)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Connections stand, and nothing answers."""
        assert self._process is not None
        # Each connection is a process with a group of its own.
        pids = [self._process.pid, *self._children(self._process.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def run(self, sql: str) -> str:
        """The rows, a line each, columns with "|" between them."""
        return self._execute(
            "psql", "--host", str(self.folder), "--port", str(self.port), "--username", "fastsmtp",
            "--dbname", "postgres", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align",
            "--set", "ON_ERROR_STOP=1", "--command", sql,
        )  # fmt: skip

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _answers(self) -> bool:
        try:
            self.run("SELECT 1")
        except AssertionError:
            return False
        return True

    def _children(self, pid: int) -> list[int]:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def _group(self) -> int | None:
        return pwd.getpwnam(self._user).pw_gid if self._user else None

    def _give_away(self) -> None:
        if self._user:
            account = pwd.getpwnam(self._user)
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, account.pw_uid, account.pw_gid)

    def _execute(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [self._binaries / program, *arguments], user=self._user or None, group=self._group(),
            extra_groups=[] if self._user else None, env={"PATH": SYSTEM_PATH}, cwd=self.folder,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{program}: {done.stderr}"
        return done.stdout


@functools.cache
def postgresql() -> Postgresql:
    """The one server of this run of the tests, which runs; it ends with the run."""
    binaries = _find_binaries()
    user = ""
    if os.geteuid() == 0:
        names = {account.pw_name for account in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
    stack = ExitStack()
    atexit.register(stack.close)
    server = Postgresql(stack.enter_context(public_folder("postgresql")), binaries, user)
    stack.callback(server.stop)
    server.make()
    server.start()
    return server


def _find_binaries() -> Path:
    """Debian keeps them where PATH does not lead."""
    found = shutil.which("initdb", path=SYSTEM_PATH)
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not versions:
        lacks("needs initdb: apt-get install postgresql")
    return versions[-1].parent
