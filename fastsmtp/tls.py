"""TLS contexts for listeners and for hosts that mail goes to, and what is known of a TLS connection.

A context is made once per listener, before the workers fork: every worker then holds the same ticket keys, so that a
client may resume on any of them, and the tickets of one listener are of no use on another. Renegotiation and
compression are off. Nothing here does I/O but reading certificates and keys.
Raises OSError (unreadable file) and ssl.SSLError (no certificate or key in it, or they do not match). RFC 3207, 8996.
"""

from __future__ import annotations

import ssl
from pathlib import Path

MINIMUM = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def server_context(certificate: Path, key: Path, minimum: str = "1.2") -> ssl.SSLContext:
    """A context for one listener. `certificate` is a PEM chain, leaf first; `minimum` is "1.2" or "1.3"."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = MINIMUM[minimum]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # Forward secrecy and authenticated encryption only; TLS 1.3's suites are not listed here.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    # An encrypted key would ask at the terminal; an unattended server cannot answer.
    context.load_cert_chain(certificate, key, password=_no_password)
    return context


def client_context(verify: bool, minimum: str = "1.2", ca_file: Path | None = None) -> ssl.SSLContext:
    """A context for hosts that mail goes to. `verify`: certificate and name are checked, against the certificates of
    `ca_file` or the system's. Without, any certificate will do: opportunistic TLS is for those who only listen."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = MINIMUM[minimum]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca_file is not None:
        context.load_verify_locations(ca_file)
    else:
        context.load_default_certs()
    return context


def _no_password() -> str:
    raise ssl.SSLError("the key is encrypted; store it without a passphrase")


def describe(connection: ssl.SSLObject) -> str:
    """Version and cipher as the Received field shows them, such as "TLSv1.3 TLS_AES_256_GCM_SHA384"."""
    cipher = connection.cipher()
    return f"{connection.version()} {cipher[0]}" if cipher else ""
