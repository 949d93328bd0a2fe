"""The race: rounds interleave, who loses mail counts for nothing, and what was found is written as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from needs import needs

from loadtest import LoadError
from loadtest.comparison import Comparison, Line, Round, Spread, Syncs, holds, summarise
from loadtest.comparison_text import BEGIN, END, insert_section, render_markdown
from loadtest.install import Installed, Store
from loadtest.options import Options
from loadtest.peers import Job, Peer, Plan
from loadtest.race import Race, Terms, judge
from loadtest.result import Latency, Result

ROOT = Path(__file__).parents[1]
# Takes mail; delivers each message as often as told, or not at all: "once", "never", "twice".
SERVER = """\
import os, socketserver, sys
from pathlib import Path
port, times, new = int(sys.argv[1]), {"once": 1, "never": 0, "twice": 2}[sys.argv[2]], Path(sys.argv[3], "mail/b/new")
new.mkdir(parents=True)
class Session(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"220 it\\r\\n")
        for line in self.rfile:
            if line.startswith(b"DATA"):
                self.wfile.write(b"354 go\\r\\n")
                while self.rfile.readline() != b".\\r\\n":
                    pass
                for _ in range(times):
                    (new / os.urandom(8).hex()).touch()
            if line.startswith(b"QUIT"):
                return
            self.wfile.write(b"250 ok\\r\\n")
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 100
Server(("127.0.0.1", port), Session).serve_forever()
"""


def scripted(name: str, times: str = "once") -> Peer:
    def plan(job: Job) -> Plan:
        return Plan([sys.executable, "-c", SERVER, str(job.port), times, str(job.folder)])

    claims = dict.fromkeys(("discard", "maildir"), "nothing")
    return Peer(name, claims, lambda _: Installed("1.0"), plan)


def result(options: Options, accepted: int = 0, interrupted: bool = False) -> Result:
    """Of a load that sent nothing, or what else it says."""
    latency = {"end_of_data": Latency(accepted, 1.0, 2.0, 3.0, 4.0, 5.0)}
    return Result(
        **dict.fromkeys(("scenario", "target", "started"), options.scenario),
        options={},
        processes=1,
        seconds=0.5,
        interrupted=interrupted,
        sessions_opened=1,
        sessions_peak=1,
        messages_sent=accepted,
        messages_accepted=accepted,
        messages_refused=0,
        messages_unknown=0,
        recipients_refused=0,
        octets_sent=0,
        rate=accepted / 0.5,
        client_cpu_us_per_message=10.0,
        errors={},
        replies={},
        misbehaviour={},
        latency_ms=latency,
        lag_ms=None,
        limits=[],
        machine={},
    )


@pytest.fixture
def race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Race]:
    monkeypatch.setattr("loadtest.accounting.QUIET_SECONDS", 0.2)

    def make(
        peers: list[Peer],
        load: Callable[[Options], Result],
        end: str = "maildir",
        rounds: int = 2,
        scenarios: tuple[str, ...] = ("persistent", "churn"),
    ) -> Race:
        terms = Terms(
            peers=tuple(peers),
            ends=(end,),
            scenarios=scenarios,
            rounds=rounds,
            seconds=0.3,
            drain=0.5,
            folder=tmp_path,
            store=Store(tmp_path / "store"),
            options={"sessions": 2},
            warm_up=0.1,
            traced=False,
        )
        return Race(terms, load)

    return make


def send_real(options: Options) -> Result:
    from loadtest.compare import send

    return send(options)


def test_rounds_interleave_and_each_server_is_started_once(race: Callable[..., Race], tmp_path: Path) -> None:
    seen: list[tuple[str, str, float]] = []

    def load(options: Options) -> Result:
        seen.append((options.scenario, options.target, options.duration))
        return result(options, 5)

    found = race([scripted("a"), scripted("b")], load, end="discard")
    found.run()
    a, b = dict.fromkeys(target for _, target, _ in seen)
    loads = [(scenario, target) for scenario, target, duration in seen if duration == 0.3]
    assert loads == [("persistent", a), ("persistent", b)] * 2 + [("churn", a), ("churn", b)] * 2
    assert [target for _, target, duration in seen if duration == 0.1] == [a, b]  # warmed up once
    lines = found.comparison("x").lines
    assert [(line.scenario, line.server, len(line.rounds)) for line in lines] == [
        ("persistent", "a", 2),
        ("persistent", "b", 2),
        ("churn", "a", 2),
        ("churn", "b", 2),
    ]
    assert all(line.accepted and line.accepted.median == 10.0 and not line.problems for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_loses_or_doubles_is_disqualified(
    race: Callable[..., Race], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [scripted("good"), scripted("loses", "never"), scripted("doubles", "twice")]
    found = race(peers, send_real, rounds=1, scenarios=("persistent",))
    found.run()
    lines = {(line.scenario, line.server): line for line in found.comparison("x").lines}
    good = lines["persistent", "good"]
    assert good.problems == ()
    assert good.rounds[0].accepted == good.rounds[0].delivered
    assert good.rounds[0].accepted > 10
    assert good.drained is not None
    assert good.accepted is not None
    assert good.drained.median <= good.accepted.median
    assert good.cpu_us is not None
    assert good.cpu_us.median > 0
    assert good.memory is not None
    assert good.memory.median > 1e6
    assert "end_of_data" in good.latency_ms
    for name, words in (("loses", r"round 1: LOST ([0-9,]+) of \1 acknowledged"), ("doubles", "more than once")):
        line = lines["persistent", name]
        assert line.accepted is None
        assert re.search(words, line.problems[0])
        assert line.rounds[0].accepted > 0
    said = capsys.readouterr().err
    assert "loses, maildir, persistent, round 1 of 1: COUNTS FOR NOTHING: LOST" in said
    assert list(tmp_path.iterdir()) == []


def test_a_peer_that_is_missing_or_does_not_start_is_said_and_the_race_goes_on(race: Callable[..., Race]) -> None:
    def fail(_: Store) -> Installed:
        raise LoadError("no such package")

    broken = Peer(
        "broken", {"discard": "fsync"}, lambda _: Installed("2"), lambda _: Plan([sys.executable, "-c", "exit(3)"])
    )
    absent = Peer("absent", {"discard": "fsync"}, fail, broken.plan)
    found = race([absent, broken, scripted("a")], lambda options: result(options, 1), end="discard", rounds=1)
    found.run()
    comparison = found.comparison("x")
    assert comparison.missing == {"absent": "cannot be installed: no such package"}
    lines = {line.server: line for line in comparison.lines if line.scenario == "persistent"}
    assert "ended with exit code 3" in lines["broken"].problems[0]
    assert lines["a"].accepted is not None
    text = render_markdown(comparison)
    assert "- **absent** took no part: cannot be installed: no such package" in text
    assert re.search(r"\| broken +\| fsync +\| +– \| +– \|", text)


def test_an_interrupted_load_ends_the_race_with_what_it_has(race: Callable[..., Race], tmp_path: Path) -> None:
    loads = iter([False, False, True])  # a warm-up, a round, and then Ctrl-C
    found = race([scripted("a")], lambda options: result(options, 1, next(loads)), end="discard")
    found.run()
    comparison = found.comparison("x")
    assert comparison.interrupted
    assert [len(line.rounds) for line in comparison.lines] == [1, 0]
    assert list(tmp_path.iterdir()) == []


def test_what_a_round_is_judged_by() -> None:
    assert judge(10, 0, None, False, 5) == []
    assert judge(10, 0, 10, False, 5) == []
    assert judge(10, 2, 12, False, 5) == []  # unanswered mail may arrive
    assert judge(10, 2, 9, False, 5) == ["LOST 1 of 10 acknowledged messages"]
    assert judge(10, 2, 9, True, 5) == ["1 of 10 acknowledged messages not delivered within 5 s"]
    assert judge(10, 2, 13, False, 5) == ["1 messages delivered more than once or never acknowledged"]
    assert judge(10, 0, 10, True, 5) == ["still busy 5 s after the load"]
    assert judge(0, 0, None, False, 5) == ["no message was accepted"]


def make_round(number: int, rate: float, problems: tuple[str, ...] = ()) -> Round:
    latency = {"end_of_data": Latency(10, rate / 10, 2.0, 3.0, 4.0, 5.0)}
    return Round(number, 1.0, 10, 0, 0, 0, 10, 2.0, rate, rate / 2, 100.0, 20.0, 1000, latency, problems)


def make_line(server: str, claim: str, before: float, *rates: float) -> Line:
    rounds = [make_round(number, rate) for number, rate in enumerate(rates, 1)]
    return summarise(server, "1", "maildir", "persistent", claim, Syncs(20, {"fsync": 20}, before, 2.0), rounds)


def make_comparison(*lines: Line) -> Comparison:
    return Comparison(
        started="2026-01-01T00:00:00Z",
        command="python -m loadtest compare --rounds 3",
        machine={"processor": "A|B", "cores": 2},
        versions={line.server: line.version for line in lines},
        rounds=3,
        seconds=5.0,
        scenarios={"persistent": "Sentence."},
        ends=("maildir",),
        accounting="cgroup",
        lines=lines,
    )


def test_a_line_is_the_median_of_rounds_that_count() -> None:
    rounds = [make_round(1, 10.0), make_round(2, 1000.0, ("LOST 1",)), make_round(3, 30.0), make_round(4, 20.0)]
    line = summarise("a", "1", "maildir", "persistent", "fsync", None, rounds, ["earlier"])
    assert line.accepted == Spread(20.0, 10.0, 30.0, (10.0, 30.0, 20.0))
    assert line.drained == Spread(10.0, 5.0, 15.0, (5.0, 15.0, 10.0))
    assert line.end_of_data_ms["p50"] == Spread(2.0, 1.0, 3.0, (1.0, 3.0, 2.0))
    assert line.problems == ("earlier", "round 2: LOST 1")
    assert line.claim_holds is None
    assert len(line.rounds) == 4
    nothing = summarise("a", "1", "maildir", "persistent", "fsync", None, [rounds[1]])
    assert nothing.accepted is None
    assert nothing.latency_ms == {}
    assert Spread.of([]) is None


@pytest.mark.parametrize(
    ("claim", "before", "holds_"), [("fsync", 1, True), ("fsync", 0.9, False), ("nothing", 0, True)]
)
def test_a_claim_holds_when_each_message_waits_for_the_disk(claim: str, before: float, holds_: bool) -> None:
    assert holds(claim, Syncs(20, {}, before, 5.0)) is holds_


def test_the_table_says_who_does_not_keep_its_word() -> None:
    text = render_markdown(
        make_comparison(make_line("good", "fsync", 1.0, 10, 20, 30), make_line("liar", "fsync", 0, 5))
    )
    assert "processor A\\|B" in text
    rows = [re.split(r" *\| *", line) for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][1:6] == ["server", "kept before 250", "syncs", "accepted/s", "in the mailbox/s"]
    assert rows[2][1:6] == ["good", "fsync", "1.00, 2.00", "20.0 (10.0–30.0)", "10.0 (5.00–15.0)"]
    assert rows[3][1:6] == ["liar", "**claims fsync, counted 0**", "0, 2.00", "5.00", "2.50"]
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| ")}) == 1


def test_a_section_replaces_the_one_before_and_nothing_else() -> None:
    once = insert_section("# Benchmarks\n\ntext\n", "first")
    assert once == f"# Benchmarks\n\ntext\n\n## The race\n\n{BEGIN}\n\nfirst\n\n{END}\n"
    twice = insert_section(f"{once}\n## After\n", "second\n")
    assert twice == f"{once}\n## After\n".replace("first", "second")
    for broken in (BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}"):
        with pytest.raises(LoadError, match="markers"):
            insert_section(broken, "x")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "loadtest", "compare", *arguments]


@pytest.mark.parametrize(
    "wrong", [("--against", "nobody"), ("--ends", "moon"), ("--scenarios", "x"), ("--rounds", "0")]
)
def test_wrong_options_are_one_line_and_code_2(wrong: tuple[str, str]) -> None:
    ended = subprocess.run(command(*wrong), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert wrong[1] in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_file_that_cannot_be_written_is_said_before_the_race(tmp_path: Path) -> None:
    where = command("--json", str(tmp_path / "none" / "x.json"))
    ended = subprocess.run(where, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == f"loadtest: {tmp_path}/none/x.json cannot be written: No such file or directory\n"


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder beside the project, as the program's own is: the tests' may be in memory."""
    folder = Path(tempfile.mkdtemp(prefix="race-test-", dir=ROOT.parent))
    yield folder
    shutil.rmtree(folder)


