"""Which queued mail an operator or a client means: messages by id, what goes to a domain, or everything.

A value, with its form in JSON, in which it goes from the command line to the workers. Exactly one of the three is
set: an empty selection would have to mean nothing to one reader and everything to another. Raises ValueError for
anything else. Domains are lower-case A-labels, as in Address. Nothing here looks into a spool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .ids import is_id, key_of


class Selection(NamedTuple):
    """Exactly one of them is set."""

    ids: tuple[str, ...] = ()
    domain: str = ""
    everything: bool = False

    @property
    def keys(self) -> list[int]:
        """The keys in the ids."""
        return [key_of(message_id) for message_id in self.ids]

    def render(self) -> dict[str, object]:
        """For JSON."""
        return {"ids": list(self.ids), "domain": self.domain, "everything": self.everything}


EVERYTHING = Selection(everything=True)


def parse_selection(values: Mapping[str, object]) -> Selection:
    """What `render` gave, in a mapping that may hold more. Raises ValueError."""
    ids, domain, everything = values.get("ids") or [], values.get("domain") or "", values.get("everything") or False
    if not isinstance(ids, list) or not isinstance(domain, str) or not isinstance(everything, bool):
        raise ValueError("ids, domain or everything have the wrong type")
    for one in ids:
        if not isinstance(one, str) or not is_id(one):
            raise ValueError(f"{one!r} is no message id")
    if bool(ids) + bool(domain) + everything != 1:
        raise ValueError("exactly one of ids, domain and everything is to be given")
    return Selection(tuple(dict.fromkeys(ids)), domain, everything)
