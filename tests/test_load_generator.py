"""The generator as a whole, against a server of a few lines: every error is counted as what it is, and ends.

The processes are real ones. No timing decides a test but that of the stall, which is made.
"""

from __future__ import annotations

import os
import resource
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest import LoadError, generator
from loadtest.connecting import loopback_sources
from loadtest.generator import find_address, make_orders, make_roles
from loadtest.ledger import read_ledger
from loadtest.options import Options
from loadtest.processes import make_certificate
from loadtest.result import ERRORS, PHASES, Result, Snapshot
from tests.load_server import RESET, Answer, LoadServer, but, load_server, ordinary
from tests.needs import needs

ROOT = Path(__file__).parents[1]


def run(server: LoadServer, on_snapshot: Callable[[Snapshot], None] = lambda snapshot: None, **options: Any) -> Result:
    chosen = {"sessions": 4, "duration": 0.6, "grace": 2.0, "size": "200", "seed": 7} | options
    return generator.run(Options(scenario="test", target=server.address, **chosen), on_snapshot)


def test_a_run_that_goes_well() -> None:
    seen: list[Snapshot] = []
    with load_server() as server:
        result = run(server, seen.append, messages=500, duration=20.0, processes=2)
    assert result.messages_accepted == result.messages_sent == 500
    assert result.errors == dict.fromkeys(ERRORS, 0)
    assert result.replies == {"220": 4, "221": 4, "250": 4 + 3 * 500, "354": 500}
    assert result.sessions_peak == result.sessions_opened == server.connections == 4
    assert result.processes == 2
    assert not result.interrupted
    assert result.seconds < 20
    assert result.rate == pytest.approx(500 / result.seconds)
    assert result.client_cpu_us_per_message > 0
    assert {phase: latency.count for phase, latency in result.latency_ms.items()} == {
        **dict.fromkeys(("connect", "banner", "ehlo", "session"), 4),
        **dict.fromkeys(("mail", "rcpt", "data", "end_of_data", "message"), 500),
    }
    assert result.latency_ms.keys() <= PHASES.keys()
    assert sum(snapshot.accepted for snapshot in result.timeline) == 500
    assert result.timeline == [snapshot for snapshot in seen if snapshot.seconds]
    assert [snapshot.second for snapshot in result.timeline] == list(range(len(result.timeline)))


def test_the_time_ends_it_and_what_is_under_way_is_answered() -> None:
    with load_server() as server:
        result = run(server, duration=1.3, per_connection=3)
    assert 1.3 <= result.seconds < 5
    assert result.messages_sent == result.messages_accepted > 10
    assert result.sessions_opened > 4
    assert result.errors == dict.fromkeys(ERRORS, 0)
    assert sum(command.startswith("MAIL") for command in server.commands) == result.messages_sent


# What a server does, the one kind of error that comes of it, and a reply that is counted.
FAULTS: dict[str, tuple[Answer, str, str]] = {
    "refuses at once": (but(open=b"554 go away\r\n"), "refused", "554"),
    "refuses EHLO": (but(EHLO=b"502 what\r\n"), "refused", "502"),
    "refuses MAIL": (but(MAIL=b"450 later\r\n"), "refused", "450"),
    "refuses RCPT": (but(RCPT=b"550 who\r\n"), "refused", "550"),
    "goes at DATA": (but(DATA=b"421 going\r\n"), "refused", "421"),
    "refuses the message": (but(end=b"552 too big\r\n"), "refused", "552"),
    "closes at once": (but(open=b""), "reset", ""),
    "closes at EHLO": (but(EHLO=b""), "reset", ""),
    "breaks at RCPT": (but(RCPT=RESET), "reset", ""),
    "closes at the end of data": (but(end=b""), "reset", ""),
    "closes at QUIT": (but(QUIT=b""), "reset", ""),
    "greets strangely": (but(open=b"hello\r\n"), "protocol", ""),
    "answers octets": (but(MAIL=b"\xff\xfe\r\n"), "protocol", ""),
    "answers 250 to DATA": (but(DATA=b"250 ok\r\n"), "protocol", "250"),
    "does not greet": (but(open=None), "timeout", ""),
    "is silent at RCPT": (but(RCPT=None), "timeout", ""),
    "is silent at the end": (but(end=None), "timeout", ""),
}


