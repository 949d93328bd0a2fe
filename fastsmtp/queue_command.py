"""`fastsmtp queue ...`: what waits, why, and what an operator does about it.

In: arguments, a configuration. Out: text for a person (on a terminal in colours and wrapped, elsewhere plain lines), or
JSON for programs; exit code 0, 1 (it could not be done, or an id is unknown) or 2 (wrong arguments). Errors are one
line each on standard error. It does not matter whether the server runs. Nothing is done to the queue here
(console.py, administration.py), and how a message is shown stands in queue_text.py.
"""

from __future__ import annotations

import heapq
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec

import click

from .address import AddressError, parse_domain
from .census import Census
from .command_line import JSON_OPTION, config_option, end, member
from .config import Config, default, load
from .console import Answer, Console, ConsoleError, reach
from .ids import is_id
from .queue_text import Printer, number_of, show_census, show_details, show_message
from .selection import EVERYTHING, Selection

P = ParamSpec("P")


@click.group()
def queue() -> None:
    """Show the queue, and change it: on a running server and on a stopped one.

    Whoever may read the data directory may do it: root, and the user that the server runs as.
    """


_command = member(queue, ConsoleError, JSON_OPTION, config_option(without="the embedded default"))


def _selecting(function: Callable[P, None]) -> Callable[P, None]:
    """The arguments that say which mail is meant."""
    for option in (
        click.option("--all", "everything", is_flag=True, help="Everything in the queue."),
        click.option("--domain", metavar="DOMAIN", default="", help="What goes to recipients at this domain."),
        click.argument("ids", nargs=-1, metavar="[ID]..."),
    ):
        function = option(function)
    return function


def _selection(ids: tuple[str, ...], domain: str, everything: bool) -> Selection:
    if bool(ids) + bool(domain) + everything != 1:
        raise click.UsageError("Give either message ids, or --domain DOMAIN, or --all.")
    _check_ids(ids)
    return EVERYTHING if everything else Selection(tuple(dict.fromkeys(ids)), _domain(domain))


def _check_ids(ids: tuple[str, ...]) -> None:
    for one in ids:
        if not is_id(one):
            raise click.UsageError(f"{one!r} is no message id: 20 characters, as in `fastsmtp queue list`.")


def _domain(text: str) -> str:
    try:
        return parse_domain(text) if text else ""
    except AddressError as error:
        raise click.UsageError(f"{text!r} is no domain: {error}.") from None


def _config(file: Path | None) -> Config:
    return load(file) if file else default()


# Questions


@_command
@click.option("--domain", metavar="DOMAIN", default="", help="Only messages with recipients at this domain.")
@click.option(
    "--state",
    type=click.Choice(["new", "deferred", "held"]),
    help="Only messages with such recipients: never tried yet, to be tried again, on hold.",
)
@click.option("--limit", type=click.IntRange(min=0), default=100, show_default=True, help="So many messages; 0: all.")
def _list(file: Path | None, as_json: bool, domain: str, state: str | None, limit: int) -> None:
    """Show the messages in the queue, oldest first.

    With --json: an object in each line, with times in seconds since the epoch.
    """
    # One more than is shown, to know whether there is more.
    request = {"do": "list", "domain": _domain(domain), "state": state or "", "limit": limit and limit + 1}
    with reach(_config(file)) as console:
        answers = [_items(answer) for answer in console.ask(request)]
        messages = heapq.merge(*answers, key=lambda message: float(message["arrived"]))
        printer = Printer()
        empty = True
        for message in itertools.islice(messages, limit or None):
            empty = False
            if as_json:
                click.echo(json.dumps(message))
            else:
                show_message(printer, message)
        if as_json:
            return
        if empty:
            printer.line("Nothing is queued." if not (domain or state) else "Nothing like that is queued.")
        elif limit and next(messages, None) is not None:
            printer.line("There is more: --limit 0 shows all, `fastsmtp queue summary` counts.", "dim")


@_command
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("--headers", is_flag=True, help="Show the header section too.")
def _show(file: Path | None, as_json: bool, ids: tuple[str, ...], headers: bool) -> None:
    """Show all that is known of messages.

    With --json: an object in each line, with times in seconds since the epoch.
    """
    _check_ids(ids)
    with reach(_config(file)) as console:
        request = {"do": "show", **Selection(ids).render(), "headers": headers}
        found: list[dict[str, Any]] = []
        unknown = set(ids)
        for answer in console.ask(request):
            for line in answer:
                if "item" in line:
                    found.append(line["item"])
                elif "done" in line:
                    unknown &= set(line["done"]["unknown"])
    printer = Printer()
    for message in found:
        if as_json:
            click.echo(json.dumps(message))
        else:
            show_details(printer, message)
    _end_unknown(unknown)


