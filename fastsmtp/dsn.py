"""Delivery reports: a message that tells a sender what became of the message it sent.

In: the message, what became of some of its recipients, and the first octets of its body. Out: messages as the
spool keeps them, one for each kind of event, or none: NOTIFY decides, and `<>` is never reported to. A report has
three parts: a text for people, fields for programs, and the original's header (all of it with RET=FULL, when small).
What a remote host or the original says is bounded and cleaned, so it forges no field; the original's octets are
passed on unaltered, and what cannot stand in a message so is encoded or left out. A report is 7bit unless it shows
non-ASCII addresses, a UTF-8 header, or a whole original with 8-bit octets: RFC 2046 5.2.1 lets that one not be
encoded. SMTPUTF8 is needed only when sender or reporter have non-ASCII addresses.
Nothing is sent here, and no report says that it failed: the queue does both. Nothing fails, whatever the input.
RFC 3461 4, 6; RFC 3464 2; RFC 6522 3; RFC 6533 3, 4; RFC 3834 3; RFC 8689 5.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from enum import Enum
from typing import NamedTuple

from .address import NULL, Address
from .message import Content, Envelope, Message, Recipient, date
from .reasons import reason_of
from .returned import Part, return_header, return_whole
from .rewrite import quoted_printable

FIELD_LIMIT = 900  # octets of a value that somebody else wrote: a line of a message has 998 at most
WIDTH = 72


class Action(Enum):
    """What became of a recipient (RFC 3464 2.3.3)."""

    FAILED = "failed"
    DELAYED = "delayed"
    DELIVERED = "delivered"
    RELAYED = "relayed"  # to a host that makes no reports
    EXPANDED = "expanded"  # given to the members of a list


class Kind(NamedTuple):
    """How an action is reported. `notify`: the word of NOTIFY that asks for it; `classes`: the first digits that its
    status may have, the first of them where another was given; `closing`: said below all recipients."""

    notify: str
    classes: str
    subject: str
    opening: str
    closing: str = ""


KINDS = {
    Action.FAILED: Kind("FAILURE", "54", "Mail could not be delivered", "Your message could not be delivered to"),
    Action.DELAYED: Kind(
        "DELAY",
        "4",
        "Mail is delayed",
        "Your message could not be delivered yet to",
        "This is only a warning: the message is kept, and will be tried again{until}. You need not send it again, "
        "unless the address is wrong. If it cannot be delivered at all, you will get another report.",
    ),
    Action.DELIVERED: Kind("SUCCESS", "2", "Mail was delivered", "Your message was delivered to"),
    Action.RELAYED: Kind(
        "SUCCESS",
        "2",
        "Mail was passed on",
        "Your message was passed on to the mail system of",
        "That mail system sends no reports of success, so this is the last one you get if all goes well.",
    ),
    Action.EXPANDED: Kind(
        "SUCCESS",
        "2",
        "Mail was given to a list",
        "Your message was given to all members of",
        "You get no reports of success for the members.",
    ),
}

DEFAULT_NOTIFY = "FAILURE,DELAY"  # RFC 3461 4.1: where the client gave no NOTIFY


@dataclass(frozen=True, slots=True)
class Event:
    """What became of one recipient. `status` is an enhanced status code, `text` says why in our own words. `remote`
    is the host that was spoken to, empty when none was; `reply` what it answered, its code first. Times are in
    seconds since the epoch; `retry_until` 0: not known, or not tried again."""

    recipient: Recipient
    action: Action
    status: str
    text: str
    attempted: float
    reply: str = ""
    remote: str = ""
    retry_until: float = 0


def is_wanted(action: Action, notify: str) -> bool:
    """Whether NOTIFY asks for a report of this action (RFC 3461 4.1)."""
    return KINDS[action].notify in (notify or DEFAULT_NOTIFY).split(",")


def is_report(message: Message) -> bool:
    """Whether a message was written here: nothing that came from elsewhere is without a protocol."""
    return not message.envelope.protocol and not message.envelope.reverse_path


@dataclass(frozen=True, slots=True)
class Reporter:
    """Writes the reports of one server.

    `hostname` is its name, `sender` the address that stands in From (NULL: MAILER-DAEMON at `hostname`). A message
    of up to `whole` octets can come back whole, else `header` octets of its header at most.
    """

    hostname: str
    sender: Address = NULL
    whole: int = 64 << 10
    header: int = 16 << 10

    def head_size(self, message: Message) -> int:
        """How many octets of the body's start `write` needs."""
        if self._may_return_whole(message):
            return message.size
        return min(message.header_end, self.header)

    def write(
        self, message: Message, events: Iterable[Event], head: bytes, next_id: Callable[[], str], now: float
    ) -> list[Message]:
        """A report for each action among `events` that the sender wants to know of.

        `head` are the first octets of the body; with less than `head_size` the report shows less.
        """
        if not message.envelope.reverse_path:  # RFC 3461 6: never for a report
            return []
        by_action: dict[Action, list[Event]] = {}
        for event in events:
            if is_wanted(event.action, event.recipient.notify):
                by_action.setdefault(event.action, []).append(event)
        return [self._report(message, action, found, head, next_id(), now) for action, found in by_action.items()]

    def _may_return_whole(self, message: Message) -> bool:
        envelope = message.envelope
        if envelope.ret != "FULL" or envelope.require_tls:  # RFC 8689 5: of what was to be kept secret, only the header
            return False
        return message.size <= self.whole and message.convertible

    def _report(
        self, message: Message, action: Action, events: Sequence[Event], head: bytes, report_id: str, now: float
    ) -> Message:
        header = head[: min(message.header_end, self.header)]
        addresses = "".join(f"{event.recipient.address}{event.recipient.orcpt}" for event in events)
        # RFC 3461 4.3: only a report of failure returns the content.
        whole = action is Action.FAILED and self._may_return_whole(message)
        parts = [
            _text_part(self._text(message, action, events, header, now)),
            self._fields(message, events, not addresses.isascii()),
            (return_whole(message, head) if whole else None) or return_header(message, head, self.header),
        ]
        if not parts[2].octets:
            del parts[2]
        boundary = f"=_{report_id}"
        while any(boundary.encode() in part.octets for part in parts):
            boundary += "_"
        eight_bit = any(part.encoding == "8bit" for part in parts)

        envelope = Envelope(NULL)
        envelope.id = report_id
        envelope.helo = self.hostname
        envelope.body = "8BITMIME" if eight_bit else "7BIT"
        # It is to be kept as its message was (RFC 8689 5).
        envelope.require_tls = message.envelope.require_tls
        envelope.waives_tls = message.envelope.waives_tls
        # RFC 3461 6.1: the value that a report may have.
        envelope.recipients = [Recipient(message.envelope.reverse_path, notify="NEVER")]
        sender = str(self.sender) or f"MAILER-DAEMON@{self.hostname}"
        top = "\r\n".join(
            [
                f"Date: {date(int(now))}",
                f"From: Mail Delivery System <{_safe(sender, wide=True)}>",
                f"To: <{_safe(str(message.envelope.reverse_path), wide=True)}>",
                f"Subject: {KINDS[action].subject}: {_subject_of(events)}",
                f"Message-ID: <{report_id}@{self.hostname}>",
                *_threading(header),
                "Auto-Submitted: auto-replied",
                *(["TLS-Required: No"] if envelope.waives_tls else []),
                "MIME-Version: 1.0",
                f"Content-Type: multipart/report; report-type={parts[1].type.partition('/')[2]};",
                f'\tboundary="{boundary}"',
                f"Content-Transfer-Encoding: {'8bit' if eight_bit else '7bit'}",
                "\r\n",
            ]
        ).encode()
        envelope.utf8 = not top.isascii()
        content = Content.EIGHT_BIT if eight_bit else Content.NONE
        if envelope.utf8:
            content |= Content.EIGHT_BIT_HEADER
        body = top + _join(parts, boundary)
        return Message(envelope, b"", [body], len(body), len(top), content, now)

    def _text(self, message: Message, action: Action, events: Sequence[Event], header: bytes, now: float) -> str:
        """The part for people. Recipients of whom the same is to be said stand together."""
        kind = KINDS[action]
        together: dict[str, list[str]] = {}
        for event in events:
            together.setdefault(_explanation(event, message.arrived, now), []).append(_shown(event.recipient))
        paragraphs = [f"This is the mail system at {self.hostname}."]
        for explanation, recipients in together.items():
            paragraphs += [kind.opening, "\n".join(f"    {recipient}" for recipient in recipients)]
            if explanation:
                paragraphs.append(explanation)
        if kind.closing:
            latest = max(event.retry_until for event in events)
            paragraphs.append(_wrap(kind.closing.format(until=f" until {date(int(latest))}" if latest else "")))
        subject = _subject(header)
        about = [f"    Subject:   {subject}"] if subject else []
        about += [f"    Accepted:  {date(int(message.arrived))}", f"    Known as:  {message.id}"]
        paragraphs += ["The message:", "\n".join(about)]
        if kind.notify != "SUCCESS":
            paragraphs.append(_wrap(_FOOT))
        return "\n\n".join(paragraphs).replace("\n", "\r\n") + "\r\n"

    def _fields(self, message: Message, events: Sequence[Event], wide: bool) -> Part:
        """The part for programs (RFC 3464 2; RFC 6533 4 when addresses are not ASCII)."""
        envid = _decode_xtext(message.envelope.envid)
        lines = [_field("Original-Envelope-Id", envid, wide)] if envid else []
        lines.append(_field("Reporting-MTA", f"dns; {self.hostname}", wide))
        lines.append(_field("Arrival-Date", date(int(message.arrived)), wide))
        for event in events:
            recipient = event.recipient
            address = str(recipient.address)
            lines.append("")
            if recipient.orcpt:
                lines.append(_field("Original-Recipient", _original_recipient(recipient.orcpt, wide), wide))
            lines.append(_field("Final-Recipient", f"{'rfc822' if address.isascii() else 'utf-8'}; {address}", wide))
            lines.append(_field("Action", event.action.value, wide))
            lines.append(_field("Status", _status(event), wide))
            if _HOST.fullmatch(event.remote):
                lines.append(_field("Remote-MTA", f"dns; {event.remote}", wide))
            if _REPLY.match(event.reply):
                lines.append(_folded("Diagnostic-Code", f"smtp; {event.reply}", wide))
            elif event.text:
                lines.append(_folded("Diagnostic-Code", f"X-fastsmtp; {event.text}", wide))
            lines.append(_field("Last-Attempt-Date", date(int(event.attempted)), wide))
            lines.append(_field("Final-Log-ID", message.id, wide))
            if event.action is Action.DELAYED and event.retry_until:
                lines.append(_field("Will-Retry-Until", date(int(event.retry_until)), wide))
        octets = "\r\n".join([*lines, ""]).encode()
        kind = "message/global-delivery-status" if wide else "message/delivery-status"
        return Part(kind, "Delivery report", "7bit" if octets.isascii() else "8bit", octets)


