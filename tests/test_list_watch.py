"""When lists are compiled, and what the process that does it keeps of its parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Logged, logged

from fastsmtp.config import Config, parse
from fastsmtp.list_compile import compile_list
from fastsmtp.list_watch import Become, Preparation, Watcher, check_lists, folder_of
from fastsmtp.lists import Listed, ListError, ListFile

TEXT = """\
data_dir = "data"
[[domain]]
name = "here.test"
recipients = {file = "boxes"}
transport = "x"
[transport.x]
type = "discard"
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "boxes").write_text("ann\n")
    (tmp_path / "data").mkdir()
    return parse(TEXT, tmp_path, "f.toml")


@pytest.fixture
def log() -> Iterator[Logged]:
    with logged() as pair:
        yield pair


def prepare(config: Config, become: Become = None) -> None:
    assert Preparation(config, become).advance(wait=True)


def opened(config: Config, tmp_path: Path) -> Listed:
    return Listed(ListFile("mailboxes", tmp_path / "boxes"), folder_of(config))


def test_what_is_current_is_left(config: Config, tmp_path: Path) -> None:
    times = []
    for text in ("ann\n", "ann\n", "ann\nbob\n"):
        if (tmp_path / "boxes").read_text() != text:
            (tmp_path / "boxes").write_text(text)
        prepare(config)
        (file,) = folder_of(config).iterdir()
        times.append(file.stat().st_ino)
    assert times[0] == times[1] != times[2]
    assert opened(config, tmp_path).has("bob@here.test")


def test_it_keeps_nothing_of_its_parent(config: Config, tmp_path: Path) -> None:
    """A socket that it held would take connections for nobody."""
    said = tmp_path / "said"

    def become() -> None:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd") if int(name) > 2]
        names = [os.readlink(link) for link in links if os.path.lexists(link)]
        ignored = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
        masked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        said.write_text(json.dumps([names, ignored == [signal.SIG_DFL] * 2, len(masked)]))

    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with socket.create_server(("127.0.0.1", 0)):
            prepare(config, become)
    finally:
        signal.signal(signal.SIGHUP, hangup)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    names, default, masked = json.loads(said.read_text())
    assert [name for name in names if not name.startswith("/memfd:list")] == []
    assert (default, masked) == (True, 0)


def test_a_process_that_dies(config: Config) -> None:
    def become() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ListError, match="boxes: the process that compiles it ended with -9"):
        prepare(config, become)


def test_a_folder_that_cannot_be_written(config: Config) -> None:
    folder_of(config).write_text("a file")
    with pytest.raises(ListError, match=r"its compiled form cannot be written to .*lists: "):
        prepare(config)


def test_nobody_waits_for_it(config: Config, tmp_path: Path) -> None:
    """One list after the other, and what was begun ends with who began it."""
    text = TEXT + '[alias]\nfile = "aliases"\n'
    (tmp_path / "aliases").write_text("a: ann\n")
    begun = tmp_path / "begun"

    def become() -> None:
        if begun.exists():
            time.sleep(600)
        begun.touch()

    preparation = Preparation(parse(text, tmp_path, "f.toml"), become)
    assert not preparation.advance()
    first = preparation._child
    deadline = time.monotonic() + 60
    while (child := preparation._child) is first:
        assert not preparation.advance()
        assert time.monotonic() < deadline
    assert child is not None
    assert [made.name.partition("-")[0] for made in folder_of(config).iterdir()] == ["mailboxes"]
    preparation.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
    preparation.close()


def test_what_a_killed_process_has_left_is_removed(config: Config) -> None:
    """But not what another still writes."""
    prepare(config)
    (made,) = folder_of(config).iterdir()
    made.with_name(f"{made.name}.{2**22 + 1}.tmp").write_bytes(b"x")  # no process has such a number
    own = made.with_name(f"{made.name}.{os.getpid()}.tmp")
    own.write_bytes(b"x")
    made.unlink()
    prepare(config)
    assert sorted(folder_of(config).iterdir()) == sorted([made, own])


