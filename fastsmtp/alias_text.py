"""The text of aliases: what an entry says, and whether all of them together end somewhere.

In: an entry of the text (`NAME: ADDRESS, ADDRESS`, lines that go on already joined). Out: its key, and its targets as
aliases.Entry has them. Names and addresses may be quoted; one without a domain is in that of the alias. Programs, files
and included lists are no addresses here. `check_expansion` finds what names itself by way of others, or is too large.
Raises AddressError for an entry, ListError with the line for all of them. Not here: reading a file (list_compile.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .address import Address, AddressError, parse_address
from .lists import ListError

MEMBERS = 20_000  # of an alias, with those of aliases in it

_NAME = re.compile(r'((?:"(?:[^"\\]|\\.)*"|[^":])*):')
_TARGET = re.compile(r'\s*((?:"(?:[^"\\]|\\.)*"|[^",\s])+)\s*(?:,|$)')


def parse_alias(line: str) -> tuple[str, tuple[str, ...]]:
    """The key, and the targets as `Entry` has them."""
    name = _NAME.match(line)
    if name is None:
        raise AddressError('there is no ":"')
    rest = line[name.end() :]
    members = []
    place = 0
    while place < len(rest.rstrip()):
        match = _TARGET.match(rest, place)
        if match is None:
            raise AddressError("addresses stand between commas")
        members.append(_parse_target(match[1]))
        place = match.end()
    if not members:
        raise AddressError("it stands for nobody")
    return _parse_target(name[1].strip(), key=True), tuple(members)


def _parse_target(text: str, key: bool = False) -> str:
    if text.startswith(("/", "|", ":", '"|', '"/')):
        raise AddressError("files, programs and included lists are not written to; see the transports")
    bare = not _has_domain(text)
    address: Address = parse_address(f"{text}@local.invalid" if bare else text)
    if key:
        return address.mailbox.rpartition("@")[0] if bare else address.mailbox
    return f"{address.local}@{'' if bare else address.domain}"


def _has_domain(text: str) -> bool:
    return "@" in re.sub(r'"(?:[^"\\]|\\.)*"', "", text)


def check_expansion(file: Path, targets: dict[str, tuple[str, ...]], numbers: dict[str, int]) -> None:
    """Raises ListError for a loop, and for an alias that grows too large. One that names itself is none: it keeps its
    mailbox."""
    sizes: dict[str, int] = {}
    for start in targets:
        path: list[tuple[str, Iterator[str]]] = [] if start in sizes else [(start, _inner(start, targets))]
        open_ = {start}
        while path:
            name, rest = path[-1]
            inner = next(rest, None)
            if inner is None:
                path.pop()
                open_.discard(name)
                sizes[name] = sum(sizes.get(key, 1) for key in _keys(name, targets[name]))
                if sizes[name] > MEMBERS:
                    raise ListError(file, numbers[name], f"{name} stands for more than {MEMBERS} addresses")
            elif inner in open_:
                names = [key for key, _ in path]
                way = " -> ".join([*names[names.index(inner) :], inner])
                raise ListError(file, numbers[name], f"a loop: {way}")
            elif inner not in sizes:
                path.append((inner, _inner(inner, targets)))
                open_.add(inner)


def _inner(name: str, targets: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """The aliases that an alias names, itself left out."""
    return (key for key in _keys(name, targets[name]) if key in targets and key != name)


def _keys(name: str, members: Iterable[str]) -> Iterator[str]:
    """Where the members of an alias are looked up: in its own domain where they name none."""
    domain = name.rpartition("@")[2] if "@" in name else ""
    for member in members:
        local, _, named = member.rpartition("@")
        key = Address(local, named or domain).mailbox
        yield key.removesuffix("@")
