"""`fastsmtp queue`: on a running server and on a stopped one, for people and for programs."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from keeping import run as run_loop
from needs import needs_root
from peer import Peer
from queueing import block, blocked, queue, rows, send, send_deferred, unblock
from servers import ROOT, files, running, toml

from fastsmtp.config import load
from fastsmtp.console import ConsoleError, reach
from fastsmtp.job import Job, Mark
from fastsmtp.queue_text import octets, shown, span

COMMAND = [sys.executable, "-m", "fastsmtp", "queue"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# Whoever becomes nobody may not be able to read the program any more: it is loaded before.
AS_NOBODY = [
    sys.executable,
    "-c",
    "import os, pwd, sys; from fastsmtp import cli, control, spool; os.setgroups([])\n"
    "nobody = pwd.getpwnam('nobody'); os.setresgid(*[nobody.pw_gid] * 3); os.setresuid(*[nobody.pw_uid] * 3)\n"
    "cli.main(['queue', *sys.argv[1:]])",
]
NOBODYS_ID = "0" * 20


@pytest.fixture(params=["running", "stopped"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Two workers, each with deferred mail; the ids."""
    with blocked(tmp_path, workers=2) as server:
        ids: list[str] = []
        while len({message_id[13:15] for message_id in ids}) < 2 or len(ids) < 4:  # the worker stands in the id
            ids += send_deferred(server, 1)
        if request.param == "stopped":
            assert server.stop() == 0
        yield tmp_path, ids


def test_questions_and_orders(place: tuple[Path, list[str]]) -> None:
    folder, ids = place
    found = rows(folder)
    assert [row["id"] for row in found] == ids
    assert {key: type(value) for key, value in found[0].items()} == {
        "id": str, "from": str, "arrived": float, "size": int, "under_way": bool, "client": str, "helo": str,
        "protocol": str, "recipients": list,
    }  # fmt: skip
    (recipient,) = found[0]["recipients"]
    assert abs(recipient.pop("next") - time.time() - 300) < 90
    assert recipient.pop("reason").startswith("4.")
    assert recipient == {
        "to": "box0@bad.test", "domain": "bad.test", "state": "deferred", "attempts": 1, "delay_reported": False,
    }  # fmt: skip

    summary = json.loads(queue(folder, "summary", "--json").stdout)
    assert {key: summary[key] for key in ("messages", "recipients", "set_aside", "age_limits")} == {
        "messages": len(ids), "recipients": len(ids), "set_aside": 0, "age_limits": [300, 3600, 14400, 86400],
    }  # fmt: skip
    assert list(summary["domains"]) == ["bad.test"]
    figures = summary["domains"]["bad.test"]
    assert set(figures) == {"recipients", "held", "new", "ages", "oldest", "next", "reasons"}
    assert figures["ages"] == [len(ids), 0, 0, 0, 0]

    result = queue(folder, "show", ids[0], "--headers")
    assert result.exit_code == 0
    assert "<box0@bad.test>  deferred after 1 attempt, next in 4m" in result.stdout.replace("5m", "4m")
    assert result.stdout.rstrip().endswith("Subject: one")
    shown = json.loads(queue(folder, "show", "--json", ids[0]).stdout)
    assert shown["id"] == ids[0]
    assert shown["set_aside"] is None

    assert queue(folder, "hold", *ids[:2]).stdout == "2 messages on hold.\n"
    assert [row["id"] for row in rows(folder, "--state", "held")] == ids[:2]
    assert [row["id"] for row in rows(folder, "--state", "deferred")] == ids[2:]
    assert "on hold after 1 attempt" in queue(folder, "list").stdout
    answer = json.loads(queue(folder, "release", "--domain", "BAD.test", "--json").stdout)
    assert answer == {"order": "release", "messages": 2, "recipients": 2, "under_way": 0, "unknown": []}
    assert rows(folder, "--state", "held") == []
    assert rows(folder, "--domain", "other.test") == []
    assert len(rows(folder, "--limit", "1")) == 1
    assert "There is more" in queue(folder, "list", "--limit", "1").stdout

    result = queue(folder, "delete", "--yes", ids[0], NOBODYS_ID)
    assert result.exit_code == 1
    assert result.stdout == "1 message deleted.\n"
    assert result.stderr == f"fastsmtp: {NOBODYS_ID} is not in the queue\n"
    assert queue(folder, "show", ids[0]).exit_code == 1
    assert queue(folder, "delete", "--yes", "--all").stdout == f"{len(ids) - 1} messages deleted.\n"
    assert queue(folder, "list").stdout == "Nothing is queued.\n"
    assert queue(folder, "summary").stdout == "Nothing is queued.\n"
    assert files(folder / "mail") == []


