"""pipe.py and runner.py with real commands: what they are given, what their end means, and what cannot get out.

The runner is the real process; as root its commands run as `nobody`, otherwise as who runs the tests.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import pwd
import resource
import shutil
import signal
import smtplib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from needs import needs_root, public_folder
from servers import running, toml

from fastsmtp.address import NULL, Address, parse_path
from fastsmtp.delivery import DELIVERED, Delivery, Outcome, Result, Scope
from fastsmtp.delivery.pipe import MEANINGS, Pipe
from fastsmtp.delivery.runner import PLACEHOLDERS, Command, Runner, clean, expand, explain_arguments, make_command
from fastsmtp.message import Content, Envelope, Message, Recipient

ROOT = os.geteuid() == 0
USER = "nobody" if ROOT else ""
SERVER = 1 if ROOT else os.geteuid()  # as whom workers would run
PREFIX = b"Received: from a.test by mx.test;\r\n\tMon, 1 Jan 2024 00:00:00 +0000\r\n"
BODY = b"Subject: x\r\n\r\n.one\r\ntwo\xe9\r\n"
SENDER = Address("ann", "example.org")
PATIENCE = 30.0  # seconds for what takes a tenth of one


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """What waits for an answer that never comes ends too."""
    return uvloop.run(asyncio.wait_for(main, 2 * PATIENCE))


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user may enter and write to."""
    with public_folder("pipe") as path:
        path.chmod(0o1777)
        yield path


