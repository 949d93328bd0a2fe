"""The queue as a person reads it in the night: messages, their recipients and reasons, and the summary as a table.

In: what the workers say of it (see administration.py, census.py). Out: lines; on a terminal in colours and wrapped
behind their indentation, elsewhere plain and whole. A line has 80 columns as long as no address, reason or figure is
too long for that. What a peer said is shown with control characters escaped: it must not reach the terminal as it came.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import click

from .census import AGES

SHOWN_REASONS = 3  # of a domain, in the summary


class Printer:
    """Prints lines: on a terminal with colours, and wrapped behind their indentation; elsewhere as they are."""

    def __init__(self) -> None:
        self._console: Any = None
        if sys.stdout.isatty():
            from rich.console import Console as Terminal  # 0.1 s that a pipe need not wait

            self._console = Terminal(highlight=False, soft_wrap=False)

    def line(self, text: str, style: str = "", indent: int = 0) -> None:
        if self._console is None:
            click.echo(" " * indent + text)
            return
        from rich.padding import Padding
        from rich.text import Text

        self._console.print(Padding(Text(text, style), (0, 0, 0, indent), expand=False))


def show_message(printer: Printer, message: dict[str, Any]) -> None:
    now = time.time()
    if message.get("damaged"):
        printer.line(f"{message['id']}  damaged: its record cannot be read", "bold red")
        return
    under_way = ", under way" if message["under_way"] else ""
    age = span(now - message["arrived"])
    printer.line(
        f"{message['id']}  {age:>6}  {octets(message['size']):>7}  from <{shown(message['from'])}>{under_way}", "bold"
    )
    for recipient in message["recipients"]:
        printer.line(f"<{shown(recipient['to'])}>  {_state(recipient, now)}", indent=4)
        if recipient["reason"]:
            printer.line(shown(recipient["reason"]), "yellow", indent=8)


def _state(recipient: dict[str, Any], now: float) -> str:
    tried = f" after {number_of(recipient['attempts'], 'attempt')}" if recipient["attempts"] else ""
    if recipient["state"] == "held":
        return f"on hold{tried}"
    if recipient["state"] == "new":
        return "not tried yet"
    wait = recipient["next"] - now
    return f"deferred{tried}, next {f'in {span(wait)}' if wait > 0 else 'now'}"


def show_details(printer: Printer, message: dict[str, Any]) -> None:
    if "recipients" in message:
        show_message(printer, message)
        arrived = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(message["arrived"]))
        client = f"[{message['client']}]" if message["client"] else "this machine"
        printer.line(
            f"arrived {arrived} from {client}, which called itself {shown(message['helo']) or '(nothing)'}, "
            f"with {message['protocol']}; {message['size']} octets",
            indent=4,
        )
    else:
        printer.line(message["id"], "bold")
    if message.get("set_aside"):
        since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(message["set_aside"]["since"]))
        printer.line(f"set aside {since}, undelivered: {shown(message['set_aside']['why'])}", "bold red", indent=4)
    if "headers" in message:
        printer.line("")
        for line in message["headers"].rstrip("\r\n").split("\n"):
            printer.line(shown(line.removesuffix("\r")), indent=4)


def show_census(printer: Printer, census: dict[str, Any], limit: int) -> None:
    domains = census["domains"]
    now = time.time()
    if not domains and not census["set_aside"]:
        printer.line("Nothing is queued.")
        return
    if domains:
        ages = [f"<{span(age)}" for age in AGES]
        printer.line(_row("", ["total", *ages, "older", "held"], "next"), "bold")
    for domain, place in itertools.islice(domains.items(), limit or None):
        due = place["next"]
        wait = "-" if due is None else "now" if due <= now else span(due - now)
        figures = [str(figure or "-") for figure in (place["recipients"], *place["ages"], place["held"])]
        printer.line(_row(shown(domain), figures, wait))
        reasons = [(reason, count) for reason, count in place["reasons"].items() if reason]
        for reason, count in reasons[:SHOWN_REASONS]:
            printer.line(f"{count} × {shown(reason)}", "yellow", indent=4)
        if len(reasons) > SHOWN_REASONS:
            printer.line(f"and {len(reasons) - SHOWN_REASONS} more reasons", "dim", indent=4)
    if limit and len(domains) > limit:
        printer.line(f"and {len(domains) - limit} more domains: --limit 0 shows all", "dim")
    printer.line("")
    printer.line(f"{number_of(census['recipients'], 'recipient')} of {number_of(census['messages'], 'message')}")
    if census["set_aside"]:
        printer.line(
            f"{number_of(census['set_aside'], 'message')} set aside as damaged: the log says which", "bold red"
        )


def _row(domain: str, figures: list[str], wait: str) -> str:
    """80 columns, as long as no name or figure is too long."""
    return f"{domain:<23} {figures[0]:>8}" + "".join(f"{figure:>7}" for figure in figures[1:]) + f"{wait:>6}"


def number_of(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def shown(text: str) -> str:
    """What a peer said, for a terminal: whatever is not printable is escaped."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\t" else f"\\x{ord(c) & 0xFF if 0xDC80 <= ord(c) <= 0xDCFF else ord(c):02x}"
        for c in text
    )


def span(seconds: float) -> str:
    """A time in its two greatest units: "45s", "12m", "3h20m", "2d4h"."""
    rest = max(0, int(seconds))
    for unit, letter, below, small in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m")):
        if rest >= unit:
            more = rest % unit // below
            return f"{rest // unit}{letter}" + (f"{more}{small}" if more else "")
    return f"{rest // 60}m" if rest >= 60 else f"{rest}s"


def octets(number: int) -> str:
    """A size: "512", "2.1KB", "50MB"."""
    size, unit = float(number), ""
    for unit in ("", "KB", "MB", "GB"):
        if size < 1024 or unit == "GB":
            break
        size /= 1024
    return f"{number}" if not unit else f"{size:.0f}{unit}" if size >= 10 else f"{size:.1f}{unit}"
