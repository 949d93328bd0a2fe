"""The crash kit: a short selection of its faults, and mistakes that it must see.

The selection goes through the real server, as `python -m loadtest crash` does; the long runs are by that command. With
a flush taken out, with the mark written before the delivery, and with the flush of directories left out it must report
losses, on each layout of disks where that can lose: these say that the kit can see at all. What needs file systems of
its own needs root.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from crash_mutants import MISTAKES, make_mutant
from needs import needs, needs_root

from loadtest import LoadError, crash
from loadtest.crash import choose, crash_command, share_out
from loadtest.crash_docs import PROMISE, RESULTS, insert, render_promise, render_results
from loadtest.crash_fault import Fault
from loadtest.crash_result import Finding, Record, Tally, merge, read_records, sum_up
from loadtest.crash_server import ROOT
from loadtest.crash_site import Bench
from loadtest.crash_trace import threads_of, traced

PLAIN = (("kill.worker", 2), ("kill.group", 2), ("kill.recovery", 1), ("kill.workers", 1), ("kill.term", 1))
ON_DISKS = (
    ("power.ext4-two", 1),
    ("power.ext4-one", 1),
    ("power.ext4-new", 1),
    ("power.xfs-two", 1),
    ("sweep.ext4-serve", 5),
    ("sweep.ext4-recover", 3),
)
DAMAGED = (("damage.body-flip", 1), ("damage.body-pipe", 1), ("damage.database-cut", 1))
BROKEN = (("disk.full-ext4", 1), ("disk.eio-once", 1), ("disk.eio-kill", 1), ("network.swallow", 1))
DOCUMENT = "".join(
    f"{name}\n<!-- made by python -m loadtest crash --docs: {name}, begin -->\nold\n"
    f"<!-- made by python -m loadtest crash --docs: {name}, end -->\n"
    for name in (PROMISE, RESULTS)
)
TRIES = 30  # a fault's moment is the machine's: a mistake loses nothing in some runs
GROUPS = ("kill", "power", "sweep", "disk", "damage", "network", "limits")
LAYOUTS = ("ext4-two", "ext4-one", "xfs-two", "xfs-one")
# What a mailbox loses is seen best when nothing else is written behind it.
IDLE = ("mailbox-fsync", "directory-fsync")
FULL = ("full-taken", "full-lost")  # what a server does whose disk is full


def play(name: str, runs: int, folder: Path, package: Path = ROOT) -> Iterator[Finding]:
    """The findings of a fault, run by run."""
    (fault,) = choose(name)
    print(f"{name}: seed 0")
    yield from fault.play(Bench(folder / name, package, 0, tuple(range(runs))))


def disks_needed() -> None:
    needs_root()
    needs("strace", "xfs_io", "losetup", "mkfs.ext4", "mkfs.xfs")


def check(name: str, runs: int, folder: Path) -> None:
    found = list(play(name, runs, folder))
    assert [violation for one in found for violation in one.violations] == []
    assert sum(one.acked for one in found) > 0
    assert sum(one.struck for one in found) > len(found) // 2


@pytest.mark.parametrize(("name", "runs"), PLAIN)
def test_processes_die(tmp_path: Path, name: str, runs: int) -> None:
    check(name, runs, tmp_path)


@pytest.mark.parametrize(("name", "runs"), ON_DISKS)
def test_power_is_cut(tmp_path: Path, name: str, runs: int) -> None:
    disks_needed()
    check(name, runs, tmp_path)


@pytest.mark.parametrize(("name", "runs"), DAMAGED)
def test_files_are_damaged(tmp_path: Path, name: str, runs: int) -> None:
    check(name, runs, tmp_path)


@pytest.mark.parametrize(("name", "runs"), BROKEN)
def test_disks_and_connections_fail(tmp_path: Path, name: str, runs: int) -> None:
    disks_needed()
    check(name, runs, tmp_path)


# --- what it must see ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name not in ("none", *FULL)])
def test_a_mistake_is_seen(request: pytest.FixtureRequest, tmp_path: Path, mistake: str, layout: str) -> None:
    if layout.startswith("xfs"):
        request.getfixturevalue("long")
    disks_needed()
    package = make_mutant(mistake, tmp_path / "package")
    lost = 0
    for found in play(f"power.{layout}{'-idle' * (mistake in IDLE)}", TRIES, tmp_path, package):
        lost += found.lost + found.altered
        if lost:
            break
    assert lost


@pytest.mark.parametrize("mistake", FULL)
def test_a_full_disk_that_takes_or_loses_mail_is_seen(tmp_path: Path, mistake: str) -> None:
    disks_needed()
    package = make_mutant(mistake, tmp_path / "package")
    found = []
    for one in play("disk.full-ext4", TRIES, tmp_path, package):
        found += one.violations
        if found:
            break
    assert any(
        ("takes mail" if mistake == "full-taken" else "neither delivered nor reported") in text for text in found
    )


def test_without_a_mistake_nothing_is_seen(tmp_path: Path) -> None:
    """So that it is the mistake that is seen, not the manner in which it was put in."""
    disks_needed()
    package = make_mutant("none", tmp_path / "package")
    assert [found.violations for found in play("power.ext4-two", 1, tmp_path, package)] == [[]]


def test_a_mark_before_the_delivery_is_seen_without_disks(tmp_path: Path) -> None:
    package = make_mutant("mark-first", tmp_path / "package")
    assert any(found.lost for found in play("kill.group", TRIES, tmp_path, package))


# --- the parts ---


def test_a_thread_is_struck_at_its_nth_call(tmp_path: Path) -> None:
    needs_root()
    needs("strace")
    text = "import os, threading, time\n"
    text += (
        f"def f():\n while True: os.write(os.open({str(tmp_path / 'out')!r}, 1 | 64 | 1024), b'x'); time.sleep(0.05)\n"
    )
    text += "threading.Thread(target=f).start(); time.sleep(0.2); f()"
    target = subprocess.Popen([sys.executable, "-c", text])
    try:
        while not (tmp_path / "out").exists() or len(threads_of(target.pid)) < 2:
            time.sleep(0.01)
        second = threads_of(target.pid)[1]
        with traced(second, tmp_path / "trace", kill_at=("write", 3)) as tracer:
            assert target.wait(20) == -signal.SIGKILL
            while not tracer.killed():
                time.sleep(0.01)
        assert tracer.killed() == {0}
        assert [call.name for call in tracer.calls()].count("write") == 3
    finally:
        target.kill()
        target.wait()


def test_who_is_not_struck_goes_on(tmp_path: Path) -> None:
    needs_root()
    needs("strace")
    target = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        with traced(target.pid, tmp_path / "trace", following=True, kill_at=("syncfs", 1)) as tracer:
            pass
        assert tracer.killed() == set()
        os.kill(target.pid, 0)
        assert target.poll() is None
    finally:
        target.kill()
        target.wait()


def test_what_does_not_run_cannot_be_traced(tmp_path: Path) -> None:
    needs("strace")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(LoadError, match="strace"), traced(ended.pid, tmp_path / "trace"):
        pass


def test_runs_are_shared_out_in_each_group() -> None:
    def nothing(_: Bench) -> Iterator[Finding]:
        yield from ()

    faults = [Fault("a.x", nothing, "", 3), Fault("a.y", nothing, "", 1), Fault("b.z", nothing, "", every=True)]
    assert share_out(faults, 8, 5) == {"a.x": tuple(range(5, 11)), "a.y": (5, 6), "b.z": tuple(range(5, 13))}
    assert share_out(faults, None, 0)["b.z"] == ()


def test_every_fault_says_what_it_does() -> None:
    faults = choose("all")
    assert all(fault.text for fault in faults)
    assert len({fault.name for fault in faults}) == len(faults)
    assert {fault.name.partition(".")[0] for fault in faults} >= set(GROUPS)
    listed = CliRunner().invoke(crash_command, ["list"])
    assert all(f"{fault.name}\n" in listed.output for fault in faults)


# --- the command ---


def _bad(bench: Bench) -> Iterator[Finding]:
    for run in bench.numbers:
        (bench.folder / "data").mkdir(parents=True, exist_ok=True)
        (bench.folder / "data" / "spool").write_text(f"of run {run}")
        (bench.folder / "disk.image").touch()
        os.mkfifo(bench.folder / f"pipe{run}")
        violations = ["A m1 <a@b.test>: gone"] if run == 8 else []
        yield Finding(run, acked=10, lost=len(violations), recovery=0.5, violations=violations, struck=run != 9)


def test_a_violation_is_told_so_that_it_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash, "all_faults", lambda: {"kill.one": Fault("kill.one", _bad, "Bad.")})
    file, document = tmp_path / "json", tmp_path / "document.md"
    document.write_text(DOCUMENT)
    arguments = ["kill", "--runs", "3", "--first", "7", "--seed", "4", "--json", str(file), "--docs", str(document)]
    done = CliRunner().invoke(crash_command, [*arguments, "--dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "kill.one, --seed 4, run 8: A m1 <a@b.test>: gone" in done.output
    assert "violations: 1; seed 4" in done.output
    group = json.loads(file.read_text())["faults"]["kill"]
    assert {key: group[key] for key in ("runs", "missed", "acked", "lost", "altered", "duplicates")} == {
        "runs": 2, "missed": 1, "acked": 30, "lost": 1, "altered": 0, "duplicates": 0,
    }  # fmt: skip
    assert group["slowest_recovery_s"] == 0.5
    assert group["parts"]["kill.one"]["runs"] == 2
    text = document.read_text()
    assert "old" not in text
    assert "| kill.one |    2 |           30 |    1 |" in text
    assert "python -m loadtest crash kill --runs 3 --seed 4 --first 7" in text
    assert str(tmp_path) not in text
    assert "**1 of their recipients got nothing**" in " ".join(text.split())
    (left,) = tmp_path.glob("crash-*")
    assert f"kept in {left}/evidence" in done.output
    assert sorted(str(path.relative_to(left)) for path in left.rglob("*") if path.is_file()) == [
        "evidence/kill.one-8/data/spool"
    ]
    assert (left / "evidence/kill.one-8/data/spool").read_text() == "of run 8"


def _found(name: str, **values: Any) -> dict[str, Fault]:
    def play(bench: Bench) -> Iterator[Finding]:
        yield Finding(0, **values)

    return {name: Fault(name, play, name, every=True)}


def test_a_document_keeps_the_rows_of_what_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = _found("kill.one", acked=10) | _found("kill.two", acked=20) | _found("sweep.ext4-one", acked=30)
    monkeypatch.setattr(crash, "all_faults", lambda: faults)
    document, file = tmp_path / "document.md", tmp_path / "kill.json"
    document.write_text(DOCUMENT)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(crash_command, [*arguments, "--dir", str(tmp_path), "--docs", str(document)])
        assert done.exit_code == 0, done.output
        return document.read_text()

    text = run("kill", "--seed", "1", "--json", str(file))
    assert "Not run: sweep.ext4-one." in text
    text = run("sweep", "--seed", "2")
    assert "Not run" not in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ") and "." in line.split()[1]] == [
        "kill.one", "kill.two", "sweep.ext4-one"
    ]  # fmt: skip
    promise = " ".join(text.split())
    assert (
        "In **2 kills** of workers, the supervisor, or all of it and **1 power cut at every step** of the path"
        in promise
    )
    assert "on ext4, with 60 messages acknowledged, **no acknowledged message was lost or altered**." in promise
    assert text.index("crash kill --seed 1") < text.index("crash sweep --seed 2")
    faults |= _found("kill.two", acked=2000)
    text = run("kill.two", "--runs", "1", "--seed", "3")
    assert text.count("| kill.two ") == 1
    assert "2,000" in text
    assert "crash kill --seed 1" in text  # of the other fault
    # And from a file, with nothing run
    text = run("kill.two", "--from", str(file))
    assert "2,000" not in text
    assert "crash kill.two" not in text
    assert not list(tmp_path.glob("crash-*"))
    assert [len(one.tallies) for one in read_records(document.with_suffix(".json"))] == [1, 1, 1]


def test_what_was_left_out_is_not_promised() -> None:
    sweep = Tally("sweep.ext4-one", runs=5)
    assert "**5 power cuts at single steps**" in render_promise([sweep])
    sweep.whole = True
    assert "**5 power cuts at every step**" in render_promise([sweep])
    assert "**5 power cuts at single steps**" in render_promise(
        [sweep, Tally("sweep.xfs-one", whole=True, why_not="no xfs")]
    )
    assert "In no run, with 0 messages" in render_promise([Tally("kill.term", runs=5)])
    assert "1 kill**" in render_promise([Tally("kill.worker", runs=1)])
    broken = render_promise([Tally("kill.worker", runs=1, lost=3, violations=["E: left over"])])
    assert "no acknowledged message was lost" not in broken
    assert "**3 of their recipients got nothing**" in broken
    assert "1 rule was broken" in broken
    assert "no acknowledged message" in render_promise([Tally("kill.worker", runs=1, violations=["E: left over"])])


def test_a_fault_counts_where_it_was_run_last() -> None:
    first = Record("a", 1, "", "", "", [Tally("a.x", runs=1), Tally("a.y", runs=2)])
    second = Record("b", 1, "", "", "", [Tally("a.x", runs=3)])
    kept = merge([first, second])
    assert [(one.command, tally.name, tally.runs) for one in kept for tally in one.tallies] == [
        ("a", "a.y", 2), ("b", "a.x", 3)
    ]  # fmt: skip
    cannot = Record("d", 1, "", "", "", [Tally("a.x", why_not="no disks"), Tally("a.z", why_not="no disks")])
    assert [[tally.name for tally in one.tallies] for one in merge([first, second, cannot])] == [
        ["a.y"],
        ["a.x"],
        ["a.z"],
    ]
    assert [one.command for one in merge([second, Record("c", 1, "", "", "", [Tally("a.x", runs=4)])])] == ["c"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"records": 1}', '{"faults": {"a": {"parts": {"a.x": {"runs": 1}}}}}']
)
def test_a_file_that_holds_no_figures(tmp_path: Path, text: str) -> None:
    file = tmp_path / "json"
    file.write_text(text)
    done = CliRunner().invoke(crash_command, ["all", "--from", str(file)])
    assert done.exit_code == 1
    assert isinstance(done.exception, LoadError)
    assert str(file) in str(done.exception)


def test_a_fault_that_cannot_be_made_stops_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cannot(bench: Bench) -> Iterator[Finding]:
        raise LoadError("no disks here")
        yield

    def good(bench: Bench) -> Iterator[Finding]:
        yield Finding(0, acked=1)

    faults = {"a.no": Fault("a.no", cannot, ""), "b.yes": Fault("b.yes", good, "")}
    monkeypatch.setattr(crash, "all_faults", lambda: faults)
    done = CliRunner().invoke(crash_command, ["all", "--runs", "1", "--dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "a.no: no disks here" in done.output
    assert "| b.yes |    1 |" in done.output
    assert CliRunner().invoke(crash_command, ["b.yes", "--runs", "1"]).exit_code == 0


@pytest.mark.parametrize("arguments", [["nothing"], ["kill", "--runs", "0"], ["kill", "--package", "/proc"], []])
def test_a_command_line_that_is_wrong(arguments: list[str]) -> None:
    done = CliRunner().invoke(crash_command, arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_a_group_is_the_sum_of_its_faults() -> None:
    one, other = Tally("a.x"), Tally("a.y")
    one.add(Finding(0, acked=3, duplicates=1, recovery=2.0), 1)
    other.add(Finding(0, acked=4, lost=1, altered=2, recovery=1.0, violations=["A"]), 1)
    total = sum_up("a", [one, other])
    assert (total.runs, total.acked, total.lost, total.altered, total.duplicates) == (2, 7, 1, 2, 1)
    assert total.recovery == 2.0
    assert total.violations == ["a.y, --seed 1, run 0: A"]
    assert list(Record("x", 1, "", "", "", [one, other]).as_json()["faults"]["a"]["parts"]) == ["a.x", "a.y"]
    assert len(render_results([one, other]).splitlines()) == 4


@pytest.mark.parametrize("document", ["", DOCUMENT.partition("old")[0], DOCUMENT * 2])
def test_a_document_without_its_markers(document: str) -> None:
    with pytest.raises(LoadError, match="markers"):
        insert(document, PROMISE, "x")
