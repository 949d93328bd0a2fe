"""The configuration: one TOML file, decoded into frozen, typed values.

In: a file's path. Out: a `Config`, or a `ConfigError` with every problem of the file: its line, its path, and
what was expected. The models below are the documentation too: name, type, default and help of a key stand
once, and `SECTIONS` lists them. Durations are float seconds, sizes int octets, domain names lower-case
A-labels; relative paths of a file are relative to its folder. Nobody reads a global configuration: a
constructor is handed its own section. Not here: anything that asks the machine (certificates, folders, users);
`fastsmtp check` does that. RFC 2033 5, RFC 5321 4.5.3.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import socket
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from .address import AddressError, parse_address, parse_domain
from .toml_lines import Lines, Place

DEFAULT = """\
[[listener]]
address = "127.0.0.1:2525"

[[domain]]
name       = "*"
recipients = "any"
transport  = "mailboxes"

[transport.mailboxes]
type = "maildir"
path = "fastsmtp-data/mail/{domain}/{local}"
"""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `line` is 0 and `path` empty where there is none."""

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigError(Exception):
    """All that is wrong with a configuration."""

    def __init__(self, errors: list[Problem]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


# Values. A parser raises ValueError with what was expected; what was found is added later.

_DURATION = re.compile(r"(?=.)(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
_DURATION_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_GREATEST_DURATION = 36500 * 86400
_SIZE = re.compile(r"([0-9]+)(KB|MB|GB|TB)")
_SIZE_UNITS = {"TB": 1 << 40, "GB": 1 << 30, "MB": 1 << 20, "KB": 1 << 10}
_GREATEST_SIZE = (1 << 63) - 1  # what the C layers count in
_MODE = re.compile(r"0?[0-7]{3}")
_KEYWORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
_PLACEHOLDERS = ("{domain}", "{local}")


def parse_duration(value: object) -> float:
    """Seconds, from "1h30m" or from a number of seconds."""
    seconds: float = -1
    if isinstance(value, str) and len(value) < 50 and (match := _DURATION.fullmatch(value)):
        seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), _DURATION_UNITS.values(), strict=True))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    if not 0 <= seconds <= _GREATEST_DURATION:
        raise ValueError('a duration such as "30s", "5m", "1h30m" or "5d", or a number of seconds')
    return float(seconds)


def show_duration(seconds: float) -> str:
    """As TOML: the shortest form that parse_duration reads back to the same value."""
    if seconds % 1:
        return repr(seconds)
    rest, text = int(seconds), ""
    for letter, unit in _DURATION_UNITS.items():
        count, rest = divmod(rest, unit)
        text += f"{count}{letter}" if count else ""
    return f'"{text or "0s"}"'


def parse_size(value: object) -> int:
    """Octets, from "50MB" (1 KB is 1,024 octets) or from a number of octets."""
    octets = -1
    if isinstance(value, str) and len(value) < 50 and (match := _SIZE.fullmatch(value)):
        octets = int(match[1]) * _SIZE_UNITS[match[2]]
    elif isinstance(value, int) and not isinstance(value, bool):
        octets = value
    if not 0 <= octets <= _GREATEST_SIZE:
        raise ValueError('a size such as "64KB", "50MB" or "1GB", or a number of octets')
    return octets


def show_size(octets: int) -> str:
    """As TOML: in the greatest unit that divides it."""
    for name, unit in _SIZE_UNITS.items():
        if octets and octets % unit == 0:
            return f'"{octets // unit}{name}"'
    return str(octets)


@dataclass(frozen=True)
class Inet:
    """A TCP address. `host` is an IP address without brackets or a host name; port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Unix:
    """A unix socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


Endpoint: TypeAlias = Inet | Unix


