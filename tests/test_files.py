"""_files: what is written, in which order it is flushed and named, and what every error leaves behind."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from errno import (
    EACCES,
    EBADF,
    EDQUOT,
    EEXIST,
    EIO,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENODATA,
    ENOENT,
    ENOSPC,
    ENOTDIR,
    EROFS,
    ESPIPE,
    EXDEV,
)
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs, volume

import fastsmtp
from fastsmtp._files import append_file, confirm, fsync_dir, make_dirs, send_last, write_batch

if TYPE_CHECKING:
    from fastsmtp._files import Item, Range

MB = 1024 * 1024


class Place:
    """A root with a folder for temporary files, and mailboxes beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.temporary = root / "temporary"
        self.temporary.mkdir(parents=True)
        self.directory = os.open(self.temporary, os.O_RDONLY | os.O_DIRECTORY)
        self.probe = os.open(self.temporary, os.O_WRONLY | os.O_TMPFILE)
        self.count = 0

    def item(self, *segments: bytes | Range, mailbox: str = "m", name: str = "", strip: bool = False) -> Item:
        self.count += 1
        number = str(self.count)
        return number.encode(), os.fsencode(self.root / mailbox), (name or number).encode(), segments, strip

    def write(self, *items: Item, each: bool = False) -> list[int]:
        return write_batch(self.directory, items, each=each, probe=self.probe)

    def found(self, mailbox: str = "m") -> dict[str, bytes]:
        new = self.root / mailbox / "new"
        return {path.name: path.read_bytes() for path in new.iterdir()} if new.exists() else {}

    def close(self) -> None:
        os.close(self.directory)
        os.close(self.probe)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "root")
    yield made
    left = os.listdir(made.temporary)
    made.close()
    assert left == [], "temporary files were left"


@pytest.fixture(params=[False, True], ids=["batch", "each"])
def each(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def source(place: Place, content: bytes, name: str = "source") -> bytes:
    path = place.root / name
    path.write_bytes(content)
    return os.fsencode(path)


# ---- what is written


def test_segments_follow_each_other(place: Place, each: bool) -> None:
    body = source(place, b"0123456789")
    assert place.write(place.item(b"head ", (body, 2, 3), b"", (body, 9, 1), b" tail"), each=each) == [0]
    assert place.found() == {"1,S=14": b"head 2349 tail"}


def test_a_batch_of_none_and_a_file_of_nothing(place: Place, each: bool) -> None:
    assert place.write(each=each) == []
    assert place.write(place.item(), each=each) == [0]
    assert place.found() == {"1,S=0": b""}


def test_size_in_the_name_counts_what_was_written(place: Place) -> None:
    assert place.write(place.item(b"a\r\nb\r\n", strip=True)) == [0]
    assert place.found() == {"1,S=4": b"a\nb\n"}


def test_a_name_that_exists_is_replaced(place: Place, each: bool) -> None:
    first, second = place.item(b"one", name="x"), place.item(b"two", name="x")
    assert place.write(first, each=each) == [0]
    assert place.write(second, each=each) == [0]
    assert place.found() == {"x,S=3": b"two"}


def test_a_missing_mailbox_is_made_whole_and_private(place: Place, each: bool) -> None:
    before = os.umask(0)
    try:
        assert place.write(place.item(b"x", mailbox="a/b/c"), each=each) == [0]
    finally:
        os.umask(before)
    folder = place.root / "a/b/c"
    assert sorted(os.listdir(folder)) == ["cur", "new", "tmp"]
    made = [place.root / "a", place.root / "a/b", folder, *folder.iterdir()]
    assert {path.stat().st_mode & 0o7777 for path in made} == {0o700}
    assert (folder / "new" / "1,S=1").stat().st_mode & 0o7777 == 0o600


def test_half_a_mailbox_is_completed(place: Place, each: bool) -> None:
    (place.root / "m" / "tmp").mkdir(parents=True)
    assert place.write(place.item(b"x"), each=each) == [0]
    assert sorted(os.listdir(place.root / "m")) == ["cur", "new", "tmp"]


def slow_lf(content: bytes) -> bytes:
    """What leaving out the CRs means, for content without bare ones."""
    return b"".join(line.removesuffix(b"\r\n") + b"\n" * line.endswith(b"\r\n") for line in lines(content))


def lines(content: bytes) -> list[bytes]:
    return re.findall(rb"[^\n]*\n|[^\n]+", content)


def test_line_ends_become_lf_wherever_the_content_is_cut() -> None:
    line = st.binary(max_size=40).map(lambda octets: octets.replace(b"\r", b"").replace(b"\n", b""))

    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder) / "root")

        @settings(deadline=None, max_examples=150)
        @given(
            rows=st.lists(line, max_size=12),
            ended=st.booleans(),
            times=st.sampled_from([1, 1, 1, 9000]),
            random_=st.randoms(use_true_random=False),
        )
        def check(rows: list[bytes], ended: bool, times: int, random_: random.Random) -> None:
            content = b"\r\n".join(rows * times) + b"\r\n" * ended
            path = source(place, content)
            cuts = sorted(random_.choices(range(len(content) + 1), k=random_.randrange(12)))
            segments: list[bytes | Range] = []
            for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
                in_memory = random_.random() < 0.5
                segments.append(content[start:end] if in_memory else (path, start, end - start))
            want = slow_lf(content)
            assert place.write(place.item(*segments, name="lf", strip=True), place.item(*segments, name="raw")) == [
                0,
                0,
            ]
            assert place.found() == {f"lf,S={len(want)}": want, f"raw,S={len(content)}": content}
            for name in os.listdir(place.root / "m/new"):
                os.unlink(place.root / "m/new" / name)

        check()
        place.close()


