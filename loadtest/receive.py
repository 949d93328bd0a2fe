"""Speed and memory of receiving: python -m loadtest.receive [NAME ...] [--rounds N] [--messages N] [--json FILE].

In: names of measurements and a folder on a real disk. Out: one table, with what is required beside what was found, and
all rounds as JSON. What goes on is said on stderr. On failure: one line; the other measurements still run, and the exit
code is 1. A signal stops the servers too. Not here: the measurements themselves.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from . import LoadError
from .measurements import CROWD, MEASUREMENTS, Bench, Measurements, say
from .report import Row, render_json, render_table

DESCRIPTORS = CROWD + 500  # of one process: a client with all sessions, and what else it needs


def raise_descriptor_limit() -> None:
    """For this process and the servers that it starts. Raises LoadError."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        raise LoadError(f"{DESCRIPTORS} descriptors per process are needed, the limit is {hard}: ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_disk(folder: Path) -> None:
    """A file system in memory flushes nothing, so its figures mean nothing. Raises LoadError."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        kind = line.partition(" - ")[2].split()[0]
        if line.split()[2] == number and kind in ("tmpfs", "ramfs"):
            raise LoadError(f"{folder} is on {kind}, in memory: give a folder on a disk with --dir")


def measure_all(names: list[str], measurements: Measurements, bench: Bench) -> tuple[list[Row], int]:
    """All rows, and how many measurements failed."""
    rows: list[Row] = []
    failed = 0
    for name in names:
        say(f"{name} ...")
        try:
            rows += measurements[name](bench)
        except LoadError as error:
            failed += 1
            say(f"{name}: not measured: {error}")
    return rows, failed


def main(arguments: list[str], program: str, about: str, measurements: Measurements) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    names = ", ".join(measurements)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {names}; default: all")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="of each measurement (5)")
    parser.add_argument("--messages", type=positive, metavar="N", help="in a round; default: as many as it takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures go there too")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where data lies; default: beside this folder")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in measurements]
    if unknown:
        parser.error(f"no measurement is called {unknown[0]}; there are {names}")
    signal.signal(signal.SIGTERM, stop)  # as an exception, so that the servers are stopped too
    gc.disable()  # a collection would show as the server's latency
    try:
        raise_descriptor_limit()
        folder = make_folder(given.dir or Path.cwd().parent)
    except LoadError as error:
        say(f"loadtest: {error}")
        return 1
    try:
        chosen = given.names or list(measurements)
        rows, failed = measure_all(chosen, measurements, Bench(folder, given.rounds, given.messages))
    except KeyboardInterrupt:
        say("loadtest: interrupted")
        return 130
    finally:
        shutil.rmtree(folder)
    if rows:
        print(render_table(rows))
    if given.json:
        try:
            given.json.write_text(render_json(rows), encoding="utf-8")
        except OSError as error:
            say(f"loadtest: {given.json} cannot be written: {error.strerror}")
            return 1
    return 1 if failed else 0


def make_folder(parent: Path) -> Path:
    """A folder of our own, on a disk. Raises LoadError."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="fastsmtp-loadtest-", dir=parent.absolute()))
    except OSError as error:
        raise LoadError(f"no folder can be made in {parent}: {error.strerror}; give one with --dir") from None
    try:
        check_disk(folder)
    except LoadError:
        folder.rmdir()
        raise
    return folder


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def stop(signum: int, _: object) -> NoReturn:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "loadtest.receive", "Measures receiving.", MEASUREMENTS))
