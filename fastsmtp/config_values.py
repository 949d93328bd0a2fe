"""What stands behind the keys of a configuration: one parser for each kind of value, and how it is shown to people.

In: a value as tomllib gives it. Out: a float of seconds, an int of octets, a rate, an address, a network, a name; a
parser raises ValueError with what was expected, and what was found is added by config.py. Domains become lower-case
A-labels; a relative path starts at the folder of the file, which is the validation's context; IPv4-mapped networks
are unmapped. What is shown is TOML, and is read back as the same value. The annotated types at the end are what the
tables are made of. Nothing here knows a key, a table or the machine. RFC 5321 4.1.2.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictInt,
    ValidationInfo,
)

from .address import AddressError, parse_address, parse_domain
from .saslprep import saslprep

_DURATION = re.compile(r"(?=.)(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
_DURATION_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_GREATEST_DURATION = 36500 * 86400
_RATE = re.compile(r"([1-9][0-9]{0,8})/((?:[1-9][0-9]{0,4})?[dhms])")
_SIZE = re.compile(r"([0-9]+)(KB|MB|GB|TB)")
_SIZE_UNITS = {"TB": 1 << 40, "GB": 1 << 30, "MB": 1 << 20, "KB": 1 << 10}
_GREATEST_SIZE = (1 << 63) - 1  # what the C layers count in
_MODE = re.compile(r"0?[0-7]{3}")
_KEYWORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
_QUEUE = re.compile(r"[A-Za-z0-9._-]{1,64}")
ANY = '"any", a list of local-parts'
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
class Rate:
    """So many in so many seconds: that many at once, and then one more each `interval` seconds."""

    count: int
    seconds: float

    @property
    def interval(self) -> float:
        return self.seconds / self.count

    def __str__(self) -> str:
        period = show_duration(self.seconds).strip('"')
        return f"{self.count}/{period[1:] if re.fullmatch('1[dhms]', period) else period}"


def parse_rate(value: object) -> Rate:
    """Such as "100/h" or "10/10m"; a day at most, which is what rates are counted over."""
    if isinstance(value, Rate):
        return value
    if isinstance(value, str) and (match := _RATE.fullmatch(value)):
        count, period = match.groups()
        seconds = parse_duration(period if period[0].isdecimal() else f"1{period}")
        if seconds <= _DURATION_UNITS["d"]:
            return Rate(int(count), seconds)
    raise ValueError('a rate such as "60/m", "100/h" or "10/10m", over a day ("1d") at most')


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


def parse_hop(value: object) -> Endpoint:
    """Where a host is that mail is handed to: as a listener's address, with the port that it listens on."""
    endpoint = parse_endpoint(value)
    if isinstance(endpoint, Inet) and not endpoint.port:
        raise ValueError('"host:port", "[IPv6]:port" (ports 1 to 65535) or "unix:/path"')
    return endpoint


def parse_smarthost(value: object) -> Inet:
    """A host by its name and port: without a port nobody would know whether 25, 465 or 587 is meant."""
    try:
        if isinstance(endpoint := parse_hop(value), Inet):
            return endpoint
    except ValueError:
        pass
    raise ValueError('"host:port" or "[IPv6]:port", such as "smtp.example.org:587"')


def parse_name_server(value: object) -> str:
    """The address of a name server, with a port where that is not 53."""
    text = value if isinstance(value, str) else ""
    host, port = text, "53"
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        port = port.removeprefix(":") if port.startswith(":") else "" if port or not bracket else "53"
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    try:
        address = ipaddress.ip_address(host)
        if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise ValueError
    except ValueError:
        raise ValueError('an IP address, "address:port" or "[IPv6]:port"') from None
    return f"[{address}]:{int(port)}" if address.version == 6 else f"{address}:{int(port)}"


def resolve_endpoint(endpoint: Endpoint, info: ValidationInfo) -> Endpoint:
    return Unix(parse_path(endpoint.path, info)) if isinstance(endpoint, Unix) else endpoint


