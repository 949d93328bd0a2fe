"""What there is to configure, for people: each kind of table with its keys, found in the models themselves.

In: the models. Out: SECTIONS, in the order of the file, and what of them a reload leaves as it was (FIXED); a key's
type and default as words. `section_at` finds the kind of the table at a place of a document, so that an error can say
what would be known there. Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

from pydantic import Tag
from pydantic.fields import FieldInfo

from .config_tables import Config
from .config_values import Kind, Restart, Table, Unset, show
from .toml_lines import Place


@dataclass(frozen=True)
class Section:
    """A kind of table. In its place "#" is any index, "NAME" any name, "<x>" one of several types."""

    place: tuple[str, ...]
    model: type[Table]

    @property
    def heading(self) -> str:
        """As it stands above its keys in a file; empty at the top."""
        path = ".".join(step for step in self.place if step != "#" and step[0] != "<")
        return f"[[{path}]]" if self.place[-1:] == ("#",) else f"[{path}]" if path else ""

    @property
    def choice(self) -> str:
        """The `type` that it is for; empty where there is no choice."""
        return self.place[-1].strip("<>") if self.place and self.place[-1][0] == "<" else ""

    @property
    def keys(self) -> dict[str, FieldInfo]:
        """Its keys that are not tables themselves."""
        fields = self.model.model_fields.items()
        return {name: field for name, field in fields if not any(_find_sections(field.annotation, ()))}


def _find_sections(kind: object, place: tuple[str, ...]) -> Iterator[Section]:
    if isinstance(kind, type) and issubclass(kind, Table):
        yield Section(place, kind)
        for name, field in kind.model_fields.items():
            yield from _find_sections(field.annotation, (*place, name))
        return
    origin = get_origin(kind)
    step = ("#",) if origin is tuple else ("NAME",) if origin is dict else ()
    for argument in get_args(kind):
        tags = tuple(data.tag for data in getattr(argument, "__metadata__", ()) if isinstance(data, Tag))
        yield from _find_sections(argument, (*place, *step, *tags))


SECTIONS = list(_find_sections(Config, ()))


@dataclass(frozen=True)
class Fixed:
    """What only a restart changes: a key of a kind of table, or a whole table that stands at the top of the file."""

    section: Section
    key: str

    def __str__(self) -> str:
        heading = self.section.heading
        if not heading:
            return self.key if self.key in self.section.keys else f"[{self.key}]"
        return f"{heading} {self.key}" if heading[:2] == "[[" else f"{heading[1:-1]}.{self.key}"


FIXED = [
    Fixed(section, name)
    for section in SECTIONS
    for name, field in section.model.model_fields.items()
    if any(isinstance(data, Restart) for data in field.metadata)
]


def section_at(place: Place) -> Section:
    """The kind of the table at a place, which has the tags of unions in it."""
    return next(
        section
        for section in SECTIONS
        if len(section.place) == len(place)
        and all(have in ("#", "NAME", step) for have, step in zip(section.place, place, strict=True))
    )


def kind_of(field: FieldInfo) -> str:
    """How a key's type is called."""
    for data in field.metadata:
        if isinstance(data, Kind):
            return data.name
    if get_origin(field.annotation) is Literal:
        *choices, last = map(show, get_args(field.annotation))
        return f"{', '.join(choices)} or {last}" if choices else last
    return "true or false" if field.annotation is bool else "text"


def default_of(field: FieldInfo) -> str:
    """What holds where the key is left out, in Markdown; empty where it must be given."""
    for data in field.metadata:
        if isinstance(data, Unset):
            return data.text
    if field.is_required():
        return ""
    render = next((data.show for data in field.metadata if isinstance(data, Kind)), show)
    return f"`{render(field.default)}`"