def test_a_retry_delivers_now_and_what_is_on_hold_stays(tmp_path: Path) -> None:
    with blocked(tmp_path) as server:
        ids = send_deferred(server, 3)
        queue(tmp_path, "hold", ids[0])
        unblock(tmp_path)
        assert queue(tmp_path, "retry", "--all").stdout == "2 messages to be tried now.\n"
        server.wait_mail(2)
        server.wait(lambda: [row["id"] for row in rows(tmp_path)] == [ids[0]], "the rest has left the queue")
        (line,) = server.wait_for("operated", order="retry")
        assert (line["uid"], line["what"], line["messages"]) == (os.getuid(), "everything", 2)
        queue(tmp_path, "release", ids[0])
        server.wait_mail(3)


def test_what_was_deleted_is_not_delivered_and_the_rest_is(tmp_path: Path) -> None:
    """Deleted one by one while all of it is delivered."""
    with blocked(tmp_path, workers=2) as server:
        ids = send_deferred(server, 60)
        unblock(tmp_path)
        fate: dict[str, str] = {}
        with reach(load(tmp_path / "fastsmtp.toml")) as console:

            def order(request: dict[str, object]) -> dict[str, int]:
                done = [list(answer)[-1]["done"] for answer in console.ask(request)]
                return {name: sum(one[name] for one in done) for name in ("messages", "under_way")}

            retry = threading.Thread(target=order, args=({"do": "retry", "everything": True},))
            retry.start()
            for message_id in reversed(ids):
                answer = order({"do": "delete", "ids": [message_id]})
                fate[message_id] = "deleted" if answer["messages"] else "under way" if answer["under_way"] else "gone"
            retry.join()
        server.wait(lambda: not rows(tmp_path), "an empty queue")
        delivered = {line["id"] for line in server.events("delivered")}
        for message_id in ids:
            assert message_id not in delivered or fate[message_id] != "deleted", message_id
            assert message_id in delivered or fate[message_id] != "gone", message_id
        assert "deleted" in fate.values()
        assert len(files(tmp_path / "mail")) == len(delivered)


def test_a_server_that_is_killed_in_the_midst_of_a_delete_has_lost_nothing_else(tmp_path: Path) -> None:
    """Every piece that was told of is durable; the rest is there as it was."""
    number = 4_000
    block(tmp_path)
    with running(tmp_path) as server:
        assert server.stop() == 0
        fill(tmp_path / "data" / "spool" / "0", number)
        server.start()
        told = 0
        with reach(load(tmp_path / "fastsmtp.toml")) as console:
            (answer,) = console.ask({"do": "delete", "everything": True})
            try:
                for line in answer:
                    told = line["progress"]["messages"]
                    server.kill()
            except ConsoleError as error:
                assert str(error) == "worker 0 ended before its answer did"  # noqa: PT017 what came before counts
        assert 0 < told < number
        left = json.loads(queue(tmp_path, "summary", "--json").stdout)
        assert 0 < left["messages"] <= number - told
        assert left["recipients"] == left["messages"]
        assert len(rows(tmp_path, "--limit", "0")) == left["messages"]
        server.start_again()
        assert queue(tmp_path, "delete", "--all", "--yes").stdout == f"{left['messages']:,} messages deleted.\n"
        assert list((tmp_path / "data" / "spool" / "0" / "body").iterdir()) == []


def fill(directory: Path, number: int) -> None:
    """A spool with deferred mail, of a server that does not run."""
    from keeping import Answers, Yard, letter, settle

    yard = Yard(directory.parent.parent.parent)
    yard.directory = directory

    async def main() -> None:
        async with yard.opened() as spool:

            def defer(jobs: list[Job]) -> None:
                for job in jobs:
                    spool.finish([Mark(job.key, 0, time.time() + 3600, 1, "4.2.0 busy")])
                    spool.release(job)

            spool.on_stored = defer
            answers = Answers()
            for _ in range(number):
                spool.append(*letter(spool), answers)
            await answers.wait(number)
            await settle(spool)

    run_loop(main())


