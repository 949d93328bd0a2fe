"""The tables of the configuration: each key's name, type, default and help. Some have a file of their own, config_*.py.

The models are the documentation: they are what a file is decoded into, what `fastsmtp check --describe` prints, and
what the server is handed, frozen. Durations are float seconds, sizes int octets, domain names lower-case A-labels;
relative paths of a file are relative to its folder. Nobody reads a global configuration: a constructor is handed its
own section. What one table must know of another stands in config_conflicts.py; a model that was made in Python is
checked for it too. Raises pydantic's ValidationError, which config.py explains to people. RFC 2033 5, RFC 5321 4.5.3.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from .config_access import Alias, OptionalPath, Recipients, Rule, check_detail
from .config_auth import Auth
from .config_conflicts import find_conflicts
from .config_inbound import Inbound, Sql
from .config_outgoing import Dns, Queue, Relay, Route, Transport
from .config_submission import Submission
from .config_values import (
    Count,
    DomainName,
    Duration,
    Endpoint,
    FilePath,
    Hostname,
    Keywords,
    Kind,
    Mode,
    Name,
    Networks,
    Restart,
    Size,
    Table,
    Unset,
    as_list,
    check_postmaster,
    check_queue,
    machine_name,
    parse_duration,
    parse_endpoint,
    parse_path,
    parse_size,
    parse_user,
    resolve_endpoint,
)
from .tls import CIPHERS


class OtherCertificate(Table):
    """A certificate for other names, or with another type of key for the same ones. A client is shown what is for the
    name that it asks for (SNI), else that of [tls]. The names are read from the certificates."""

    certificate: FilePath = Field(description="The certificate with its chain, leaf first, as PEM.")
    key: Annotated[FilePath, Unset("the file of `certificate`")] = Field(
        default_factory=lambda values: values["certificate"], description="Its private key, as PEM."
    )


class Tls(Table):
    """The server's certificate. Without this table there is no TLS. When its files change, new handshakes use them."""

    certificate: FilePath = Field(description="The certificate with its chain, leaf first, as PEM.")
    key: Annotated[FilePath, Unset("the file of `certificate`")] = Field(
        default_factory=lambda values: values["certificate"], description="Its private key, as PEM."
    )
    minimum: Literal["1.2", "1.3"] = Field("1.2", description="The oldest version of TLS that is spoken.")
    ciphers: str = Field(
        CIPHERS, description="What is offered in TLS 1.2, as OpenSSL's ciphers(1) has it; TLS 1.3 has its own."
    )
    also: tuple[OtherCertificate, ...] = Field((), description="More certificates.")


class Withhold(Table):
    """EHLO keywords that chosen clients are not offered, for clients that stumble over one."""

    keywords: Keywords = Field(
        min_length=1, description="What is withheld, such as `CHUNKING`. What needs it goes too."
    )
    networks: Networks = Field((), description="From whom; an empty list: from everyone.")


class Listener(Table):
    """A place where clients connect; as many tables as wanted. Without any: one on 127.0.0.1:2525."""

    address: Annotated[
        tuple[Annotated[Endpoint, PlainValidator(parse_endpoint), AfterValidator(resolve_endpoint)], ...],
        BeforeValidator(as_list),
        Kind("address, or list of them"),
    ] = Field(min_length=1, description="`host:port`, `[IPv6]:port` (port 0: any free one) or `unix:/path`.")
    role: Literal["mx", "submission", "lmtp", "odmr"] = Field(
        "mx",
        description="Who connects: other servers (`mx`), users with a password (`submission`), a server "
        "that hands over mail for mailboxes (`lmtp`, not on port 25), or one that fetches its own by ATRN (`odmr`, "
        "usually on port 366; see `[[customer]]`).",
    )
    tls: Annotated[
        Literal["off", "starttls", "implicit"], Unset("`starttls` where there is a `[tls]` table, else `off`")
    ] = Field("off", description="When TLS begins: never, after STARTTLS, or at once.")
    client_ca: Annotated[Path | None, PlainValidator(parse_path), Kind("path"), Unset("none")] = Field(
        None,
        validate_default=False,
        description="Whose signatures on the certificates of clients are believed, as PEM. Who shows such a "
        "certificate may log in by it (AUTH EXTERNAL); one that is signed by nobody of these ends the handshake.",
    )
    client_certificate: Annotated[
        Literal["off", "optional", "required"], Unset("`optional` with `client_ca`, else `off`")
    ] = Field(
        default_factory=lambda values: "optional" if values.get("client_ca") else "off",
        description="Whether a client is asked for a certificate in TLS, and whether it gets in without.",
    )
    bare: Literal["reject", "normalize", "keep"] = Field(
        "reject",
        description="A CR or LF that is no part of CRLF, in a message sent by DATA: the message is refused, "
        "repaired (a bare LF ends a line, a bare CR becomes a space) or kept as sent.",
    )
    bare_bdat: Literal["keep", "reject"] = Field(
        "keep", description="The same in a message sent by BDAT, where it can do no harm."
    )
    early_talker: Annotated[Literal["refuse", "allow"], Unset("`refuse` for role `mx`, else `allow`")] = Field(
        default_factory=lambda values: "refuse" if values["role"] == "mx" else "allow",
        description="A client that does not wait where it must (RFC 2920 3.1).",
    )
    greet_delay: Duration = Field(0.0, description="How long the greeting waits; catches early talkers.")
    dsn: Annotated[StrictBool, Unset("true for role `submission`")] = Field(
        default_factory=lambda values: values["role"] == "submission",
        description="True: everyone may ask for delivery reports (DSN). False: only who may relay, for reports of "
        "success to strangers are mail that nobody asked for.",
    )
    auth: Annotated[StrictBool, Unset("true for role `submission`")] = Field(
        default_factory=lambda values: values["role"] == "submission",
        description="True: the users of `[auth]` can log in, inside TLS.",
    )
    auth_clear: StrictBool = Field(
        False, description="True: also without TLS; only where all addresses are of this machine (loopback, unix)."
    )
    vrfy: StrictBool = Field(
        False, description="True: VRFY tells everyone whether a mailbox exists. False: only who may relay."
    )
    expn: StrictBool = Field(
        False, description="True: EXPN tells everyone what an alias stands for. False: only who may relay."
    )
    brackets: StrictBool = Field(True, description="False: `MAIL FROM:a@b` without `<>` is tolerated.")
    mode: Annotated[Mode, Restart()] = Field(0o660, description="Who may connect to a unix socket.")
    withhold: tuple[Withhold, ...] = Field((), description="EHLO keywords withheld from chosen clients.")


