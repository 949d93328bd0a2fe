"""How a message is written down: the envelope as text, a row of the spool's table, and a Job made from one.

The envelope is lines: a format number, nine values in fixed order, then four for each recipient; the number is
raised when a line is added. No value can hold a line end (all of them came on lines); one that does is refused
with ValueError, before anything is written. Octets that are not UTF-8 survive. No SQL and no I/O here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from .address import Address
from .ids import is_id, key_of
from .job import HELD, JOB_OCTETS, Job, Mark
from .message import Content, Envelope, Message, Recipient

ENVELOPE_FORMAT = "1"
LISTS_FORMAT = "2"  # behind the recipients follows one more line for each: the owner of its list, or nothing

# key, id, arrived, envelope, prefix, cuts, content, header_end, size, crc, body (None: in a file)
Row: TypeAlias = tuple[int, str, float, bytes, bytes, str, int, int, int, int, bytes | None]
# As JSON has it: like Row up to size, octets in hexadecimal, then whether it is in a file, and the pending recipients:
# number, due (ms), attempts, reason, reported, held.
Loaded: TypeAlias = list[Any]


def render_envelope(envelope: Envelope) -> bytes:
    """The envelope without its id. Raises ValueError."""
    if not envelope.recipients:
        raise ValueError("the envelope has no recipient")
    path = envelope.reverse_path
    flags = "utf8" if envelope.utf8 else ""
    if envelope.require_tls:
        flags += " requiretls"
    elif envelope.waives_tls:
        flags += " waivestls"
    lines = [
        ENVELOPE_FORMAT,
        f"{path.local}@{path.domain}",
        envelope.body,
        flags,
        str(envelope.size),
        envelope.ret,
        envelope.envid,
        envelope.client,
        envelope.helo,
        envelope.protocol,
    ]
    for recipient in envelope.recipients:
        address = recipient.address
        lines += (f"{address.local}@{address.domain}", recipient.notify, recipient.orcpt, recipient.fault)
        if recipient.sender is not None:
            lines[0] = LISTS_FORMAT
    if lines[0] is LISTS_FORMAT:
        senders = [recipient.sender for recipient in envelope.recipients]
        lines += ["" if sender is None else f"{sender.local}@{sender.domain}" for sender in senders]
    text = "\n".join(lines)
    if text.count("\n") != len(lines) - 1:
        raise ValueError("a value of the envelope holds a line end")
    return text.encode("utf-8", "surrogateescape")


def parse_envelope(raw: bytes, message_id: str) -> Envelope:
    """Raises ValueError for what render_envelope cannot have written."""
    version, *lines = raw.decode("utf-8", "surrogateescape").split("\n")
    if version not in (ENVELOPE_FORMAT, LISTS_FORMAT):
        raise ValueError(f"unknown envelope format {version!r}")
    path, body, flags, size, ret, envid, client, helo, protocol, *recipients = lines
    envelope = Envelope(_address(path))
    envelope.id = message_id
    envelope.body = body
    envelope.utf8 = flags.startswith("utf8")
    envelope.require_tls = flags.endswith(" requiretls")
    envelope.waives_tls = flags.endswith(" waivestls")
    envelope.size = int(size)
    envelope.ret = ret
    envelope.envid = envid
    envelope.client = client
    envelope.helo = helo
    envelope.protocol = protocol
    senders: list[str] = []
    if version == LISTS_FORMAT:
        recipients, senders = recipients[: len(recipients) // 5 * 4], recipients[len(recipients) // 5 * 4 :]
    envelope.recipients = [
        Recipient(_address(address), notify, orcpt, fault)
        for address, notify, orcpt, fault in zip(*[iter(recipients)] * 4, strict=True)
    ]
    if senders:
        for recipient, sender in zip(envelope.recipients, senders, strict=True):
            recipient.sender = _address(sender) if sender else None
    return envelope


def render_row(key: int, message: Message, crc: int, body: bytes | None) -> Row:
    """The row of a message whose body is `body`, or in a file."""
    cuts = ",".join(f"{start}-{end}" for start, end in message.cuts) if message.cuts else ""
    return (
        key, message.id, message.arrived, render_envelope(message.envelope), message.prefix, cuts,
        int(message.content), message.header_end, message.size, crc, body,
    )  # fmt: skip


def parse_job(row: Loaded, bodies: Path) -> Job:
    """The Job of a row; its body is in a file below `bodies`, or not in memory. Raises ValueError."""
    key, message_id, arrived, envelope, prefix, cuts, content, header_end, size, in_file, pending = row
    # The name of a file may come from it; another's would take the place of that one's.
    if not is_id(message_id) or key_of(message_id) != key:
        raise ValueError("its id is damaged")
    message = Message(
        parse_envelope(bytes.fromhex(envelope), message_id),
        bytes.fromhex(prefix),
        None,
        size,
        header_end,
        Content(content),
        arrived,
        str(bodies / message_id) if in_file else "",
        tuple((int(start), int(end)) for start, _, end in (cut.partition("-") for cut in cuts.split(",")))
        if cuts
        else (),
    )
    job = Job(key, message, [number for number, *_ in pending], checked=False)
    if job.pending and not 0 <= job.pending[-1] < len(message.envelope.recipients):
        raise ValueError("a recipient is not in the envelope")
    for number, due, attempts, reason, reported, held in pending:
        if held or due is not None:
            job.tried[number] = Mark(key, number, HELD if held else due / 1000, attempts, reason, bool(reported))
    job.held = JOB_OCTETS
    return job


def _address(text: str) -> Address:
    local, _, domain = text.rpartition("@")
    return Address(local, domain)