def parse_endpoint(value: object) -> Endpoint:
    """One address of a listener."""
    if isinstance(value, Inet | Unix):
        return value
    text = value if isinstance(value, str) else ""
    if text.startswith("unix:") and len(text) > len("unix:") and "\0" not in text:
        return Unix(Path(text[len("unix:") :]))
    host, _, port = text.rpartition(":")
    try:
        if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
            raise ValueError
        if host.startswith("[") and host.endswith("]"):
            host = str(ipaddress.IPv6Address(host[1:-1]))
        elif re.fullmatch("[0-9.]+", host):
            host = str(ipaddress.IPv4Address(host))
        elif host.startswith("["):
            raise ValueError
        else:
            host = parse_domain(host)
    except ValueError:
        raise ValueError('"host:port", "[IPv6]:port" (ports 0 to 65535) or "unix:/path"') from None
    return Inet(host, int(port))


def _resolve_endpoint(endpoint: Endpoint, info: ValidationInfo) -> Endpoint:
    return Unix(_parse_path(endpoint.path, info)) if isinstance(endpoint, Unix) else endpoint


def _parse_path(value: object, info: ValidationInfo) -> Path:
    """The validation's context is the folder of the file; without a file paths stay as they are."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("a path in quotes")
    return Path(os.path.normpath(info.context / value)) if isinstance(info.context, Path) else Path(value)


def _parse_mode(value: object) -> int:
    # A decimal 660 is above 0o777, so TOML's 0o660 can be told from it.
    mode = int(value, 8) if isinstance(value, str) and _MODE.fullmatch(value) else value
    if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 0o777:
        raise ValueError('a file mode such as "0660"')
    return mode


def _parse_network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    try:
        if isinstance(value, str):
            return ipaddress.ip_network(value)
    except ValueError:
        pass
    raise ValueError('a network such as "192.0.2.0/24" or "2001:db8::/32", with no bit set behind its length')


def _check_keyword(value: str) -> str:
    if not _KEYWORD.fullmatch(value):
        raise ValueError('an EHLO keyword such as "CHUNKING"')
    return value.upper()


def _check_hostname(value: str) -> str:
    try:
        return parse_domain(value)
    except AddressError as error:
        raise ValueError(f'a host name such as "mx1.example.org" ({error})') from None


def _check_domain(value: str) -> str:
    if value == "*":
        return value
    wildcard = "*." if value.startswith("*.") else ""
    try:
        return wildcard + parse_domain(value.removeprefix(wildcard))
    except AddressError as error:
        raise ValueError(f'a domain such as "example.org", "*.example.org" or "*" ({error})') from None


def _check_local_part(value: str) -> str:
    try:
        return parse_address(f"{value}@local.invalid").local
    except AddressError:
        raise ValueError('a local-part: what stands before the "@", such as "ann"') from None


def _parse_any(value: object) -> Literal["any"]:
    if value != "any":
        raise ValueError('"any", or a list of local-parts')
    return "any"


def _check_postmaster(value: str) -> str:
    try:
        return str(parse_address(value)) if value else ""
    except AddressError as error:
        raise ValueError(f'an address such as "admin@example.org" ({error})') from None


def _check_template(template: str, info: ValidationInfo) -> str:
    """A placeholder is a whole folder name: in `{local}-{domain}` a-b@c and a@b-c would share a mailbox.
    What stands before the first placeholder is the folder of all mailboxes."""
    folders = template.split("/")
    first = next((i for i, folder in enumerate(folders) if "{" in folder), 0)
    root, rest = "/".join(folders[:first]), folders[first:]
    if isinstance(info.context, Path):
        root = os.path.normpath(info.context / (root or ("/" if first else ".")))
    if (
        "\0" in template
        or "{" in root
        or "}" in root
        or "{local}" not in rest
        or any(folder in ("", ".", "..") for folder in rest)
        or any(("{" in folder or "}" in folder) and folder not in _PLACEHOLDERS for folder in rest)
        or any(rest.count(placeholder) > 1 for placeholder in _PLACEHOLDERS)
    ):
        raise ValueError(
            'a path such as "/var/mail/{domain}/{local}", with {local}, perhaps {domain}, each a whole folder name, '
            "and no other braces"
        )
    return "/".join([root.rstrip("/"), *rest]) if root else template


def _as_list(value: object) -> Iterable[object]:
    return value if isinstance(value, list | tuple) else [value]


def machine_name() -> str:
    """This machine's name, fully qualified where it knows it."""
    name = socket.gethostname()
    try:
        # getfqdn asks the resolver, which may take seconds: only where the plain name says too little
        return parse_domain(name if "." in name else socket.getfqdn())
    except AddressError:
        return "localhost"


