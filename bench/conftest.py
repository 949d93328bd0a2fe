"""Shows what a benchmark noted beside its times (GB/s, messages/s) in a table of its own."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [(bench.name, bench.extra_info) for bench in session.benchmarks if bench.extra_info] if session else []
    if rows:
        terminalreporter.section("figures")
    for name, info in rows:
        terminalreporter.write_line(f"{name:52} " + "  ".join(f"{value:>12} {unit}" for unit, value in info.items()))