@pytest.mark.parametrize("size", [256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, MB, 2 * MB + 77])
def test_the_buffer_s_edges(place: Place, each: bool, size: int) -> None:
    content = random.Random(size).randbytes(size)
    path = source(place, content)
    for segments in ([content], [(path, 0, size)], [b"x", content], [content[:-1], (path, size - 1, 1)]):
        item = place.item(*segments)
        assert place.write(item, each=each) == [0]
        want = b"x" + content if segments[0] == b"x" else content
        assert (place.root / "m/new" / f"{item[2].decode()},S={len(want)}").read_bytes() == want


# ---- errors of one file


def test_errors_are_one_file_s_only(place: Place, each: bool) -> None:
    (place.root / "file").write_bytes(b"")
    (place.root / "loop").symlink_to(place.root / "loop")
    (place.root / "m/new/taken,S=1/full").mkdir(parents=True)
    (place.root / "fifo").mkdir()
    os.mkfifo(place.root / "fifo/fifo")
    (place.root / "link").symlink_to(place.root / "file")
    short = source(place, b"12345", "short")
    root = os.fsencode(place.root)
    cases = [
        (place.item(b"x", mailbox="file"), ENOTDIR),
        (place.item(b"x", mailbox="file/below"), ENOTDIR),
        (place.item(b"x", mailbox="loop"), ELOOP),
        (place.item(b"x", name="n" * 300), ENAMETOOLONG),
        (place.item(b"x", mailbox="n" * 300), ENAMETOOLONG),
        (place.item(b"x", mailbox="d/" * 2060), ENAMETOOLONG),
        (place.item(b"x", mailbox="d/" * 2500), ENAMETOOLONG),
        (place.item(b"x", name="taken"), EISDIR),
        (place.item(b"x", name="no/such/folder"), ENOENT),
        (place.item(b"x", (short, 0, 6)), ENODATA),
        (place.item((short, 6, 1)), ENODATA),
        (place.item((root + b"/missing", 0, 1)), ENODATA),
        (place.item((root + b"/link", 0, 1)), ELOOP),
        (place.item((root + b"/file/x", 0, 1)), ENOTDIR),
        (place.item((root + b"/temporary", 0, 1)), EISDIR),
        (place.item((root + b"/fifo/fifo", 0, 1)), ESPIPE),
    ]
    items: list[Item] = []
    want: list[int] = []
    for item, error in cases:
        items += [item, place.item(b"good")]
        want += [error, 0]
    assert place.write(*items, each=each) == want
    new = [path for path in (place.root / "m/new").iterdir() if path.is_file()]
    assert [path.read_bytes() for path in new] == [b"good"] * len(cases)


def test_a_temporary_name_that_exists_is_not_touched(place: Place, each: bool) -> None:
    theirs = place.temporary / "1"
    theirs.write_bytes(b"theirs")
    assert place.write(place.item(b"a"), place.item(b"b"), each=each) == [EEXIST, 0]
    assert theirs.read_bytes() == b"theirs"
    theirs.unlink()
    theirs.symlink_to(place.root / "outside")
    place.count = 0
    assert place.write(place.item(b"a"), each=each) == [EEXIST]
    assert not (place.root / "outside").exists()
    theirs.unlink()


