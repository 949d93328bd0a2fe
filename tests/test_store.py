"""The database below the spool: ranges, the log that is written over itself, the reader."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import volume
from servers import ROOT

from fastsmtp.reader import Reader
from fastsmtp.store import Store, _flush_again, consecutive


@given(st.sets(st.integers(0, 60), min_size=1))
def test_runs_hold_the_keys_and_nothing_else(keys: set[int]) -> None:
    runs = list(consecutive(list(keys)))
    assert [key for first, last in runs for key in range(first, last + 1)] == sorted(keys)
    assert all(one[1] + 1 < other[0] for one, other in pairwise(runs))


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_a_file_is_written_over_itself(tmp_path: Path, size: int) -> None:
    path = tmp_path / "log"
    content = os.urandom(size)
    path.write_bytes(content)
    _flush_again(path)
    assert path.read_bytes() == content
    _flush_again(tmp_path / "missing")


def test_a_log_that_cannot_be_flushed_again_keeps_the_database_shut(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.db")
    store.open(0.0)
    store.drop()
    store.drop()
    Path(f"{store.path}-wal").unlink(missing_ok=True)
    Path(f"{store.path}-wal").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        store.recover([])


FILLED = """
import sys
from pathlib import Path

from fastsmtp.store import Store

folder = Path(sys.argv[1])
store = Store(folder / "x.db")
store.open(0.0)
store.drop()
for act in (lambda: (folder / "filler").write_bytes(bytes(20 << 20)), lambda: store.recover([])):
    try:
        act()
    except OSError as error:
        print(error.strerror)
"""


def test_the_index_is_not_made_on_a_full_disk_of_small_blocks(tmp_path: Path) -> None:
    """SQLite would leave holes in it, and the first octet in one is the end of the process."""
    with volume("ext4", tmp_path / "disk", "16M") as disk:
        assert os.statvfs(disk.path).f_frsize == 1024
        command = [sys.executable, "-c", FILLED, str(disk.path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "No space left on device\n" * 2), done.stderr


def test_a_closed_reader_says_so_and_a_missing_message_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.db")
    store.open(0.0)
    reader = Reader(store.path)
    with pytest.raises(apsw.Error):
        reader.new((-1, -1), 10)
    reader.open()
    assert reader.new((-1, -1), 10) == "[]"
    assert reader.messages([1, 2]) == "[]"
    assert reader.next_due((0, 0, 0)) is None
    with pytest.raises(LookupError):
        reader.body(1)
    reader.close()
    reader.close()
    store.close()