def script(folder: Path, text: str, name: str = "script") -> str:
    """A shell script; `$D` is the folder."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nD={folder}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def command(*arguments: str, timeout: float = PATIENCE, concurrency: int = 4) -> Command:
    return make_command(arguments, USER, SERVER, timeout, concurrency)


def letter(
    body: bytes | Path = BODY,
    sender: Address = SENDER,
    content: Content = Content.NONE,
    cuts: tuple[tuple[int, int], ...] = (),
) -> Message:
    envelope = Envelope(sender)
    envelope.id = "0123456789abcdefghij"
    if isinstance(body, Path):
        return Message(envelope, PREFIX, None, body.stat().st_size, 14, content, time.time(), str(body), cuts)
    return Message(envelope, PREFIX, [body[:5], body[5:]], len(body), 14, content, time.time(), "", cuts)


def delivery(message: Message | None = None, *recipients: Address) -> Delivery:
    chosen = [Recipient(address) for address in recipients or (Address("bob", "example.net"),)]
    return Delivery(message or letter(), chosen, list(range(len(chosen))))


class Pipes:
    """A runner with its commands, and a transport for each."""

    def __init__(self, folder: Path, **commands: Command) -> None:
        self.commands = commands
        self.runner = Runner(commands)
        self.pid = self.runner.start()
        # Where a server's spool stands: nobody else may look into it.
        self.data = folder / "data"
        self.data.mkdir(0o700)

    def pipe(self, name: str = "x", **options: Any) -> Pipe:
        concurrency = self.commands[name].concurrency
        return Pipe(name, self.commands[name].arguments[0], self.runner.asks, self.data, concurrency, **options)


@asynccontextmanager
async def piped(folder: Path, **commands: Command) -> AsyncIterator[Pipes]:
    pipes = Pipes(folder, **commands)
    try:
        yield pipes
    finally:
        assert list(pipes.data.iterdir()) == []
        pipes.runner.close()


async def deliver(folder: Path, one: Command, what: Delivery | None = None, **options: Any) -> Outcome:
    """The one outcome of one delivery."""
    async with piped(folder, x=one) as pipes:
        pipe = pipes.pipe(**options)
        ((outcome,),) = await pipe.deliver([what or delivery()])
        await pipe.close()
    return outcome


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether it runs; who waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read_pids(path: Path, n: int) -> list[int]:
    """`n` process ids from a file once they are there; before, none."""
    words = path.read_text().split() if path.exists() else []
    return [int(word) for word in words] if len(words) == n else []


# The message


def test_the_command_reads_prefix_and_body_with_lf(folder: Path) -> None:
    outcome = run(deliver(folder, command(script(folder, "cat >$D/got"))))
    assert outcome is DELIVERED
    assert (folder / "got").read_bytes() == (PREFIX + BODY).replace(b"\r\n", b"\n")


def test_with_crlf_it_reads_what_was_sent(folder: Path) -> None:
    run(deliver(folder, command(script(folder, "cat >$D/got")), crlf=True))
    assert (folder / "got").read_bytes() == PREFIX + BODY


@pytest.mark.parametrize("content", [Content.BARE, Content.BINARY])
def test_what_is_not_convertible_stays_as_it_is(folder: Path, content: Content) -> None:
    body = b"Subject: x\r\n\r\n\x00\r\r\n\n\r"
    run(deliver(folder, command(script(folder, "cat >$D/got")), delivery(letter(body, content=content)), fields=True))
    head = b"Return-Path: <ann@example.org>\r\nDelivered-To: bob@example.net\r\n"
    assert (folder / "got").read_bytes() == head + PREFIX + body


def test_cuts_are_left_out(folder: Path) -> None:
    run(deliver(folder, command(script(folder, "cat >$D/got")), delivery(letter(cuts=((0, 12), (14, 20)))), crlf=True))
    assert (folder / "got").read_bytes() == PREFIX + BODY[12:14] + BODY[20:]


def test_fields_show_the_exact_envelope(folder: Path) -> None:
    to = parse_path(b'<"o\'brien; x"@example.net>')[0]
    run(deliver(folder, command(script(folder, "head -n 2 >$D/got")), delivery(letter(sender=NULL), to), fields=True))
    assert (folder / "got").read_text() == 'Return-Path: <>\nDelivered-To: "o\'brien; x"@example.net\n'


def test_a_big_message_comes_from_its_file(folder: Path, tmp_path: Path) -> None:
    """Its CRLFs fall on every place at which it is cut into pieces."""
    body = tmp_path / "body"
    octets = b"Subject: x\r\n\r\n" + b"x" * 77 + b"\r\n0123456789\r\n" * 1_000_003
    body.write_bytes(octets)
    outcome = run(deliver(folder, command(script(folder, "sha256sum >$D/got")), delivery(letter(body))))
    assert outcome is DELIVERED
    expected = hashlib.sha256((PREFIX + octets).replace(b"\r\n", b"\n")).hexdigest()
    assert (folder / "got").read_text().split()[0] == expected


def test_a_body_that_is_not_whole_is_not_handed_over(folder: Path, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(BODY)
    message = letter(body)
    body.write_bytes(BODY[:-1])
    outcome = run(deliver(folder, command(script(folder, "touch $D/ran")), delivery(message)))
    assert (outcome.result, outcome.scope, outcome.status) == (Result.DEFERRED, Scope.MESSAGE, "4.3.0")
    assert "not as long as the message" in outcome.text
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(("code", "result"), [(0, Result.DELIVERED), (67, Result.FAILED)])
def test_a_command_need_not_read(folder: Path, code: int, result: Result) -> None:
    message = letter(b"Subject: x\r\n\r\n" + b"x" * 5_000_000)
    assert run(deliver(folder, command(script(folder, f"exit {code}")), delivery(message))).result is result


def test_the_message_cannot_be_written_to(folder: Path) -> None:
    ways = ["&0", "/proc/self/fd/0"] if ROOT else ["&0"]  # our own user may open our own file
    for way in ways:
        shutil.rmtree(folder / "data", ignore_errors=True)
        outcome = run(deliver(folder, command(script(folder, f"(echo x >{way}) 2>/dev/null || exit 75"))))
        assert outcome.result is Result.DEFERRED


# Arguments

SHOW = 'for each; do printf "%s\\n" "$each"; done >$D/got'
HOSTILE = {
    "an option": ("-oQ/tmp/x", "_oQ_tmp_x"),
    "a shell's word": ("$(id)`id`;id|id&id", "__id__id__id_id_id"),
    "quotes": ("a'b\"c\\d", "a_b_c_d"),
    "blanks": ("a b", "a_b"),
    "a path": ("../../etc/passwd", "_._.._etc_passwd"),
    "a folder above": ("..", "_."),
    "a folder": (".", "_"),
    "globs": ("*?[a]{b}~", "___a__b__"),
    "another placeholder": ("{sender}", "_sender_"),
    "not ASCII": ("josé中", "jos__"),
    "a variable": ("%s%n", "_s_n"),
    "nothing of it": ("Abc.9+x=y-z_", "Abc.9+x=y-z_"),
}


@pytest.mark.parametrize(("local", "cleaned"), HOSTILE.values(), ids=HOSTILE)
def test_values_from_mail_are_cleaned(folder: Path, local: str, cleaned: str) -> None:
    """The command sees what the table says, and nothing else happens."""
    to = Address(local, "example.net")
    program = script(folder, SHOW)
    one = command(program, "--", "{local}", "to={local}", "{recipient}", "{local}{local}")
    assert run(deliver(folder, one, delivery(letter(), to))) is DELIVERED
    first, *others = (folder / "got").read_text().split("\n")[:-1]
    # A hyphen at the beginning of a value is harmless behind something that is not from mail.
    inside = "-" + cleaned[1:] if local.startswith("-") else cleaned
    assert first == "--"
    assert [*others[:2], others[3]] == [cleaned, f"to={inside}", cleaned + inside]
    assert others[2].endswith("@example.net")
    assert others[2][0] not in "-\"'$"
    assert sorted(path.name for path in folder.iterdir()) == ["data", "got", "script"]


def test_what_the_values_are(folder: Path) -> None:
    sender = Address("ann", "[192.0.2.1]")
    one = command(script(folder, SHOW), "{sender}", "{recipient}", "{local}", "{domain}", "{id}", "a{")
    run(deliver(folder, one, delivery(letter(sender=sender), Address("Bob+x", "example.net"))))
    assert (folder / "got").read_text().split("\n") == [
        "ann@_192.0.2.1_", "Bob+x@example.net", "Bob+x", "example.net", "0123456789abcdefghij", "a{", "",
    ]  # fmt: skip


def test_the_null_sender_is_no_empty_argument(folder: Path) -> None:
    run(deliver(folder, command(script(folder, SHOW), "-f{sender}", "{sender}"), delivery(letter(sender=NULL))))
    assert (folder / "got").read_text() == "-fMAILER-DAEMON\nMAILER-DAEMON\n"


def test_no_argument_from_mail_begins_with_a_hyphen() -> None:
    values = dict.fromkeys(PLACEHOLDERS, "-x")
    assert expand("{local}", values) == "_x"
    assert expand("{local}{domain}", values) == "_x-x"
    assert expand("-f{sender}", values) == "-f-x"
    assert expand("--", values) == "--"
    assert expand("", values) == ""
    assert clean("") == "_"


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ((), "absolute path"),
        (("cat",), "absolute path"),
        (("{local}/x",), "absolute path"),
        (("/bin/{local}",), "absolute path"),
        (("/bin/cat", "a\0b"), "NUL"),
        (("/bin/cat", "{user}"), "there is no {user}, only {sender}"),
        (("/bin/cat", "{local}", "{{x}"), "there is no {x}"),
        (("/bin/cat", "{}"), "there is no {}"),
        (("/bin/cat", "{Local}"), "there is no {Local}"),
    ],
)
def test_argument_lists_that_cannot_be_used(arguments: tuple[str, ...], wrong: str) -> None:
    assert wrong in explain_arguments(arguments)
    with pytest.raises(ValueError, match="command: "):
        make_command(arguments, USER, SERVER, 1, 1)


# What a command finds


def test_nothing_of_the_server_is_inherited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the server")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    leak, end = os.pipe()
    os.set_inheritable(leak, True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGQUIT)}
    cores = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (cores[1], cores[1]))
    try:
        text = """
            env >$D/env
            pwd >$D/cwd
            umask >$D/umask
            grep -E '^(Sig(Blk|Ign)|Uid|Gid|Groups)' /proc/self/status >$D/status
            echo $$ $(cut -d' ' -f5,6 /proc/$$/stat) >$D/session
            ulimit -Sn >$D/descriptors
            ulimit -Sc >$D/core
            exec ls -l /proc/self/fd >$D/fds"""
        assert run(deliver(folder, command(script(folder, text)))) is DELIVERED
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, cores)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(leak)
        os.close(end)

    def read(name: str) -> str:
        return (folder / name).read_text().strip()

    environment = dict(line.partition("=")[::2] for line in read("env").splitlines())
    assert environment["PATH"] == "/usr/local/bin:/usr/bin:/bin"
    assert set(environment) <= {"PATH", "LANG", "HOME", "USER", "LOGNAME", "PWD", "OLDPWD", "SHLVL", "_"}
    assert environment["USER"] == environment["LOGNAME"] == USER
    assert read("cwd") == "/"
    assert int(read("umask"), 8) == 0o077
    status = dict(line.split(":", 1) for line in read("status").splitlines())
    own = 0b11 << 31  # signals 32 and 33 are the C library's: nobody can set them, and who started the tests may have
    assert int(status["SigBlk"], 16) & ~own == int(status["SigIgn"], 16) & ~own == 0
    pid, group, session = read("session").split()
    assert pid == group == session
    assert int(read("descriptors")) <= 1024
    assert read("core") == "0"
    # The fourth is the folder that ls reads.
    lines = [line.split(maxsplit=8)[8] for line in read("fds").splitlines()[1:]]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    assert lines[0].endswith("(deleted)")
    assert lines[2].split()[2].startswith("pipe:")
    assert lines[3].split()[2].endswith("/fd")
    if ROOT:
        nobody = str(pwd.getpwnam("nobody").pw_uid)
        assert status["Uid"].split() == [nobody] * 4
        assert len(set(status["Gid"].split())) == 1
        assert status["Groups"].split() == status["Gid"].split()[:1] != ["0"]


def test_no_signal_is_blocked(folder: Path) -> None:
    """Not by way of a shell: that would unblock them itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        one = command("/bin/grep", "-q", "^SigBlk:.0*$", "/proc/self/status")
        assert run(deliver(folder, one)) is DELIVERED
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_the_spool_is_out_of_reach(folder: Path) -> None:
    needs_root()
    outcome = run(deliver(folder, command(script(folder, "ls $D/data && exit 0; exit 77"))))
    assert (outcome.result, outcome.status) == (Result.FAILED, "5.7.0")


