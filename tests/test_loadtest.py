"""The load test: its client against a scripted server, its accounts against processes that use what they are told."""

from __future__ import annotations

import ast
import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from loadtest import LoadError, client, measurements, processes, receive
from loadtest.report import GOALS, Row, render_json, render_table
from tests.needs import needs, needs_root, volume

ROOT = Path(__file__).parent.parent
REPLIES = {"EHLO": "250-mx.test\r\n250-SIZE\r\n250 HELP", "MAIL": "250 ok", "RCPT": "250 ok", "DATA": "354 go"}
BODY = client.make_message(1000)


class Scripted:
    """A server with fixed replies that keeps what it got."""

    def __init__(self, replies: dict[str, str] | None = None, piecemeal: bool = False, wait: float = 0) -> None:
        self.replies = {**REPLIES, **(replies or {})}
        self.piecemeal = piecemeal
        self.wait = wait  # before the reply to a message, and before its body is read
        self.recipients: list[str] = []
        self.bodies: list[bytes] = []
        self.sessions: list[asyncio.StreamWriter] = []

    async def say(self, writer: asyncio.StreamWriter, reply: str) -> None:
        octets = f"{reply}\r\n".encode()
        for n in range(len(octets)) if self.piecemeal else ():
            writer.write(octets[n : n + 1])
            await asyncio.sleep(0)
        if not self.piecemeal:
            writer.write(octets)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.sessions.append(writer)
        await self.say(writer, self.replies.get("", "220 mx.test ESMTP"))
        while line := (await reader.readline()).decode():
            verb = line[:4]
            if verb == "RCPT":
                self.recipients.append(line[8:].strip())
            reply = self.replies[verb]
            if not reply:
                writer.close()
                return
            await self.say(writer, reply)
            if reply.startswith("354"):
                await asyncio.sleep(self.wait)
                self.bodies.append(await reader.readuntil(b"\r\n.\r\n"))
                await self.say(writer, self.replies.get(".", "250 kept"))

    def play(self, work: Callable[[int], Awaitable[None]], seconds: float = 20.0) -> None:
        """Runs a client's work with this server's port."""

        async def both() -> None:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0, limit=1 << 26)
            await work(server.sockets[0].getsockname()[1])
            server.close()

        client.run(both(), seconds)


@pytest.mark.parametrize("piecemeal", [False, True])
def test_client_sends_every_message_once(piecemeal: bool) -> None:
    server = Scripted(piecemeal=piecemeal)
    latencies: list[float] = []

    async def work(port: int) -> None:
        sessions = await client.open_sessions(port, 5)
        latencies.extend(await client.send_closed_loop(sessions, client.recipients(3, 50), BODY))
        measurements.check_alive(sessions)

    server.play(work)
    assert sorted(server.recipients) == sorted(f"<b{n % 3}@y.test>" for n in range(50))
    assert server.bodies == [BODY] * 50
    assert len(latencies) == 50
    assert all(0 < one < 20 for one in latencies)


@pytest.mark.parametrize("size", [0, 1, 2, 71, 72, 73, 75, 1000, 50_000])
def test_message_has_its_size(size: int) -> None:
    payload = client.make_message(size).partition(b"\r\n\r\n")[2]
    assert payload.endswith(b".\r\n")
    assert abs(len(payload) - 3 - size) <= 2  # there are no lines of one octet
    assert payload.count(b".") == 1


def test_latency_counts_from_the_end_of_data_to_the_reply() -> None:
    server = Scripted(wait=0.2)

    async def work(port: int) -> None:
        sessions = await client.open_sessions(port, 1)
        found = await client.send_closed_loop(sessions, client.recipients(1, 2), BODY)
        assert min(found) >= 0.19

    server.play(work)


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ({"": "421 go away"}, "421 go away where 220 was"),
        ({"EHLO": "250-a\r\n550 no"}, "550 no where 250 was"),
        ({"RCPT": "550 5.1.1 nobody"}, "550 5.1.1 nobody where 250 was"),
        ({"DATA": "250 ok"}, "250 ok where 354 was"),
        ({".": "451 4.3.0 disk"}, "451 4.3.0 disk where 250 was"),
        ({"MAIL": ""}, "closed the connection"),
    ],
)
def test_client_takes_no_other_reply(replies: dict[str, str], said: str) -> None:
    async def work(port: int) -> None:
        sessions = await client.open_sessions(port, 3)
        await client.send_closed_loop(sessions, client.recipients(1, 10), BODY)

    with pytest.raises(LoadError, match=said):
        Scripted(replies).play(work)


