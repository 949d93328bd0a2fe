"""The tables of the configuration that say how mail leaves: transports, routes, relay, DNS, and the queue's patience.

As in config_tables.py each key's name, type, default and help stand once, here. A key that may be left out and whose
default depends on another table is asked for in `model_fields_set`. What one table must know of another is checked
in config_conflicts.py. Not here: what a transport does, and whether the machine has its files and users.
RFC 3461 (reports), RFC 5321 4.5.4.1 (retries), 5.1 (MX).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    PlainValidator,
    StrictBool,
    Tag,
    ValidationInfo,
    field_validator,
)

from .config_values import (
    Count,
    DomainName,
    Duration,
    Endpoint,
    Hostname,
    Inet,
    IPs,
    Keywords,
    Kind,
    Name,
    Networks,
    Table,
    Unset,
    check_template,
    parse_duration,
    parse_hop,
    parse_name_server,
    parse_path,
    parse_smarthost,
    resolve_endpoint,
)

MinimumTls: TypeAlias = Literal["1.2", "1.3"]
EightBit: TypeAlias = Literal["send", "bounce"]


class Smtp(Table):
    """Mail goes to other mail servers: each domain's by MX, or all of it to one smarthost."""

    type: Literal["smtp"] = Field(description="This kind of transport.")
    smarthost: Annotated[Inet | None, PlainValidator(parse_smarthost), Kind("host:port"), Unset("none: by MX")] = Field(
        None, validate_default=False, description="The one host that takes all mail, such as `smtp.example.org:587`."
    )
    user: Annotated[str, Unset("no login")] = Field("", description="Who we are to the smarthost.")
    password_file: Annotated[Path | None, PlainValidator(parse_path), Kind("path"), Unset("none")] = Field(
        None,
        validate_default=False,
        description="The file whose first line is the password. Read once, before `user` is dropped to.",
    )
    auth: Literal["password", "xoauth2"] = Field(
        "password",
        description="What stands in `password_file`: a password (SCRAM-SHA-256, PLAIN or LOGIN), or a token (XOAUTH2).",
    )
    tls: Annotated[
        Literal["opportunistic", "required", "verified", "off", "starttls", "implicit"],
        Unset("`starttls` with `user`, else `opportunistic`"),
    ] = Field(
        default_factory=lambda values: "starttls" if values["user"] else "opportunistic",
        description="`opportunistic`: where it is offered, with any certificate, in clear where it fails. "
        "`required`: never in clear. `verified`: nor to a host that cannot prove its name. `off`: always in clear. "
        "For a smarthost: `starttls` (verified, after STARTTLS) or `implicit` (verified, from the first octet, port "
        "465). A password is sent over verified connections only.",
    )
    tls_minimum: MinimumTls = Field("1.2", description="The oldest version of TLS that is spoken.")
    ca_file: Annotated[Path | None, PlainValidator(parse_path), Kind("path"), Unset("the system's")] = Field(
        None, validate_default=False, description="Whose certificates are believed where TLS is verified, as PEM."
    )
    helo: Annotated[Hostname, Unset("`hostname`")] = Field("", validate_default=False, description="Our name in EHLO.")
    source: IPs = Field((), description="Our address for connections; at most one IPv4 and one IPv6 address.")
    timeout: Duration = Field(
        parse_duration("10m"),
        gt=0,
        description="The longest wait for one answer; RFC 5321 4.5.3.2 has shorter ones for most commands.",
    )
    eight_bit: EightBit = Field(
        "send",
        description="What becomes of 8-bit content for a host without 8BITMIME: it is sent all the same, or returned "
        "to its sender.",
    )
    bare: Literal["convert", "bounce"] = Field(
        "convert",
        description="A message with a bare CR or LF, for a host without CHUNKING: a bare CR becomes a space and a bare "
        "LF a line end, or it is returned to its sender.",
    )


class Lmtp(Table):
    """Mail goes to a mailbox server, such as Dovecot, that answers for each recipient."""

    type: Literal["lmtp"] = Field(description="This kind of transport.")
    address: Annotated[Endpoint, PlainValidator(parse_hop), AfterValidator(resolve_endpoint), Kind("address")] = Field(
        description="Where it listens: `unix:/path`, `host:port` or `[IPv6]:port`."
    )
    timeout: Duration = Field(
        parse_duration("10m"),
        gt=0,
        description="The longest wait for one answer; RFC 5321 4.5.3.2 has shorter ones for most commands.",
    )
    eight_bit: EightBit = Field(
        "send",
        description="What becomes of 8-bit content for a server without 8BITMIME: it is sent all the same, or refused.",
    )


class Pipe(Table):
    """Mail goes to a program, one run for each recipient; its exit code (sysexits.h) says what became of it."""

    type: Literal["pipe"] = Field(description="This kind of transport.")
    command: Annotated[tuple[str, ...], Kind("list of text")] = Field(
        min_length=1,
        description="The program's absolute path and its arguments, which no shell reads. `{sender}`, `{recipient}`, "
        "`{local}`, `{domain}` and `{id}` stand for values of the message, cleaned.",
    )
    user: Annotated[str, Unset("whoever runs the server; as root it must be given")] = Field(
        "", description="Who it runs as: somebody who can read neither spool nor keys."
    )
    timeout: Duration = Field(parse_duration("5m"), gt=0, description="How long it may run before it is killed.")
    concurrency: Count = Field(10, ge=1, description="How many run at once, of the whole machine.")
    crlf: StrictBool = Field(False, description="True: its lines end in CRLF, as on the wire; else in LF.")
    fields: StrictBool = Field(False, description="Whether Return-Path and Delivered-To stand before the message.")


