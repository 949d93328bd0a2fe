"""Accounting: whatever a server forks is counted and ended, also what left its parents; syncs are those it made."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from needs import needs

from loadtest import LoadError
from loadtest.accounting import WAITED_FOR, Supervised, make_cgroup
from loadtest.comparison import holds
from loadtest.install import Store
from loadtest.processes import free_port
from loadtest.syncs import Call, attribute, count_syncs, make_tracer, read_calls

ROOT = Path(__file__).parents[1]
# Children that leave their parent, burn CPU, and end, each with a note of what it has used.
BURN = """\
import os, time
for number in range(10):
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            while time.process_time() < 0.05:
                pass
            with open(f"used-{number}", "w") as file:
                file.write(str(time.process_time()))
        os._exit(0)
    os.wait()
open("begun", "w").close()
time.sleep(60)
"""
# Daemons that have left, in a session of their own, deaf to SIGTERM.
DAEMON = """\
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open("daemon.new", "w") as file:
            file.write(str(os.getpid()))
        os.rename("daemon.new", "daemon")
        time.sleep(60)
    os._exit(0)
os.wait()
"""


def wait_until(ready: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            return connection.recv(512).startswith(b"220")
    except OSError:
        return False


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(params=[True, False], ids=["cgroup", "wait-status"])
def supervise(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Supervised]]:
    monkeypatch.chdir(tmp_path)
    started: list[Supervised] = []

    def start(script: str, **options: float) -> Supervised:
        command = [sys.executable, "-c", script]
        server = Supervised("it", command, tmp_path / "log", cgroup=request.param, **options)  # type: ignore[arg-type]
        if request.param and server.how == WAITED_FOR:
            server.stop()
            pytest.skip("needs the right to make a cgroup")
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def test_cpu_of_those_that_left_their_parent_and_ended(supervise: Callable[..., Supervised], tmp_path: Path) -> None:
    server = supervise(BURN)
    wait_until(lambda: (tmp_path / "begun").exists() and len(list(tmp_path.glob("used-*"))) == 10)
    assert server.settle(30)
    used = sum(float(file.read_text()) for file in tmp_path.glob("used-*"))
    assert used >= 0.5
    assert 0.95 * used <= server.cpu() <= 1.5 * used + 0.5  # and the start of Python


def test_all_is_ended_also_what_is_deaf(supervise: Callable[..., Supervised], tmp_path: Path) -> None:
    server = supervise(DAEMON, grace=0.5)
    wait_until((tmp_path / "daemon").exists)
    daemon = int((tmp_path / "daemon").read_text())
    assert server.alive()
    assert lives(daemon)
    server.stop()
    assert not lives(daemon)
    assert not server.alive()


def test_memory_is_that_of_all_processes(supervise: Callable[..., Supervised], tmp_path: Path) -> None:
    server = supervise(
        "import os, time\n"
        "os.fork()\n"
        "held = bytearray(os.urandom(20_000_000))\n"
        "open(f'held-{os.getpid()}', 'w').close()\n"
        "time.sleep(60)\n"
    )
    wait_until(lambda: len(list(tmp_path.glob("held-*"))) == 2)
    assert 40e6 < server.memory() < 70e6


def test_who_has_ended_says_so(supervise: Callable[..., Supervised]) -> None:
    server = supervise("import sys; sys.exit('no port')")
    wait_until(lambda: not server.alive())
    with pytest.raises(LoadError, match="it has ended with exit code 1: no port"):
        server.cpu()
    assert server.stop() == 1


def test_nothing_outlives_a_race_that_is_killed(tmp_path: Path) -> None:
    script = f"""\
import time
from pathlib import Path
from loadtest.accounting import Supervised
server = Supervised("it", ["{sys.executable}", "-c", {DAEMON!r}], Path("log"), grace=0.2, cgroup=False)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    race = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    try:
        wait_until((tmp_path / "daemon").exists)
        daemon = int((tmp_path / "daemon").read_text())
        assert lives(daemon)
    finally:
        race.send_signal(signal.SIGKILL)
        race.wait()
    wait_until(lambda: not lives(daemon))


def test_a_cgroup_is_gone_when_its_server_is(tmp_path: Path) -> None:
    group = make_cgroup("removed")
    if group is None:
        pytest.skip("needs the right to make a cgroup")
    sleeper = subprocess.Popen(["sh", "-c", 'echo 0 >"$1"; exec sleep 60', "sh", str(group.procs)])
    try:
        wait_until(lambda: str(sleeper.pid) in group.procs.read_text().split())
        group.remove()
        assert not group.procs.exists()
        assert sleeper.wait(10) == -signal.SIGKILL
    finally:
        sleeper.kill()
        sleeper.wait()