# Types as a file shows them.


def _show(value: object) -> str:
    """As TOML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_show, value)) + "]"
    return json.dumps(value if isinstance(value, str | int) else str(value), ensure_ascii=False)


@dataclass(frozen=True)
class Kind:
    """How a key's type is called, and how its values are written in a file."""

    name: str
    show: Callable[[Any], str] = _show


@dataclass(frozen=True)
class Unset:
    """What holds where the key is left out, for a default that depends on something else."""

    text: str


Duration: TypeAlias = Annotated[float, BeforeValidator(parse_duration), Kind("duration", show_duration)]
Size: TypeAlias = Annotated[int, BeforeValidator(parse_size), Kind("size", show_size)]
Count: TypeAlias = Annotated[StrictInt, Field(le=2**31 - 1), Kind("number")]
FilePath: TypeAlias = Annotated[Path, PlainValidator(_parse_path), Kind("path")]
Hostname: TypeAlias = Annotated[str, AfterValidator(_check_hostname), Kind("host name")]
Mode: TypeAlias = Annotated[int, BeforeValidator(_parse_mode), Kind("file mode", lambda mode: f'"0{mode:03o}"')]
Network: TypeAlias = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, PlainValidator(_parse_network)]
Recipients: TypeAlias = Annotated[
    Annotated[Literal["any"], PlainValidator(_parse_any), Tag("<any>")]
    | Annotated[tuple[Annotated[str, AfterValidator(_check_local_part)], ...], Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list | tuple) else "<any>"),
]