def test_a_folder_that_is_gone_or_was_never_one(place: Place, tmp_path: Path, each: bool) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    directory = os.open(gone, os.O_RDONLY | os.O_DIRECTORY)
    gone.rmdir()
    assert write_batch(directory, [place.item(b"x")], each=each) == [ENOENT]
    os.close(directory)
    assert write_batch(directory, [place.item(b"x")], each=each) == [EBADF]


def test_a_full_disk_is_each_file_s_own_error(tmp_path: Path, each: bool) -> None:
    with volume("tmpfs", tmp_path / "small", "1M"):
        place = Place(tmp_path / "small" / "root")
        big, small = b"x" * (2 * MB), b"fits"
        items = [place.item(small), place.item(big), place.item(small), place.item(big), place.item(small)]
        assert place.write(*items, each=each) == [0, ENOSPC, 0, ENOSPC, 0]
        assert place.found() == {"1,S=4": small, "3,S=4": small, "5,S=4": small}
        assert os.listdir(place.temporary) == []
        place.close()


def test_another_file_system_is_exdev(tmp_path: Path, place: Place, each: bool) -> None:
    with volume("tmpfs", place.root / "mounted", "1M"):
        items = [place.item(b"x", mailbox="mounted/box"), place.item(b"y")]
        assert place.write(*items, each=each) == [EXDEV, 0]
        assert place.found("mounted/box") == {}
        own = os.fsencode(place.root / "mounted/box/tmp/t")
        assert place.write((own, *items[0][1:]), each=each) == [0]
        assert place.found("mounted/box") == {"1,S=1": b"x"}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ((b"t", b"/m", b"n", ("text",), False), TypeError),
        ((b"t", b"/m", b"n", [b"list"], False), TypeError),
        (("t", b"/m", b"n", (), False), TypeError),
        ([b"t", b"/m", b"n", (), False], TypeError),
        ((b"t", b"/m", b"n", ((b"f", -1, -1),), False), OverflowError),
        ((b"t\0", b"/m", b"n", (), False), ValueError),
        ((b"t", b"/m\0", b"n", (), False), ValueError),
        ((b"t", b"/m", b"n\0", (), False), ValueError),
        ((b"t", b"/m", b"n", ((b"f\0", 0, 0),), False), ValueError),
        ((b"t", b"/m", b"n", ((b"f", 0),), False), ValueError),
        ((b"t", b"/m", b"n", (None,), False), TypeError),
        ((b"t", b"/m", b"n", None, False), TypeError),
        ((b"t", b"/m", b"n", ()), ValueError),
        (None, TypeError),
    ],
)
def test_what_is_no_item_is_refused_before_anything_is_written(place: Place, bad: Item, error: type[Exception]) -> None:
    with pytest.raises(error):
        place.write(place.item(b"good"), bad)
    assert place.found() == {}


# ---- order, watched from outside