SMALL = ("--rounds", "1", "--seconds", "0.4", "--sessions", "4", "--scenarios", "persistent")


def test_a_whole_race(on_disk: Path, tmp_path: Path) -> None:
    needs("smtp-sink", "strace")
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / f"race.{name}" for name in ("json", "markdown", "report", "docs")}
    files["docs"].write_text("# Figures\n\nbefore\n")
    written = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    given = command("--against", "smtp-sink", "--ends", "discard", *SMALL, *written)
    given += ["--charts", str(tmp_path / "charts"), "--dir", str(on_disk)]
    ended = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(files["json"].read_text())
    lines = {line["server"]: line for line in found["lines"]}
    assert lines.keys() == {"fastsmtp", "fastsmtp-memory", "smtp-sink"}
    assert lines["fastsmtp"]["claim_holds"] is True
    assert lines["fastsmtp"]["syncs"]["before_250"] >= 1
    assert lines["smtp-sink"]["syncs"]["in_all"] == 0
    assert all(line["cpu_us"]["median"] > 0 and len(line["accepted"]["rounds"]) == 1 for line in found["lines"])
    assert found["lines"][0]["server"] == "fastsmtp"  # who syncs stands above who does not
    assert found["command"].startswith("python -m loadtest compare --against smtp-sink")
    text = files["markdown"].read_text()
    assert ended.stdout == text
    assert text.strip() in files["docs"].read_text()
    assert files["docs"].read_text().startswith("# Figures\n\nbefore\n")
    assert "![race-persistent-discard](charts/race-persistent-discard.png)" in files["docs"].read_text()
    assert (tmp_path / "charts" / "race-persistent-discard.png").stat().st_size > 1000
    assert files["report"].read_text().startswith("<!")
    assert list(on_disk.iterdir()) == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_servers(signum: int, code: int, on_disk: Path, tmp_path: Path) -> None:
    """Ctrl-C keeps what was found too. It comes to the whole group, and twice, as timeout(1) sends it."""
    needs("smtp-sink")
    given = command("--against", "smtp-sink", "--ends", "discard", "--seconds", "20", "--scenarios", "persistent")
    given += ["--dir", str(on_disk), "--json", str(tmp_path / "race.json")]
    program = subprocess.Popen(
        given, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (servers := list(on_disk.glob("*/fastsmtp-[0-9]*/output"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert servers
    time.sleep(1.0)
    os.killpg(program.pid, signum)
    time.sleep(0.01)
    program.send_signal(signum)
    stdout, stderr = program.communicate(timeout=60)
    assert program.returncode == code, stderr
    assert "Traceback" not in stderr
    if signum == signal.SIGINT:
        assert "It was interrupted" in stdout
        assert json.loads((tmp_path / "race.json").read_text())["interrupted"] is True
    assert list(on_disk.iterdir()) == []
    assert not list(Path("/sys/fs/cgroup").glob(f"**/loadtest-{program.pid}-*"))
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            assert str(on_disk) not in Path(f"/proc/{entry}/cmdline").read_text(errors="replace")
        except OSError:
            pass


def test_keys_of_the_json_are_the_fields() -> None:
    shown = make_comparison(make_line("a", "fsync", 1.0, 10, 20)).as_json()
    assert shown["lines"][0]["accepted"] == {"median": 15.0, "low": 10.0, "high": 20.0, "rounds": (10.0, 20.0)}
    assert json.loads(json.dumps(shown))["lines"][0]["end"] == "maildir"
