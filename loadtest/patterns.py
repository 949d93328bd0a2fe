"""Addresses from a pattern: `user{1..1000}@y.test`, `m{n}@y.test`, `{random}@y.test`.

In: the pattern. Out: for each number 0, 1, 2 ... one address. `{a..b}` counts from a to b and begins again; of several,
the first counts fastest, so that all combinations come. `{n}` is the number itself, `{random}` ten hexadecimal digits.
Always: an address depends on nothing but its number, `{random}` aside; so processes that take different numbers share
a pattern without knowing of each other. `user{01..10}` keeps its zeros.
Not here: which numbers are taken, SMTP commands (content). On failure: LoadError. RFC 5321 4.1.2, ASCII only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from . import LoadError

# One varying part of a pattern: its text for a number.
Part: TypeAlias = Callable[[int], str]

_PART = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_PATH = re.compile(r"[!-;=?A-~]+@[!-;=?A-~]+|postmaster", re.IGNORECASE)  # printable, without <, > and another @
LONGEST = 254  # octets of a path without its brackets, RFC 5321 4.5.3.1.3


@dataclass(frozen=True)
class Pattern:
    """`render` gives the address of a number; `period`: after how many numbers they begin again, 0: never."""

    text: str
    render: Callable[[int], str]
    period: int


def parse_pattern(text: str, rng: Random, null: bool = False) -> Pattern:
    """`rng` is what `{random}` draws from; `null` lets the empty path through, as `<>` or nothing. Raises LoadError."""
    if null and text in ("", "<>"):
        return Pattern("", lambda _: "", 1)
    template = ""
    parts: list[Part] = []
    period = 1
    endless = False
    for index, piece in enumerate(_PART.split(text)):
        if index % 2 == 0:
            template += _check_fixed(text, piece).replace("%", "%%")
            continue
        template += "%s"
        if piece in _ENDLESS:
            parts.append(_ENDLESS[piece](rng))
            endless = True
        else:
            part, count = _range(text, piece, period)
            parts.append(part)
            period *= count
    pattern = Pattern(text, _compile(text, template, parts), 0 if endless else period)
    longest = pattern.render(period - 1)
    if _PATH.fullmatch(longest) is None or len(longest) > LONGEST:
        raise LoadError(f"{text!r} gives {longest!r}, which is no address")
    return pattern


# Parts that never repeat.
_ENDLESS: dict[str, Callable[[Random], Part]] = {
    "n": lambda _: str,
    "random": lambda rng: lambda _: f"{rng.getrandbits(40):010x}",
}


def _check_fixed(text: str, piece: str) -> str:
    if "{" in piece or "}" in piece:
        raise LoadError(f"a brace stands alone in {text!r}")
    return piece


def _range(text: str, piece: str, slower: int) -> tuple[Part, int]:
    """The part, and how many it counts; `slower`: how often all ranges before it count round between two steps."""
    found = _RANGE.fullmatch(piece)
    if found is None or int(found[1]) > int(found[2]):
        raise LoadError(f"{{{piece}}} in {text!r} is none of {{1..1000}}, {{n}}, {{random}}")
    first, width = int(found[1]), len(found[1]) if found[1].startswith("0") else 0
    count = int(found[2]) - first + 1
    return lambda number: f"{first + number // slower % count:0{width}d}", count


def _compile(text: str, template: str, parts: list[Part]) -> Callable[[int], str]:
    """One function; for the usual patterns without a loop over their parts, which halves what an envelope costs."""
    if not parts:
        return lambda _: text
    if parts == [str]:
        return template.__mod__
    if len(parts) == 1:
        part = parts[0]
        return lambda number: template % part(number)
    return lambda number: template % tuple([part(number) for part in parts])


def common_period(sender: Pattern, recipient: Pattern, recipients: int) -> int:
    """After how many messages, each with its sender and so many recipients, all begin again; 0: never."""
    if not sender.period or not recipient.period:
        return 0
    return math.lcm(sender.period, recipient.period // math.gcd(recipient.period, recipients))