def _text_part(text: str) -> Part:
    octets = text.encode()
    if octets.isascii():
        return Part("text/plain; charset=us-ascii", "Notification", "7bit", octets)
    return Part("text/plain; charset=utf-8", "Notification", "quoted-printable", quoted_printable(octets))


def _join(parts: Iterable[Part], boundary: str) -> bytes:
    """The body of a multipart (RFC 2046 5.1.1)."""
    octets = [b"This is a delivery report in MIME format."]
    for part in parts:
        octets.append(
            f"\r\n--{boundary}\r\nContent-Type: {part.type}\r\nContent-Description: {part.description}\r\n"
            f"Content-Transfer-Encoding: {part.encoding}\r\n\r\n".encode()
        )
        octets.append(part.octets)
    octets.append(f"\r\n--{boundary}--\r\n".encode())
    return b"".join(octets)


_FOOT = (
    "Recipients who are not named above are not concerned. If you need help, ask your postmaster and forward this "
    "whole report: what follows is for experts."
)
_HOST = re.compile(r"[A-Za-z0-9._-]{1,255}|\[[A-Za-z0-9.:]{1,64}\]")
_REPLY = re.compile(r"[2-5][0-9]{2}(?:[ -]|$)")
_STATUS = re.compile(r"[245](\.[0-9]{1,3}\.[0-9]{1,3})")
_NOT_ASCII = re.compile(r"[^ -~]")
# Controls, what is no character, line separators, and what turns the direction of writing.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _safe(text: str, wide: bool) -> str:
    """`text` with "?" for what could end a line or mislead a reader; `wide`: non-ASCII may stay."""
    return (_UNSAFE if wide else _NOT_ASCII).sub("?", text)


