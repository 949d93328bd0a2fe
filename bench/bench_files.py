"""_files: a batch of 1 KB messages written, flushed and named. Octets in, files out; no sockets, no Python in between.

CPU (user and system time of this process, in µs per message, without the kernel's own threads) stands in each row's
extra information and decides; wall-clock time is the disk's. TMPDIR says on which file system.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastsmtp._files import write_batch

HEAD = b"Return-Path: <ann@x.test>\nDelivered-To: bob@y.test\nReceived: from x by y; now\r\n"
BODY = (b"x" * 70 + b"\r\n") * 14
ROUNDS = 30


@pytest.fixture
def root() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fastsmtp-bench-"))
    yield folder
    shutil.rmtree(folder)


def cpu() -> float:
    """Seconds of this process, in user and system mode."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("each", [False, True], ids=["batch", "each"])
@pytest.mark.parametrize("mailboxes", [1, 1000])
@pytest.mark.parametrize("size", [1, 8, 64])
def bench_write_batch(benchmark: BenchmarkFixture, root: Path, size: int, mailboxes: int, each: bool) -> None:
    (root / "temporary").mkdir()
    directory = os.open(root / "temporary", os.O_RDONLY | os.O_DIRECTORY)
    boxes = [os.fsencode(root / f"y.test/u{i}") for i in range(mailboxes)]
    count = 0

    def items() -> list[tuple[bytes, bytes, bytes, tuple[bytes, ...], bool]]:
        nonlocal count
        count += size
        # A stride through the mailboxes: the items of a batch are for different ones.
        return [
            (b"0.%x" % n, boxes[n * 37 % mailboxes], b"1234567890.M%dR0.mx.y.test" % n, (HEAD, BODY), True)
            for n in range(count, count + size)
        ]

    write_batch(directory, [(b"%d" % i, box, b"made", (), False) for i, box in enumerate(boxes)])
    spent = 0.0

    def run(batch: list[tuple[bytes, bytes, bytes, tuple[bytes, ...], bool]]) -> None:
        nonlocal spent
        before = cpu()
        errors = write_batch(directory, batch, each=each)
        spent += cpu() - before
        assert not any(errors)

    benchmark.pedantic(run, setup=lambda: ((items(),), {}), rounds=ROUNDS)
    benchmark.extra_info["cpu_us_per_message"] = round(spent / (ROUNDS * size) * 1e6, 1)
    os.close(directory)