class Limits(Table):
    """How much is accepted."""

    message_size: Size = Field(parse_size("50MB"), ge=1, description="The largest message, offered as SIZE.")
    recipients: Count = Field(1000, ge=100, description="Recipients of one message.")
    command_line: Count = Field(2048, ge=512, description="Octets of a command line, with CRLF.")
    auth_line: Count = Field(12288, ge=512, description="Octets of a line in an AUTH exchange, with CRLF.")
    text_line: Size = Field(parse_size("1MB"), ge=1000, description="The longest line of a message, with CRLF.")
    header: Size = Field(parse_size("256KB"), ge=1000, description="The longest header section.")
    received: Count = Field(100, ge=1, description="Received fields in a message; more is taken for a loop.")
    errors: Count = Field(20, ge=1, description="Bad commands in a session before it is closed with 421.")
    useless: Count = Field(100, ge=1, description="Commands that do nothing (NOOP, RSET, ...) before 421.")
    sessions: Count = Field(10000, ge=1, description="Open sessions of the whole machine; more are told 421.")
    memory: Annotated[Size, Restart()] = Field(
        parse_size("256MB"), ge=1, description="For bodies on their way and jobs that wait, per worker."
    )


class Timeouts(Table):
    """How long is waited."""

    command: Duration = Field(parse_duration("5m"), gt=0, description="For the next command.")
    data: Duration = Field(parse_duration("5m"), gt=0, description="For the next octets of a message.")
    data_rate: Count = Field(
        100, ge=0, description="Octets per second that a message must bring, measured over `data`; 0: no matter."
    )
    tls: Duration = Field(parse_duration("30s"), gt=0, description="For a TLS handshake.")
    session: Duration = Field(
        parse_duration("1h"),
        gt=0,
        description="A session's greatest age; it ends between transactions, at twice that age in any case.",
    )
    oversize: Duration = Field(
        parse_duration("10m"), gt=0, description="How long a message over the size limit is read to its end."
    )
    write: Duration = Field(parse_duration("5m"), gt=0, description="For a client that takes no replies.")
    shutdown: Duration = Field(
        parse_duration("30s"), description="For what is under way when the server is told to stop."
    )


class Spool(Table):
    """Where accepted mail waits, in `data_dir`."""

    durability: Literal["fsync", "none"] = Field(
        "fsync",
        description="Where a message must be before it is acknowledged: on stable storage, or in memory "
        "(`none`, for tests and benchmarks: mail is lost when the machine stops).",
    )
    inline: Size = Field(
        parse_size("128KB"), description="Bodies up to this stand in the database, larger ones in a file each."
    )
    min_free: Size = Field(
        parse_size("100MB"), description="Free space of the disk below which new mail is put off with 452."
    )


class Log(Table):
    """One line for each event that an operator needs."""

    format: Literal["auto", "human", "json"] = Field("auto", description="`auto`: for people on a terminal, else JSON.")