def test_sockets_of_a_killed_server_are_no_hindrance(tmp_path: Path) -> None:
    with blocked(tmp_path, workers=2) as server:
        (message_id,) = send_deferred(server, 1)
        server.kill()
        assert len(list((tmp_path / "data" / "control").iterdir())) == 2
        assert [row["id"] for row in rows(tmp_path)] == [message_id]
        server.configuration = toml(tmp_path, workers=1)
        server.start_again()
        assert [row["id"] for row in rows(tmp_path)] == [message_id]
        for kind in ("control", "submit"):
            assert [path.name for path in (tmp_path / "data" / kind).iterdir()] == ["0"]
        assert queue(tmp_path, "hold", message_id).exit_code == 0  # also where another worker's number stands in the id
        assert server.stop() == 0
        assert list((tmp_path / "data" / "control").iterdir()) == []


def test_a_worker_that_is_started_again_is_waited_for(tmp_path: Path) -> None:
    with blocked(tmp_path) as server:
        (message_id,) = send_deferred(server, 1)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        assert [row["id"] for row in rows(tmp_path)] == [message_id]
        assert server.workers() != [worker]


def test_others_have_no_permission() -> None:
    needs_root()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with running(folder) as server:
            for state in ("running", "stopped"):
                if state == "stopped":
                    server.stop()
                done = command(folder, "list", program=AS_NOBODY)
                assert done.returncode == 1
                assert done.stdout == ""
                assert re.fullmatch(
                    r"fastsmtp: .*/data: no permission for user \d+; it belongs to user 0\n", done.stderr
                )


def command(folder: Path, *arguments: str, program: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *arguments, "--config", "fastsmtp.toml"],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_root_leaves_the_files_of_a_stopped_server_to_its_user() -> None:
    needs_root()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        block(folder)
        (folder / "mail").chmod(0o777)
        with running(folder, toml(folder, top='user = "nobody"')) as server:
            send_deferred(server, 1)
            server.kill()
            assert "1 message on hold" in command(folder, "hold", "--all").stdout
            owners = {path.stat().st_uid for path in (folder / "data").rglob("*")}
            assert owners == {(folder / "data").stat().st_uid} != {0}
            server.start_again()


# What cannot be done


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "fastsmtp.toml").write_text(toml(tmp_path))
    result = queue(tmp_path, "list")
    assert result.exit_code == 1
    assert result.stderr == f"fastsmtp: data_dir {tmp_path}/data: no server has run with it\n"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lock").touch()  # a start that failed leaves it
    assert queue(tmp_path, "list").stderr == result.stderr
    (tmp_path / "fastsmtp.toml").write_text("x = 1\n")
    result = queue(tmp_path, "summary")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{tmp_path}/fastsmtp.toml:1: x: unknown key")


