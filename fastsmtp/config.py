"""The configuration: one TOML file, decoded into frozen, typed values.

In: a file's path. Out: a `Config`, or a `ConfigError` with every problem of the file: its line, its path, and
what was expected. The tables stand in config_tables.py and config_outgoing.py, their values in config_values.py;
everyone else takes them from here. Not here: anything that asks the machine (certificates, folders, users);
`fastsmtp check` does that (check.py).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .config_access import Alias, Rule
from .config_auth import Auth, AuthDovecot, AuthOauth, AuthSql
from .config_conflicts import find_conflicts, nearest
from .config_inbound import AheadLookup, Inbound, Postgresql, Sql, Sqlite, SqlLookup
from .config_lists import InFile
from .config_outgoing import Discard, Dns, Lmtp, Maildir, Odmr, Pipe, Queue, Relay, Route, Smtp, Transport
from .config_sections import FIXED, SECTIONS, Section, default_of, kind_of, section_at
from .config_submission import Submission
from .config_tables import Config, Customer, Domain, Limits, Listener, Log, Spool, Timeouts, Tls, Withhold
from .config_values import Endpoint, Inet, Unix
from .config_warnings import warnings
from .toml_lines import Lines, Place

__all__ = [
    "CONFIG_VARIABLE", "DEFAULT", "FIXED", "SECTIONS", "AheadLookup", "Alias", "Auth", "AuthDovecot",
    "AuthOauth", "AuthSql", "Config", "ConfigError", "Customer", "Discard", "Dns", "Domain", "Endpoint", "InFile",
    "Inbound", "Inet", "Limits", "Listener", "Lmtp", "Log", "Maildir", "Odmr", "Pipe", "Postgresql", "Problem", "Queue",
    "Relay", "Route", "Rule", "Section", "Smtp", "Spool", "Sql", "SqlLookup", "Sqlite", "Submission",
    "Timeouts", "Tls", "Transport", "Unix", "Withhold", "default", "default_of", "kind_of", "load", "parse",
    "problem_at", "warnings",
]  # fmt: skip

CONFIG_VARIABLE = "FASTSMTP_CONFIG"  # names the file where no option does

DEFAULT = """\
[[listener]]
address = "127.0.0.1:2525"

[[domain]]
name       = "*"
recipients = "any"
transport  = "mailboxes"

[transport.mailboxes]
type = "maildir"
path = "fastsmtp-data/mail/{domain}/{local}"
"""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `line` is 0 and `path` empty where there is none."""

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigError(Exception):
    """All that is wrong with a configuration."""

    def __init__(self, errors: list[Problem]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "model_type": "a table",
    "string_type": "text in quotes",
    "too_short": "at least one entry",
    "tuple_type": "a list",
    "value_error": "{error}",
}


def load(path: Path) -> Config:
    """The configuration that a file holds. Raises ConfigError."""
    try:
        octets = path.read_bytes()
    except OSError as error:
        raise ConfigError([Problem(str(path), 0, "", f"cannot be read: {error.strerror}")]) from None
    try:
        text = octets.decode()
    except UnicodeDecodeError as error:
        line = octets.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(str(path), line, "", "not UTF-8")]) from None
    return parse(text, path.absolute().parent, str(path))


def default() -> Config:
    """What holds without a file."""
    return parse(DEFAULT, Path.cwd(), "(default)")


def parse(text: str, folder: Path, file: str) -> Config:
    """What a text says; relative paths start at `folder`, problems name `file`. Raises ConfigError."""
    text = text.replace("\r\n", "\n")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # Messages end in "(at line 3, column 5)" or "(at end of document)".
        message, _, place = str(error).partition(" (at ")
        found = re.match("line ([0-9]+)", place)
        line = int(found[1]) if found else text.count("\n") + 1
        raise ConfigError([Problem(file, line, "", f"not TOML: {message}")]) from None
    except RecursionError:
        raise ConfigError([Problem(file, 0, "", "nested too deeply")]) from None
    try:
        return Config.model_validate(document, context=folder)
    except ValidationError as error:
        details = [detail for detail in error.errors() if not _is_consequence(detail)]
        wrong = dict.fromkeys(_explain(detail, document) for detail in details)
    wrong |= dict.fromkeys(find_conflicts(document))
    lines = Lines(text)
    problems = [Problem(file, lines.line(place), _render_place(place), message) for place, message in wrong]
    raise ConfigError(sorted(problems, key=lambda problem: problem.line))


def problem_at(file: Path, place: Place, message: str) -> Problem:
    """A problem of a file that was loaded without one, found by asking the machine."""
    lines = Lines(file.read_text(encoding="utf-8"))
    return Problem(str(file), lines.line(place), _render_place(place), message)


def _render_place(place: Place) -> str:
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += "." + (step if re.fullmatch("[A-Za-z0-9_-]+", step) else json.dumps(step))
    return text.removeprefix(".")


def _is_consequence(detail: ErrorDetails) -> bool:
    """Whether it says nothing but that another error of the same table or list is there."""
    return detail["type"] == "default_factory_not_called" or (detail["type"] == "too_short" and detail["input"])


def _explain(detail: ErrorDetails, document: dict[str, Any]) -> tuple[Place, str]:
    """Where an error of pydantic's stands in the document, and what it means."""
    kind, place = detail["type"], detail["loc"]
    steps = tuple(step for step in place if not str(step).startswith("<"))
    match kind:
        case "conflict":
            return steps, detail["msg"]
        case "extra_forbidden":
            return steps, f"unknown key{_suggest(str(place[-1]), place[:-1])}"
        case "missing":
            field = section_at(place[:-1]).keys[str(place[-1])]
            return steps, f"missing; expected {kind_of(field)} ({str(field.description).removesuffix('.')})"
        case "union_tag_invalid" if isinstance(detail["input"], dict):
            expected = _either(section.choice for section in SECTIONS if section.choice)
            steps = (*steps, "type")
        case "union_tag_invalid":
            expected = "a table"
        case "tuple_type" if isinstance(detail["input"], dict):
            expected = f"a list, each of its tables under [[{'.'.join(s for s in steps if isinstance(s, str))}]]"
        case _:
            expected = _EXPECTED[kind].format_map(detail.get("ctx", {})).replace("'", '"')
    found: Any = document
    for end, step in enumerate(steps):
        if not isinstance(found, dict | list):  # a text that was taken for a list of one
            steps = steps[:end]
            break
        found = found[int(step)] if isinstance(found, list) else found.get(step)
    return steps, f"expected {expected}, found {_render_found(found)}"


def _render_found(value: object) -> str:
    if value is None or isinstance(value, dict | list):
        return "nothing" if value is None else "a table" if isinstance(value, dict) else "a list"
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _either(words: Iterable[str]) -> str:
    *others, last = map(json.dumps, words)
    return f"{', '.join(others)} or {last}" if others else last


def _suggest(key: str, place: Place) -> str:
    here = section_at(place)
    having = [section for section in SECTIONS if key in section.keys and section is not here]
    siblings = [section.choice for section in having if section.heading == here.heading]
    if siblings:
        return f"; it is for type {_either(siblings)}"
    known = here.model.model_fields
    homes = list(dict.fromkeys(section.heading for section in having))
    if near := nearest(key, known):
        return near
    return f"; it belongs in {' or '.join(homes)}" if homes and all(homes) else f"; known here: {', '.join(known)}"