def test_users_that_a_command_may_not_have() -> None:
    arguments = ["/bin/cat"]
    with pytest.raises(ValueError, match="there is no user 'no-such-user'"):
        make_command(arguments, "no-such-user", SERVER, 1, 1)
    if not ROOT:
        with pytest.raises(ValueError, match="only a server that is started as root runs commands as 'root'"):
            make_command(arguments, "root", SERVER, 1, 1)
        return
    with pytest.raises(ValueError, match="needs one for its commands"):
        make_command(arguments, "", SERVER, 1, 1)
    for user, server in (("root", 1), ("nobody", make_command(arguments, "nobody", 1, 1, 1).uid)):
        with pytest.raises(ValueError, match="a user of its own"):
            make_command(arguments, user, server, 1, 1)


# What its end means


def test_exit_codes(folder: Path) -> None:
    async def main() -> dict[int, Outcome]:
        async with piped(folder, x=command(script(folder, "exit {local}".replace("{local}", "$1")), "{local}")) as all_:
            codes = [0, 1, 63, *range(64, 79), 79, 125, 126, 127, 128, 255]
            recipients = [Address(str(code), "example.net") for code in codes]
            (outcomes,) = await all_.pipe().deliver([delivery(letter(), *recipients)])
            return dict(zip(codes, outcomes, strict=True))

    outcomes = run(main())
    assert outcomes.pop(0) is DELIVERED
    assert {code for code, outcome in outcomes.items() if outcome.result is Result.DEFERRED} == {71, 75, 126, 127}
    assert {code for code, outcome in outcomes.items() if outcome.scope is Scope.HOST} == {126, 127}
    assert {code: outcome.status for code, outcome in outcomes.items()} == {
        **dict.fromkeys((1, 63, 64, 66, 69, 70, 72, 74, 79, 125, 128, 255), "5.3.0"),
        65: "5.6.0", 67: "5.1.1", 68: "5.1.2", 71: "4.3.0", 73: "5.2.0", 75: "4.3.0", 76: "5.5.0", 77: "5.7.0",
        78: "5.3.5", 126: "4.3.5", 127: "4.3.5",
    }  # fmt: skip
    assert outcomes[67].text == f"{folder}/script: user unknown (exit code 67)"
    assert outcomes[1].text == f"{folder}/script: failed (exit code 1)"
    assert set(MEANINGS) <= set(outcomes)


