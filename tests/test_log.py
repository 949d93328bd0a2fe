"""The log: what a line looks like, that nothing gets out raw, and that nobody waits for its reader."""

from __future__ import annotations

import ast
import fcntl
import itertools
import json
import os
import pty
import re
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastsmtp import log as events
from fastsmtp._files import render_line
from fastsmtp.log import (
    ACCEPTED,
    BUG,
    OUTSTANDING_LIMIT,
    REFUSED,
    START,
    STOP,
    WAITING_LIMIT,
    WORKER_DIED,
    Event,
    Log,
    _render_with_care,
    trace,
)

NOW = 1_767_323_045.678
STAMP = "2026-01-02T03:04:05.678Z"
NOTE = Event("note", "one", "A line of the tests.")
PAIR = Event("pair", "one two", "A line of the tests.")


def clock() -> float:
    return NOW


class Reader:
    """The far end of a pipe. It reads nothing by itself."""

    def __init__(self) -> None:
        self.fd, self.write_fd = os.pipe()

    def read_lines(self, number: int) -> list[str]:
        """Reads until so many lines are there, with a limit in time."""
        data = b""
        end = time.monotonic() + 10
        while data.count(b"\n") < number:
            assert select.select([self.fd], [], [], end - time.monotonic())[0], f"only {data!r}"
            data += os.read(self.fd, 1 << 20)
        assert data.endswith(b"\n")
        return data.decode().split("\n")[:-1]

    def is_empty(self) -> bool:
        return not select.select([self.fd], [], [], 0)[0]


@pytest.fixture
def reader() -> Iterator[Reader]:
    pipe = Reader()
    yield pipe
    os.close(pipe.fd)
    os.close(pipe.write_fd)


def lines_of(event: Event, *values: object, human: bool) -> list[str]:
    """What comes out for one event, through a file and without a thread."""
    read, write = os.pipe()
    try:
        log = Log(write, human, clock, threaded=False)
        log.write(event, *values)
        log.close()
        os.close(write)
        data = os.read(read, 1 << 16)
    finally:
        os.close(read)
    assert data.endswith(b"\n")
    assert data.isascii() or human
    return data.decode().split("\n")[:-1]


def json_of(event: Event, *values: object) -> dict[str, object]:
    (line,) = lines_of(event, *values, human=False)
    record = json.loads(line)
    assert isinstance(record, dict)
    return record


def text_of(event: Event, *values: object) -> str:
    (line,) = lines_of(event, *values, human=True)
    assert line.startswith(STAMP + " ")
    return line.removeprefix(STAMP + " ")


# The two forms


def test_a_json_line() -> None:
    assert json_of(ACCEPTED, "id1", "192.0.2.1", "ann", "<>", ("a@b.test", "c@d.test"), 5) == {
        "time": STAMP,
        "level": "info",
        "event": "accepted",
        "id": "id1",
        "client": "192.0.2.1",
        "user": "ann",
        "from": "<>",
        "to": ["a@b.test", "c@d.test"],
        "size": 5,
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, 0),
        (-(2**70), -(2**70)),
        (1.23456, 1.235),
        (float("inf"), None),
        (float("nan"), None),
        (None, None),
        ("", ""),
        ((), []),
        (True, "True"),
        (Path("/x"), "/x"),
    ],
)
def test_values_in_json(value: object, shown: object) -> None:
    assert json_of(NOTE, value)["one"] == shown


def test_a_text_line() -> None:
    assert text_of(ACCEPTED, "id1", "192.0.2.1", None, "<>", ("a@b.test", "c@d.test"), 5) == (
        "accepted       id=id1 client=192.0.2.1 from=<> to=a@b.test,c@d.test size=5"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.23456, " one=1.235"),
        (None, ""),
        ("", ' one=""'),
        ((), " one=-"),
        ("bob=x@y.test", " one=bob=x@y.test"),
        ("jürgen@bücher.test", " one=jürgen@bücher.test"),
        ("two words", ' one="two words"'),
        ('a"b\\c', ' one="a\\"b\\\\c"'),
        (("a,b", "c"), ' one="a,b",c'),
        ("a\r\nb\0\x1b[31m\x7f", ' one="a\\u{d}\\u{a}b\\u{0}\\u{1b}[31m\\u{7f}"'),
        ("\x85\x9b", ' one="\\u{85}\\u{9b}"'),
        ("\u2028\u2029\u202e", ' one="\\u{2028}\\u{2029}\\u{202e}"'),
        ("\u2066\ufeff\U000e0041", ' one="\\u{2066}\\u{feff}\\u{e0041}"'),
        ("\udc80", ' one="\\u{dc80}"'),
        ("\xa0", ' one="\\u{a0}"'),
    ],
)  # fmt: skip
def test_values_in_text(value: object, shown: str) -> None:
    assert text_of(NOTE, value) == "note          " + shown