@pytest.mark.parametrize(
    "arguments",
    [
        ["hold"],
        ["hold", "--all", "--domain", "a.test"],
        ["retry", NOBODYS_ID, "--all"],
        ["release", "not-an-id"],
        ["show"],
        ["show", "x"],
        ["delete", "--all"],  # nobody can answer
        ["list", "--domain", "-"],
        ["list", "--state", "lost"],
        ["what"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_told(tmp_path: Path, arguments: list[str]) -> None:
    with running(tmp_path) if arguments == ["delete", "--all"] else open(os.devnull):
        result = queue(tmp_path, *arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_mail_in_memory_is_out_of_reach(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, tables='[spool]\ndurability = "none"\n')):
        result = queue(tmp_path, "list")
        assert result.exit_code == 1
        assert "in memory only" in result.stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.stop()
        fill(tmp_path / "data" / "spool" / "0", 3_000)
    process = subprocess.Popen(
        [*COMMAND, "list", "--limit", "0", "--config", "fastsmtp.toml"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


# For people


def on_terminal(folder: Path, arguments: list[str], say: bytes = b"") -> tuple[str, int]:
    """What stands on a terminal of 80 columns, and the exit code."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(folder)
        os.execve(sys.executable, [*COMMAND, *arguments, "--config", "fastsmtp.toml"], {**ENVIRONMENT, "TERM": "xterm"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    if say:
        os.write(terminal, say)
    octets = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # EIO: the other end is closed
            piece = b""
        if not piece:
            break
        octets += piece
    os.close(terminal)
    return octets.decode().replace("\r\n", "\n"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_terminal_has_colours_and_eighty_columns(tmp_path: Path) -> None:
    with blocked(tmp_path) as server:
        send(server, [f"{letter * 40}@bad.test" for letter in "ab"])
        server.wait_for("deferred", 2)
        for arguments in (["list"], ["summary"]):
            text, code = on_terminal(tmp_path, arguments)
            assert code == 0, text
            assert "\x1b[1m" in text
            plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
            assert max(len(line) for line in plain.split("\n")) <= 80
            assert "bad.test" in plain
        piped = command(tmp_path, "list")
        assert "\x1b" not in piped.stdout
        (message, *recipients) = piped.stdout.splitlines()
        assert re.fullmatch(r"[0-9a-v]{20} +\d+s +23  from <s@client.test>", message)
        assert (
            recipients[0] == f"    <{'a' * 40}@bad.test>  deferred after 1 attempt, next in {recipients[0].split()[-1]}"
        )
        table = command(tmp_path, "summary").stdout.splitlines()
        assert table[0].split() == ["total", "<5m", "<1h", "<4h", "<1d", "older", "held", "next"]
        assert table[1].split()[:7] == ["bad.test", "2", "2", "-", "-", "-", "-"]
        assert len(table[0]) <= 80
        assert table[2].startswith("    1 × 4.")
        assert table[-1] == "2 recipients of 1 message"


def test_deleting_asks(tmp_path: Path) -> None:
    with blocked(tmp_path) as server:
        send_deferred(server, 2)
        text, code = on_terminal(tmp_path, ["delete", "--all"], b"n\n")
        assert code == 1
        assert "Delete 2 messages (2 recipients) without a report to the sender? [y/N]" in text
        assert len(rows(tmp_path)) == 2
        text, code = on_terminal(tmp_path, ["delete", "--all"], b"y\n")
        assert code == 0
        assert "2 messages deleted." in text
        assert rows(tmp_path) == []


def test_what_a_peer_said_is_shown_without_control_characters(tmp_path: Path) -> None:
    with blocked(tmp_path) as server:
        with Peer(server.address, hello="") as peer:
            peer.reply()
            peer.ask("EHLO a\x1b[31mb")
            reply = peer.data(["x@bad.test"], b"Subject: \x1b]0;title\x07 caf\xe9 \xc3\xa9\r\n\r\nx\r\n")
        result = queue(tmp_path, "show", "--headers", reply.split()[-1])
        assert result.exit_code == 0
        assert "which called itself a\\x1b[31mb" in result.stdout
        assert "    Subject: \\x1b]0;title\\x07 caf\\xe9 é\n" in result.stdout


def test_a_time_and_a_size_are_short() -> None:
    assert [span(x) for x in (-5, 0, 59, 60, 3599, 3600, 12_000, 86_400, 187_200)] == [
        "0s", "0s", "59s", "1m", "59m", "1h", "3h20m", "1d", "2d4h",
    ]  # fmt: skip
    assert [octets(x) for x in (0, 1023, 1024, 2150, 20_000, 50 << 20, 3 << 40)] == [
        "0", "1023", "1.0KB", "2.1KB", "20KB", "50MB", "3072GB",
    ]  # fmt: skip
    assert shown("a\tb\x00\u202e\udcff") == "a\tb\\x00\\x202e\\xff"


def test_every_command_says_what_it_does(tmp_path: Path) -> None:
    for name in ("", "list", "show", "summary", "retry", "hold", "release", "delete"):
        result = queue_help(name)
        assert result.startswith("Usage: ")
        assert name == "" or ("--json" in result and "--config" in result)


def queue_help(name: str) -> str:
    from click.testing import CliRunner

    from fastsmtp.cli import main

    result = CliRunner().invoke(main, ["queue", *([name] if name else []), "--help"])
    assert result.exit_code == 0
    return result.stdout