@pytest.mark.parametrize(
    ("line", "code", "result", "status"),
    [
        ("5.2.1 mailbox disabled", 67, Result.FAILED, "5.2.1"),
        ("4.2.2 mailbox full", 75, Result.DEFERRED, "4.2.2"),
        ("4.2.2 mailbox full", 67, Result.FAILED, "5.1.1"),  # of sysexits.h the code decides
        ("5.2.2 mailbox full", 75, Result.DEFERRED, "4.3.0"),
        ("4.2.2 mailbox full", 1, Result.DEFERRED, "4.2.2"),
        ("5.7.1", 1, Result.FAILED, "5.7.1"),
        ("4.2.2x", 1, Result.FAILED, "5.3.0"),
        ("2.0.0 delivered", 1, Result.FAILED, "5.3.0"),
    ],
)
def test_a_status_that_the_command_prints(folder: Path, line: str, code: int, result: Result, status: str) -> None:
    outcome = run(deliver(folder, command(script(folder, f"echo '{line}'; exit {code}"))))
    assert (outcome.result, outcome.status) == (result, status)
    assert outcome.text.endswith(f"(exit code {code}): {line}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("echo one; echo two", ": one"),
        ("echo; echo ' two ' >&2", ": two"),
        ("printf 'a\\tb\\033[31m\\000\\377c'", ": a?b?[31m?\ufffdc"),
        ("head -c 5000 /dev/zero | tr '\\0' x", ": " + "x" * 400),
        ("", ""),
    ],
)
def test_the_first_line_of_its_output(folder: Path, text: str, line: str) -> None:
    outcome = run(deliver(folder, command(script(folder, f"{text}\nexit 67"))))
    assert outcome.text == f"{folder}/script: user unknown (exit code 67){line}"