# A server of one session that waits for the disk as often as it is told, before its 250 and after it.
SERVER = """\
import os, socket, sys
port, before, after = map(int, sys.argv[1:])
plain = os.open("plain", os.O_CREAT | os.O_WRONLY)
synced = os.open("synced", os.O_CREAT | os.O_WRONLY | os.O_DSYNC)
read, write = os.pipe()
listener = socket.create_server(("127.0.0.1", port))
while True:
    connection, _ = listener.accept()
    reader = connection.makefile("rb")
    connection.sendall(b"220 it\\r\\n")
    for line in reader:
        if line.startswith(b"DATA"):
            connection.sendall(b"354 go\\r\\n")
            while reader.readline() != b".\\r\\n":
                pass
            for number in range(before):
                if number % 2:
                    os.write(synced, b"x")
                else:
                    os.fsync(plain)
            try:
                os.fsync(write)  # fails: a pipe
            except OSError:
                pass
            connection.sendall(b"250 ok\\r\\n")
            for _ in range(after):
                os.fdatasync(plain)
        else:
            connection.sendall(b"221 bye\\r\\n" if line.startswith(b"QUIT") else b"250 ok\\r\\n")
"""


@pytest.mark.parametrize(("before", "after"), [(3, 2), (0, 1)])
def test_syncs_are_counted_before_and_after_the_reply(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("strace")
    monkeypatch.chdir(tmp_path)
    port, trace = free_port(), tmp_path / "trace"
    command = [sys.executable, "-c", SERVER, str(port), str(before), str(after)]
    tracer = make_tracer(Store(tmp_path / "store"))
    server = Supervised("it", tracer.command(trace, command), tmp_path / "log", grace=0)
    try:
        wait_until(lambda: listens(port))
        syncs = count_syncs("127.0.0.1", port, trace, messages=4)
    finally:
        server.stop()
    assert syncs.messages == 4
    assert syncs.before_250 == before
    assert syncs.in_all == before + after
    named = {"fsync": (before + 1) // 2 * 4, "O_DSYNC": before // 2 * 4, "fdatasync": after * 4}
    assert syncs.calls == {name: count for name, count in sorted(named.items()) if count}
    assert holds("fsync", syncs) == (before > 0)
    assert holds("nothing", syncs)


def test_lines_of_strace() -> None:
    lines = """\
10 1.000000 openat(AT_FDCWD, "a", O_WRONLY|O_CREAT|O_DSYNC, 0600) = 5
10 1.100000 write(5, ""..., 3) = 3
10 1.200000 fsync(7 <unfinished ...>
11 1.250000 fdatasync(3)                = 0
10 1.300000 <... fsync resumed>)         = 0
10 1.400000 fsync(9)                     = -1 EINVAL (Invalid argument)
10 1.500000 close(5)                     = 0
10 1.600000 write(5, ""..., 3) = 3
10 1.700000 pwritev2(8, [...], 1, 0, RWF_DSYNC) = 3
10 1.800000 msync(0x7f, 4096, MS_ASYNC)  = 0
10 1.810000 msync(0x7f, 4096, MS_SYNC)   = 0
12 1.900000 fsync(4 <unfinished ...>
12 1.950000 <... fsync resumed>)         = -1 EIO (Input/output error)
12 2.000000 write(7, "250 "..., 14)      = 14
12 2.100000 sendto(7, "250-"..., 14, 0, NULL, 0) = 14
12 2.200000 sendto(7, "354 "..., 14, 0, NULL, 0) = 14
12 +++ exited with 0 +++
""".splitlines()
    assert list(read_calls(lines)) == [
        Call(1.1, "O_DSYNC"),
        Call(1.25, "fdatasync"),
        Call(1.2, "fsync"),
        Call(1.7, "O_DSYNC"),
        Call(1.81, "msync"),
        Call(2.0, "250"),
        Call(2.1, "250"),
    ]


def test_calls_belong_to_the_message_whose_reply_waited() -> None:
    calls = [Call(1.0, "fsync"), Call(2.0, "fsync"), Call(3.0, "fdatasync"), Call(3.1, "io_uring_setup")]
    calls += [Call(3.12, "250"), Call(3.15, "fsync"), Call(4.0, "250")]  # one that waits after the reply was sent
    syncs = attribute(calls, [(0.9, 1.1), (2.9, 3.2)])
    assert syncs.before_250 == 1.0
    assert syncs.in_all == 2.0
    assert syncs.calls == {"fdatasync": 1, "fsync": 3, "io_uring_setup": 1}