def _bounded(text: str) -> str:
    octets = text.encode()
    return text if len(octets) <= FIELD_LIMIT else octets[: FIELD_LIMIT - 4].decode("utf-8", "ignore") + " ..."


def _line(text: str, wide: bool) -> str:
    """What somebody else wrote, as one line of bounded length."""
    return _bounded(_safe(" ".join(text.split()), wide))


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _field(name: str, value: str, wide: bool) -> str:
    """A field on one line, its blanks as they are: there are addresses with two in a row."""
    return f"{name}: {_bounded(_safe(value, wide))}"


def _folded(name: str, value: str, wide: bool) -> str:
    """A field of prose, folded at its blanks."""
    return _wrap(f"{name}: {_line(value, wide)}").replace("\n", "\r\n ")


def _status(event: Event) -> str:
    """RFC 3464 2.3.4, with a class that its action may have: a deferred 5.1.1 is 4.1.1."""
    classes = KINDS[event.action].classes
    match = _STATUS.fullmatch(event.status)
    if match is None:
        return f"{classes[0]}.0.0"
    return event.status if event.status[0] in classes else classes[0] + match[1]


_HEX = re.compile(r"\+([0-9A-Fa-f]{2})")
_EMBEDDED = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}")


def _decode_xtext(text: str) -> str:
    """RFC 3461 4; what is not xtext stays as it is. What comes out may be anything."""
    return _HEX.sub(lambda match: chr(int(match[1], 16)), text)