def test_much_output_delays_nobody(folder: Path) -> None:
    outcome = run(deliver(folder, command(script(folder, "yes | head -c 20000000; echo end >$D/end; exit 67"))))
    assert (outcome.status, outcome.text[-3:]) == ("5.1.1", ": y")
    assert (folder / "end").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_killed_by_a_signal(folder: Path, number: signal.Signals) -> None:
    outcome = run(deliver(folder, command(script(folder, f"echo oh; kill -{int(number)} $$"))))
    assert (outcome.result, outcome.status, outcome.scope) == (Result.DEFERRED, "4.3.0", Scope.RECIPIENT)
    assert outcome.text == f"{folder}/script: killed by signal {int(number)}: oh"


def test_programs_that_cannot_be_run(folder: Path) -> None:
    (folder / "plain").write_text("exit 0\n")
    (folder / "no-format").write_text("exit 0\n")
    (folder / "no-format").chmod(0o755)
    for name, why in (("missing", "No such file"), ("plain", "Permission denied"), ("no-format", "Exec format error")):
        shutil.rmtree(folder / "data", ignore_errors=True)
        outcome = run(deliver(folder, command(str(folder / name))))
        assert (outcome.result, outcome.status, outcome.scope) == (Result.DEFERRED, "4.3.5", Scope.HOST)
        assert outcome.text.startswith(f"{folder / name}: cannot be run: {why}")