def script(code: str, root: Path, strace: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code that finds a Place in `place`; under strace with these arguments."""
    text = f"""
        import os, sys, threading, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pathlib import Path
        from test_files import MB, Place
        place = Place(Path({str(root)!r}))
    """
    program = [sys.executable, "-c", textwrap.dedent(text) + textwrap.dedent(code)]
    if strace is not None:
        needs("strace")
        program = ["strace", "-f", "-qq", "-y", "-s", "64", *strace, *program]
    environment = {**os.environ, "PYTHONPATH": str(Path(fastsmtp.__file__).parents[1])}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=60)
    if "PTRACE" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("needs the right to trace processes")
    return done


CALLS = "openat,open,write,pread64,fdatasync,fsync,syncfs,fallocate,close,rename,renameat,renameat2,mkdir,unlinkat"


def traced(code: str, root: Path) -> list[str]:
    """The calls, in order, that touch `root`, as "name last-part-of-path"."""
    trace = root.with_name("trace")
    done = script(code, root, ["-e", f"trace={CALLS}", "-o", str(trace)])
    assert done.returncode == 0, done.stderr
    calls = []
    for line in trace.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)\) += ([-\w]+)", line)
        if call and str(root) in line and "__pycache__" not in line:
            calls.append(f"{call[1]} {call[2].replace(str(root), '@')} {call[3]}")
    return calls


def short(calls: list[str]) -> list[str]:
    """Each call's name with the last path it names."""
    path = re.compile(r'@[^>" ]*')
    return [call.split()[0] + " " + path.findall(call)[-1] for call in calls]


def test_a_batch_is_flushed_before_the_first_name_and_behind_the_last(tmp_path: Path) -> None:
    calls = traced('assert place.write(*[place.item(b"x") for _ in range(3)]) == [0, 0, 0]', tmp_path / "root")
    names = [call.split()[0] for call in calls]
    start = next(i for i, call in enumerate(calls) if "O_CREAT" in call)
    assert names[start:] == [
        *["openat", "write", "close"] * 3,
        "syncfs",
        *["renameat", "mkdir", "mkdir", "mkdir", "mkdir", "renameat"],  # the mailbox was not there
        *["renameat", "renameat"],
        "syncfs",
        "fallocate",
    ]
    for call in calls:
        if "O_CREAT" in call:
            assert "O_EXCL" in call
            assert "O_NOFOLLOW" in call
            assert "0600" in call


def test_each_file_and_each_new_folder_has_its_own_flush(tmp_path: Path) -> None:
    calls = short(traced('assert place.write(place.item(b"x", mailbox="d/m"), each=True) == [0]', tmp_path / "root"))
    start = calls.index("write @/temporary/1")
    changes = [call for call in calls[start:] if call.split()[0] not in ("openat", "close")]
    assert changes == [
        "write @/temporary/1",
        "fdatasync @/temporary/1",
        "renameat @/d/m/new/1,S=1",
        "mkdir @/d/m",
        "mkdir @/d",
        "fsync @",
        "mkdir @/d/m",
        "fsync @/d",
        *["mkdir @/d/m/tmp", "mkdir @/d/m/cur", "mkdir @/d/m/new"],
        "fsync @/d/m",
        "renameat @/d/m/new/1,S=1",
        "fsync @/d/m/new",
        changes[-1],
    ]
    assert changes[-1].startswith("fallocate @/temporary/#")


def test_a_large_file_is_flushed_every_megabyte_in_bounded_pieces(tmp_path: Path) -> None:
    calls = traced(
        """
        (place.root / "source").write_bytes(b"x" * (5 * MB // 2))
        source = os.fsencode(place.root / "source")
        assert place.write(place.item(b"y" * (3 * MB)), place.item((source, 0, 5 * MB // 2))) == [0, 0]
        """,
        tmp_path / "root",
    )
    calls = calls[next(i for i, call in enumerate(calls) if "O_CREAT|O_EXCL" in call) :]
    flushed = [call for call in short(calls) if call.startswith(("fdatasync", "syncfs"))]
    assert flushed == [
        *["fdatasync @/temporary/1"] * 3,
        *["fdatasync @/temporary/2"] * 2,
        *["syncfs @/temporary"] * 2,
    ]
    moved = [call for call in calls if call.startswith(("write ", "pread64 "))]
    assert {call.split()[0] for call in moved} == {"write", "pread64"}
    assert max(int(call.split()[-1]) for call in moved) == 256 * 1024


# ---- faults, injected from outside


def injected(code: str, root: Path, fault: str) -> str:
    """Runs code with a fault in it; returns what it printed."""
    trace = root.with_name("trace")
    done = script(code, root, ["-e", f"inject={fault}", "-e", f"trace={fault.split(':')[0]}", "-o", str(trace)])
    assert done.returncode == 0, done.stderr
    assert re.search(r"\((INJECTED|DELAYED)\)", trace.read_text()), "the fault did not strike"
    return done.stdout


REPORT = """
    try:
        errors = place.write(*[place.item(b"x") for _ in range(3)], each={each})
    except OSError as error:
        errors = error.errno
    print(errors, sorted(place.found()), os.listdir(place.temporary))
"""
ALL = ["1,S=1", "2,S=1", "3,S=1"]


@pytest.mark.parametrize(
    ("fault", "each", "report"),
    [
        # A flush of all fails: nothing was delivered, whatever stands in new/ by then.
        ("syncfs:error=EIO:when=1", False, f"{EIO} [] []"),
        ("syncfs:error=EIO:when=2", False, f"{EIO} {ALL} []"),
        ("syncfs:error=ENOSPC:when=1", False, f"{ENOSPC} [] []"),
        ("fdatasync:error=EIO:when=2", True, f"[0, {EIO}, 0] {[ALL[0], ALL[2]]} []"),
        # fsyncs: 1 the mailbox in its parent, 2 its three folders, 3 the first file's name, 4 the second's
        ("fsync:error=EIO:when=1", True, f"[{EIO}, 0, 0] {ALL[1:]} []"),
        ("fsync:error=EIO:when=2", True, f"[{EIO}, 0, 0] {ALL[1:]} []"),
        ("fsync:error=EIO:when=4", True, f"[0, {EIO}, 0] {ALL} []"),
        ("renameat:error=EACCES:when=3", False, f"[0, {EACCES}, 0] {[ALL[0], ALL[2]]} []"),
        ("mkdir:error=EACCES:when=4", False, f"[{EACCES}, 0, 0] {ALL[1:]} []"),
        # A flush that is not confirmed has failed.
        ("fallocate:error=EROFS:when=1", False, f"{EROFS} {ALL} []"),
        ("fallocate:error=EIO:when=1", True, f"{EIO} {ALL} []"),
    ],
)
def test_a_failed_call_is_told_and_never_repeated(tmp_path: Path, fault: str, each: bool, report: str) -> None:
    assert injected(REPORT.format(each=each), tmp_path / "root", fault) == report + "\n"


@pytest.mark.parametrize("error", ["EOPNOTSUPP", "ENOSYS", "EINVAL", "ENOSPC", "EDQUOT", "EINTR"])
def test_what_cannot_allocate_or_has_no_room_confirms(tmp_path: Path, error: str) -> None:
    assert (
        injected(REPORT.format(each=False), tmp_path / "root", f"fallocate:error={error}:when=1")
        == f"[0, 0, 0] {ALL} []\n"
    )
    calls = [line for line in (tmp_path / "trace").read_text().splitlines() if "fallocate(" in line]
    assert len(calls) == 1 + (error == "EINTR")


def test_to_confirm_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"octets")
    with path.open("r+b") as file:
        confirm(file.fileno(), 0)
        confirm(file.fileno(), 100_000)
    assert path.read_bytes() == b"octets"
    with path.open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        confirm(file.fileno(), 0)