def test_client_without_a_server() -> None:
    async def work() -> None:
        await client.open_sessions(processes.free_port(), 1)

    with pytest.raises(LoadError, match="cannot connect"):
        client.run(work(), 5)


def test_client_notices_an_idle_session_that_ends() -> None:
    server = Scripted()

    async def work(port: int) -> None:
        sessions = await client.open_sessions(port, 3)
        measurements.check_alive(sessions)
        server.sessions[1].write(b"421 4.4.2 bye\r\n")
        server.sessions[2].close()
        await asyncio.sleep(0.2)
        with pytest.raises(LoadError, match=r"2 of 3 sessions ended: .*421 4\.4\.2 bye where nothing"):
            measurements.check_alive(sessions)
        ended = next(session for session in sessions if session.lost)
        with pytest.raises(LoadError, match=ended.lost.split("(")[0]):
            await ended.run(client.send([b"RCPT TO:<b@y.test>\r\n"], BODY, []))

    server.play(work)


@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_large_message_arrives_whole(wait: float) -> None:
    server = Scripted(wait=wait)  # while it waits, the socket's buffers fill and writing pauses

    async def work(port: int) -> None:
        sessions = await client.open_sessions(port, 2)
        to = b"RCPT TO:<big@y.test>\r\n"
        await asyncio.gather(*(session.run(client.send_pieces(to, 30_000_000)) for session in sessions))

    server.play(work)
    assert len(server.bodies) == 2
    for body in server.bodies:
        header, _, payload = body.partition(b"\r\n\r\n")
        assert header == b"Subject: large"
        assert set(payload.split(b"\r\n")) == {b"x" * 70, b".", b""}
        assert 0 <= 30_000_000 - (len(payload) - 3) < 72


def test_paced_messages_keep_their_rate_and_count_what_found_no_session() -> None:
    async def work(port: int) -> None:
        loop = asyncio.get_running_loop()
        paced = client.Paced(await client.open_sessions(port, 4), 100, b"RCPT TO:<b@y.test>\r\n", BODY)
        end = loop.time() + 0.5
        await paced.run(lambda: loop.time() > end)
        assert 40 <= len(paced.latencies) + paced.missed <= 55
        seen.append(paced.missed)

    seen: list[int] = []
    Scripted().play(work)
    Scripted(wait=0.2).play(work)
    assert seen[1] > seen[0]


def test_run_ends_what_takes_too_long() -> None:
    async def work(port: int) -> None:
        sessions = await client.open_sessions(port, 1)
        await client.send_closed_loop(sessions, client.recipients(1, 1), BODY)

    with pytest.raises(LoadError, match="not finished within 0 s"):
        Scripted(wait=30).play(work, 0.3)


def test_run_ends_when_a_callback_errs() -> None:
    def broken() -> client.Script:
        yield b"EHLO x\r\n", b"250"
        raise ZeroDivisionError

    async def work(port: int) -> None:
        await (await client.open_session(port)).run(broken())

    with pytest.raises(LoadError, match=r"the client erred: .*ZeroDivisionError"):
        Scripted().play(work)


def test_percentile() -> None:
    values = [float(n) for n in range(1, 1001)]
    assert [client.percentile(values, share) for share in (0.5, 0.99, 0.999, 1.0)] == [500, 990, 999, 1000]
    assert client.percentile([7.0], 0.5) == 7


# A server that does what it is told: one line, one answer.
TOLD = """
import os, signal, socket, subprocess, sys, threading, time
def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end: pass
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
if sys.argv[2:] == ["stubborn"]: signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print('{"level":"info"}', flush=True)
while True:
    connection, _ = listening.accept()
    connection.sendall(b"220 hello\\r\\n")
    told = connection.recv(1000).decode().split()
    if told[:1] == ["burn"]:
        thread = threading.Thread(target=burn, args=[0.3]); thread.start(); thread.join()
        subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.4: pass"])
    elif told[:1] == ["later"]:
        connection.sendall(b"ok"); time.sleep(0.3); burn(0.5)
    elif told[:1] == ["grow"]:
        memory = bytearray(os.urandom(1)) * (40 << 20); del memory
    elif told[:1] == ["hold"]:
        held = bytearray(os.urandom(1)) * (40 << 20)
    elif told[:1] == ["orphan"]:
        child.kill(); child.wait()
    elif told[:1] == ["err"]:
        print('{"level":"error","event":"bug"}', flush=True)
    elif told[:1] == ["exit"]:
        print("no more", flush=True); child.kill(); os._exit(3)
    connection.sendall(b"ok")
    connection.close()
"""


