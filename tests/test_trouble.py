"""What is said of troubles, and how often."""

from __future__ import annotations

from pathlib import Path

from keeping import Yard

from fastsmtp.trouble import INTERVAL_SECONDS, Trouble


def test_one_line_per_place_and_interval(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    now = 100.0
    trouble = Trouble(yard.log, "x", lambda: now)
    trouble.ends()
    for _ in range(3):
        trouble.begins("commit", "no")
        trouble.begins("recovery", "no")
        trouble.warn("body", "odd")
    now += 2
    trouble.ends()
    trouble.begins("commit", "no")
    trouble.ends()  # its beginning was not told
    assert [(line["event"], line.get("where"), line.get("seconds")) for line in yard.lines()] == [
        ("spool-trouble", "commit", None),
        ("spool-trouble", "recovery", None),
        ("spool-warning", "body", None),
        ("spool-well", None, 2.0),
    ]
    now += INTERVAL_SECONDS
    trouble.begins("commit", "still")
    assert yard.lines()[-1]["why"] == "still"