def test_without_a_probe_nothing_is_asked(tmp_path: Path) -> None:
    code = """
        place.probe = -1
        assert place.write(place.item(b"x")) == [0]
    """
    assert short(traced(code, tmp_path / "root"))[-1] == "syncfs @/temporary"


def test_a_fault_that_does_not_strike_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="did not strike"):
        injected(REPORT.format(each=False), tmp_path / "root", "syncfs:error=EIO:when=3")


@pytest.mark.parametrize(
    ("fault", "touched", "error"),
    [
        ("write:error=EDQUOT:when=1", "temporary/1", EDQUOT),
        ("close:error=EDQUOT:when=1", "temporary/1", EDQUOT),
        ("pread64:error=EIO:when=1", "source", EIO),
        # interrupted is tried again; the first openat below is the test's own
        ("openat:error=EINTR:when=2", "temporary", 0),
        ("write:error=EINTR:when=1..2", "temporary/1", 0),
        ("pread64:error=EINTR:when=1", "source", 0),
    ],
)
def test_a_file_that_cannot_be_written_is_removed(tmp_path: Path, fault: str, touched: str, error: int) -> None:
    # strace's -P: Python itself opens, writes and closes all the time.
    code = """
        segment = (os.fsencode(place.root.with_name("source")), 0, 4)
        errors = place.write(place.item(segment), place.item(b"x"))
        print(errors, sorted(place.found().items()), os.listdir(place.temporary))
    """
    root = tmp_path / "root"
    (tmp_path / "source").write_bytes(b"body")
    path = tmp_path / "source" if touched == "source" else root / touched
    call = fault.split(":")[0]
    trace = tmp_path / "trace"
    done = script(code, root, ["-P", str(path), "-e", f"trace={call}", "-e", f"inject={fault}", "-o", str(trace)])
    assert re.search(r"\((INJECTED|DELAYED)\)", trace.read_text()), "the fault did not strike"
    found = [("2,S=1", b"x")] if error else [("1,S=4", b"body"), ("2,S=1", b"x")]
    assert done.stdout == f"{[error, 0]} {found} []\n", done.stderr