def test_no_room_for_the_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def main() -> list[Outcome]:
        async with piped(folder, x=command("/bin/cat")) as pipes:
            pipe = Pipe("x", "/bin/cat", pipes.runner.asks, folder / "no-such-folder", 1)
            ((missing,),) = await pipe.deliver([delivery()])
            monkeypatch.setattr("fastsmtp.delivery.pipe.TemporaryFile", full)
            ((no_room,),) = await pipe.deliver([delivery()])
            return [missing, no_room]

    outcomes = run(main())
    assert {(outcome.result, outcome.scope) for outcome in outcomes} == {(Result.DEFERRED, Scope.HOST)}
    assert [outcome.text.removeprefix("/bin/cat: cannot be run: ") for outcome in outcomes] == [
        "No such file or directory",
        "No space left on device",
    ]
    assert [outcome.status for outcome in outcomes] == ["4.3.0", "4.3.1"]


# Time


def test_the_time_out_kills_the_whole_group(folder: Path) -> None:
    text = "trap '' TERM HUP; sleep 1000 & (sleep 1000) & echo waiting; echo $$ $! >$D/pids; wait"

    async def main() -> Outcome:
        outcome = await deliver(folder, command(script(folder, text), timeout=1.0))
        pids = read_pids(folder / "pids", 2)
        await until(lambda: not any(map(alive, pids)), "killed")
        assert pids
        return outcome

    outcome = run(main())
    assert (outcome.result, outcome.status, outcome.scope) == (Result.DEFERRED, "4.3.0", Scope.RECIPIENT)
    assert outcome.text == f"{folder}/script: did not end in time, and was killed: waiting"


def test_output_without_an_end_does_not_outlive_the_time_out(folder: Path) -> None:
    assert "did not end in time" in run(deliver(folder, command("/usr/bin/yes", timeout=0.3))).text


def test_a_daemon_that_holds_the_output_is_not_waited_for(folder: Path) -> None:
    text = "setsid sleep 1000 & echo $! >$D/pids; echo started"
    try:
        assert run(deliver(folder, command(script(folder, text)))) is DELIVERED
        (pid,) = read_pids(folder / "pids", 1)
        assert alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_closed_output_is_not_an_end(folder: Path) -> None:
    assert run(deliver(folder, command(script(folder, "exec >&- 2>&-; cat >$D/got; exit 68")))).status == "5.1.2"
    assert (folder / "got").stat().st_size


def test_a_worker_that_goes_takes_its_command_with_it(folder: Path) -> None:
    async def main() -> None:
        text = "echo $$ >$D/pids; exec sleep 1000"
        async with piped(folder, x=command(script(folder, text), timeout=1000.0)) as pipes:
            task = asyncio.ensure_future(pipes.pipe().deliver([delivery()]))
            await until(lambda: read_pids(folder / "pids", 1), "started")
            (pid,) = read_pids(folder / "pids", 1)
            assert alive(pid)
            task.cancel()
            await until(lambda: not alive(pid), "killed")

    run(main())


# Several at once

COUNTING = """
mkdir $D/running/$$
ls $D/running | wc -l >>$D/seen
sleep 0.05
rmdir $D/running/$$"""


