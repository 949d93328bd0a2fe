"""The process that runs the commands of pipe transports, each as a user of its own.

A worker gives up its privileges before it reads an octet, so it can become nobody else. This process keeps them, and is
small for that: this file and the standard library in a fresh interpreter, so that no key, no spool and no socket of the
network is in its memory. The supervisor starts it (`Runner`), as root where it is root itself.
In, from any worker: the name of a configured command, values from mail, the message as a file, and a socket for the
answer. Out: one answer, how the command ended and what it said. What is run, as whom and for how long was told at the
start; values are cleaned here, for a worker could be lying. Each command has a child of this process beside it that
waits for it: what hangs in one, be it execve(2) from a dead file server, delays no other. At its time-out, or when
whoever asked is gone, its whole process group is killed. The end comes when nobody is left who could ask.
On failure: an answer, or the answer's socket closes without one. Not here: what an exit code means (pipe.py).
"""

from __future__ import annotations

import json
import os
import pwd
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, NamedTuple, NoReturn

PLACEHOLDERS = ("sender", "recipient", "local", "domain", "id")  # also their order in a request
REQUEST_LIMIT = 4096
OUTPUT_LIMIT = 2048  # octets of the output that are kept; the rest is read, so that nobody waits, and dropped
ANSWER_LIMIT = OUTPUT_LIMIT + 512
DESCRIPTORS = 1024  # soft limit of a command: programs that use select(2) break above it
AGAIN = 1.0  # seconds before a runner that died is started again
PATH = "/usr/local/bin:/usr/bin:/bin"

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_UNSAFE = re.compile(r"[^A-Za-z0-9@._+=-]")
_NOT_OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # told to a whole group or service; the workers decide


class Command(NamedTuple):
    """`uid` -1: as whoever runs the server. `timeout` in seconds; `concurrency` counts for the whole machine."""

    arguments: tuple[str, ...]
    uid: int
    gid: int
    user: str
    home: str
    timeout: float
    concurrency: int


def explain_arguments(arguments: Sequence[str]) -> str:
    """What is wrong with a command's argument list; "" when it can be used."""
    if not arguments or not arguments[0].startswith("/") or "{" in arguments[0]:
        return "it begins with the absolute path of a program"
    for argument in arguments:
        if "\0" in argument:
            return "an argument holds a NUL"
        for name in _PLACEHOLDER.findall(argument):
            if name not in PLACEHOLDERS:
                return f"there is no {{{name}}}, only {{{'}, {'.join(PLACEHOLDERS)}}}"
    return ""


def make_command(arguments: Sequence[str], user: str, server: int, timeout: float, concurrency: int) -> Command:
    """Looks up `user`. `server` is the user id of the workers. Raises ValueError with one line for the operator."""
    if wrong := explain_arguments(arguments):
        raise ValueError(f"command: {wrong}")
    own = os.geteuid()
    try:
        account = pwd.getpwnam(user) if user else None
    except (KeyError, ValueError):
        raise ValueError(f"user: there is no user {user!r} on this machine") from None
    limits = (timeout, concurrency)
    if own != 0:
        if account is not None and account.pw_uid != own:
            raise ValueError(f"user: only a server that is started as root runs commands as {user!r}")
        return Command(tuple(arguments), -1, -1, user, account.pw_dir if account else "/", *limits)
    if account is None:
        raise ValueError("user: a server that is started as root needs one for its commands")
    if account.pw_uid == 0 or account.pw_uid == server:
        raise ValueError(f"user: {user!r} could read the spool and the keys; the command needs a user of its own")
    return Command(tuple(arguments), account.pw_uid, account.pw_gid, user, account.pw_dir, *limits)


def clean(value: str) -> str:
    """A value from mail as it may stand in an argument: never empty, no octet that means anything to anyone, and no
    dot in front: `..` is a folder."""
    text = _UNSAFE.sub("_", value) or "_"
    return "_" + text[1:] if text[0] == "." else text


