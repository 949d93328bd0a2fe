"""The table at the end of a load test: real figures arrive, warnings when they are due, nothing of a peer raw."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from loadtest.caveats import caveats, generator_share
from loadtest.result import Latency, Result
from loadtest.show import clock, number, octets, plain, tick
from loadtest.table import print_result, render_result
from tests.load_results import HOSTILE, RAW, hostile_result, latency, result


def printed(of: Result) -> str:
    file = io.StringIO()
    print_result(of, file)
    return file.getvalue()


def row(text: str, name: str) -> list[str]:
    """The figures of the row that begins so."""
    found = next(line for line in text.splitlines() if line.strip().startswith(name))
    return found.strip().removeprefix(name).split()


def test_the_headline() -> None:
    text = printed(result(recipients_refused=7, errors={"reset": 2, "timeout": 3}))
    assert "mx-small to 127.0.0.1:2525, 2026-11-22T10:00:00Z in 0:10" in text
    assert row(text, "accepted") == ["15,500", "of", "15,530", "messages"]
    assert row(text, "rate")[0] == "1,550"
    assert row(text, "octets") == ["15.5", "MB,", "1.55", "MB/s"]
    assert row(text, "sessions") == ["100", "at", "once,", "400", "opened"]
    assert row(text, "refused") == ["30", "messages,", "7", "recipients"]
    assert row(text, "errors") == ["5"]
    assert row(text, "generator")[0] == "20.5"


def test_latencies_stand_in_the_order_of_a_session() -> None:
    text = printed(result())
    assert row(text, "TCP connection") == ["400", "0.12", "0.25", "0.50", "1.00", "2.00"]
    assert row(text, "end of data to its reply") == ["100,000", "4.50", "9.00", "18.0", "36.0", "72.0"]
    assert row(text, "whole session") == ["400", "900", "1,800", "3,600", "7,200", "14,400"]
    assert text.index("TCP connection") < text.index("end of data") < text.index("whole session")


def test_errors_replies_and_misbehaviour() -> None:
    text = printed(
        result(
            errors={"reset": 2, "timeout": 30, "tls": 0},
            misbehaviour={"drip": {"sessions": 5, "closed": 3}, "idle": {"sessions": 4, "completed": 4}},
        )
    )
    assert text.index("the server did not answer in time") < text.index("the connection was lost")
    assert row(text, "timeout")[0] == "30"
    assert row(text, "reset")[0] == "2"
    assert "TLS handshake failed" not in text
    assert row(text, "451") == ["30", "0.0", "%"]
    assert row(text, "250") == ["46,500", "75.0", "%"]
    assert row(text, "drip") == ["5", "3", "0"]
    assert row(text, "idle") == ["4", "0", "4"]


def test_what_has_no_rows_is_left_out() -> None:
    text = printed(result(latency_ms={}, replies={}))
    assert "latency" not in text
    assert "replies" not in text
    assert "misbehaviour" not in text


@pytest.mark.parametrize("of", [result(), hostile_result()], ids=["ordinary", "hostile"])
def test_no_terminal_gets_80_columns_of_plain_text(of: Result) -> None:
    text = printed(of)
    assert max(map(len, text.splitlines())) <= 80
    assert not any(raw in text for raw in RAW)


def test_a_terminal_gets_no_control_characters_of_a_peer() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    console.print(render_result(hostile_result()))
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert "\x1b[1m" in written, "its own are there"
    assert "\\x1b[2J" in written, "those of the peer can be read"
    for raw in ("\x1b[2J", "\x1b]", "\x07", "\u202e", "\x9b"):
        assert raw not in written


def test_no_warning_without_a_reason() -> None:
    assert caveats(result(lag_ms=Latency(1000, 0.1, 0.2, 0.9, 3.0, 30.0))) == []
    assert "warning" not in printed(result())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"interrupted": True}, "interrupted: the figures are those of the first 10.0 s"),
        ({"client_cpu_us_per_message": 1160.0}, "the generator was busy 90 % of the time in each process"),
        ({"lag_ms": Latency(1000, 1.0, 2.0, 50.0, 60.0, 70.0)}, "was late (p99 50.0 ms, most 70.0 ms)"),
        ({"errors": {"overrun": 1234}}, "1,234 messages were due while no session was free"),
        ({"messages_unknown": 5}, "5 messages were never answered"),
        ({"limits": ["20,000 descriptors"]}, "limit hit: 20,000 descriptors"),
    ],
)
def test_what_must_be_known_is_said(changes: dict[str, object], expected: str) -> None:
    found = caveats(result(**changes))
    assert len(found) == 1
    assert expected in found[0]
    assert "warning: " + found[0][:30] in printed(result(**changes))


def test_lateness_counts_by_what_it_is_part_of() -> None:
    late = Latency(1000, 1.0, 2.0, 50.0, 60.0, 70.0)
    assert caveats(result(lag_ms=late, latency_ms={"end_of_data": latency(1000.0)})) == []
    assert caveats(result(lag_ms=late, latency_ms={"message": latency(1000.0), "end_of_data": latency(1.0)})) == []
    assert caveats(result(lag_ms=late, latency_ms={})) != []


def test_a_run_that_never_began_has_a_table_too() -> None:
    nothing = replace(result(), seconds=0.0, processes=0, messages_sent=0, rate=0.0, latency_ms={}, replies={})
    assert generator_share(nothing) == 0
    assert "0 accepted/s" in printed(nothing)


def test_figures_as_people_read_them() -> None:
    assert [number(value) for value in (0, 0.004, 0.42, 4.2, 9.996, 42, 99.96, 420, 42_000.4)] == [
        "0", "0.00", "0.42", "4.20", "10.0", "42.0", "100", "420", "42,000",
    ]  # fmt: skip
    assert [number(value) for value in (float("nan"), float("inf"))] == ["–", "–"]
    assert [tick(value) for value in (0, 0.5, 40.0, 2000.0, 0.6000000001)] == ["0", "0.5", "40", "2,000", "0.6"]
    assert [octets(value) for value in (0, 999, 1000, 1_234_567, 2e15)] == [
        "0 octets", "999 octets", "1.00 KB", "1.23 MB", "2,000 TB",
    ]  # fmt: skip
    assert [clock(value) for value in (7.9, 754, 3600, float("inf"))] == ["0:07", "12:34", "1:00:00", "–"]


def test_foreign_text_is_printable_and_short() -> None:
    assert plain("grüße 邮件") == "grüße 邮件"
    assert plain("a\x1b\n\u202e\udc80b") == "a\\x1b\\n\\u202e\\udc80b"
    assert plain(HOSTILE).isprintable()
    assert plain("x" * 1000, 10) == "x" * 9 + "…"
    assert len(plain("\x00" * 1000, 50)) == 50