def test_concurrency_holds_for_all_workers_together(folder: Path) -> None:
    async def main() -> None:
        async with piped(folder, x=command(script(folder, COUNTING), concurrency=2)) as pipes:
            workers = [pipes.pipe(), pipes.pipe(), pipes.pipe()]
            batch = [delivery(letter(), Address("a", "x.test"), Address("b", "x.test")), delivery()]
            for outcomes in await asyncio.gather(*[worker.deliver(batch) for worker in workers]):
                assert outcomes == [[DELIVERED, DELIVERED], [DELIVERED]]

    (folder / "running").mkdir()
    (folder / "running").chmod(0o777)
    run(main())
    seen = [int(line) for line in (folder / "seen").read_text().split()]
    assert len(seen) == 9
    assert max(seen) <= 2


def test_commands_run_beside_each_other(folder: Path) -> None:
    """Each of two waits until it has seen the other, and a third command is not delayed by them."""

    async def main() -> None:
        text = "echo >$D/$1; while ! [ -e $D/one -a -e $D/two -a -e $D/other ]; do sleep 0.01; done"
        both = command(script(folder, text), "{local}", concurrency=2)
        other = command(script(folder, "echo >$D/other", "quick"))
        async with piped(folder, x=both, y=other) as pipes:
            pipe = pipes.pipe()
            tasks = [pipe.deliver([delivery(letter(), Address(name, "x.test"))]) for name in ("one", "two")]
            last = pipes.pipe("y").deliver([delivery()])
            assert await asyncio.gather(*tasks, last) == [[[DELIVERED]]] * 3

    run(main())


def test_on_the_loop_of_asyncio(folder: Path) -> None:
    outcome = asyncio.run(deliver(folder, command(script(folder, "exit 75"))))
    assert outcome.result is Result.DEFERRED


def test_many_requests_wait_in_the_kernel(folder: Path) -> None:
    """A runner that stands still takes none of them for a while; then all are served."""

    async def main() -> None:
        async with piped(folder, x=command(script(folder, "exit 0"), concurrency=64)) as pipes:
            os.kill(pipes.pid, signal.SIGSTOP)
            pipes.runner.asks.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
            async with asyncio.TaskGroup() as group:
                task = group.create_task(pipes.pipe().deliver([delivery() for _ in range(64)]))
                await asyncio.sleep(0.3)
                assert not task.done()
                os.kill(pipes.pid, signal.SIGCONT)
            assert task.result() == [[DELIVERED]] * 64

    run(main())


# The runner's own life


def test_a_runner_that_dies_is_started_again(folder: Path) -> None:
    async def main() -> None:
        text = "echo $$ >>$D/pids; while ! [ -e $D/go ]; do sleep 0.01; done"
        one = command(script(folder, text), concurrency=1)
        async with piped(folder, x=one, y=one) as pipes:
            tasks = [asyncio.ensure_future(pipes.pipe().deliver([delivery()]))]
            await until(lambda: read_pids(folder / "pids", 1), "started")
            tasks.append(asyncio.ensure_future(pipes.pipe().deliver([delivery()])))
            await asyncio.sleep(0.1)
            tasks.append(asyncio.ensure_future(pipes.pipe("y").deliver([delivery()])))
            await until(lambda: read_pids(folder / "pids", 2), "another command")
            os.kill(pipes.pid, signal.SIGKILL)
            # The second waited in the runner for the first one's end.
            ((lost,),) = await tasks[1]
            assert (lost.result, lost.scope) == (Result.DEFERRED, Scope.HOST)
            assert lost.text.endswith("the runner has ended")
            codes: list[int | None] = [None]

            def restarted() -> bool:
                codes.append(pipes.runner.look_after())
                return codes[-1] is not None

            await until(restarted, "started again")
            assert codes[-1] == -signal.SIGKILL
            (folder / "go").touch()
            # What minds a command does not need the runner.
            assert await tasks[0] == await tasks[2] == [[DELIVERED]]
            assert await pipes.pipe().deliver([delivery()]) == [[DELIVERED]]
            assert pipes.runner.look_after() is None

    run(main())