def test_check_writes_nothing(config: Config, tmp_path: Path) -> None:
    assert list(check_lists(config)) == []
    (tmp_path / "boxes").write_text("ann\n\na b\n")
    ((place, text),) = check_lists(config)
    assert place == ("domain", 0, "recipients")
    assert text.startswith(f"{tmp_path}/boxes:3: expected a local-part")
    assert list((tmp_path / "data").iterdir()) == []


# The watcher


class Watched:
    """A watcher with a clock that is set."""

    def __init__(self, config: Config, log: Logged, become: Callable[[], None] | None = None) -> None:
        self.config = config
        self.lines = log[1]
        self.watcher = Watcher(log[0], become)
        self.now = 1000.0

    def pass_time(self, seconds: float) -> None:
        """As if it were called often; what has begun is done."""
        self.now += seconds
        self.watcher.look_after(self.config, self.now)
        deadline = time.monotonic() + 60
        while self.watcher._child is not None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
            self.watcher.look_after(self.config, self.now)

    @property
    def events(self) -> list[tuple[str, Any]]:
        return [(line["event"], line.get("line", line.get("entries"))) for line in self.lines()]


def test_a_change_is_taken_when_it_is_over(config: Config, tmp_path: Path, log: Logged) -> None:
    prepare(config)
    watched = Watched(config, log)
    for _ in range(3):
        watched.pass_time(1.0)
    assert watched.events == []
    (tmp_path / "boxes").write_text("ann\nbob\n")
    watched.pass_time(1.0)
    (tmp_path / "boxes").write_text("ann\nbob\ncarl\n")
    watched.pass_time(1.0)
    watched.pass_time(0.5)  # looked at too soon
    assert watched.events == []
    watched.pass_time(0.5)
    assert watched.events == [("list-published", 3)]
    assert opened(config, tmp_path).has("carl@here.test")
    watched.pass_time(1.0)
    assert len(watched.events) == 1


def test_a_list_that_loses_its_half_at_once_is_kept(config: Config, tmp_path: Path, log: Logged) -> None:
    """Written in place by a program that is slow, or out of an empty database; a reload takes it all the same."""
    boxes = tmp_path / "boxes"

    def write(entries: int) -> None:
        boxes.write_text("".join(f"u{n}\n" for n in range(entries)))

    write(100)
    prepare(config)
    watched = Watched(config, log)
    watched.pass_time(1.0)
    for entries in (50, 24, 25):
        write(entries)
        for _ in range(4):
            watched.pass_time(1.0)
    assert watched.events == [("list-published", 50), ("list-kept", 0), ("list-published", 25)]
    assert "24 entries, less than half of those before" in watched.lines()[1]["why"]
    write(1)
    watched.pass_time(1.0)
    watched.pass_time(1.0)
    assert opened(config, tmp_path).has("u20@here.test")
    prepare(config)
    assert not opened(config, tmp_path).has("u20@here.test")
    for entries in (19, 0):
        write(entries)
        watched.pass_time(1.0)
        watched.pass_time(1.0)
    assert watched.events[-2:] == [("list-published", 19), ("list-published", 0)]


def test_networks_are_counted_whatever_they_are(tmp_path: Path, log: Logged) -> None:
    (tmp_path / "data").mkdir()
    config = parse(TEXT.partition("[[")[0] + '[inbound]\nexceptions = {file = "nets"}\n', tmp_path, "f.toml")

    def write(count: int) -> None:
        (tmp_path / "nets").write_text("".join(f"2001:db8:{n:x}::/64\n192.0.{n}.0/32\n" for n in range(count)))

    write(50)
    prepare(config)
    watched = Watched(config, log)
    watched.pass_time(1.0)
    for count in (40, 10):
        write(count)
        watched.pass_time(1.0)
        watched.pass_time(1.0)
    assert watched.events == [("list-published", 80), ("list-kept", 0)]
    assert "20 entries, less than half" in watched.lines()[1]["why"]


