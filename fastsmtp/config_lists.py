"""Lists in a configuration that may be long: named there, or in a file of their own, which is read elsewhere.

In: what tomllib made of them. Out: a tuple of patterns (patterns.py) or of networks (ipaddress), or the path of the
file (`InFile`), of which no line is read here. Tables that have such lists say so by the annotated types at the end.
Not here: the files' contents (list_compile.py), which mailboxes there are (config_access.py). Raises ValueError with
what was expected, to which config.py adds what was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, PlainValidator, Tag, ValidationInfo

from .address import AddressError
from .config_values import Kind, Network, parse_path
from .patterns import parse_name_pattern, parse_pattern


@dataclass(frozen=True)
class InFile:
    """A list in a file of its own, one entry a line."""

    path: Path

    def __str__(self) -> str:
        return f"file {self.path}"


def parse_in_file(value: object, info: ValidationInfo) -> InFile:
    if isinstance(value, InFile):
        return value
    if isinstance(value, dict) and list(value) == ["file"]:
        return InFile(parse_path(value["file"], info))
    raise ValueError('{file = "PATH"}')


def check_name(value: str) -> str:
    try:
        return parse_name_pattern(value)
    except AddressError as error:
        raise ValueError(f'a name such as "x.test" or "*.x.test" ({error})') from None


def check_address(value: str) -> str:
    try:
        return parse_pattern(value)
    except AddressError as error:
        raise ValueError(f'an address, a domain, "*.x.test" or "<>" ({error})') from None


def _kind_of(value: object) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<file>"


_File: TypeAlias = Annotated[InFile, PlainValidator(parse_in_file)]
_Kind = Discriminator(_kind_of)

NetworkList: TypeAlias = Annotated[
    Annotated[tuple[Network, ...], Field(min_length=1), Tag("<list>")] | Annotated[_File, Tag("<file>")],
    _Kind,
    Kind("list of networks, or {file = path}"),
]
PerhapsNetworks: TypeAlias = Annotated[
    Annotated[tuple[Network, ...], Tag("<list>")] | Annotated[_File, Tag("<file>")],
    _Kind,
    Kind("list of networks, or {file = path}"),
]
NameList: TypeAlias = Annotated[
    Annotated[tuple[Annotated[str, AfterValidator(check_name)], ...], Field(min_length=1), Tag("<list>")]
    | Annotated[_File, Tag("<file>")],
    _Kind,
    Kind("list of names, or {file = path}"),
]
AddressList: TypeAlias = Annotated[
    Annotated[tuple[Annotated[str, AfterValidator(check_address)], ...], Field(min_length=1), Tag("<list>")]
    | Annotated[_File, Tag("<file>")],
    _Kind,
    Kind("list of addresses, or {file = path}"),
]
