"""Names and addresses that stand for many: how they are written, and whether one of them matches.

In: text of a configuration or a list, and a container of the keys that were made of it, in memory or in a file. Out: a
key, by `parse_pattern` for addresses and `parse_name_pattern` for names; whether an address or name is in the
container: as it is, by its domain, by a parent (`*.x.test`), or because everything is (`*`). Case does not matter.
Raises AddressError. Not here: networks (lists.py).
"""

from __future__ import annotations

from collections.abc import Container

from .address import Address, parse_address, parse_domain

NOBODY = "<>"  # the reverse-path of reports
EVERYTHING = "*"


def parse_pattern(text: str) -> str:
    """Of an address: `ann@x.test`, `x.test` or `@x.test` (the domain), `*.x.test` (all below it), `*`, or `<>`."""
    if text == NOBODY:
        return text
    if "@" in text[1:]:
        return parse_address(text).mailbox
    return parse_name_pattern(text.removeprefix("@"))


def parse_name_pattern(text: str) -> str:
    """Of a name: `x.test`, `*.x.test` (all below it), an address literal, or `*`."""
    wildcard = "*." if text.startswith("*.") else ""
    return text if text == EVERYTHING else wildcard + parse_domain(text.removeprefix(wildcard))


def has_name(patterns: Container[str], name: str) -> bool:
    """Whether a name (lower-case A-labels) is meant."""
    if name in patterns or EVERYTHING in patterns:
        return True
    while "." in name:
        name = name.partition(".")[2]
        if f"*.{name}" in patterns:
            return True
    return False


def has_address(patterns: Container[str], address: Address) -> bool:
    """Whether an address, or NULL, is meant."""
    if not address:
        return NOBODY in patterns or EVERYTHING in patterns
    return address.mailbox in patterns or has_name(patterns, address.domain)