def test_what_is_wrong_is_said_once(config: Config, tmp_path: Path, log: Logged) -> None:
    prepare(config)
    watched = Watched(config, log)
    counted: list[int] = []
    watched.watcher.on_kept = lambda: counted.append(1)
    watched.pass_time(1.0)
    (tmp_path / "boxes").write_text("a b\n")
    for _ in range(5):
        watched.pass_time(1.0)
    assert watched.events == [("list-kept", 1)]
    assert counted == [1]
    assert opened(config, tmp_path).has("ann@here.test")
    (tmp_path / "boxes").unlink()
    for _ in range(5):
        watched.pass_time(1.0)
    assert watched.events == [("list-kept", 1), ("list-kept", 0)]
    (tmp_path / "boxes").write_text("zoe\n")
    for _ in range(3):
        watched.pass_time(1.0)
    assert watched.events[2:] == [("list-published", 1)]


def test_what_a_reload_has_compiled_is_not_compiled_again(config: Config, tmp_path: Path, log: Logged) -> None:
    prepare(config)
    watched = Watched(config, log)
    watched.pass_time(1.0)
    (tmp_path / "boxes").write_text("ann\nbob\n")
    prepare(config)
    for _ in range(3):
        watched.pass_time(1.0)
    assert watched.events == []


def test_what_somebody_has_removed_is_compiled_again(config: Config, tmp_path: Path, log: Logged) -> None:
    """Or a worker that dies could not be started again."""
    prepare(config)
    watched = Watched(config, log)
    watched.pass_time(1.0)
    (made,) = folder_of(config).iterdir()
    made.unlink()
    watched.pass_time(1.0)
    assert watched.events == [("list-published", 1)]
    assert opened(config, tmp_path).has("ann@here.test")


def test_lists_that_nobody_names_are_removed(config: Config, tmp_path: Path, log: Logged) -> None:
    """And nothing else that lies there."""
    prepare(config)
    folder = folder_of(config)
    kept = set(folder.iterdir())
    (tmp_path / "old").write_text("ann\n")
    old = ListFile("mailboxes-case", tmp_path / "old")
    compile_list(old, folder)
    compile_list(ListFile("names", tmp_path / "old"), folder)
    mapped = Listed(old, folder)
    hexadecimal = "0123456789abcdef"
    (folder / f"networks-{hexadecimal}.{2**22 + 1}.tmp").write_bytes(b"x")  # no process has such a number
    (folder / f"aliases-{hexadecimal}").symlink_to(tmp_path / "old")
    foreign = [f"networks-{hexadecimal}.{os.getpid()}.tmp", f"networks-{hexadecimal[1:]}", "networks", "README",
               f"others-{hexadecimal}", f"names-{hexadecimal}.bak", f"my-names-{hexadecimal}"]  # fmt: skip
    for name in foreign:
        (folder / name).write_bytes(b"x")
    (folder / "a").mkdir()
    (folder / "a" / f"names-{hexadecimal}").write_bytes(b"x")
    who: list[int] = []
    Watcher(log[0], lambda: who.append(os.getpid())).remove_others(config)
    assert set(folder.iterdir()) == kept | {folder / name for name in (*foreign, "a")}
    assert list((folder / "a").iterdir())
    assert (tmp_path / "old").read_text() == "ann\n"
    assert mapped.has("ann@here.test")
    assert who == [], "done by a process of its own"


def test_what_cannot_be_removed_is_left(config: Config, log: Logged) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    watcher = Watcher(log[0])
    watcher.remove_others(config)  # there is no folder yet
    prepare(config)
    (folder_of(config) / "names-0123456789abcdef").mkdir()
    watcher.remove_others(config)
    assert len(list(folder_of(config).iterdir())) == 2
    assert children.read_text() == before, "a process that nobody waited for"


def test_it_ends_with_its_parent(config: Config, tmp_path: Path, log: Logged) -> None:
    prepare(config)
    watched = Watched(config, log, become=lambda: time.sleep(600))
    watched.pass_time(1.0)
    (tmp_path / "boxes").write_text("bob\n")
    watched.watcher.look_after(config, 1002.0)
    watched.watcher.look_after(config, 1003.0)
    assert watched.watcher._child is not None
    pid = watched.watcher._child[0].pid
    watched.watcher.look_after(config, 1004.0)
    watched.watcher.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    watched.watcher.close()
    assert watched.events == []