class Maildir(Table):
    """A Maildir for each mailbox."""

    type: Literal["maildir"] = Field(description="This kind of transport.")
    path: Annotated[str, AfterValidator(check_template), Kind("path with placeholders")] = Field(
        description="A mailbox's folder: a path such as `/var/mail/{domain}/{local}`, with `{local}` and "
        "perhaps `{domain}`, each as the whole name of a folder."
    )
    sync: Literal["batch", "file"] = Field("batch", description="One flush for many messages, or one for each file.")

    @property
    def root(self) -> Path:
        """The folder of all mailboxes: what stands before the first placeholder."""
        return Path(self.path[: self.path.index("{")] or ".")


class Discard(Table):
    """Mail is accepted and thrown away."""

    type: Literal["discard"] = Field(description="This kind of transport.")


class Odmr(Table):
    """Mail waits until its domain's server comes for it by ATRN (RFC 2645), on a listener of role `odmr`."""

    type: Literal["odmr"] = Field(description="This kind of transport.")
    timeout: Duration = Field(
        parse_duration("10m"),
        gt=0,
        description="The longest wait for one answer; RFC 5321 4.5.3.2 has shorter ones for most commands.",
    )


def _transport_tag(value: object) -> str:
    return f"<{value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)}>"


# Tags stand in brackets so that they differ from every key when they turn up in the place of an error.
Transport: TypeAlias = Annotated[
    Annotated[Smtp, Tag("<smtp>")]
    | Annotated[Lmtp, Tag("<lmtp>")]
    | Annotated[Pipe, Tag("<pipe>")]
    | Annotated[Maildir, Tag("<maildir>")]
    | Annotated[Discard, Tag("<discard>")]
    | Annotated[Odmr, Tag("<odmr>")],
    Discriminator(_transport_tag),
]


class Relay(Table):
    """Mail for domains that are not served here: who may send it, and how it leaves."""

    networks: Networks = Field((), description="Who may send to any domain. Everyone else hears 550 5.7.1.")
    transport: Annotated[Name, Unset("none")] = Field(
        "", description="Where mail goes that no [[domain]] and no [[route]] names: the NAME of a transport."
    )
    own_addresses: IPs = Field(
        (),
        description="Addresses that lead back to this server and that no interface of it has, such as the outside of a "
        "NAT. A host that has one of them is never tried.",
    )


class Route(Table):
    """The way to a domain that is not served here; permits nothing. An exact name goes before the longest `*.` name,
    that before `*`, and that before [relay]."""

    domain: DomainName = Field(
        description="`example.org`, `*.example.org` (everything below it) or `*` (every domain)."
    )
    transport: Name = Field(description="Where its mail goes: the NAME of a transport.")
    tls: Annotated[Literal["opportunistic", "required", "verified", "off"], Unset("that of the transport")] = Field(
        "opportunistic", description="As in a transport of type `smtp`."
    )
    tls_minimum: Annotated[MinimumTls, Unset("that of the transport")] = Field(
        "1.2", description="The oldest version of TLS that is spoken there."
    )
    concurrency: Annotated[Count, Unset("`queue.concurrency`")] = Field(
        0, ge=1, validate_default=False, description="Deliveries at once to each destination of this route."
    )
    ignore: Keywords = Field((), description="EHLO keywords of its hosts that are taken as not offered.")


class Dns(Table):
    """Who is asked for MX and address records."""

    servers: Annotated[
        tuple[Annotated[str, PlainValidator(parse_name_server)], ...],
        Kind("list of addresses"),
        Unset("those of /etc/resolv.conf"),
    ] = Field((), description="Name servers, in the order in which they are asked, such as `127.0.0.1:5353`.")
    allow_loopback: StrictBool = Field(
        False, description="True, for tests: mail goes to hosts whose address is a loopback address."
    )


class Queue(Table):
    """When a delivery that failed for now is tried again, and when its sender is told."""

    retry: Duration = Field(parse_duration("5m"), gt=0, description="The first wait; it doubles from try to try.")
    retry_max: Duration = Field(parse_duration("4h"), gt=0, description="The longest wait, at most a day.")
    lifetime: Duration = Field(
        parse_duration("5d"),
        gt=0,
        description="How long a message is tried before it is returned; never before one try since the start.",
    )
    report_lifetime: Duration = Field(
        parse_duration("1d"), gt=0, description="The same for reports, and for all other mail without a sender."
    )
    delay_report: Duration = Field(
        parse_duration("4h"), description="When a sender is told, once, that a message still waits; 0: never."
    )
    report_postmaster: StrictBool = Field(
        False, description="True: a report that cannot be delivered goes to the postmaster; it is logged anyway."
    )
    soft_bounce: StrictBool = Field(
        False, description="True, for a careful first day: what would be returned, or refused for good, is put off."
    )
    concurrency: Count = Field(20, ge=1, description="Deliveries at once to one destination, of the whole machine.")
    concurrency_total: Count = Field(
        500, ge=1, description="Deliveries at once to all destinations together, of the whole machine."
    )

    @field_validator("retry_max")
    @classmethod
    def _check_order(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("retry", 0):
            raise ValueError("no less than retry")
        # At start the spool takes a time further ahead for the work of a wrong clock, and tries at once.
        if value > parse_duration("1d"):
            raise ValueError("at most 1d")
        return value

    @field_validator("concurrency_total")
    @classmethod
    def _check_total(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("concurrency", 0):
            raise ValueError("no less than concurrency")
        return value