def test_the_gil_is_free_while_a_flush_waits(tmp_path: Path) -> None:
    code = """
        ticks = 0
        def tick():
            global ticks
            while True:
                time.sleep(0.01)
                ticks += 1
        threading.Thread(target=tick, daemon=True).start()
        assert place.write(place.item(b"x")) == [0]
        print(ticks)
    """
    ticks = int(injected(code, tmp_path / "root", "syncfs:delay_enter=1000000:when=1"))
    assert ticks >= 5


# ---- power cuts and readers


@pytest.mark.parametrize(("kind", "size"), [("ext4", "64M"), ("xfs", "300M")])
def test_what_was_said_to_be_durable_survives_a_power_cut(tmp_path: Path, kind: str, size: str, each: bool) -> None:
    with volume(kind, tmp_path / "disk", size) as disk:
        place = Place(disk.path / "root")
        big = random.Random(1).randbytes(3 * MB)
        items = [place.item(b"%d" % i * 1000, mailbox=f"d{i % 3}/m{i % 5}") for i in range(30)]
        assert not any(place.write(*items, place.item(big), each=each))
        want = {name: place.found(name) for name in [f"d{i % 3}/m{i % 5}" for i in range(30)] + ["m"]}
        # What shows that the cut cuts: a file that was renamed without any flush, as before, after the batch.
        (place.temporary / "control").write_bytes(b"x")
        (place.temporary / "control").rename(disk.path / "root/m/new/control")
        place.close()
        disk.cut_power()
        assert {name: place.found(name) for name in want} == want
        assert sum(len(found) for found in want.values()) == 31


@pytest.mark.parametrize(("kind", "size"), [("ext4", "64M"), ("xfs", "300M")])
def test_a_dead_disk_delivers_nothing(tmp_path: Path, kind: str, size: str, each: bool) -> None:
    with volume(kind, tmp_path / "disk", size) as disk:
        place = Place(disk.path / "root")
        assert place.write(place.item(b"alive"), each=each) == [0]
        disk.shut_down()
        try:
            errors = place.write(*[place.item(b"x") for _ in range(3)], each=each)
        except OSError as failure:
            errors = [failure.errno or 0]
        assert set(errors) == {EIO}
        place.close()


def test_readers_never_see_a_part_of_a_file(place: Place, each: bool) -> None:
    content = random.Random(7).randbytes(700_000)
    path = source(place, content)
    done = threading.Event()
    seen: list[bytes] = []

    def deliver() -> None:
        for _ in range(6):
            place.write(*[place.item((path, 0, len(content))) for _ in range(3)], each=each)
        done.set()

    writer = threading.Thread(target=deliver)
    writer.start()
    new = place.root / "m/new"
    while not done.is_set():
        for name in os.listdir(new) if new.exists() else []:
            seen.append((new / name).read_bytes())
            (new / name).rename(place.root / "m/cur" / name)
    writer.join()
    assert all(octets == content for octets in seen)
    assert len(seen) + len(place.found()) == 18


def test_two_batches_at_once_make_the_same_mailboxes(place: Place, each: bool) -> None:
    boxes = [f"d{i}/m" for i in range(8)]
    batches = [[place.item(b"x", mailbox=box) for box in boxes] for _ in range(4)]
    errors: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda batch=batch: errors.append(place.write(*batch, each=each))) for batch in batches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [[0] * 8] * 4
    assert all(len(place.found(box)) == 4 for box in boxes)


# ---- append_file, fsync_dir, make_dirs


def test_append_takes_any_number_of_parts(tmp_path: Path) -> None:
    parts = [b"%d," % i for i in range(3000)] + [b"", b"end", b""]
    with open(tmp_path / "f", "wb") as file:
        append_file(file.fileno(), [b"first "], sync=False)
        append_file(file.fileno(), [], sync=True)
        append_file(file.fileno(), [b"", b""], sync=False)
        append_file(file.fileno(), parts, sync=True)
    assert (tmp_path / "f").read_bytes() == b"first " + b"".join(parts)


