"""Where everything stands in a TOML document; tomllib keeps no lines, and an error without one is half an error.

In: a text that tomllib has accepted, which is why nothing is checked here. Out: the line of any key, table or
list item, by its place: keys and list indices from the top, such as ("listener", 1, "address"). Table headers,
arrays of tables, dotted and quoted keys, inline tables and lists are followed; other values are stepped over.
It runs only when a file is wrong, so it is short rather than fast. TOML 1.0; inline tables of 1.1 do no harm.
"""

from __future__ import annotations

import re
import tomllib
from typing import TypeAlias

Place: TypeAlias = tuple[str | int, ...]


class Lines:
    """Where everything stands in a TOML document that tomllib, which keeps no lines, has found to be one."""

    _TOKEN = re.compile(
        r"""(?P<blank>[ \t]+|\#[^\n]*)
        | \"{3} (?:[^\\]|\\.)*? \"{3} (?!") | '{3} .*? '{3} (?!') | "(?:[^"\\]|\\.)*" | '[^']*'
        | [^][{}=,.\s\#"']+ | .""",
        re.DOTALL | re.VERBOSE,
    )

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, int]] = []
        self._next = 0
        self._lines: dict[Place, int] = {}
        self._last: dict[Place, int] = {}  # array of tables -> index of its last element
        line = 1
        for match in self._TOKEN.finditer(text):
            if not match["blank"]:
                self._tokens.append((match[0], line))
            line += match[0].count("\n")
        self._tokens.append(("", line))
        self._take_document()

    def line(self, place: Place) -> int:
        """The line of a place, or of the nearest thing around it."""
        while place and place not in self._lines:
            place = place[:-1]
        return self._lines.get(place, 1)

    def _note(self, place: Place) -> None:
        for end in range(1, len(place) + 1):
            self._lines.setdefault(place[:end], self._tokens[self._next][1])

    def _peek(self) -> str:
        return self._tokens[self._next][0]

    def _take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1][0]

    def _take_all(self, tokens: str) -> None:
        while self._peek() and self._peek() in tokens:
            self._next += 1

    def _take_document(self) -> None:
        table: Place = ()
        while self._peek():
            if self._peek() == "\n":
                self._take()
            elif self._peek() != "[":
                self._take_pair(table)
            else:
                table = self._take_header()

    def _take_header(self) -> Place:
        self._take()
        is_array = self._peek() == "["
        self._take_all("[")
        table: Place = ()
        for key in (keys := self._take_key())[:-1]:
            table = (*table, key)
            if table in self._last:
                table = (*table, self._last[table])
        table = (*table, keys[-1])
        if is_array:
            self._last[table] = self._last.get(table, -1) + 1
            table = (*table, self._last[table])
        self._note(table)
        self._take_all("]")
        return table

    def _take_key(self) -> list[str]:
        keys: list[str] = []
        while not keys or self._peek() == ".":
            self._take_all(".")
            keys += tomllib.loads(f"{self._take()} = 0")
        return keys

    def _take_pair(self, table: Place) -> None:
        place = (*table, *self._take_key())
        self._note(place)
        self._take()
        self._take_value(place)

    def _take_value(self, place: Place) -> None:
        start = self._take()
        if start == "[":
            index = 0
            self._take_all("\n")
            while self._peek() != "]":
                self._note((*place, index))
                self._take_value((*place, index))
                self._take_all("\n,")
                index += 1
            self._take()
        elif start == "{":
            self._take_all("\n")
            while self._peek() != "}":
                self._take_pair(place)
                self._take_all("\n,")
            self._take()
        elif start[0] not in "\"'":  # a number or a date: points and blanks may stand in it
            while self._peek() not in ("\n", ",", "]", "}", ""):
                self._take()
