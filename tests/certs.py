"""An authority of our own and what it signs: certificates for tests of TLS, as PEM files.

In: a folder, names, kinds of keys. Out: files, and contexts of clients that believe only this authority.
"""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import NamedTuple, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
KEYS = {
    "ec": lambda: ec.generate_private_key(ec.SECP256R1()),
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


class Files(NamedTuple):
    """A certificate with its chain, and its key."""

    certificate: Path
    key: Path


class Authority:
    """`ca` is its own certificate, as a file; it is signed by `above`, or by itself."""

    def __init__(self, folder: Path, name: str = "Test CA", above: Authority | None = None) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signer = above or self
        made = signer._builder(self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        made = made.add_extension(_usage(signs=True), critical=True)
        self.ca = folder / f"{name.replace(' ', '-').lower()}.pem"
        self.ca.write_bytes(made.sign(signer._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        file: str,
        *names: str,
        kind: str = "ec",
        common_name: str = "",
        mail: str = "",
        digest: hashes.HashAlgorithm | None = None,
        crl: str = "",
        days: float = 90,
    ) -> Files:
        """`file`.pem and `file`.key for these names; `mail`: for a client with that address. `days` from now on it is
        valid, and it was yesterday."""
        key: Key = KEYS[kind]()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])
        made = self._builder(subject, key.public_key(), days)
        other: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        if mail:
            other.append(x509.RFC822Name(mail))
        if other:
            made = made.add_extension(x509.SubjectAlternativeName(other), critical=not common_name)
        use = ExtendedKeyUsageOID.CLIENT_AUTH if mail else ExtendedKeyUsageOID.SERVER_AUTH
        made = made.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        made = made.add_extension(_usage(signs=False), critical=True)
        if crl:
            point = x509.DistributionPoint([x509.UniformResourceIdentifier(crl)], None, None, None)
            made = made.add_extension(x509.CRLDistributionPoints([point]), critical=False)
        signed = made.sign(self._key, digest or hashes.SHA256())
        files = Files(self.folder / f"{file}.pem", self.folder / f"{file}.key")
        files.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    def client(self, version: ssl.TLSVersion | None = None, own: Files | None = None) -> ssl.SSLContext:
        """A client that believes this authority, and shows a certificate of its `own`."""
        context = ssl.create_default_context(cafile=self.ca)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        if own is not None:
            context.load_cert_chain(*own)
        return context

    def _builder(self, subject: x509.Name, key: object, days: float = 90) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)  # type: ignore[arg-type]
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=signs, crl_sign=signs, encipher_only=False, decipher_only=False,
    )  # fmt: skip