def test_append_goes_on_after_signals_and_short_writes() -> None:
    # The reader is a Python thread: it would never run if the GIL were held.
    parts = [bytes([i % 251]) * (i % 4096) for i in range(3000)]
    ours, theirs = socket.socketpair()
    received = bytearray()

    def read() -> None:
        while octets := theirs.recv(65536):
            received.extend(octets)

    reader = threading.Thread(target=read)
    reader.start()
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        append_file(ours.fileno(), parts, sync=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        ours.close()
        reader.join()
        theirs.close()
    assert bytes(received) == b"".join(parts)


def test_append_raises_what_the_system_says(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        append_file(-1, [b"x"], sync=False)
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):  # a pipe has nothing to flush
        append_file(writer, [], sync=True)
    os.close(reader)
    os.close(writer)
    parts: list[Any] = [b"x", "text"]
    with pytest.raises(TypeError), open(tmp_path / "f", "wb") as file:
        append_file(file.fileno(), parts, sync=False)
    assert (tmp_path / "f").read_bytes() == b""


def test_append_flushes_once_and_last(tmp_path: Path) -> None:
    code = """
        from fastsmtp._files import append_file
        file = open(place.root / "f", "wb")
        try:
            append_file(file.fileno(), [b"a", b"b"], sync=True)
        except OSError as error:
            print(error.errno)
    """
    assert injected(code, tmp_path / "root", "fdatasync:error=EIO:when=1") == f"{EIO}\n"
    calls = short(traced(code, tmp_path / "again"))
    assert [call.split()[0] for call in calls if call.endswith("@/f")][-2:] == ["fdatasync", "close"]


def test_make_dirs_flushes_each_parent_that_it_changed(tmp_path: Path) -> None:
    code = """
        from fastsmtp._files import make_dirs
        make_dirs(place.root / "a/b")
        make_dirs(place.root / "a/b")
    """
    changes = [call for call in short(traced(code, tmp_path / "root")) if call.split()[0] in ("mkdir", "fsync")]
    start = changes.index("mkdir @/a/b")
    assert changes[start:] == ["mkdir @/a/b", "mkdir @/a", "fsync @", "mkdir @/a/b", "fsync @/a", "mkdir @/a/b"]


def test_make_dirs_takes_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_dirs("one")
    make_dirs(b"two/three")
    assert (tmp_path / "one").is_dir()
    assert (tmp_path / "two/three").stat().st_mode & 0o777 == 0o700


def test_make_dirs_raises_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, error in [(f"{tmp_path}/file/x", ENOTDIR), ("", ENOENT), ("/" + "d/" * 3000, ENAMETOOLONG)]:
        with pytest.raises(OSError, match=re.escape(os.strerror(error))) as caught:
            make_dirs(path)
        assert caught.value.errno == error
    with pytest.raises(ValueError, match="null byte"):
        make_dirs("a\0b")


def test_fsync_dir(tmp_path: Path) -> None:
    fsync_dir(tmp_path)
    fsync_dir(os.fsencode(tmp_path))
    (tmp_path / "file").write_bytes(b"")
    for path, error in [(tmp_path / "none", ENOENT), (tmp_path / "file", ENOTDIR)]:
        with pytest.raises(OSError, match=str(path)) as caught:
            fsync_dir(path)
        assert caught.value.errno == error


# Last words


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        far = socket.create_connection(listening.getsockname())
        near, _ = listening.accept()
    return near, far


def segments(connection: socket.socket) -> int:
    """Packets that came in, by tcp_info.tcpi_segs_in."""
    return int(struct.unpack_from("I", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 140)[0])


def test_last_octets_and_the_end_are_one_packet() -> None:
    near, far = tcp_pair()
    with near, far:
        before = segments(far)
        assert send_last(near.fileno(), b"221 Bye\r\n") == 9
        assert far.recv(100) == b"221 Bye\r\n"
        assert far.recv(100) == b""
        assert segments(far) == before + 1
        far.sendall(b"x")  # the other direction is open
        assert near.recv(1) == b"x"


def test_no_last_octets_are_the_end() -> None:
    near, far = tcp_pair()
    with near, far:
        assert send_last(near.fileno(), b"") == 0
        assert far.recv(1) == b""


def test_what_is_not_taken_whole_does_not_end() -> None:
    near, far = tcp_pair()
    with near, far:
        sent = 0
        while more := send_last(near.fileno(), b"x" * (64 * MB)):
            sent += more
        while sent:
            sent -= len(far.recv(MB))
        far.setblocking(False)
        with pytest.raises(BlockingIOError):  # not the end
            far.recv(1)


def test_last_octets_to_nobody() -> None:
    near, far = tcp_pair()
    with near:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        assert send_last(near.fileno(), b"221 Bye\r\n") == 0
    assert send_last(-1, b"x") == 0