def test_names_are_aligned_in_text() -> None:
    starts = {text_of(event, *["v"] * len(event.fields)).index(f" {event.fields[0]}=") for event in all_events()}
    assert starts == {14}


def test_colour_on_a_terminal_only_and_only_for_what_asks_for_attention(reader: Reader) -> None:
    master, terminal = pty.openpty()
    try:
        log = Log(terminal, True, clock, threaded=False)
        log.write(STOP, "SIGTERM")
        log.write(WORKER_DIED, 0, 1, "SIGKILL", 0, 0.0)
        log.close()
        shown = os.read(master, 10_000).decode().split("\r\n")
    finally:
        os.close(master)
        os.close(terminal)
    assert "\x1b" not in shown[0]
    assert "\x1b[31mworker-died   \x1b[0m worker=0 pid=1" in shown[1]

    piped = Log(reader.write_fd, True, clock, threaded=False)
    piped.write(WORKER_DIED, 0, 1, "SIGKILL", 0, 0.0)
    piped.close()
    assert "\x1b" not in reader.read_lines(1)[0]


def test_time_stamps_follow_the_clock(reader: Reader) -> None:
    times = iter([0.0, 0.0015, 0.9999, 1.0, 1_767_323_045.001, 3.0])
    log = Log(reader.write_fd, False, lambda: next(times), threaded=False)
    for _ in range(6):
        log.write(NOTE, None)
    log.close()
    assert [json.loads(line)["time"][11:] for line in reader.read_lines(6)] == [
        "00:00:00.000Z",
        "00:00:00.001Z",
        "00:00:00.999Z",
        "00:00:01.000Z",
        "03:04:05.001Z",
        "00:00:03.000Z",
    ]


# Nothing raw, nothing long

texts = st.text(st.characters(), max_size=40) | st.text("\x00\x1b\r\n\x85\u2028\u202e\ud800 \"'=,\\{}%s", max_size=20)


@given(texts, texts)
@example("%s %d %", "{0}")
def test_whatever_the_peer_sends_is_one_line_and_comes_back_from_json(one: str, two: str) -> None:
    (line,) = lines_of(PAIR, one, (two, one), human=False)
    assert line.isascii()
    assert line.isprintable()
    record = json.loads(line)
    assert (record["one"], record["two"]) == (one, [two, one])


plain = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'), max_size=600)
values = st.none() | st.integers() | st.floats() | st.booleans() | plain | texts
values |= st.lists(plain | texts, max_size=40).map(tuple)


@given(values, values)
@example("x" * 512, 1e300)
@example("x" * 512, (1 << 63) - 1)
@example(("x" * 100,) * 32, -(1 << 63))
@example(("x" * 512,) * 7, ("x" * 400,))
def test_what_is_rendered_in_one_go_is_as_with_care(one: object, two: object) -> None:
    quick = render_line(PAIR.pieces, STAMP, (one, two))
    assert quick in (None, _render_with_care(PAIR, STAMP, (one, two)))


@pytest.mark.parametrize("value", [None, 0, -1, 1 << 62, 0.0, -0.0005, 1.0005, 1e20, float("inf"), "", "x" * 512, ()])
def test_plain_values_are_rendered_in_one_go(value: object) -> None:
    items = (value,) if isinstance(value, str) else ("a", "b")
    line = render_line(PAIR.pieces, STAMP, (value, items))
    assert line == _render_with_care(PAIR, STAMP, (value, items))


