"""What submission does to a message of a user, and who may stand in its header.

In: how a listener handles it, the header section, who submits. Out: `Changes`: fields that go in front, ranges of the
header that are cut out; or the Reply that refuses. The sender's octets themselves stay as they are (long lines are
another matter: rewrite.py). A header that two readers could take for two different ones is refused, not repaired, as
the author that was checked must be the one that is shown: bare CR or LF, a line that is no field, From twice.
A message without any header gets one. Without `complete` nothing is added or taken out, only checked.
Not here: the reverse-path (policy/senders.py), Received (message.py). RFC 6409 6, 8; RFC 5322 3.6; RFC 6854.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, TypeAlias

from .address import Address, AddressError, parse_address
from .header import Field, Header, HeaderError, parse_mailboxes, read_header
from .reply import (
    R550_AUTHOR_NEEDS_SENDER,
    R550_AUTHOR_UNCLEAR,
    R550_FROM_NOT_YOURS,
    R550_HEADER_MALFORMED,
    R550_RESENT_NOT_YOURS,
    R550_SENDER_NOT_YOURS,
    Reply,
)
from .rights import Rights

Cuts: TypeAlias = tuple[tuple[int, int], ...]

BLIND = ("bcc", "resent-bcc")

# To whoever takes any line end for one, and reads on behind what is no field.
_ANY_BCC = re.compile(rb"(?:\A|[\r\n])(?:resent-)?bcc[ \t]*:", re.IGNORECASE)
MOST_AUTHORS = 100  # of one From: each takes up to 0.3 ms to read


class Handling(NamedTuple):
    """What a listener does. `author`: about a From that is not the user's: "refuse", "add_sender" or "off". `complete`:
    missing fields are added and Bcc is taken out, where `remove_bcc`. `hide_client`: Received does not say where it
    came from. `rewrite`: long lines are made quoted-printable.
    """

    author: Literal["refuse", "add_sender", "off"] = "refuse"
    complete: bool = True
    remove_bcc: bool = True
    hide_client: bool = False
    rewrite: bool = False


class Submitter(NamedTuple):
    """Who submits, and what is known of the message besides its header. `date` as in the Date field."""

    user: str
    rights: Rights
    reverse_path: Address
    hostname: str
    message_id: str
    date: str

    @property
    def address(self) -> Address:
        """Whom mail of the user is from, where it does not say."""
        if self.reverse_path:
            return self.reverse_path
        names = [self.user, *sorted(self.rights.addresses)]
        local = self.user.partition("@")[0]
        names += [f"{local}@{domain}" for domain in sorted(self.rights.domains - {"*"})]
        for name in names:
            try:
                address = parse_address(name)
            except AddressError:
                continue
            if self.rights.allows(address):
                return address
        return Address(local, self.hostname)


class Changes(NamedTuple):
    """`added` goes in front of the message, `cuts` are left out of it. `headless`: it has no header of its own, and
    `added` is all of it, with its empty line."""

    added: bytes
    cuts: Cuts
    headless: bool = False


def prepare(handling: Handling, octets: bytes, submitter: Submitter) -> Changes | Reply:
    """What is done to a message whose header section, with its empty line, is `octets`."""
    header = read_header(octets)
    rest = octets[header.end :]
    ends_well = rest in (b"", b"\r\n") and (handling.complete or not header.start)
    headless = handling.complete and not header.fields and not ends_well
    if handling.author != "off" and not headless and not (ends_well and _is_plain(octets)):
        return R550_HEADER_MALFORMED
    fields: dict[str, list[Field]] = {}
    for field in header.fields:
        fields.setdefault(field.name, []).append(field)
    if handling.complete and handling.remove_bcc:
        # One that cannot be cut would tell everybody who must not be told.
        found = sum(len(fields.get(name, ())) for name in BLIND)
        if len(_ANY_BCC.findall(octets)) != found:
            return R550_HEADER_MALFORMED
    cuts: list[tuple[int, int]] = []
    names_sender = False
    if handling.author != "off":
        verdict = _check_author(handling, fields, submitter)
        if isinstance(verdict, Reply):
            return verdict
        names_sender = verdict
    if names_sender:
        cuts += [field[1:3] for field in fields.pop("sender", [])]
    added = _complete(handling, fields, cuts, header, submitter)
    if names_sender:
        added = render_missing((), {"Sender": submitter.address.wire}) + added
    return Changes(added + b"\r\n" * headless, tuple(sorted(cuts)), headless)


def _is_plain(octets: bytes) -> bool:
    """Whether its lines are the same to everybody."""
    ends = octets.count(b"\r\n")
    return octets.count(b"\n") == ends == octets.count(b"\r") and b"\0" not in octets


def render_missing(there: Collection[str], fields: Mapping[str, str]) -> bytes:
    """The fields whose names, in lower case, are not `there`."""
    return "".join([f"{name}: {value}\r\n" for name, value in fields.items() if name.lower() not in there]).encode()


def _complete(
    handling: Handling,
    fields: Mapping[str, list[Field]],
    cuts: list[tuple[int, int]],
    header: Header,
    submitter: Submitter,
) -> bytes:
    """What is missing (RFC 6409 8.1 to 8.3); what is to go is added to `cuts`."""
    if not handling.complete:
        return b""
    if header.start:
        cuts.append((0, header.start))
    if handling.remove_bcc:
        cuts += [field[1:3] for name in BLIND for field in fields.get(name, ())]
    wanted = {
        "From": submitter.address.wire,
        "Date": submitter.date,
        "Message-ID": f"<{submitter.message_id}@{submitter.hostname}>",
    }
    # A message that is passed on by its reader says so above all that it said before (RFC 5322 3.6.6).
    resent = any(name.startswith("resent-") for name in fields)
    again = {f"Resent-{name}": value for name, value in wanted.items()} if resent else {}
    return render_missing(fields, again | wanted)


def _check_author(handling: Handling, fields: Mapping[str, list[Field]], submitter: Submitter) -> bool | Reply:
    """Whether a Sender has to be added, in the place of one that there is; or the refusal."""
    if any(len(fields.get(name, ())) > 1 for name in ("from", "sender")):
        return R550_AUTHOR_UNCLEAR
    try:
        authors, senders = _mailboxes(fields, "from"), _mailboxes(fields, "sender")
        # Of those who passed it on, the last stands first; the others did it elsewhere.
        resenders = [*_mailboxes(fields, "resent-from"), *_mailboxes(fields, "resent-sender")]
    except HeaderError:
        return R550_AUTHOR_UNCLEAR
    allows = submitter.rights.allows
    if not all(map(allows, resenders)):
        return R550_RESENT_NOT_YOURS
    sent_by_user = "sender" in fields and len(senders) == 1 and allows(senders[0])
    written_by_user = all(map(allows, authors))
    # RFC 5322 3.6.2, RFC 6854 2: whoever sends for several, or for a group without names, names himself.
    needs_sender = "from" in fields and len(authors) != 1
    if handling.author == "add_sender":
        plain = written_by_user and not needs_sender and "sender" not in fields
        return not (plain or sent_by_user or resenders)
    if not written_by_user:
        return R550_FROM_NOT_YOURS
    if "sender" in fields and not sent_by_user:
        return R550_SENDER_NOT_YOURS
    return R550_AUTHOR_NEEDS_SENDER if needs_sender and not sent_by_user else False


def _mailboxes(fields: Mapping[str, list[Field]], name: str) -> list[Address]:
    """Of the first field of that name. Raises HeaderError."""
    found = parse_mailboxes(fields[name][0].value) if name in fields else []
    if len(found) > MOST_AUTHORS:
        raise HeaderError("more addresses than anybody writes")
    return found