def _embedded(match: re.Match[str]) -> str:
    code = int(match[1], 16)
    return match[0] if code < 0x80 or 0xD800 <= code < 0xE000 or code > 0x10FFFF else chr(code)


def _original_recipient(orcpt: str, wide: bool) -> str:
    """ORCPT as a field: xtext decoded (RFC 3461 6.3); an address of type utf-8 has its own coding, which is ASCII,
    and is written out where non-ASCII may stand (RFC 6533 3)."""
    kind, _, address = orcpt.partition(";")
    if kind.lower() != "utf-8":
        address = _decode_xtext(address)
    elif wide:
        address = _EMBEDDED.sub(_embedded, address)
    return f"{kind}; {address}"


def _shown(recipient: Recipient) -> str:
    """An address for people, with the one that was written to where an alias or a list led elsewhere."""
    address = _safe(str(recipient.address), wide=True)
    first = _line(_original_recipient(recipient.orcpt, wide=True).partition("; ")[2], wide=True)
    return address if not first or first.lower() == address.lower() else f"{address} (you wrote to {first})"


def _explanation(event: Event, arrived: float, now: float) -> str:
    """Why, what to do, and in whose words; empty when there is nothing to explain."""
    if KINDS[event.action].notify == "SUCCESS":
        return ""
    status = _status(event)
    reason = reason_of(status)
    said = [reason.what]
    if event.action is Action.FAILED:
        if status.startswith("4"):
            said.append(f"This was tried again and again for {_span(now - arrived)}, and has now been given up.")
        said.append(reason.advice)
    paragraphs = [_wrap(" ".join(said))]
    host = f" {event.remote}" if _HOST.fullmatch(event.remote) else ""
    if event.reply:
        paragraphs += [f"The mail server{host} answered:", _wrap(_line(event.reply, wide=True), "    ")]
    elif event.text:
        paragraphs += ["In technical terms:", _wrap(_line(event.text, wide=True), "    ")]
    return "\n\n".join(paragraphs)


def _span(seconds: float) -> str:
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= unit:
            count = int(seconds // unit)
            return f"{count} {name}{'s' if count > 1 else ''}"
    return "less than a minute"


def _subject_of(events: Sequence[Event]) -> str:
    """Whom it is about, as far as it fits into the line of the report's Subject."""
    address = str(events[0].recipient.address)
    if len(events) == 1:
        return address if len(address) <= 40 and not _NOT_ASCII.search(address) else "1 recipient"
    return f"{len(events)} recipients"


_SUBJECT = re.compile(rb"^subject[ \t]*:((?:[^\r\n]|\r?\n[ \t]){1,600})", re.IGNORECASE | re.MULTILINE)
_MESSAGE_ID = re.compile(rb"^message-id[ \t]*:\s*(<[!-;=?-~]{1,250}>)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


def _subject(header: bytes) -> str:
    """The original's Subject for people, its encoded words decoded (RFC 2047) where they can be."""
    match = _SUBJECT.search(header)
    if match is None:
        return ""
    raw = " ".join(match[1].decode("utf-8", "replace").split())
    try:
        raw = str(make_header(decode_header(raw)))
    except (ValueError, LookupError, HeaderParseError):
        pass
    text = _line(raw, wide=True)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."


def _threading(header: bytes) -> list[str]:
    """In-Reply-To and References, so that a report stands beside what it is about (RFC 3834 3.1)."""
    match = _MESSAGE_ID.search(header)
    return [f"In-Reply-To: {match[1].decode()}", f"References: {match[1].decode()}"] if match else []
