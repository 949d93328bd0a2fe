"""PROXY headers, as a load balancer sends them in front of a connection.

In: the version, the client's address and port and the server's. Out: the octets that go first, before TLS and before
the greeting. Nothing here is kept or sent. Version 1 is a line of text, version 2 is binary; both for TCP over IPv4 or
IPv6. What cannot be said in one family is said in IPv6, with the IPv4 address mapped.
On failure: ValueError for what is no address. The PROXY protocol, haproxy.org/download/3.0/doc/proxy-protocol.txt.
"""

from __future__ import annotations

import struct
from ipaddress import IPv6Address, ip_address
from typing import TypeAlias

Endpoint: TypeAlias = tuple[str, int]  # IP address, port

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_VERSION_2_PROXY = 0x21  # version 2, command PROXY
_FAMILIES = {4: ("TCP4", 0x11), 6: ("TCP6", 0x21)}  # for IPv4 and IPv6: in version 1, in version 2


def render_proxy(version: str, client: Endpoint, server: Endpoint) -> bytes:
    """`version` is v1 or v2, as in the options."""
    hosts = [ip_address(client[0]), ip_address(server[0])]
    if hosts[0].version != hosts[1].version:
        hosts = [host if host.version == 6 else IPv6Address(f"::ffff:{host}") for host in hosts]
    text, number = _FAMILIES[hosts[0].version]
    if version == "v1":
        return f"PROXY {text} {hosts[0]} {hosts[1]} {client[1]} {server[1]}\r\n".encode()
    addresses = hosts[0].packed + hosts[1].packed + struct.pack("!HH", client[1], server[1])
    return _SIGNATURE + struct.pack("!BBH", _VERSION_2_PROXY, number, len(addresses)) + addresses