def test_lines_up_to_what_a_pipe_takes_whole_are_rendered_in_one_go() -> None:
    lengths = []
    for length in range(300, 512):
        values = (("x" * 512,) * 7, "x" * length)
        line = render_line(PAIR.pieces, STAMP, values)
        assert line in (None, _render_with_care(PAIR, STAMP, values))
        lengths.append(len(line or b""))
    assert max(lengths) == select.PIPE_BUF
    assert lengths == sorted(lengths[: lengths.index(0)]) + [0] * lengths.count(0)


def test_values_of_another_number_are_not_rendered() -> None:
    assert render_line(PAIR.pieces, STAMP, ("a",)) is None
    assert render_line(PAIR.pieces, STAMP, ("a", "b", "c")) is None


@given(texts, texts)
def test_whatever_the_peer_sends_is_one_printable_line_of_text_with_the_same_fields(one: str, two: str) -> None:
    (line,) = lines_of(PAIR, one, two, human=True)
    assert line.isprintable()
    # What is quoted taken out, no value can look like another field.
    fields = re.sub(r'"(\\.|[^"\\])*"', '""', line).split(" ")
    assert [field.split("=")[0] for field in fields if "=" in field] == ["one", "two"]


@pytest.mark.parametrize("human", [False, True])
def test_long_values_are_cut(human: bool) -> None:
    (whole,) = lines_of(NOTE, "x" * 512, human=human)
    assert "x" * 512 in whole
    (cut,) = lines_of(NOTE, "x" * 513, human=human)
    assert "x" * 511 + ("…" if human else "\\u2026") in cut
    assert "x" * 512 not in cut


def test_a_list_of_one_is_like_any_other() -> None:
    for item in ("", 'a"\r\n\x85\ud800', "x" * 512, "x" * 513):
        record = json_of(PAIR, (item,), (item, item))
        assert record["two"] == [*record["one"], *record["one"]]


def test_long_lists_are_cut() -> None:
    assert json_of(NOTE, ("x" * 100,) * 32)["one"] == ["x" * 100] * 32
    assert json_of(NOTE, ("x" * 100,) * 1000)["one"] == ["x" * 100] * 32 + ["and 968 more"]


@pytest.mark.parametrize("human", [False, True])
@pytest.mark.parametrize("value", ["\U0001f600" * 10_000, ("\U000e0041" * 10_000,) * 1000, "\0" * 5000, "é" * 512])
def test_no_line_is_longer_than_a_pipe_takes_whole(value: object, human: bool) -> None:
    for event in all_events():
        (line,) = lines_of(event, *[value] * len(event.fields), human=human)
        assert len(line.encode()) < select.PIPE_BUF
        if not human:
            assert len(json.loads(line)) == 3 + len(event.fields)


def test_lines_of_several_processes_on_one_pipe_do_not_mix(reader: Reader) -> None:
    fcntl.fcntl(
        reader.write_fd, fcntl.F_SETPIPE_SZ, select.PIPE_BUF
    )  # soon full, so that writes are cut if they may be

    def work(mark: str) -> None:
        log = Log(reader.write_fd, False, clock)
        for _ in range(10):
            for number in range(100):
                log.write(PAIR, mark * (number * 3), "ü" * (number % 7))
            log.flush()
        log.close()

    pids = []
    for mark in "abc":
        pid = os.fork()
        if pid == 0:
            try:
                work(mark)
            finally:
                os._exit(0)
        pids.append(pid)
    marks = [set(json.loads(line)["one"]) for line in reader.read_lines(3000)]
    for pid in pids:
        os.waitpid(pid, 0)
    assert all(len(mark) <= 1 for mark in marks)


# Nobody waits


@pytest.mark.parametrize("threaded", [False, True])
def test_lines_come_out_in_order_and_whole(reader: Reader, threaded: bool) -> None:
    log = Log(reader.write_fd, False, clock, threaded=threaded)
    for number in range(300):
        log.write(NOTE, number)
    assert log.waiting == 300
    assert log.flush() == 0
    assert log.waiting == 0
    assert [json.loads(line)["one"] for line in reader.read_lines(300)] == list(range(300))
    log.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_to_a_file_everything_is_written(tmp_path: Path, threaded: bool) -> None:
    with open(tmp_path / "log", "wb") as file:
        log = Log(file.fileno(), False, clock, threaded=threaded)
        for _ in range(2):
            for number in range(5000):
                log.write(NOTE, number)
            log.flush()
        log.close()
    with open(tmp_path / "log") as lines:
        assert [json.loads(line)["one"] for line in lines] == [*range(5000), *range(5000)]