class Told:
    """A process that runs TOLD, as a server under test."""

    def __init__(self, folder: Path, *options: str) -> None:
        port = processes.free_port()
        command = [sys.executable, "-c", TOLD, str(port), *options]
        self.server = processes.Server("told", command, port, folder / "log")
        self.server.wait_ready()

    def tell(self, word: str) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port)) as connection:
            connection.recv(100)
            connection.sendall(word.encode())
            connection.recv(100)


def test_cpu_of_ended_threads_and_ended_children_counts(tmp_path: Path) -> None:
    told = Told(tmp_path)
    try:
        before = told.server.cpu()
        time.sleep(0.5)
        idle = told.server.cpu() - before
        told.tell("burn")
        used = told.server.cpu() - before - idle
    finally:
        told.server.stop()
    assert idle < 0.1
    assert 0.68 <= used < 1.2  # 0.3 in a thread, 0.4 in a child, counted in ticks of 10 ms; starting it costs too


def test_settle_waits_until_the_work_is_done(tmp_path: Path) -> None:
    told = Told(tmp_path)
    try:
        told.server.settle(30)
        before = told.server.cpu()
        told.tell("later")
        assert told.server.settle(30) >= 0.5
        assert told.server.cpu() - before >= 0.5
        told.tell("later")
        with pytest.raises(LoadError, match="still busy"):
            told.server.settle(0.5)
    finally:
        told.server.stop()


def test_memory(tmp_path: Path) -> None:
    told = Told(tmp_path)
    try:
        growth = processes.Growth(told.server.pid)
        before = processes.proportional_memory(told.server.pid)
        told.tell("grow")
        assert 39 << 20 <= growth.peak() < 60 << 20  # the kernel counts by the processor, and adds up now and then
        assert abs(processes.proportional_memory(told.server.pid) - before) < 20 << 20
        assert processes.Growth(told.server.pid).peak() < 10 << 20
        told.tell("hold")
        assert 39 << 20 <= processes.proportional_memory(told.server.pid) - before < 60 << 20
    finally:
        told.server.stop()


@pytest.mark.parametrize("word", ["exit", "orphan"])
def test_a_process_that_ends_is_noticed(tmp_path: Path, word: str) -> None:
    told = Told(tmp_path)
    try:
        told.tell(word)
        time.sleep(0.1)
        with pytest.raises(LoadError, match="a process has ended"):
            told.server.cpu()
    finally:
        code = told.server.stop()
    with pytest.raises(LoadError, match="exit code 3: no more" if word == "exit" else "exit code -15"):
        told.server.check_end(code)


def test_a_server_that_logs_an_error_is_noticed(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.server.check_end(0)
    told.tell("err")
    told.server.stop()
    with pytest.raises(LoadError, match=r'logged an error: .*"bug"'):
        told.server.check_end(0)


def test_a_server_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.3)
    told = Told(tmp_path, "stubborn")
    assert len(processes.family(told.server.pid)) == 2
    assert told.server.stop() == -signal.SIGKILL
    assert processes.family(told.server.pid) == [told.server.pid]


def test_a_server_that_does_not_start_is_told_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        processes, "configuration", lambda *_: '[[listener]]\naddress = "nowhere"\n[spool]\ndurability = "none"\n'
    )
    with (
        pytest.raises(LoadError, match=r"fastsmtp did not start: .*address"),
        processes.fastsmtp(tmp_path, "none", "x"),
    ):
        pass
    monkeypatch.setattr(processes, "START_SECONDS", 0.2)
    mute = processes.Server("mute", [sys.executable, "-c", "import time; time.sleep(9)"], 1, tmp_path / "log")
    with pytest.raises(LoadError, match="does not greet within 0 s: it said nothing"):
        mute.wait_ready()
    mute.stop()


@pytest.mark.parametrize("durability", ["none", "fsync"])
@pytest.mark.parametrize("transport", ["discard", "maildir"])
@pytest.mark.parametrize("tls", [False, True])
def test_configuration_is_one(tmp_path: Path, durability: str, transport: str, tls: bool) -> None:
    if tls:
        needs("openssl")
        processes.make_certificate(tmp_path)
    file = tmp_path / "fastsmtp.toml"
    file.write_text(processes.configuration(tmp_path, processes.free_port(), durability, transport, tls))
    command = [sys.executable, "-m", "fastsmtp", "check", "--config", str(file)]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_certificate_that_cannot_be_written(tmp_path: Path) -> None:
    needs("openssl")
    with pytest.raises(LoadError, match="openssl made no certificate"):
        processes.make_certificate(tmp_path / "missing")


