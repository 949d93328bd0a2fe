"""Lists in files: how long one is compiled, and a look-up, in a process that has just started and later.

`FASTSMTP_BENCH_MAILBOXES` and `FASTSMTP_BENCH_NETWORKS` say how long the lists are (300,000 and 100,000; the figures in
lists.py are of 10,000,000 and 1,000,000). A look-up's first time is taken in a process that has opened the file and
looked for nothing yet: each page of the file that it touches is new to it. In: text made here. Out: µs of CPU, octets.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastsmtp.list_compile import compile_list
from fastsmtp.lists import Kind, Listed, ListFile

MAILBOXES = int(os.environ.get("FASTSMTP_BENCH_MAILBOXES", "300000"))
NETWORKS = int(os.environ.get("FASTSMTP_BENCH_NETWORKS", "100000"))
LOOKS = 20_000

# Looks for names that are there and for some that are not, in a new process; µs for each.
FRESH = """
import json, sys, time
from pathlib import Path
from fastsmtp.lists import Lists
kind, path, folder, keys = json.load(sys.stdin)
lists = Lists(Path(folder))
listed = lists.open(kind, Path(path))
lists.map_ahead(60.0)
look = listed.has if kind == "mailboxes" else listed.__contains__
begun = time.process_time()
found = sum(map(look, keys))
spent = time.process_time() - begun
print(json.dumps([spent / len(keys) * 1e6, found]))
"""


def name(n: int) -> str:
    return f"user{n}.{n * 2654435761 & 0xFFFFFFFF:x}"


def network(n: int) -> str:
    start = n * 2654435761 & 0xFFFFFF00
    return ".".join(str(start >> shift & 255) for shift in (24, 16, 8, 0))


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Kind, tuple[Listed, Path, float]]]:
    folder = tmp_path_factory.mktemp("lists")
    made: dict[Kind, tuple[Listed, Path, float]] = {}
    order = list(range(MAILBOXES))
    random.Random(1).shuffle(order)
    texts: dict[Kind, Iterator[str]] = {
        "mailboxes": (f"{name(n)}@here.test\n" for n in order),
        "networks": (f"{network(n)}/24\n" for n in range(NETWORKS)),
    }
    for kind, lines in texts.items():
        path = folder / kind
        with path.open("w") as file:
            file.writelines(lines)
        begun = time.process_time()
        compile_list(ListFile(kind, path), folder / "made")
        made[kind] = (Listed(ListFile(kind, path), folder / "made"), folder, time.process_time() - begun)
    yield made
    for kind, (listed, folder, _) in made.items():
        (folder / kind).unlink()
        listed.list_file.compiled(folder / "made").unlink()


def keys_of(kind: Kind) -> list[str]:
    """Half of them are in the list."""
    chance = random.Random(2)
    if kind == "mailboxes":
        return [f"{name(chance.randrange(MAILBOXES))}{'x' * (n % 2)}@here.test" for n in range(LOOKS)]
    addresses = [network(chance.randrange(NETWORKS)).rpartition(".")[0] for _ in range(LOOKS)]
    return [f"{address}.{n % 256}" if n % 2 else f"2001:db8::{n:x}" for n, address in enumerate(addresses)]


@pytest.mark.timeout(3600)  # ten million lines take minutes to write and to compile
@pytest.mark.parametrize("kind", ["mailboxes", "networks"])
def bench_look_up(benchmark: BenchmarkFixture, lists: dict[Kind, tuple[Listed, Path, float]], kind: Kind) -> None:
    listed, folder, compiling = lists[kind]
    keys = keys_of(kind)
    question = json.dumps([kind, str(folder / kind), str(folder / "made"), keys])
    done = subprocess.run(
        [sys.executable, "-c", FRESH], input=question, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    first, found = json.loads(done.stdout)
    assert found == LOOKS // 2
    size = listed.list_file.compiled(folder / "made").stat().st_size
    entries = MAILBOXES if kind == "mailboxes" else NETWORKS

    spent: list[float] = []

    def look() -> None:
        begun = time.process_time()
        if kind == "mailboxes":
            has = listed.has
            for key in keys:
                has(key)
        else:
            find = listed.networks._look_up  # the answers themselves are kept for each address
            for key in keys:
                find(key)
        spent.append(time.process_time() - begun)

    benchmark.pedantic(look, rounds=5, warmup_rounds=1)
    benchmark.extra_info["µs"] = f"{min(spent) / LOOKS * 1e6:.2f}"
    benchmark.extra_info["µs in a new process"] = f"{first:.2f}"
    benchmark.extra_info["octets each"] = f"{size / entries:.1f}"
    benchmark.extra_info["s to compile"] = f"{compiling:.2f}"