def test_it_ends_with_the_last_who_could_ask(folder: Path) -> None:
    """Neither a signal to the whole service nor requests without sense end it before."""
    pipes = Pipes(folder, x=command("/bin/true"))
    asks = pipes.runner.asks
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE)
    good = "\0".join(["x", *PLACEHOLDERS]).encode()
    plain = os.open("/dev/null", os.O_RDONLY)
    # Once it answers, it has its handlers.
    socket.send_fds(asks, [good], [plain, theirs.fileno()])
    assert ours.recv(100) == b"exit 0\n"
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pipes.pid, signum)
    for data, descriptors in (
        (b"", []),
        (b"", [plain, theirs.fileno()]),
        (good, []),
        (good, [plain]),
        (good, [plain, plain]),
        (good, [plain, theirs.fileno(), plain]),
        (good + b"\0more", [plain, theirs.fileno()]),
        (b"y" + good[1:], [plain, theirs.fileno()]),
        (b"\xff" * 100_000, [plain, theirs.fileno()]),
        (b"x" * 4, [plain, theirs.fileno()]),
    ):
        socket.send_fds(asks, [data], descriptors)
    theirs.close()
    assert ours.recv(100) == b""  # nobody kept it
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE)
    socket.send_fds(asks, [good], [plain, theirs.fileno()])
    theirs.close()
    os.close(plain)
    assert ours.recv(100) == b"exit 0\n"
    assert len(os.listdir(f"/proc/{pipes.pid}/fd")) <= 9
    assert pipes.runner.look_after() is None
    pipes.runner.close()
    assert pipes.runner._process is not None
    assert pipes.runner._process.returncode == 0


def test_without_a_runner_mail_waits(folder: Path) -> None:
    async def main() -> Outcome:
        asks, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.close()
        asks.setblocking(False)
        ((outcome,),) = await Pipe("x", "/bin/cat", asks, folder, 1).deliver([delivery()])
        asks.close()
        return outcome

    outcome = run(main())
    assert (outcome.result, outcome.scope, outcome.text) == (
        Result.DEFERRED,
        Scope.HOST,
        "/bin/cat: cannot be run: Broken pipe",
    )


def test_nothing_but_the_standard_library_is_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the server")
    pipes = Pipes(folder, x=command("/bin/true"))
    time.sleep(0.2)
    maps = Path(f"/proc/{pipes.pid}/maps").read_text()
    arguments = Path(f"/proc/{pipes.pid}/cmdline").read_bytes().split(b"\0")
    environment = Path(f"/proc/{pipes.pid}/environ").read_bytes()
    pipes.runner.close()
    assert arguments[0].decode() == sys.executable
    assert environment == b"PATH=/usr/local/bin:/usr/bin:/bin\0"
    assert "fastsmtp" not in maps
    assert "_ssl" not in maps


# The whole server


def test_a_server_with_a_command(folder: Path, tmp_path: Path) -> None:
    """From the wire to the command and back to the sender's spool; workers that come and go share the runner."""
    program = script(folder, "cat >$D/$1.new && mv $D/$1.new $D/$1")
    user = f'user = "{USER}"' if USER else ""
    tables = f'[transport.program]\ntype = "pipe"\ncommand = ["{program}", "{{local}}"]\n{user}\nfields = false\n'
    domains = '[[domain]]\nname = "*"\nrecipients = "any"\ntransport = "program"\n'
    with running(tmp_path, toml(tmp_path, domains=domains, tables=tables)) as server:
        for name in ("one", "two"):
            with smtplib.SMTP(*server.address.split(":")) as client:  # type: ignore[arg-type]
                client.sendmail("ann@example.org", [f"{name}@y.test"], BODY)
            server.wait((folder / name).exists, f"{name} delivered")
            assert (folder / name).read_bytes().endswith(b"\n" + BODY.replace(b"\r\n", b"\n"))
            if name == "one":
                children = server.workers()
                (runner,) = [pid for pid in children if b"runner.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
                (worker,) = [pid for pid in children if pid != runner]
                os.kill(worker, signal.SIGKILL)
                server.wait_for("worker-died")
        assert server.stop() == 0
        assert not alive(runner)
