"""A supervisor as a program, whose workers answer questions about themselves; test_supervisor.py runs it.

Arguments: the worker's name, the configuration and the supervisor's patience, as JSON. It says what happens in lines of
JSON on standard output, among those of the log. A client sends a question in a line and gets a line of JSON.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import selectors
import signal
import socket
import sys
import time

from fastsmtp.claim import StartError
from fastsmtp.config import Config
from fastsmtp.seat import EXIT_CANNOT_START, Seat
from fastsmtp.supervisor import Patience, run


def say(event: str, **values: object) -> None:
    os.write(1, json.dumps({"event": event, **values}).encode() + b"\n")


def answer(question: str, seat: Seat) -> object:
    match question.split():
        case ["pid"]:
            return os.getpid()
        case ["index"]:
            return seat.index
        case ["ids"]:
            return [os.getresuid(), os.getresgid()]
        case ["become", "root"]:
            try:
                os.setuid(0)
            except PermissionError:
                return "PermissionError"
            return "root"
        case ["open", number]:
            return [seat.shared.open_session(seat.index) for _ in range(int(number))][-1]
        case ["sessions"]:
            return seat.shared.open_sessions()
        case ["freeze"]:
            return "frozen"
        case _:
            return None


def serve(
    config: Config, seat: Seat, *, heart: bool = True, by_signal: bool = True, by_pipe: bool = True, late: float = 0
) -> int:
    """Serves until SIGTERM or until the supervisor is gone."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number) if by_signal else None)
    selector = selectors.DefaultSelector()
    for _, _, listening in seat.sockets:
        selector.register(listening, selectors.EVENT_READ)
    if by_pipe:
        selector.register(seat.alive, selectors.EVENT_READ)
    say("worker", index=seat.index, pid=os.getpid())
    if heart:
        seat.shared.beat(seat.index, time.monotonic())
    os.write(seat.ready, b"r")
    os.close(seat.ready)
    said: object = None
    while not stopping:
        if heart:
            seat.shared.beat(seat.index, time.monotonic())
        for key, _ in selector.select(0.05):
            if key.fileobj == seat.alive:
                return 0
            assert isinstance(key.fileobj, socket.socket)
            try:
                client = key.fileobj.accept()[0]
            except BlockingIOError:
                continue
            with client, client.makefile("rw") as lines:
                client.settimeout(5)
                if question := lines.readline():
                    said = answer(question, seat)
                    lines.write(json.dumps(said) + "\n")
            if said == "frozen":
                time.sleep(100)
    if late:
        for _, _, listening in seat.sockets:
            listening.close()
        say("closing")
        time.sleep(late)
    return 0


def serve_late(config: Config, seat: Seat) -> int:
    time.sleep(0.3 * seat.index)
    return serve(config, seat)


def serve_until_late(config: Config, seat: Seat) -> int:
    return serve(config, seat, late=0.5)


def serve_by_signal(config: Config, seat: Seat) -> int:
    return serve(config, seat, by_pipe=False)


def serve_by_pipe(config: Config, seat: Seat) -> int:
    return serve(config, seat, by_signal=False)


def serve_deaf(config: Config, seat: Seat) -> int:
    return serve(config, seat, by_signal=False, by_pipe=False)


def serve_without_heart(config: Config, seat: Seat) -> int:
    return serve(config, seat, heart=False)


def serve_and_end_badly(config: Config, seat: Seat) -> int:
    serve(config, seat)
    return 5


def serve_but_second_cannot(config: Config, seat: Seat) -> int:
    return EXIT_CANNOT_START if seat.index == 1 else serve(config, seat)


def sleep(config: Config, seat: Seat) -> int:
    say("worker", index=seat.index, pid=os.getpid())
    time.sleep(100)
    return 1


def die_early(config: Config, seat: Seat) -> int:
    return 3


def fail_once(config: Config, seat: Seat) -> int:
    mark = config.data_dir / "failed"
    if mark.exists():
        return serve(config, seat)
    mark.touch()
    raise RuntimeError("once")


def refuse_forks(failing: set[int]) -> None:
    """The kernel refuses root no process, so those of these numbers are refused here."""
    fork = os.fork
    numbers = itertools.count(1)

    def counted_fork() -> int:
        if next(numbers) in failing:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    os.fork = counted_fork


def announce(addresses: list[str]) -> None:
    if os.environ.get("FAIL_IN_ANNOUNCE"):
        raise RuntimeError("announce")
    say("announced", addresses=addresses)


def main(worker: str, config: str, patience: str) -> int:
    if worker == "serve_if_setuid_is_impossible":
        worker = "serve"
        ctypes.CDLL(None).prctl(28, 4, 0, 0, 0)  # SECBIT_NO_SETUID_FIXUP: capabilities survive setuid
    refuse_forks({int(number) for number in os.environ.get("FORKS_THAT_FAIL", "").split()})
    try:
        return run(
            Config.model_validate(json.loads(config)),
            announce,
            worker=globals()[worker],
            patience=Patience(**json.loads(patience)),
        )
    except StartError as error:
        say("start-error", text=str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
