"""What a user may send as, as text: addresses and `@domain`s with commas between them.

In: such a text, and the user's name. Out: `Rights`, with the user's own address in them; domains become A-labels,
addresses the keys of their mailboxes. `*` is every address there is. ValueError names what is neither.
"""

from __future__ import annotations

from ..address import AddressError, parse_address, parse_domain
from ..rights import Rights
from . import own_rights


def parse_sender(text: str) -> str:
    """One of them in its canonical form. Raises ValueError."""
    if text == "*":
        return text
    try:
        if text.startswith("@"):
            return f"@{parse_domain(text[1:])}"
        address = parse_address(text)
        if address.domain and "," not in address.mailbox and ":" not in address.mailbox:
            return address.mailbox
    except AddressError:
        pass
    raise ValueError(f'{text!r} is neither an address nor "@domain" nor "*"')


def parse_senders(text: str, name: str, domain: str) -> Rights:
    """Of the user `name`, whose address is `name@domain` where the name is none."""
    words = [parse_sender(word) for each in text.split(",") if (word := each.strip())]
    own = own_rights(name, domain).addresses
    return Rights(
        own.union(word for word in words if word[0] not in "@*"),
        frozenset(word.removeprefix("@") for word in words if word[0] in "@*"),
    )