def test_over_the_bound_lines_are_dropped_and_one_line_says_how_many(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as file:
        log = Log(file.fileno(), False, clock)
        for number in range(WAITING_LIMIT + 3):
            log.write(NOTE, number)
        assert log.waiting == WAITING_LIMIT
        assert log.flush() == 3
        assert 0 < log.waiting < WAITING_LIMIT  # more than 1 MB: the rest waits, nothing is lost
        log.write(NOTE, "again")
        assert log.flush() == 0
        log.close()
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [record.get("one") for record in records] == [*range(WAITING_LIMIT), None, "again"]
    assert (records[-2]["event"], records[-2]["lines"]) == ("lines-dropped", 3)


@pytest.mark.parametrize("threaded", [False, True])
def test_a_reader_that_does_not_read_costs_lines_not_time_or_memory(
    reader: Reader, threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "WAITING_LIMIT", 2000)
    log = Log(reader.write_fd, False, clock, threaded=threaded)
    written = 0
    dropped = 0
    for _ in range(8):
        for _ in range(1000):
            log.write(NOTE, "x" * 300)
            written += 1
        started = time.monotonic()
        dropped += log.flush()
        assert time.monotonic() - started < 1
        assert log.waiting <= 2000
    assert written * 300 > 2 * OUTSTANDING_LIMIT
    assert 0 < dropped < written

    got: list[dict[str, object]] = []
    while not any(line["event"] == "lines-dropped" for line in got):
        got += [json.loads(line) for line in reader.read_lines(1)]
        dropped += log.flush()
        time.sleep(0.01)
    log.write(NOTE, "again")
    log.close()
    while got[-1].get("one") != "again":
        got += [json.loads(line) for line in reader.read_lines(1)]
    told = [line["lines"] for line in got if line["event"] == "lines-dropped"]
    # In one line, or in more where room came and went while they were written.
    assert sum(map(int, map(str, told))) == dropped
    assert len(got) == written - dropped + 1 + len(told)


@pytest.mark.parametrize("threaded", [False, True])
def test_close_gives_up_on_a_reader_that_does_not_read(
    reader: Reader, threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "CLOSE_SECONDS", 0.2)
    log = Log(reader.write_fd, False, clock, threaded=threaded)
    for _ in range(1000):
        log.write(NOTE, "x" * 500)
    started = time.monotonic()
    log.close()
    assert 0.15 < time.monotonic() - started < 1.5
    while not reader.is_empty():  # lets the thread go on
        os.read(reader.fd, 1 << 20)
        time.sleep(0.01)


@pytest.mark.parametrize("threaded", [False, True])
def test_close_waits_for_a_slow_reader(reader: Reader, threaded: bool) -> None:
    log = Log(reader.write_fd, False, clock, threaded=threaded)
    for _ in range(400):
        log.write(NOTE, "x" * 500)
    lines: list[str] = []

    def read_late() -> None:
        time.sleep(0.2)
        lines.extend(reader.read_lines(400))

    thread = threading.Thread(target=read_late)
    thread.start()
    log.close()
    thread.join()
    assert len(lines) == 400


@pytest.mark.parametrize("threaded", [False, True])
def test_a_reader_that_went_away_is_no_error(threaded: bool) -> None:
    read, write = os.pipe()
    log = Log(write, False, clock, threaded=threaded)
    os.close(read)
    log.write(NOTE, 1)
    log.write(NOTE, 2)
    lost = log.flush()
    end = time.monotonic() + 10
    while lost < 2 and time.monotonic() < end:
        time.sleep(0.01)
        lost += log.flush()
    assert lost >= 2  # and the lines that say so
    log.close()
    os.close(write)


@pytest.mark.parametrize("threaded", [False, True])
def test_no_descriptor_at_all_is_no_error(threaded: bool) -> None:
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    log = Log(write, False, clock, threaded=threaded)
    log.write(NOTE, 1)
    log.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_a_descriptor_that_somebody_made_non_blocking(reader: Reader, threaded: bool) -> None:
    os.set_blocking(reader.write_fd, False)
    fcntl.fcntl(reader.write_fd, fcntl.F_SETPIPE_SZ, 4096)
    log = Log(reader.write_fd, False, clock, threaded=threaded)
    for number in range(200):
        log.write(PAIR, number, "x" * 200)
    log.flush()
    lines: list[str] = []
    while len(lines) < 200:
        lines += reader.read_lines(1)
        log.flush()
    assert [json.loads(line)["one"] for line in lines] == list(range(200))
    log.close()


def test_a_log_can_be_made_in_a_forked_child(reader: Reader) -> None:
    parent = Log(reader.write_fd, False, clock, threaded=False)
    pid = os.fork()
    if pid == 0:
        try:
            child = Log(reader.write_fd, False, clock)
            child.write(NOTE, "child")
            child.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    parent.write(NOTE, "parent")
    parent.close()
    assert [json.loads(line)["one"] for line in reader.read_lines(2)] == ["child", "parent"]


# The table of events


def all_events() -> list[Event]:
    return [value for value in vars(events).values() if isinstance(value, Event)]


def test_events_are_explained_and_named_once() -> None:
    found = all_events()
    assert START in found
    assert REFUSED in found
    assert len({event.name for event in found}) == len(found)
    for event in found:
        assert re.fullmatch(r"[a-z-]{1,14}", event.name)
        assert event.help.endswith(".")
        assert event.fields
        assert len(set(event.fields)) == len(event.fields)
        assert not {"time", "level", "event"} & set(event.fields)


def wrong_calls(source: str) -> Iterator[str]:
    """Calls `x.write(EVENT, ...)` whose number of values is not the event's number of fields."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        first = node.args[0]
        name = first.id if isinstance(first, ast.Name) else first.attr if isinstance(first, ast.Attribute) else ""
        event = getattr(events, name, None)
        if node.func.attr != "write" or not isinstance(event, Event):
            continue
        starred = any(isinstance(value, ast.Starred) for value in node.args)
        if not starred and len(node.args) - 1 != len(event.fields):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def test_every_line_is_written_with_all_its_fields() -> None:
    package = Path(events.__file__).parent
    for path in package.rglob("*.py"):
        assert list(wrong_calls(path.read_text())) == [], path


def test_a_missing_value_is_seen() -> None:
    assert list(wrong_calls("log.write(STOP)"))
    assert list(wrong_calls("self.log.write(events.STOP, 1, 2)"))
    assert list(wrong_calls("log.write(STOP, 1)\nfile.write(data)\nlog.write(STOP, *values)")) == []


@pytest.mark.parametrize("human", [False, True])
def test_a_missing_value_is_logged_and_stops_nothing(reader: Reader, human: bool) -> None:
    log = Log(reader.write_fd, human, clock, threaded=False)
    log.write(NOTE)
    log.write(PAIR, 1, 2, 3)
    log.write(NOTE, "next")
    log.close()
    first, second, third = reader.read_lines(3)
    assert "note with 0 values" in first
    assert "pair with 3 values" in second
    assert "next" in third


def test_a_trace_names_the_places_innermost_first() -> None:
    def inner() -> None:
        raise RuntimeError("no")

    try:
        inner()
    except RuntimeError as error:
        places = trace(error)
        record = json_of(BUG, "here", repr(error), places)
    assert [place.split()[-1] for place in places] == [
        "inner",
        "test_a_trace_names_the_places_innermost_first",
    ]
    assert all(re.fullmatch(r"test_log\.py:\d+ \w+", place) for place in places)
    assert record["trace"] == list(places)
    assert trace(RuntimeError("never raised")) == ()


def test_writing_never_raises_even_when_the_clock_jumps(reader: Reader) -> None:
    times = itertools.cycle([NOW, NOW - 10**9, NOW + 10**9, -5.0])
    log = Log(reader.write_fd, False, lambda: next(times), threaded=False)
    for number in range(8):
        log.write(NOTE, number)
    log.close()
    assert len(reader.read_lines(8)) == 8