class Table(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Tls(Table):
    """The server's certificate. Without this table there is no TLS."""

    certificate: FilePath = Field(description="The certificate with its chain, leaf first, as PEM.")
    key: Annotated[FilePath, Unset("the file of `certificate`")] = Field(
        default_factory=lambda values: values["certificate"], description="Its private key, as PEM."
    )
    minimum: Literal["1.2", "1.3"] = Field("1.2", description="The oldest version of TLS that is spoken.")


class Withhold(Table):
    """EHLO keywords that chosen clients are not offered, for clients that stumble over one."""

    keywords: Annotated[tuple[Annotated[str, AfterValidator(_check_keyword)], ...], Kind("list of keywords")] = Field(
        min_length=1, description="What is withheld, such as `CHUNKING`. What needs it goes too."
    )
    networks: Annotated[tuple[Network, ...], Kind("list of networks")] = Field(
        (), description="From whom; an empty list: from everyone."
    )


class Listener(Table):
    """A place where clients connect; as many tables as wanted. Without any: one on 127.0.0.1:2525."""

    address: Annotated[
        tuple[Annotated[Endpoint, PlainValidator(parse_endpoint), AfterValidator(_resolve_endpoint)], ...],
        BeforeValidator(_as_list),
        Kind("address, or list of them"),
    ] = Field(min_length=1, description="`host:port`, `[IPv6]:port` (port 0: any free one) or `unix:/path`.")
    role: Literal["mx", "submission", "lmtp"] = Field(
        "mx",
        description="Who connects: other servers (`mx`), users with a password (`submission`), or a server "
        "that hands over mail for mailboxes (`lmtp`, not on port 25).",
    )
    tls: Annotated[
        Literal["off", "starttls", "implicit"], Unset("`starttls` where there is a `[tls]` table, else `off`")
    ] = Field("off", description="When TLS begins: never, after STARTTLS, or at once.")
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
    brackets: StrictBool = Field(True, description="False: `MAIL FROM:a@b` without `<>` is tolerated.")
    mode: Mode = Field(0o660, description="Who may connect to a unix socket.")
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
    memory: Size = Field(
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


class Queue(Table):
    """When a delivery that failed for now is tried again."""

    retry: Duration = Field(parse_duration("5m"), gt=0, description="The first wait; it doubles from try to try.")
    retry_max: Duration = Field(parse_duration("4h"), gt=0, description="The longest wait, at most a day.")

    @field_validator("retry_max")
    @classmethod
    def _check_order(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("retry", 0):
            raise ValueError("no less than retry")
        # At start the spool takes a time further ahead for the work of a wrong clock, and tries at once.
        if value > parse_duration("1d"):
            raise ValueError("at most 1d")
        return value


class Log(Table):
    """One line for each event that an operator needs."""

    format: Literal["auto", "human", "json"] = Field("auto", description="`auto`: for people on a terminal, else JSON.")


class Domain(Table):
    """A domain whose mail is taken. An exact name goes before the longest `*.` name, and that before `*`."""

    name: Annotated[str, AfterValidator(_check_domain), Kind("domain")] = Field(
        description="`example.org`, `*.example.org` (everything below it) or `*` (every domain)."
    )
    recipients: Annotated[Recipients, Kind('"any", or list of local-parts')] = Field(
        description="Who gets mail there; the postmaster always does."
    )
    transport: Annotated[str, Kind("name")] = Field(description="Where it goes: the NAME of a transport.")
    case_sensitive: StrictBool = Field(False, description="True: `Ann` and `ann` are two mailboxes.")


class Maildir(Table):
    """A Maildir for each mailbox."""

    type: Literal["maildir"] = Field(description="This kind of transport.")
    path: Annotated[str, AfterValidator(_check_template), Kind("path with placeholders")] = Field(
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


def _transport_tag(value: object) -> str:
    return f"<{value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)}>"


# Tags stand in brackets so that they differ from every key when they turn up in the place of an error.
Transport: TypeAlias = Annotated[
    Annotated[Maildir, Tag("<maildir>")] | Annotated[Discard, Tag("<discard>")],
    Discriminator(_transport_tag),
]


class Config(Table):
    """The whole file."""

    hostname: Annotated[Hostname, Unset("this machine's name")] = Field(
        default_factory=machine_name, description="Our name in the greeting and in Received."
    )
    data_dir: FilePath = Field(Path("fastsmtp-data"), description="The folder of the spool.")
    workers: Annotated[StrictInt, Kind("number")] = Field(
        0, ge=0, le=1000, description="Processes that serve; 0: one per core."
    )
    user: str = Field("", description="Who the workers become when started as root; empty: stay.")
    postmaster: Annotated[str, AfterValidator(_check_postmaster), Kind("address")] = Field(
        "",
        description="Who gets the mail for `postmaster`, at every domain and without one; at a domain "
        "served here. Empty: each domain has a mailbox of that name.",
    )
    tls: Annotated[Tls | None, Unset("no TLS")] = Field(None, description="The certificate.")
    listener: tuple[Listener, ...] = Field(
        (Listener(address="127.0.0.1:2525"),), min_length=1, description="Where clients connect."
    )
    limits: Limits = Field(Limits(), description="How much is accepted.")
    timeouts: Timeouts = Field(Timeouts(), description="How long is waited.")
    spool: Spool = Field(Spool(), description="Where accepted mail waits.")
    queue: Queue = Field(Queue(), description="When a delivery is tried again.")
    log: Log = Field(Log(), description="What the log looks like.")
    domain: tuple[Domain, ...] = Field((), description="Whose mail is taken.")
    transport: dict[str, Transport] = Field({}, description="Where it goes.")

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
            for place, text in _conflicts(self.__dict__)
        ]
        if conflicts:
            raise ValidationError.from_exception_data("Config", conflicts)
        return self


# What one table must know of another. The raw document is asked too, so that the answers stand among the
# errors of single keys: tables are mappings or models here, and may hold anything.


def _get(table: object, key: str) -> Any:
    return table.get(key) if isinstance(table, Mapping) else getattr(table, key, None)


def _items(table: object, key: str) -> Iterator[tuple[int, Any]]:
    value = _get(table, key)
    yield from enumerate(value if isinstance(value, list | tuple) else ())


def _valid(parse: Callable[[Any], Any], value: object) -> Any:
    try:
        return parse(value)
    except (ValueError, TypeError, AttributeError):
        return None


def _conflicts(config: object) -> Iterator[tuple[Place, str]]:
    yield from _listener_conflicts(config)
    yield from _domain_conflicts(config)


def _listener_conflicts(config: object) -> Iterator[tuple[Place, str]]:
    taken: set[Endpoint] = set()
    for i, listener in _items(config, "listener"):
        if _get(listener, "tls") in ("starttls", "implicit") and _get(config, "tls") is None:
            yield ("listener", i, "tls"), "there is no [tls] table that names a certificate"
        for address in _as_list(_get(listener, "address")):
            endpoint = _valid(parse_endpoint, address)
            port = _get(endpoint, "port")
            if port == 25 and _get(listener, "role") == "lmtp":
                yield ("listener", i, "address"), "LMTP never runs on port 25 (RFC 2033 5)"
            if endpoint in taken:
                yield ("listener", i, "address"), f"{endpoint} stands twice"
            if endpoint is not None and port != 0:
                taken.add(endpoint)


def _domain_conflicts(config: object) -> Iterator[tuple[Place, str]]:
    transports = _get(config, "transport") or {}
    names: list[str | None] = []
    for i, domain in _items(config, "domain"):
        transport = _get(domain, "transport")
        if isinstance(transport, str) and isinstance(transports, Mapping) and transport not in transports:
            near = _nearest(transport, transports)
            yield ("domain", i, "transport"), f"there is no [transport.{transport}]{near}"
        name = _valid(_check_domain, _get(domain, "name"))
        if name is not None and name in names:
            yield ("domain", i, "name"), f"{name} stands twice"
        names.append(name)
    at = _valid(lambda text: parse_address(text).domain, _get(config, "postmaster"))
    if at and None not in names and not any(_serves(name, at) for name in names if name):
        yield ("postmaster",), f"no [[domain]] serves {at}"


def _serves(pattern: str, domain: str) -> bool:
    return pattern in ("*", domain) or (pattern.startswith("*.") and domain.endswith(pattern[1:]))


# From a file to a Config, and from its errors to problems with lines.


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "model_type": "a table",
    "string_type": "text in quotes",
    "too_short": "at least one entry",
    "tuple_type": "a list",
    "value_error": "{error}",
}


def load(path: Path) -> Config:
    """The configuration that a file holds. Raises ConfigError."""
    try:
        octets = path.read_bytes()
    except OSError as error:
        raise ConfigError([Problem(str(path), 0, "", f"cannot be read: {error.strerror}")]) from None
    try:
        text = octets.decode()
    except UnicodeDecodeError as error:
        line = octets.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(str(path), line, "", "not UTF-8")]) from None
    return parse(text, path.absolute().parent, str(path))