class Domain(Table):
    """A domain whose mail is taken. An exact name goes before the longest `*.` name, and that before `*`."""

    name: DomainName = Field(description="`example.org`, `*.example.org` (everything below it) or `*` (every domain).")
    recipients: Annotated[Recipients, Kind('"any", list of local-parts, or {file = path}')] = Field(
        description="Who gets mail there; the postmaster always does. In a file: a local-part or an address a line."
    )
    transport: Name = Field(description="Where it goes: the NAME of a transport.")
    case_sensitive: StrictBool = Field(False, description="True: `Ann` and `ann` are two mailboxes.")
    detail: Annotated[str, AfterValidator(check_detail), Kind("text"), Unset("none")] = Field(
        "", description="What begins a detail: with `+`, mail for `ann+x` is for `ann` where `ann+x` is no mailbox."
    )
    catch_all: Annotated[str, AfterValidator(check_postmaster), Kind("address"), Unset("none")] = Field(
        "", description="Who gets mail for unknown mailboxes: an address at a domain served here."
    )
    aliases: OptionalPath = Field(
        None, validate_default=False, description="A file with aliases of this domain; see `[alias]`."
    )


class Customer(Table):
    """A client with domains of its own whose mail waits here while its server is away. It may have the queue run for
    them (ETRN, RFC 1985), on every listener but `lmtp`; and fetch what goes to a transport of type `odmr` (ATRN,
    RFC 2645) on a listener of role `odmr`."""

    networks: Annotated[Networks, Unset("none")] = Field((), description="Where it comes from.")
    users: Annotated[tuple[Annotated[str, PlainValidator(parse_user)], ...], Kind("list of user names")] = Field(
        (), description="As whom of `[auth]` it may log in instead. One of the two is needed."
    )
    domains: Annotated[tuple[DomainName, ...], Kind("list of domains")] = Field(
        min_length=1, description="Whose mail it may ask for: names as in `[[domain]]`."
    )
    queue: Annotated[str, AfterValidator(check_queue), Kind("text"), Unset("none")] = Field(
        "", description="What they are called together, for `ETRN #name`."
    )


class Config(Table):
    """The whole file."""

    hostname: Annotated[Hostname, Unset("this machine's name")] = Field(
        default_factory=machine_name, description="Our name in the greeting and in Received."
    )
    data_dir: Annotated[FilePath, Restart()] = Field(Path("fastsmtp-data"), description="The folder of the spool.")
    workers: Annotated[StrictInt, Kind("number"), Restart()] = Field(
        0, ge=0, le=1000, description="Processes that serve; 0: one per core."
    )
    user: Annotated[str, Restart()] = Field("", description="Who the workers become when started as root; empty: stay.")
    postmaster: Annotated[str, AfterValidator(check_postmaster), Kind("address")] = Field(
        "",
        description="Who gets the mail for `postmaster`, at every domain and without one; at a domain "
        "served here. Empty: each domain has a mailbox of that name.",
    )
    tls: Annotated[Tls | None, Unset("no TLS")] = Field(None, description="The certificate.")
    listener: tuple[Listener, ...] = Field(
        (Listener(address="127.0.0.1:2525"),), min_length=1, description="Where clients connect."
    )
    limits: Limits = Field(Limits(), description="How much is accepted.")
    inbound: Inbound = Field(Inbound(), description="How much one client may.")
    timeouts: Timeouts = Field(Timeouts(), description="How long is waited.")
    spool: Annotated[Spool, Restart()] = Field(Spool(), description="Where accepted mail waits.")
    queue: Queue = Field(Queue(), description="When a delivery is tried again.")
    log: Annotated[Log, Restart()] = Field(Log(), description="What the log looks like.")
    domain: tuple[Domain, ...] = Field((), description="Whose mail is taken.")
    route: tuple[Route, ...] = Field((), description="The ways to domains that are not served here.")
    relay: Relay = Field(Relay(), description="Who may send to any domain.")
    customer: tuple[Customer, ...] = Field((), description="Who asks for mail that waits here.")
    alias: Alias = Field(Alias(), description="Addresses that stand for others.")
    rule: tuple[Rule, ...] = Field((), description="Who is let in.")
    auth: Auth = Field(Auth(), description="Who may log in.")
    submission: Submission = Field(Submission(), description="What is done to messages of users.")
    transport: dict[str, Transport] = Field({}, description="Where it goes.")
    dns: Dns = Field(Dns(), description="Who is asked for addresses.")
    sql: dict[str, Sql] = Field({}, description="Databases that are asked.")

    @property
    def worker_count(self) -> int:
        """How many workers there are to be."""
        return self.workers or len(os.sched_getaffinity(0))

    @field_validator("listener")
    @classmethod
    def _offer_starttls(cls, listeners: tuple[Listener, ...], info: ValidationInfo) -> tuple[Listener, ...]:
        if not info.data.get("tls"):
            return listeners
        return tuple(
            given if "tls" in given.model_fields_set else given.model_copy(update={"tls": "starttls"})
            for given in listeners
        )

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        conflicts = [
            InitErrorDetails(type=PydanticCustomError("conflict", "{text}", {"text": text}), loc=place, input=None)
            for place, text in find_conflicts(self.__dict__)
        ]
        if conflicts:
            raise ValidationError.from_exception_data("Config", conflicts)
        return self