def expand(argument: str, values: Mapping[str, str]) -> str:
    """An argument with the values, cleaned, in their places. What the configuration does not begin with a hyphen does
    not begin with one afterwards."""
    text = _PLACEHOLDER.sub(lambda match: clean(values[match[1]]), argument)
    return "_" + text[1:] if text.startswith("-") and not argument.startswith("-") else text


class Runner:
    """The process as its parent sees it: in the supervisor, before workers are forked.

    `asks` is what a worker asks through; all workers share it, also those that are started later. `forget` is called
    in each child of the parent, `look_after` now and then, `close` when every worker has ended.
    """

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands = json.dumps(commands).encode()
        # Messages keep their borders, however many workers write.
        self.asks, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.asks.setblocking(False)
        self._started = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Its process id. Raises OSError."""
        self._started = time.monotonic()
        number = self._end.fileno()
        process = self._process = subprocess.Popen(
            # Isolated, without site: nothing is run as root that a variable or a packaging file names.
            [sys.executable, "-I", "-S", os.path.abspath(__file__), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/", env={"PATH": PATH}, pass_fds=[number],
        )  # fmt: skip
        assert process.stdin is not None
        try:
            process.stdin.write(self._commands)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died already: `look_after` sees it
        return process.pid

    def look_after(self) -> int | None:
        """Starts it again where it has died, at most once a second; the exit code then, negative for a signal."""
        process = self._process
        if process is None or process.poll() is None or time.monotonic() < self._started + AGAIN:
            return None
        self.start()
        return process.returncode

    def forget(self) -> None:
        """In a worker: the other end is not its own. Held there, nobody would see that the runner is gone."""
        self._end.close()

    def retire(self) -> None:
        """Another one has its place: it ends when no worker asks it any more."""
        self.asks.close()
        self._end.close()

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def close(self) -> None:
        """Ends it. Commands of workers that are gone are killed."""
        self.asks.close()
        self._end.close()
        if self._process is not None:
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class _Request:
    """What a worker asks for; its descriptors are closed with it."""

    def __init__(self, name: str, values: dict[str, str], message: int, answer: socket.socket) -> None:
        self.name = name
        self.values = values
        self.message = message
        self.answer = answer

    def close(self) -> None:
        os.close(self.message)
        self.answer.close()


class _Process:
    """The runner itself."""

    def __init__(self, asked: socket.socket, commands: Mapping[str, Command]) -> None:
        self._asked = asked
        self._commands = commands
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, str] = {}  # by the process id of the child that minds it
        self._count: Counter[str] = Counter()
        self._wake, self._wake_end = socket.socketpair()

    def serve(self) -> None:
        """Returns when nobody can ask any more."""
        # What is ignored is inherited by what is run, also from who started the server; a handler is not.
        for number in signal.valid_signals():
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        for number in (*_NOT_OURS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        for end in (self._wake, self._wake_end):
            end.setblocking(False)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it; Popen undoes it
        signal.set_wakeup_fd(self._wake_end.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        poll = select.poll()
        poll.register(self._asked, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            events = dict(poll.poll())
            if self._wake.fileno() in events:
                self._wake.recv(4096)
                self._reap()
            if (event := events.get(self._asked.fileno(), 0)) and not self._take(event):
                signal.set_wakeup_fd(-1)
                return
            self._start_waiting()

    def _take(self, event: int) -> bool:
        """Takes one request. False: nobody is left to ask."""
        data, descriptors, flags, _ = socket.recv_fds(
            self._asked, REQUEST_LIMIT, 2, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
        fields = data.decode("utf-8", "replace").split("\0")
        whole = len(descriptors) == 2 and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        if not whole or len(fields) != 1 + len(PLACEHOLDERS) or fields[0] not in self._commands:
            for descriptor in descriptors:
                os.close(descriptor)
            return bool(data) or not event & select.POLLHUP
        try:
            answer = socket.socket(fileno=descriptors[1])
        except OSError:  # no socket
            for descriptor in descriptors:
                os.close(descriptor)
            return True
        values = dict(zip(PLACEHOLDERS, fields[1:], strict=True))
        self._waiting.append(_Request(fields[0], values, descriptors[0], answer))
        return True

    def _reap(self) -> None:
        while self._running:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._count[self._running.pop(pid)] -= 1

    def _start_waiting(self) -> None:
        """Starts what there is room for, in the order in which it came."""
        for _ in range(len(self._waiting)):
            request = self._waiting.popleft()
            if self._count[request.name] >= self._commands[request.name].concurrency:
                self._waiting.append(request)
                continue
            try:
                pid = os.fork()
            except OSError as error:
                _answer(request, "cannot", error.strerror or "")
            else:
                if not pid:
                    self._mind(request)
                self._running[pid] = request.name
                self._count[request.name] += 1
            request.close()

    def _mind(self, request: _Request) -> NoReturn:
        """The child, which ends with the command."""
        try:
            signal.set_wakeup_fd(-1)
            self._asked.close()
            for other in self._waiting:
                other.close()
            _run(self._commands[request.name], request)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)


def _run(command: Command, request: _Request) -> None:
    """Runs it and waits for its end, its time-out, or the end of whoever asked."""
    user, group = (None, None) if command.uid < 0 else (command.uid, command.gid)
    try:
        process = subprocess.Popen(
            [expand(argument, request.values) for argument in command.arguments],
            stdin=request.message, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, cwd="/", umask=0o077,
            env={"PATH": PATH, "LANG": "C.UTF-8", "HOME": command.home, "USER": command.user, "LOGNAME": command.user},
            user=user, group=group, extra_groups=None if group is None else [group], start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        _answer(request, "cannot", getattr(error, "strerror", "") or str(error))
        return
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    output = bytearray()
    for event in _events(process, process.stdout, request.answer, command.timeout):
        if event == "output":
            _take_output(process.stdout, output)
            continue
        if event == "ended":
            _take_output(process.stdout, output)  # what there is: a daemon that it left behind may hold the pipe
            status = process.wait()
            _answer(request, f"signal {-status}" if status < 0 else f"exit {status}", bytes(output))
            return
        # Its leader has not been waited for: no other group can have its number.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        if event == "time-out":
            _answer(request, event, bytes(output))
        process.wait()
        return


def _events(process: subprocess.Popen[bytes], pipe: IO[bytes], answer: socket.socket, timeout: float) -> Iterator[str]:
    """Any number of "output"; then "ended", "time-out" or "gone": nobody waits for the answer any more."""
    ended = os.pidfd_open(process.pid)
    poll = select.poll()
    poll.register(answer, 0)  # a hang-up is told in any case
    poll.register(ended, select.POLLIN)
    poll.register(pipe, select.POLLIN)
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        found = dict(poll.poll(left * 1000 + 1))
        if ended in found:
            yield "ended"
            return
        if answer.fileno() in found:
            yield "gone"
            return
        if event := found.get(pipe.fileno(), 0):
            if event & select.POLLIN:
                yield "output"
            else:  # closed
                poll.unregister(pipe)
    yield "time-out"


def _take_output(pipe: IO[bytes], output: bytearray) -> None:
    """One read of what a pipe can hold."""
    output += (pipe.read(1 << 16) or b"")[: OUTPUT_LIMIT - len(output)]


def _answer(request: _Request, how: str, output: bytes | str) -> None:
    said = output if isinstance(output, bytes) else output.encode()
    try:
        request.answer.send(b"%s\n%s" % (how.encode(), said[:OUTPUT_LIMIT]), socket.MSG_DONTWAIT)
    except OSError:
        pass  # nobody waits any more


def main() -> None:
    """What `Runner.start` starts."""
    asked = socket.socket(fileno=int(sys.argv[1]))
    asked.set_inheritable(False)
    commands = {name: Command(*row) for name, row in json.load(sys.stdin).items()}
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = most if most != resource.RLIM_INFINITY and most < DESCRIPTORS else DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # mail is in memory
    _Process(asked, commands).serve()


if __name__ == "__main__":
    main()