def default() -> Config:
    """What holds without a file."""
    return parse(DEFAULT, Path.cwd(), "(default)")


def parse(text: str, folder: Path, file: str) -> Config:
    """What a text says; relative paths start at `folder`, problems name `file`. Raises ConfigError."""
    text = text.replace("\r\n", "\n")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # Messages end in "(at line 3, column 5)" or "(at end of document)".
        message, _, place = str(error).partition(" (at ")
        found = re.match("line ([0-9]+)", place)
        line = int(found[1]) if found else text.count("\n") + 1
        raise ConfigError([Problem(file, line, "", f"not TOML: {message}")]) from None
    except RecursionError:
        raise ConfigError([Problem(file, 0, "", "nested too deeply")]) from None
    try:
        return Config.model_validate(document, context=folder)
    except ValidationError as error:
        details = [detail for detail in error.errors() if not _is_consequence(detail)]
        wrong = dict.fromkeys(_explain(detail, document) for detail in details)
    wrong |= dict.fromkeys(_conflicts(document))
    lines = Lines(text)
    problems = [Problem(file, lines.line(place), _render_place(place), message) for place, message in wrong]
    raise ConfigError(sorted(problems, key=lambda problem: problem.line))


def problem_at(file: Path, place: Place, message: str) -> Problem:
    """A problem of a file that was loaded without one, found by asking the machine."""
    lines = Lines(file.read_text(encoding="utf-8"))
    return Problem(str(file), lines.line(place), _render_place(place), message)


def _render_place(place: Place) -> str:
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += "." + (step if re.fullmatch("[A-Za-z0-9_-]+", step) else json.dumps(step))
    return text.removeprefix(".")