@pytest.fixture(scope="module")
def faults() -> dict[str, tuple[Result, int]]:
    """All of them at once, which takes a few seconds instead of twenty."""

    def measure(name: str) -> tuple[Result, int]:
        with load_server(FAULTS[name][0]) as server:
            return run(server, per_connection=1, timeout=0.4, duration=2.0), server.connections

    with ThreadPoolExecutor(len(FAULTS)) as threads:
        return dict(zip(FAULTS, threads.map(measure, FAULTS), strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_each_error_has_its_kind(name: str, faults: dict[str, tuple[Result, int]]) -> None:
    _, kind, code = FAULTS[name]
    result, connections = faults[name]
    others = {name: count for name, count in result.errors.items() if name != kind}
    assert result.errors[kind] > 0
    assert others == dict.fromkeys(others, 0)
    assert not code or result.replies[code] > 0
    fates = result.messages_accepted + result.messages_refused + result.messages_unknown
    assert fates <= result.messages_sent
    assert connections > 4  # it went on trying


def test_a_message_without_an_answer_is_unknown() -> None:
    with load_server(but(end=b"")) as server:
        result = run(server)
    assert result.messages_unknown == result.messages_sent > 0
    assert result.messages_accepted == 0


def test_what_is_under_way_at_the_end_is_given_up(tmp_path: Path) -> None:
    book = tmp_path / "ledger"
    with load_server(but(end=None)) as server:
        result = run(server, grace=0.2, ledger=str(book))
    assert result.messages_unknown == result.errors["timeout"] == 4
    assert [entry.outcome for entry in read_ledger(book)] == ["unknown"] * 4


def test_a_server_that_comes_back_is_used_again() -> None:
    answers = iter([b"", b"", b"", b"", b"", b""])

    def answer(said: str) -> bytes | None:
        return next(answers, ordinary(said)) if said == "" else ordinary(said)

    with load_server(answer) as server:
        result = run(server, duration=1.2, per_connection=2)
    assert result.errors["reset"] == 6
    assert result.messages_accepted > 10


def test_a_dead_server_does_not_make_it_spin() -> None:
    with load_server(but(open=b"")) as server:
        result = run(server, duration=1.5, per_connection=1)
    # 4 sessions, pauses of 0.05, 0.1, 0.2 ... seconds
    assert 4 < result.errors["reset"] < 60


def test_nobody_there() -> None:
    with load_server() as server:
        options = Options(target=server.address, per_connection=1, sessions=20)
    started = time.monotonic()
    with pytest.raises(LoadError, match=rf"127\.0\.0\.1:{server.port} cannot be reached: "):
        generator.run(options, lambda snapshot: None)
    assert time.monotonic() - started < 20
    with pytest.raises(LoadError, match="cannot be reached"):
        generator.run(replace(options, per_connection=0), lambda snapshot: None)
    with pytest.raises(LoadError, match="cannot be found"):
        find_address(("nowhere.invalid", 25))


def test_what_the_server_must_offer() -> None:
    with (
        load_server(but(EHLO=b"250 mx.test\r\n")) as server,
        pytest.raises(LoadError, match="does not offer PIPELINING"),
    ):
        run(server, pipelining=True)


def measure_stall(**options: Any) -> Result:
    """The server stands still for about a second."""
    with load_server() as server:

        def on_snapshot(snapshot: Snapshot) -> None:
            (server.stall.set if snapshot.second == 0 and snapshot.seconds else server.stall.clear)()

        return run(server, on_snapshot, duration=3.0, sessions=2, grace=10.0, **options)


def test_an_open_loop_counts_from_when_a_message_was_due() -> None:
    """Who waits for a server that stands still counts, also who could not be sent yet."""
    with ThreadPoolExecutor(2) as threads:
        closed = threads.submit(measure_stall)
        open_loop = measure_stall(rate=200.0, max_sessions=2)
        closed_loop = closed.result()
    # About 200 of 600 messages were due during the stall; a closed loop sees two.
    message, end = open_loop.latency_ms["message"], open_loop.latency_ms["end_of_data"]
    assert message.max > 800
    assert message.p90 > 400
    assert end.p90 < message.p90 / 4
    assert closed_loop.latency_ms["message"].p90 < message.p90 / 4
    assert open_loop.messages_accepted == open_loop.messages_sent > 400
    assert open_loop.errors["overrun"] == 0
    assert open_loop.lag_ms is not None
    assert open_loop.lag_ms.count == open_loop.messages_sent
    assert closed_loop.lag_ms is None


def test_an_open_loop_opens_sessions_as_it_needs_them() -> None:
    """Only a bound on the sessions makes messages wait, and what never got one is an overrun."""
    with load_server(but(end=None)) as server:
        free = run(server, rate=100.0, duration=1.0, sessions=1, grace=0.3)
        bound = run(server, rate=100.0, duration=1.0, sessions=1, max_sessions=3, grace=0.3)
    assert free.errors["overrun"] == 0
    assert free.sessions_peak > 20
    assert free.messages_unknown == free.messages_sent
    assert bound.sessions_peak == 3
    assert bound.messages_unknown == 3
    assert bound.errors["overrun"] > 20


def test_arrivals_do_not_depend_on_the_server() -> None:
    """The same seed and budget: the same number of messages, over the same connections' worth of time."""
    with load_server() as server:
        result = run(server, rate=300.0, messages=200, duration=20.0, per_connection=1, processes=2)
    assert result.messages_accepted == 200
    assert result.sessions_opened >= 200
    assert result.seconds < 5


def test_a_crowd_takes_turns() -> None:
    with load_server() as server:
        result = run(server, sessions=50, active=0.1, messages=100, duration=20.0)
        shares = sorted(server.mails.values())
    assert result.messages_accepted == sum(shares) == 100
    assert result.sessions_peak == result.sessions_opened == 50
    assert len(shares) == 50
    assert shares[-1] <= 3  # two each, were the answers in order


def test_of_a_crowd_only_some_send() -> None:
    with load_server(but(end=None)) as server:
        result = run(server, sessions=50, active=0.1, duration=0.5, grace=0.2)
    assert result.messages_unknown == result.messages_sent == 5
    assert result.sessions_peak == 50


def test_a_pause_after_each_message() -> None:
    with load_server() as server:
        result = run(server, think=0.3, duration=1.0)
    assert 4 * 2 <= result.messages_accepted <= 4 * 4


def test_large_messages_are_counted_apart() -> None:
    with load_server() as server:
        result = run(server, sessions=5, large=1, large_size="300KB", duration=1.5)
    assert result.latency_ms["large"].count > 0
    small = result.latency_ms["end_of_data"].count
    assert small + result.latency_ms["large"].count == result.messages_accepted
    assert result.octets_sent > result.latency_ms["large"].count * 300_000


def test_misbehaviour_is_counted_by_kind() -> None:
    shares = {"hangup": 0.2, "idle": 0.1, "early": 0.1, "rset": 0.1}
    with load_server() as server:
        result = run(server, sessions=20, misbehave=shares, duration=1.5, per_connection=2)
    assert result.misbehaviour.keys() == shares.keys()
    assert result.misbehaviour["idle"] == {"sessions": 2, "completed": 2}
    assert result.misbehaviour["rset"]["completed"] == result.misbehaviour["rset"]["sessions"] > 0
    assert result.misbehaviour["hangup"]["sessions"] >= 4
    for outcomes in result.misbehaviour.values():
        assert outcomes["sessions"] == sum(outcomes.values()) - outcomes["sessions"]
    assert result.messages_accepted > 0
    assert result.errors == dict.fromkeys(ERRORS, 0)
    with pytest.raises(LoadError, match="no misbehaviour is called sulk"):
        generator.run(Options(target="127.0.0.1:1", misbehave={"sulk": 0.1}), lambda snapshot: None)


def contexts(folder: Path) -> ssl.SSLContext:
    needs("openssl")
    make_certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
@pytest.mark.parametrize("resumption", [True, False])
def test_tls(tls: str, resumption: bool, tmp_path: Path) -> None:
    with load_server(context=contexts(tmp_path), implicit=tls == "implicit") as server:
        result = run(server, tls=tls, resumption=resumption, per_connection=1, messages=60, duration=20.0)
    assert result.messages_accepted == 60
    assert result.latency_ms["tls"].count >= 60
    assert result.latency_ms["ehlo"].count >= (120 if tls == "starttls" else 60)
    assert result.errors == dict.fromkeys(ERRORS, 0)
    assert result.tls_resumed > 30 if resumption else result.tls_resumed == 0


@pytest.mark.parametrize(("more", "kind"), [(b"", "tls"), (b"454 no\r\n", "protocol")])
def test_a_handshake_that_fails(more: bytes, kind: str) -> None:
    """The server goes away, or says something in the clear behind its 220."""
    with load_server(but(STARTTLS=b"220 go\r\n" + more)) as server:
        result = run(server, tls="starttls", per_connection=1)
    assert result.errors[kind] == sum(result.errors.values()) > 0
    assert result.messages_sent == 0


def test_orders_keep_the_limits() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits: list[str] = []
    options = Options(target="127.0.0.1:25", sessions=3 * hard, seed=1, messages=10)
    orders = make_orders(options, ("127.0.0.1", 25), limits)
    assert len(orders) == 4
    assert sum(len(order.roles) for order in orders) == 3 * hard
    assert max(len(order.roles) for order in orders) < hard
    assert sum(order.budget for order in orders) == 10
    assert any("descriptors" in limit for limit in limits)
    assert all(order.options.processes == 4 for order in orders)
    limits = []
    (small,) = make_orders(Options(target="127.0.0.1:25"), ("127.0.0.1", 25), limits)
    assert small.sources == ()
    assert limits == []


def test_more_sessions_than_ports_come_from_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "ports_of_an_address", lambda: 10)
    limits: list[str] = []
    options = Options(target="127.0.0.1:25", sessions=25, processes=2)
    first, second = make_orders(options, ("127.0.0.1", 25), limits)
    assert sorted(first.sources) == sorted(second.sources) == ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    assert first.sources[0] != second.sources[0]
    assert limits == ["10 ports of an address: connecting from 127.0.0.2 to 127.0.0.4"]
    remote = make_orders(replace(options, target="192.0.2.1:25"), ("192.0.2.1", 25), [])
    assert remote[0].sources == ()


def test_addresses_to_connect_from() -> None:
    with load_server() as server:
        result = run(server, source=("127.0.0.9", "127.0.0.10"), per_connection=1, messages=20, duration=10.0)
    assert result.messages_accepted == 20
    assert len(set(loopback_sources(1000))) == 1000


def test_an_address_that_is_not_ours() -> None:
    with load_server() as server, pytest.raises(LoadError, match=r"cannot be reached: .*assign"):
        run(server, source=("192.0.2.1",))


def test_roles_are_shares_of_the_sessions() -> None:
    roles = make_roles(Options(sessions=200, misbehave={"drip": 0.05, "idle": 0.001}))
    assert (roles.count("drip"), roles.count("idle"), roles.count("mail")) == (10, 1, 189)
    with pytest.raises(LoadError, match="none is left that behaves"):
        make_roles(Options(sessions=2, misbehave={"drip": 0.5, "idle": 0.5}))


@contextmanager
def started(server: LoadServer, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "loadtest", "run", "persistent", server.address, *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_processes_do_not_outlive_their_parent() -> None:
    with load_server() as server, started(server, "--processes", "2", "--duration", "60s") as process:
        wait_for(lambda: server.commands.count("DATA") > 20)
        workers = children(process.pid)
        assert len(workers) == 2
        process.kill()
        wait_for(lambda: not any(Path(f"/proc/{worker}/stat").exists() for worker in workers))


def test_a_process_that_dies_ends_the_run() -> None:
    with load_server() as server, started(server, "--processes", "2", "--duration", "60s") as process:
        wait_for(lambda: server.commands.count("DATA") > 20)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1
        assert errors.splitlines()[-1] == "loadtest: a process of the generator died"
