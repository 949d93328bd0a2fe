"""The supervisor with real processes: supervised.py is the server."""

from __future__ import annotations

import json
import os
import pwd
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastsmtp.supervisor import _is_ending

ROOT = Path(__file__).parent.parent
QUICK = {"round": 0.1, "heartbeat": 0.5, "first_heartbeat": 5.0, "shutdown": 0.3, "early": 0.3}

Record = dict[str, Any]


class Server:
    """A supervisor in a process of its own, and what it says, a JSON object a line."""

    def __init__(self, worker: str, config: Record, patience: Record, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.supervised", worker, json.dumps(config), json.dumps(patience)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.seen: list[Record] = []
        self._data = b""
        self._next = 0

    def wait_for(self, event: str, **values: object) -> Record:
        """The next such line; those before it are passed over."""
        end = time.monotonic() + 20
        while True:
            while self._next < len(self.seen):
                record = self.seen[self._next]
                self._next += 1
                if record["event"] == event and all(record[key] == value for key, value in values.items()):
                    return record
            assert self._read(end - time.monotonic()), f"no {event} {values} in {self.seen}"

    def _read(self, seconds: float) -> bool:
        assert self.process.stdout
        fd = self.process.stdout.fileno()
        if not select.select([fd], [], [], max(0, seconds))[0]:
            return False
        data = os.read(fd, 1 << 16)
        *lines, self._data = (self._data + data).split(b"\n")
        self.seen += [json.loads(line) for line in lines]
        return bool(data)

    def wait(self) -> int:
        """Its exit code; then all that it said is in `seen`."""
        code = self.process.wait(20)
        while self._read(0):
            pass
        return code

    def addresses(self) -> list[str]:
        addresses = self.wait_for("announced")["addresses"]
        assert isinstance(addresses, list)
        return addresses

    def find(self, event: str) -> list[Record]:
        return [record for record in self.seen if record["event"] == event]

    def end(self) -> None:
        """Kills what is left of it, by process id."""
        for pid in {self.pid, *(record["pid"] for record in self.find("worker"))}:
            if is_running(pid) and b"tests.supervised" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(address: str, question: str) -> Any:
    """One question to whichever worker takes the connection."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as client:
        client.sendall(question.encode() + b"\n")
        with client.makefile() as answers:
            return json.loads(answers.readline())


@pytest.fixture
def folder() -> Iterator[Path]:
    """Reached by every user, which tmp_path is not."""
    with tempfile.TemporaryDirectory(prefix="fastsmtp-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(
        worker: str = "serve", workers: int = 1, patience: Record | None = None, shutdown: float = 10, **keys: Any
    ) -> Server:
        environment = keys.pop("environment", {})
        config: Record = {
            "hostname": "mx.test",
            "data_dir": str(folder / "data"),
            "workers": workers,
            "listener": [{"address": "127.0.0.1:0"}],
            "timeouts": {"shutdown": shutdown},
            **keys,
        }
        server = Server(worker, config, {**QUICK, **(patience or {})}, **environment)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.end()


Start = Callable[..., Server]


# Start


def test_it_starts_announces_what_it_bound_serves_and_ends(start: Start, folder: Path) -> None:
    listener = [{"address": ["127.0.0.1:0", f"unix:{folder}/lmtp"]}]
    server = start(workers=2, listener=listener)
    inet, unix = server.addresses()
    assert unix == f"unix:{folder}/lmtp"
    assert len(server.find("worker")) == 2, "announced before every worker was ready"
    assert {ask(inet, "index") for _ in range(40)} == {0, 1}
    assert (folder / "data" / "lock").read_text() == f"{server.pid}\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{folder}/lmtp")

    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    started, stopped = server.find("start")[0], server.find("stop")[0]
    assert (started["workers"], started["addresses"], started["hostname"]) == (2, [inet, unix], "mx.test")
    assert stopped["signal"] == "SIGTERM"
    assert server.find("stopped")[0]["killed"] == 0
    assert not server.find("worker-died")
    assert not (folder / "lmtp").exists()


def test_it_announces_only_when_every_worker_accepts(start: Start) -> None:
    server = start("serve_late", workers=2)
    server.addresses()
    assert [record["event"] for record in server.seen].index("announced") > max(
        number for number, record in enumerate(server.seen) if record["event"] == "worker"
    )


def test_a_port_in_use_is_one_line(start: Start, folder: Path) -> None:
    address = start().addresses()[0]
    second = start(data_dir=f"{folder}/other", listener=[{"address": address}])
    assert second.wait() == 1
    assert second.seen == [
        {"event": "start-error", "text": f"listener {address}: the address is in use by another program"}
    ]


def test_two_servers_on_one_data_directory(start: Start, folder: Path) -> None:
    first = start()
    address = first.addresses()[0]
    second = start()
    assert second.wait() == 1
    text = f"data_dir {folder}/data is in use by process {first.pid}, or by workers it left"
    assert second.seen == [{"event": "start-error", "text": text}]
    assert ask(address, "index") == 0


def test_a_worker_that_outlives_its_supervisor_keeps_the_lock(start: Start) -> None:
    first = start("serve_deaf")
    first.addresses()
    pid = first.find("worker")[0]["pid"]
    os.kill(first.pid, signal.SIGKILL)
    first.process.wait()
    assert is_running(pid)
    second = start()
    assert second.wait() == 1
    assert "in use" in second.seen[0]["text"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_running(pid))
    start().addresses()


def test_a_worker_that_cannot_start_ends_the_start(start: Start, folder: Path) -> None:
    server = start("serve_but_second_cannot", workers=2)
    assert server.wait() == 1
    assert server.seen[-1] == {"event": "start-error", "text": "worker 1 cannot start; the log says why"}
    assert not server.find("announced")
    assert not any(is_running(record["pid"]) for record in server.find("worker"))


def test_privileges_are_dropped(start: Start, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    nobody = pwd.getpwnam("nobody")
    server = start(user="nobody")
    address = server.addresses()[0]
    assert ask(address, "ids") == [[nobody.pw_uid] * 3, [nobody.pw_gid] * 3]
    assert ask(address, "become root") == "PermissionError"
    assert (folder / "data").stat().st_uid == nobody.pw_uid
    # Still bound to its parent, though setuid forgets what was set before it.
    pid = server.find("worker")[0]["pid"]
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not is_running(pid))


def test_privileges_that_cannot_be_dropped_end_the_start(start: Start) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    server = start("serve_if_setuid_is_impossible", user="nobody")
    assert server.wait() == 1
    assert server.find("cannot-start")[0]["why"] == "cannot become user nobody: root could be regained"
    assert server.seen[-1]["event"] == "start-error"


# Deaths


def test_a_killed_worker_is_started_again_and_its_sessions_are_given_back(start: Start) -> None:
    server = start()
    address = server.addresses()[0]
    first = ask(address, "pid")
    assert ask(address, "open 5") == 5
    time.sleep(0.4)  # no early death
    os.kill(first, signal.SIGKILL)
    assert ask(address, "sessions") == 0
    died = server.wait_for("worker-died")
    assert ask(address, "pid") == server.wait_for("worker", index=0)["pid"] != first
    assert died == {
        "event": "worker-died", "level": "error", "time": died["time"],
        "worker": 0, "pid": first, "why": "SIGKILL", "sessions": 5, "restart": 0,
    }  # fmt: skip
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert len(server.find("announced")) == 1


def test_clients_wait_in_the_kernel_while_a_worker_is_started_again(start: Start) -> None:
    server = start(patience={"restart": 0.5, "early": 100.0})
    address = server.addresses()[0]
    first = ask(address, "pid")
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not is_running(first))
    started = time.monotonic()
    assert ask(address, "pid") != first
    assert time.monotonic() - started > 0.2


def test_a_worker_that_dies_early_is_started_again_ever_later(start: Start) -> None:
    server = start("die_early", patience={"restart": 0.02, "restart_max": 0.1})
    waits = [server.wait_for("worker-died", why="exit code 3")["restart"] for _ in range(5)]
    assert waits == [0.02, 0.04, 0.08, 0.1, 0.1]
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0


def test_without_a_process_to_be_had_the_start_fails(start: Start) -> None:
    server = start(workers=2, environment={"FORKS_THAT_FAIL": "2"})
    assert server.wait() == 1
    text = "cannot fork: Resource temporarily unavailable"
    assert server.seen[-1] == {"event": "start-error", "text": text}
    assert not any(is_running(record["pid"]) for record in server.find("worker"))


def test_without_a_process_to_be_had_a_restart_waits(start: Start) -> None:
    server = start(patience={"restart": 0.02}, environment={"FORKS_THAT_FAIL": "2 3"})
    address = server.addresses()[0]
    first = ask(address, "pid")
    time.sleep(0.4)  # no early death
    os.kill(first, signal.SIGKILL)
    assert ask(address, "pid") != first
    server.wait_for("worker", pid=ask(address, "pid"))
    died = [(record["why"], record["restart"]) for record in server.find("worker-died")]
    why = "cannot fork: Resource temporarily unavailable"
    assert died == [("SIGKILL", 0.0), (why, 0.02), (why, 0.04)]


def test_an_exception_in_a_worker_is_logged_once_and_it_is_started_again(start: Start) -> None:
    server = start("fail_once")
    server.addresses()
    bug = server.find("bug")[0]
    assert (bug["where"], bug["exception"]) == ("worker 0", "RuntimeError('once')")
    assert bug["trace"][0].endswith(" fail_once")
    assert server.find("worker-died")[0]["why"] == "exit code 70"


def test_a_worker_whose_heartbeat_stands_still_is_killed(start: Start) -> None:
    server = start()
    address = server.addresses()[0]
    first = ask(address, "pid")
    ask(address, "freeze")
    stuck = server.wait_for("worker-stuck")
    assert (stuck["worker"], stuck["pid"]) == (0, first)
    assert 0.5 < stuck["seconds"] < 5
    assert server.wait_for("worker-died")["why"] == "SIGKILL"
    assert ask(address, "pid") != first


def test_a_worker_without_a_first_heartbeat_is_killed_later(start: Start) -> None:
    server = start("serve_without_heart", patience={"heartbeat": 0.1, "first_heartbeat": 1.0})
    server.addresses()
    assert 1 < server.wait_for("worker-stuck")["seconds"] < 5


def test_time_that_nobody_saw_is_no_standing_heart(start: Start) -> None:
    server = start(patience={"heartbeat": 1.0})
    address = server.addresses()[0]
    worker = ask(address, "pid")
    os.kill(worker, signal.SIGSTOP)
    time.sleep(0.25)  # the supervisor sees the heart stand still, but not long enough
    os.kill(server.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(server.pid, signal.SIGCONT)
    os.kill(worker, signal.SIGCONT)
    assert ask(address, "pid") == worker
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert not server.find("worker-stuck")


def test_workers_end_with_their_supervisor(start: Start) -> None:
    server = start(workers=2)
    server.addresses()
    pids = [record["pid"] for record in server.find("worker")]
    assert all(is_running(pid) for pid in pids)
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not any(is_running(pid) for pid in pids))


@pytest.mark.parametrize("worker", ["serve_by_signal", "serve_by_pipe"])
def test_either_sign_of_the_supervisors_death_is_enough(start: Start, worker: str) -> None:
    server = start(worker)
    server.addresses()
    pid = server.find("worker")[0]["pid"]
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not is_running(pid))


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_stop_it_too_but_do_not_touch_a_worker(start: Start, number: signal.Signals) -> None:
    server = start()
    address = server.addresses()[0]
    worker = ask(address, "pid")
    os.kill(worker, number)
    assert ask(address, "pid") == worker
    os.kill(server.pid, number)
    assert server.wait() == 0
    assert server.find("stop")[0]["signal"] == number.name


def test_a_signal_to_the_whole_group_stops_it_in_order(start: Start) -> None:
    server = start(workers=2)
    server.addresses()
    os.killpg(server.pid, signal.SIGTERM)
    assert server.wait() == 0


def test_while_stopping_nobody_waits_in_its_queue(start: Start, folder: Path) -> None:
    server = start("serve_until_late", workers=2, listener=[{"address": ["127.0.0.1:0", f"unix:{folder}/lmtp"]}])
    address = server.addresses()[0]
    ask(address, "index")
    os.kill(server.pid, signal.SIGTERM)
    server.wait_for("closing")
    server.wait_for("closing")
    with pytest.raises(ConnectionRefusedError):
        ask(address, "index")
    assert not (folder / "lmtp").exists()
    assert server.process.poll() is None
    assert server.wait() == 0


def test_a_worker_that_does_not_end_in_time_is_killed(start: Start) -> None:
    server = start("serve_deaf", shutdown=0.2)
    server.addresses()
    os.kill(server.pid, signal.SIGTERM)
    started = time.monotonic()
    assert server.wait() == 1
    assert 0.4 < time.monotonic() - started < 8
    assert server.find("stopped")[0]["killed"] == 1
    assert server.find("worker-died")[0]["why"] == "SIGKILL"


def test_a_worker_that_ends_badly_shows_in_the_exit_code(start: Start) -> None:
    server = start("serve_and_end_badly")
    server.addresses()
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 1
    assert server.find("worker-died")[0]["why"] == "exit code 5"


def test_a_worker_that_was_killed_before_is_no_matter_of_the_end(start: Start) -> None:
    server = start("serve", workers=2)
    server.addresses()
    victim = server.find("worker")[0]["pid"]
    os.kill(server.pid, signal.SIGSTOP)  # it hears of both at once
    os.kill(victim, signal.SIGKILL)
    while is_running(victim):
        time.sleep(0.01)
    os.kill(server.pid, signal.SIGTERM)
    os.kill(server.pid, signal.SIGCONT)
    assert server.wait() == 0
    (died,) = server.find("worker-died")
    assert (died["pid"], died["why"]) == (victim, "SIGKILL")
    assert server.find("stopped")[0]["killed"] == 0


def test_a_worker_that_was_killed_is_known_before_it_can_be_waited_for() -> None:
    with subprocess.Popen(["sleep", "100"]) as child:
        assert not _is_ending(child.pid)
        child.terminate()
        while not _is_ending(child.pid):
            time.sleep(0.001)
        assert child.wait() == -signal.SIGTERM
    assert not _is_ending(child.pid)


def test_a_worker_that_is_not_ready_yet_may_just_die(start: Start) -> None:
    server = start("sleep", workers=2)
    server.wait_for("worker")
    server.wait_for("worker")
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert not server.find("announced")


def test_the_second_signal_ends_it_at_once(start: Start) -> None:
    server = start("serve_deaf", workers=2, shutdown=100)
    server.addresses()
    pids = [record["pid"] for record in server.find("worker")]
    os.kill(server.pid, signal.SIGTERM)
    server.wait_for("stop")
    started = time.monotonic()
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 1
    assert time.monotonic() - started < 5
    assert not any(is_running(pid) for pid in pids)


def test_an_exception_of_the_supervisor_leaves_no_worker(start: Start) -> None:
    server = start("serve_deaf", environment={"FAIL_IN_ANNOUNCE": "1"})
    assert server.wait() == 1
    assert server.find("worker")
    assert not any(is_running(record["pid"]) for record in server.find("worker"))


# The service manager


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(start: Start, folder: Path, abstract: bool) -> None:
    name = f"@{folder}/notify" if abstract else f"{folder}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        manager.settimeout(20)
        server = start(environment={"NOTIFY_SOCKET": name})
        assert manager.recv(100) == b"READY=1"
        os.kill(server.pid, signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        assert server.wait() == 0


def test_a_service_manager_that_is_gone_does_not_matter(start: Start, folder: Path) -> None:
    server = start(environment={"NOTIFY_SOCKET": f"{folder}/gone"})
    server.addresses()
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0


# Descriptors


def descriptors(pid: int) -> dict[str, str]:
    """What the descriptors above stderr are; each must be closed in a program that is executed."""
    found = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        if int(number) > 2:
            try:
                flags = Path(f"/proc/{pid}/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
                found[number] = os.readlink(f"/proc/{pid}/fd/{number}")
            except FileNotFoundError:  # closed meanwhile
                continue
            assert int(flags, 8) & os.O_CLOEXEC, number
    return found


def count(pid: int, kind: str) -> int:
    return sum(name.startswith(kind) for name in descriptors(pid).values())


def kinds(pid: int) -> list[str]:
    return sorted(name.partition(":")[0] for name in descriptors(pid).values())


def test_no_descriptor_leaks(start: Start) -> None:
    server = start(workers=3)
    address = server.addresses()[0]
    before = kinds(server.pid)
    assert count(server.pid, "socket:") == 6  # for each worker one that it listens on, and one to it
    for _ in range(3):
        pid = ask(address, "pid")
        os.kill(pid, signal.SIGKILL)
        server.wait_for("worker")
        eventually(lambda: kinds(server.pid) == before)
    eventually(lambda: len({ask(address, "index") for _ in range(20)}) == 3)
    for pid in {ask(address, "pid") for _ in range(60)}:
        # Its own socket, what it has of the supervisor, and nothing of the other workers.
        eventually(lambda pid=pid: (count(pid, "socket:"), count(pid, "pipe:")) == (2, 1))
