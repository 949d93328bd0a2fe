"""Certificates and their keys as files: read, understood, tried, and looked at again when they change.

In: the paths of a configuration. Out: `Pair`s, which a worker without any privilege can use, or CertificateError with
one line for the operator. A pair is whole: the key is the certificate's, and OpenSSL takes both. A renewal writes one
file after the other; `Watch` speaks when the files have stood still for a moment, and what does not fit then changes
nothing. The names that a certificate is for are read from it. Not here: contexts (tls.py), who is sent what
(supervisor.py). RFC 5280 4.2.1.6, RFC 5929 4.1, RFC 6125 6.4.4 (a common name counts where there is no other name).
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from . import tls
from .config import Config, Listener
from .tls import Demands, Pair

SETTLED = 1.0  # seconds that files must stand still before they are read again
FILE_LIMIT = 1 << 20  # octets; who names a disk here gets no further
# What OpenSSL says of a key that is not the certificate's: of the same type, and of another.
FOREIGN_KEY = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


class CertificateError(Exception):
    """They cannot be used; the text is one line, without the key's contents. `key` is that of the configuration which
    names the file to blame, empty where it is none alone."""

    def __init__(self, text: str, key: str = "") -> None:
        super().__init__(text)
        self.key = key


def read_pair(certificate: Path, key: Path) -> Pair:
    """A certificate's chain, leaf first, and its key. Raises CertificateError."""
    chain = read_file(certificate, "certificate")
    secret = read_file(key, "key")
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
        names = _names(leaf)
        made = Pair(
            chain, secret, names, type(leaf.public_key()).__name__, _end_point(leaf), str(certificate),
            leaf.not_valid_after_utc.timestamp(),
        )  # fmt: skip
    except (ValueError, IndexError):
        raise CertificateError(f"there is no PEM certificate in {certificate}", "certificate") from None
    if b"PRIVATE KEY-----" not in secret:
        raise CertificateError(f"there is no PEM key in {key}", "key")
    try:
        tls.load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), chain, secret)
    except ssl.SSLError as error:
        if getattr(error, "reason", None) in FOREIGN_KEY:
            raise CertificateError(
                f"the key in {key} does not belong to the certificate in {certificate}", "key"
            ) from None
        raise CertificateError(f"{certificate} and {key} cannot be used: {error.args[-1]}") from None
    return made


def read_pairs(config: Config) -> tuple[Pair, ...]:
    """All that a configuration names, its default first. Raises CertificateError."""
    return tuple(read_pair(*files) for files in files_of(config))


def files_of(config: Config) -> list[tuple[Path, Path]]:
    """Certificate and key, in the order of the configuration."""
    section = config.tls
    if section is None:
        return []
    return [(section.certificate, section.key), *((other.certificate, other.key) for other in section.also)]


def read_demands(config: Config) -> dict[int, Demands]:
    """What each listener with TLS wants of a handshake, by its index. Raises CertificateError."""
    found: dict[int, Demands] = {}
    for number, listener in enumerate(config.listener):
        if config.tls and listener.tls != "off":
            authorities = _read_authorities(listener)
            found[number] = Demands(config.tls.minimum, config.tls.ciphers, listener.client_certificate, authorities)
    return found


def try_all(demands: Iterable[Demands], pairs: tuple[Pair, ...]) -> None:
    """Whether a listener can be had of them, on a context that nobody uses. Raises CertificateError."""
    for wanted in dict.fromkeys(demands):
        try:
            tls.Entrance(tls.bare_context()).use(wanted, pairs)
        except ssl.SSLError as error:
            raise CertificateError(f"cannot be used: {error.args[-1]}") from None


def _read_authorities(listener: Listener) -> str:
    path = listener.client_ca
    if path is None:
        return ""
    try:
        text = read_file(path, "client_ca").decode("ascii", "replace")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise CertificateError(f"there is no PEM certificate in {path}", "client_ca") from None
    return text


def read_file(path: Path, key: str) -> bytes:
    """`key` is what names it in the configuration. Raises CertificateError."""
    try:
        with path.open("rb") as file:
            return file.read(FILE_LIMIT)
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}", key) from None


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        other = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = other.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        found = [str(name.value) for name in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return tuple(dict.fromkeys(name.lower().rstrip(".") for name in found))


def _end_point(leaf: x509.Certificate) -> bytes:
    """The hash of tls-server-end-point. A signature without a hash of its own (Ed25519) has none in RFC 5929; clients
    that bind to it take SHA-256."""
    used = leaf.signature_hash_algorithm
    weak = used is None or isinstance(used, hashes.MD5 | hashes.SHA1)
    digest = hashes.Hash(hashes.SHA256() if weak or used is None else used)
    digest.update(leaf.public_bytes(serialization.Encoding.DER))
    return digest.finalize()


Signature = tuple[tuple[int, int, int, int] | None, ...]


class Watch:
    """Files that may be exchanged. To be made before they are read. Times are monotonic, in seconds."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = tuple(dict.fromkeys(files))
        self._taken = self._seen = self._look()
        self._looked = 0.0

    def has_changed(self, now: float) -> bool:
        """Whether they are others than at the last time that this said so, and stand still."""
        if not self._files or now < self._looked + SETTLED:
            return False
        self._looked = now
        found = self._look()
        still = found == self._seen
        self._seen = found
        if not still or found == self._taken:
            return False
        self._taken = found
        return True

    def _look(self) -> Signature:
        return tuple(map(_sign, self._files))


def _sign(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
