"""`python -m loadtest run` as people call it: options, exit codes, files, Ctrl-C, and the server of this project.

And that the documentation has every key, phase, kind of error, scenario and option that there is.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadtest import LoadError
from loadtest.misbehave import KINDS, OUTCOMES
from loadtest.options import Options, declared, parse_seconds, parse_share, parse_shares, parse_sources, parse_target
from loadtest.processes import fastsmtp, mail_in
from loadtest.result import ERRORS, PHASES, Latency, Result, Snapshot
from loadtest.run import make_options
from loadtest.scenarios import SCENARIOS, find_scenario
from tests.load_server import LoadServer, but, load_server
from tests.test_load_generator import wait_for

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "loadtest.md").read_text(encoding="utf-8")


def call(*arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtest", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, env=environment or None
    )


def test_a_run_against_our_own_server(tmp_path: Path) -> None:
    """With every message in its mailbox, and the files that were asked for."""
    result_file, report = tmp_path / "result.json", tmp_path / "report.html"
    with fastsmtp(tmp_path, "none", "maildir") as server:
        done = call(
            *("run", "mx-small", f"127.0.0.1:{server.port}", "--messages", "300", "--sessions", "10"),
            *("--duration", "60s", "--json", str(result_file), "--report", str(report), "--to", "u{1..5}@y.test"),
        )
        wait_for(lambda: mail_in(tmp_path) == 300)
    assert done.returncode == 0, done.stderr
    assert "300 of 300 messages" in done.stdout
    assert "Traceback" not in done.stderr
    found = json.loads(result_file.read_text())
    assert found["scenario"] == "mx-small"
    assert found["messages_accepted"] == 300
    assert found["messages_refused"] == 0
    assert found["sessions_peak"] == 10
    assert found["errors"] == dict.fromkeys(ERRORS, 0)
    assert found["rate"] > 0
    assert found["seconds"] > 0
    assert found["client_cpu_us_per_message"] > 0
    assert found["latency_ms"]["end_of_data"].keys() == {"count", "p50", "p90", "p99", "p999", "max"}
    assert found["options"]["recipient"] == "u{1..5}@y.test"
    page = report.read_text(encoding="utf-8")
    HTMLParser().feed(page)
    assert "mx-small" in page
    assert not re.search(r"(?:src|href)=\W?https?:", page)


def test_a_tls_run_against_our_own_server(tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    with fastsmtp(tmp_path, "none", "discard", tls=True) as server:
        done = call(
            *("run", "tls-churn", f"127.0.0.1:{server.port}", "--tls", "implicit", "--resumption", "--sessions", "5"),
            *("--pipelining", "--body", "bdat", "--messages", "50", "--duration", "60s", "--json", str(result_file)),
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(result_file.read_text())
    assert found["messages_accepted"] == 50
    assert found["tls_resumed"] > 20


@contextmanager
def running(server: LoadServer, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "loadtest", "run", "persistent", server.address, "--duration", "60s", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: server.commands.count("DATA") > 20)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_interruption_ends_it_with_the_figures_so_far(tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    with load_server() as server, running(server, "--json", str(result_file), "--processes", "2") as process:
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors
    found = json.loads(result_file.read_text())
    assert found["interrupted"] is True
    assert found["messages_accepted"] == found["messages_sent"] >= 20
    assert "interrupted" in output


def test_a_second_interruption_ends_it_at_once() -> None:
    with load_server() as server, running(server, "--sessions", "2") as process:
        server.stall.set()
        process.send_signal(signal.SIGINT)
        # The first one gives what is under way two seconds; the second does not wait for them.
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            if process.poll() is not None:
                break
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "accepted" not in output


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["run", "nothing", "127.0.0.1:25"], 2, "no scenario is called nothing; there are mx-small"),
        (["run", "churn", "localhost"], 2, "'localhost' is no HOST:PORT"),
        (["run", "churn", "127.0.0.1:25", "--duration", "soon"], 2, "'soon' is no time"),
        (["run", "churn", "127.0.0.1:25", "--auth", "plain"], 2, "--auth needs --user and --password"),
        (["run", "churn", "127.0.0.1:25", "--sessions", "0"], 2, "'--sessions'"),
        (["run", "churn", "127.0.0.1:25", "--misbehave", "sulk=1%"], 1, "no misbehaviour is called sulk"),
        (["run", "churn", "127.0.0.1:25", "--to", "a{"], 1, "loadtest: "),
        (["run", "churn", "127.0.0.1:25", "--corpus", "/nowhere"], 1, "loadtest: /nowhere is no folder"),
        (["run", "churn", "127.0.0.1:1", "--json", "/nowhere/x"], 1, "loadtest: /nowhere/x cannot be written: No such"),
        (["run", "churn", "127.0.0.1:1", "--ledger", "/nowhere/x"], 1, "loadtest: the ledger /nowhere/x cannot be"),
        (["run", "churn", "127.0.0.1:1"], 1, "loadtest: 127.0.0.1:1 cannot be reached: Connection refused"),
        (["race"], 2, "No such command 'race'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], code: int, line: str) -> None:
    done = call(*arguments)
    assert done.returncode == code
    assert line in done.stderr.splitlines()[-1]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_server_that_refuses_everything_is_a_result() -> None:
    with load_server(but(MAIL=b"450 \x1b[2Jno\r\n")) as server:
        done = call("run", "persistent", server.address, "--duration", "500ms", "--sessions", "2")
    assert done.returncode == 0
    assert "refused" in done.stdout
    assert "450" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_the_password_can_stand_in_the_environment(tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    with load_server() as server:
        done = call(
            *("run", "persistent", server.address, "--auth", "plain", "--user", "ann", "--messages", "3"),
            *("--sessions", "1", "--json", str(result_file)),
            LOADTEST_PASSWORD="pw",
            PATH="/usr/bin:/bin",
        )
        assert "AUTH PLAIN AGFubgBwdw==" in server.commands
    assert done.returncode == 0, done.stderr
    assert '"pw"' not in result_file.read_text()


def test_help_has_all_options_and_scenarios() -> None:
    shown = re.sub(r"\s+", " ", call("run", "--help").stdout)
    for each in declared():
        assert each.metadata["help"][:30] in shown
    for name, scenario in SCENARIOS.items():
        assert f"{name} {scenario.sentence}" in shown
    commands = call("--help").stdout
    assert all(command in commands for command in ("run", "verify", "sink", "compare"))


def test_what_is_given_goes_before_the_scenario() -> None:
    options = make_options("crowd", "127.0.0.1:25", {"sessions": 30, "rate": None, "resumption": False})
    assert options.sessions == 30
    assert options.active == 0.05
    assert options.resumption is False
    assert options == replace(Options(), **{**find_scenario("crowd").options, "sessions": 30, "resumption": False}, scenario="crowd", target="127.0.0.1:25")  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_are_possible(name: str) -> None:
    options = make_options(name, "127.0.0.1:25", {})
    assert options.scenario == name
    assert options.misbehave.keys() <= KINDS.keys()


@pytest.mark.parametrize(
    "values",
    [
        {"target": "localhost"},
        {"target": "a:70000"},
        {"duration": 0.0},
        {"timeout": 0.0},
        {"sizes": "1KB:1", "corpus": "x"},
        {"rate": 1.0, "think": 1.0},
        {"max_sessions": 5, "sessions": 6},
        {"active": 0.001},
        {"large": 100},
        {"helo": "a b"},
        {"auth": "plain", "user": "a\r\nb", "password": "x"},
    ],
    ids=str,
)
def test_options_that_contradict_themselves(values: dict[str, Any]) -> None:
    with pytest.raises(LoadError):
        Options(**values)


def test_notations() -> None:
    assert [parse_seconds(text) for text in ("10", "200ms", "1.5m", "1h")] == [10, 0.2, 90, 3600]
    assert [parse_share(text) for text in ("5%", "0.05", "100%")] == [0.05, 0.05, 1]
    assert parse_shares("drip=1%, idle=0.5") == {"drip": 0.01, "idle": 0.5}
    assert parse_target("[::1]:25") == ("::1", 25)
    assert parse_sources("127.0.0.2, ::1") == ("127.0.0.2", "::1")
    for parse, wrong in (
        (parse_seconds, ("", "5 days", "-1s", "s")),
        (parse_share, ("", "101%", "2", "x")),
        (parse_shares, ("drip", "drip=1%,drip=2%", "=1%", "a=60%,b=60%")),
        (parse_target, ("", "host", "host:0", "host:99999", "::1:25")),
        (parse_sources, ("localhost", "127.0.0.1/8")),
    ):
        for text in wrong:
            with pytest.raises(LoadError):
                parse(text)


def documented(heading: str) -> set[str]:
    """The words in the first column of the table below a heading of the guide."""
    section = GUIDE.split(f"\n{heading}\n")[1].split("\n#")[0]
    return {
        match
        for line in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for match in re.findall(r"`([^`]+)`", line)
    }


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("## The keys of the JSON file", {field.name for field in fields(Result)}),
        ("### A second of `timeline`", {field.name for field in fields(Snapshot)}),
        ("### Latencies", {field.name for field in fields(Latency)}),
        ("### Phases", set(PHASES)),
        ("### Errors", set(ERRORS)),
        ("### Misbehaviour", set(KINDS)),
        ("### How a misbehaving session ended", set(OUTCOMES)),
        ("## Scenarios", set(SCENARIOS)),
    ],
)
def test_the_guide_is_complete(heading: str, names: set[str]) -> None:
    assert documented(heading) == names