def _is_consequence(detail: ErrorDetails) -> bool:
    """Whether it says nothing but that another error of the same table or list is there."""
    return detail["type"] == "default_factory_not_called" or (detail["type"] == "too_short" and detail["input"])


def _explain(detail: ErrorDetails, document: dict[str, Any]) -> tuple[Place, str]:
    """Where an error of pydantic's stands in the document, and what it means."""
    kind, place = detail["type"], detail["loc"]
    steps = tuple(step for step in place if not str(step).startswith("<"))
    match kind:
        case "conflict":
            return steps, detail["msg"]
        case "extra_forbidden":
            return steps, f"unknown key{_suggest(str(place[-1]), place[:-1])}"
        case "missing":
            field = _section(place[:-1]).keys[str(place[-1])]
            return steps, f"missing; expected {kind_of(field)} ({str(field.description).removesuffix('.')})"
        case "union_tag_invalid" if isinstance(detail["input"], dict):
            expected = " or ".join(f'"{section.choice}"' for section in SECTIONS if section.choice)
            steps = (*steps, "type")
        case "union_tag_invalid":
            expected = "a table"
        case "tuple_type" if isinstance(detail["input"], dict):
            expected = f"a list, each of its tables under [[{'.'.join(s for s in steps if isinstance(s, str))}]]"
        case _:
            expected = _EXPECTED[kind].format_map(detail.get("ctx", {})).replace("'", '"')
    found: Any = document
    for end, step in enumerate(steps):
        if not isinstance(found, dict | list):  # a text that was taken for a list of one
            steps = steps[:end]
            break
        found = found[int(step)] if isinstance(found, list) else found.get(step)
    return steps, f"expected {expected}, found {_render_found(found)}"


def _render_found(value: object) -> str:
    if value is None or isinstance(value, dict | list):
        return "nothing" if value is None else "a table" if isinstance(value, dict) else "a list"
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _suggest(key: str, place: Place) -> str:
    here = _section(place)
    homes = [section.heading for section in SECTIONS if key in section.keys and section.heading != here.heading]
    if homes and all(homes):
        return f"; it belongs in {' or '.join(homes)}"
    known = here.model.model_fields
    return _nearest(key, known) or f"; known here: {', '.join(known)}"


# What there is to configure, for people.


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


def _section(place: Place) -> Section:
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
        *choices, last = map(_show, get_args(field.annotation))
        return f"{', '.join(choices)} or {last}" if choices else last
    return "true or false" if field.annotation is bool else "text"


def default_of(field: FieldInfo) -> str:
    """What holds where the key is left out, in Markdown; empty where it must be given."""
    for data in field.metadata:
        if isinstance(data, Unset):
            return data.text
    if field.is_required():
        return ""
    show = next((data.show for data in field.metadata if isinstance(data, Kind)), _show)
    return f"`{show(field.default)}`"


def warnings(config: Config) -> list[str]:
    """What is allowed, but seldom meant."""
    found = []
    if not config.domain:
        found.append("there is no [[domain]]: every recipient is refused")
    if not config.postmaster and any(domain.name != "*" for domain in config.domain):
        found.append("postmaster is not set: every domain must have one who is read (RFC 5321 4.5.1)")
    if config.spool.durability == "none":
        found.append('spool.durability is "none": acknowledged mail is lost when the machine stops')
    used = {domain.transport for domain in config.domain}
    found += [f"no [[domain]] uses [transport.{name}]" for name in config.transport if name not in used]
    for listener in config.listener:
        where = ", ".join(map(str, listener.address))
        if listener.role == "submission":
            found.append(f"{where}: nobody can authenticate yet, so submission takes no mail")
        if listener.tls == "off" and not all(map(_is_local, listener.address)):
            found.append(f"{where}: mail crosses the network in clear (tls is off)")
    return found


def _is_local(endpoint: Endpoint) -> bool:
    if isinstance(endpoint, Unix) or endpoint.host == "localhost":
        return True
    address = _valid(ipaddress.ip_address, endpoint.host)
    return address is not None and bool(address.is_loopback)