@_command
@click.option("--limit", type=click.IntRange(min=0), default=20, show_default=True, help="So many domains; 0: all.")
def _summary(file: Path | None, as_json: bool, limit: int) -> None:
    """Count what waits, by destination, age and last reason: the fullest destination first."""
    census = Census()
    with reach(_config(file)) as console:
        for answer in console.ask({"do": "summary"}):
            for item in _items(answer):
                census.merge(item)
    rendered = census.render()
    if as_json:
        click.echo(json.dumps(rendered, indent=2))
        return
    show_census(Printer(), rendered, limit)


def _items(answer: Answer) -> Iterator[dict[str, Any]]:
    for line in answer:
        if "item" in line:
            yield line["item"]


# Orders


@_command
@_selecting
def _retry(file: Path | None, as_json: bool, ids: tuple[str, ...], domain: str, everything: bool) -> None:
    """Try deferred mail again now, also where its host is held for dead. What is on hold stays there."""
    _order(file, as_json, "retry", _selection(ids, domain, everything))


@_command
@_selecting
def _hold(file: Path | None, as_json: bool, ids: tuple[str, ...], domain: str, everything: bool) -> None:
    """Put mail on hold: it is not tried until it is released. An attempt that is under way goes on."""
    _order(file, as_json, "hold", _selection(ids, domain, everything))


@_command
@_selecting
def _release(file: Path | None, as_json: bool, ids: tuple[str, ...], domain: str, everything: bool) -> None:
    """Release mail that is on hold: it is tried now."""
    _order(file, as_json, "release", _selection(ids, domain, everything))


@_command
@_selecting
@click.option("--yes", is_flag=True, help="Do not ask.")
def _delete(file: Path | None, as_json: bool, ids: tuple[str, ...], domain: str, everything: bool, yes: bool) -> None:
    """Delete mail, without a report to its sender.

    It asks before, or takes --yes. A delivery that is under way cannot be called back: what it leaves is deleted then.
    Messages that were set aside as damaged are deleted when they are named by id.
    """
    _order(file, as_json, "delete", _selection(ids, domain, everything), ask=not yes)


DONE = {"retry": "to be tried now", "hold": "on hold", "release": "released", "delete": "deleted"}
UNDER_WAY = {
    "retry": "being delivered at this moment",
    "hold": "being delivered at this moment: on hold behind that attempt",
    "release": "being delivered at this moment",
    "delete": "being delivered at this moment: what that attempt leaves is deleted behind it",
}


def _order(file: Path | None, as_json: bool, order: str, selection: Selection, ask: bool = False) -> None:
    with reach(_config(file)) as console:
        if ask:
            _confirm(console, selection)
        done, unknown, errors = _collect(console, {"do": order, **selection.render()})
    if as_json:
        click.echo(json.dumps({"order": order, **done, "unknown": sorted(unknown)}))
    else:
        under_way = done["under_way"]
        settled = done["messages"] - (under_way if order != "delete" else 0)
        lines = [f"{number_of(settled, 'message')} {DONE[order]}."]
        if under_way:
            lines.append(f"{number_of(under_way, 'message')} {UNDER_WAY[order]}.")
        click.echo("\n".join(lines))
    for error in errors:
        click.echo(f"fastsmtp: {error}", err=True)
    _end_unknown(unknown)
    if errors:
        sys.exit(1)


def _collect(console: Console, request: dict[str, Any]) -> tuple[dict[str, int], set[str], list[str]]:
    """What was done in all, the ids that nobody knows, and what went wrong."""
    total = {"messages": 0, "recipients": 0, "under_way": 0}
    unknown = set(request["ids"])
    errors = []
    for answer in console.ask(request):
        last: dict[str, Any] = {}
        try:
            for line in answer:
                last = line.get("progress") or line["done"]
                if "done" in line:
                    unknown &= set(last["unknown"])
        except ConsoleError as error:
            errors.append(str(error))
            unknown.clear()
        for name in total:
            total[name] += last.get(name, 0)
    return total, unknown, errors


def _confirm(console: Console, selection: Selection) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("Deleting asks; where nobody can answer, give --yes.")
    counted, _, errors = _collect(console, {"do": "count", **selection.render()})
    if errors:
        raise ConsoleError(errors[0])
    if counted["messages"]:
        what = f"{number_of(counted['messages'], 'message')} ({number_of(counted['recipients'], 'recipient')})"
        click.confirm(f"Delete {what} without a report to the sender?", abort=True, err=True)


def _end_unknown(unknown: Iterable[str]) -> None:
    lines = [f"fastsmtp: {message_id} is not in the queue" for message_id in sorted(unknown)]
    if lines:
        end(*lines)