def parse_path(value: object, info: ValidationInfo) -> Path:
    """The validation's context is the folder of the file; without a file paths stay as they are."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("a path in quotes")
    return Path(os.path.normpath(info.context / value)) if isinstance(info.context, Path) else Path(value)


def parse_mode(value: object) -> int:
    # A decimal 660 is above 0o777, so TOML's 0o660 can be told from it.
    mode = int(value, 8) if isinstance(value, str) and _MODE.fullmatch(value) else value
    if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 0o777:
        raise ValueError('a file mode such as "0660"')
    return mode


def parse_network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    try:
        if isinstance(value, str):
            network = ipaddress.ip_network(value)
            mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
            if mapped is None or network.prefixlen < 96:
                return network
            return ipaddress.ip_network((mapped, network.prefixlen - 96))
    except ValueError:
        pass
    raise ValueError('a network such as "192.0.2.0/24" or "2001:db8::/32", without bits beyond its length')


def parse_ip(value: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address of one host; mapped ones are unmapped."""
    try:
        if isinstance(value, str | ipaddress.IPv4Address | ipaddress.IPv6Address):
            address = ipaddress.ip_address(value)
            return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address
    except ValueError:
        pass
    raise ValueError('an IP address such as "192.0.2.1" or "2001:db8::1"')


def check_keyword(value: str) -> str:
    if not _KEYWORD.fullmatch(value):
        raise ValueError('an EHLO keyword such as "CHUNKING"')
    return value.upper()


def check_hostname(value: str) -> str:
    try:
        return parse_domain(value)
    except AddressError as error:
        raise ValueError(f'a host name such as "mx1.example.org" ({error})') from None


def check_domain(value: str) -> str:
    if value == "*":
        return value
    wildcard = "*." if value.startswith("*.") else ""
    try:
        return wildcard + parse_domain(value.removeprefix(wildcard))
    except AddressError as error:
        raise ValueError(f'a domain such as "example.org", "*.example.org" or "*" ({error})') from None


def check_local_part(value: str) -> str:
    try:
        return parse_address(f"{value}@local.invalid").local
    except AddressError:
        raise ValueError('a local-part: what stands before the "@", such as "ann"') from None


def parse_any(value: object) -> Literal["any"]:
    if value != "any":
        raise ValueError(f"{ANY}, or a table")
    return "any"


def parse_user(value: object) -> str:
    """A user as the credential stores name one: canonical."""
    if isinstance(value, str):
        try:
            name = saslprep(value)
            return parse_address(name).mailbox if "@" in name else name.lower()
        except ValueError:
            pass
    raise ValueError("a user name in quotes")


def check_postmaster(value: str) -> str:
    try:
        return str(parse_address(value)) if value else ""
    except AddressError as error:
        raise ValueError(f'an address such as "admin@example.org" ({error})') from None


def check_queue(value: str) -> str:
    if value and not _QUEUE.fullmatch(value):
        raise ValueError('a name of letters, digits and ".", "_", "-", without "#"')
    return value


def check_template(template: str, info: ValidationInfo) -> str:
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


def as_list(value: object) -> Iterable[object]:
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


def show(value: object) -> str:
    """As TOML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    return json.dumps(value if isinstance(value, str | int) else str(value), ensure_ascii=False)


@dataclass(frozen=True)
class Kind:
    """How a key's type is called, and how its values are written in a file."""

    name: str
    show: Callable[[Any], str] = show


@dataclass(frozen=True)
class Unset:
    """What holds where the key is left out, for a default that depends on something else."""

    text: str


@dataclass(frozen=True)
class Restart:
    """Of a key that a reload leaves as it was: only a restart changes it."""


Duration: TypeAlias = Annotated[float, BeforeValidator(parse_duration), Kind("duration", show_duration)]
RateLimit: TypeAlias = Annotated[Rate, PlainValidator(parse_rate), Kind("rate")]
Size: TypeAlias = Annotated[int, BeforeValidator(parse_size), Kind("size", show_size)]
Count: TypeAlias = Annotated[StrictInt, Field(le=2**31 - 1), Kind("number")]
FilePath: TypeAlias = Annotated[Path, PlainValidator(parse_path), Kind("path")]
Hostname: TypeAlias = Annotated[str, AfterValidator(check_hostname), Kind("host name")]
Mode: TypeAlias = Annotated[int, BeforeValidator(parse_mode), Kind("file mode", lambda mode: f'"0{mode:03o}"')]
Network: TypeAlias = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, PlainValidator(parse_network)]
Networks: TypeAlias = Annotated[tuple[Network, ...], Kind("list of networks")]
IP: TypeAlias = Annotated[ipaddress.IPv4Address | ipaddress.IPv6Address, PlainValidator(parse_ip)]
IPs: TypeAlias = Annotated[tuple[IP, ...], Kind("list of IP addresses")]
Keywords: TypeAlias = Annotated[tuple[Annotated[str, AfterValidator(check_keyword)], ...], Kind("list of keywords")]
DomainName: TypeAlias = Annotated[str, AfterValidator(check_domain), Kind("domain")]
Name: TypeAlias = Annotated[str, Kind("name")]


class Table(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