def test_mail_is_counted_in_new_only(tmp_path: Path) -> None:
    for name in ("mail/y.test/a/new/1", "mail/y.test/b/new/2", "mail/y.test/b/cur/3", "mail/tmp/4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert processes.mail_in(tmp_path) == 2
    measurements.check_mail(tmp_path, "maildir", 2)
    with pytest.raises(LoadError, match="3 messages were acknowledged, 2 are in a mailbox"):
        measurements.check_mail(tmp_path, "maildir", 3)


def test_rows_are_judged_by_their_median() -> None:
    assert Row("persistent", [0.9, 1.0, 9.0]).met == "aim"
    assert Row("persistent", [0.9, 1.3, 9.0]).met == "required"
    assert Row("persistent", [0.9, 1.31, 1.4]).met == "NO"
    assert Row("crowd", [-30.0]).met == "aim"
    row = Row("persistent", [1.1, 1.2], [20.0, 24.0], [18.0, 20.0], [30_000.0, 20_000.0], ["a note"])
    table = render_table([row, Row("idle", [2.5])])
    assert "22.0 (20.0–24.0)" in table
    assert "25,000 (20,000–30,000)" in table
    assert "1.15 (1.10–1.20) × smtp-sink" in table
    assert "a note" in table
    figures = json.loads(render_json([row]))
    assert figures["measurements"][0]["fastsmtp_us"] == [20, 24]
    assert figures["machine"]["kernel"]


def test_every_goal_is_measured() -> None:
    sources = "".join(file.read_text() for file in (ROOT / "loadtest").glob("*.py") if file.name != "report.py")
    assert set(GOALS) > set(measurements.MEASUREMENTS)
    assert [name for name in GOALS if f'"{name}"' not in sources] == []


def test_nothing_here_imports_what_it_measures() -> None:
    for file in (ROOT / "loadtest").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "fastsmtp" for name in names), file


def test_a_folder_in_memory_is_refused(tmp_path: Path) -> None:
    needs_root()
    with volume("tmpfs", tmp_path / "memory", "1M") as memory:
        with pytest.raises(LoadError, match="is on tmpfs, in memory"):
            receive.make_folder(memory.path)
        assert list(memory.path.iterdir()) == []
    with pytest.raises(LoadError, match="no folder can be made in"):
        receive.make_folder(tmp_path / "missing")


def start_program(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loadtest.receive", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def disk() -> Path:
    """A folder that is not in memory, as /tmp may be."""
    folder = ROOT / "build" / "loadtest"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        receive.make_folder(folder).rmdir()
    except LoadError as error:
        pytest.skip(str(error))
    return folder


def test_the_program_measures(disk: Path, tmp_path: Path) -> None:
    needs("smtp-source", "smtp-sink")
    names = ["persistent", "maildir-1000"]
    program = start_program(*names, "--rounds", "1", "--messages", "200", "--dir", str(disk), "--json", f"{tmp_path}/j")
    table, said = program.communicate(timeout=120)
    assert program.returncode == 0, said
    assert [line.split()[0] for line in table.splitlines()[2:4]] == names
    found = json.loads((tmp_path / "j").read_text())["measurements"]
    assert [one["name"] for one in found] == names
    for one in found:
        assert one["fastsmtp_us"][0] > 0
        assert one["smtp_sink_us"][0] > 0
    assert list(disk.iterdir()) == []


def test_the_program_stops_its_servers_when_it_is_stopped(disk: Path) -> None:
    program = start_program("latency", "--messages", "10000000", "--dir", str(disk))
    deadline = time.monotonic() + 30
    while not list(disk.glob("*/*/data/spool")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    started = processes.family(program.pid)[1:]
    assert len(started) >= 2  # supervisor and worker
    program.terminate()
    _, said = program.communicate(timeout=60)
    assert program.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    assert list(disk.iterdir()) == []


def test_what_is_missing_is_one_line(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_PATH", "/nowhere")
    rows, failed = receive.measure_all(["persistent"], measurements.MEASUREMENTS, measurements.Bench(disk, 1, 10))
    assert (rows, failed) == ([], 1)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "persistent: not measured: smtp-sink is missing: apt-get install postfix"
    )


@pytest.mark.parametrize("arguments", [["nonsense"], ["--rounds", "0"], ["--messages", "x"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    program = start_program(*arguments)
    _, said = program.communicate(timeout=30)
    assert program.returncode == 2
    assert "Traceback" not in said
