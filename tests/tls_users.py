"""A listener with TLS and users for clients that block, with certificates made for it.

In: a function that plays a client in a thread. Out: what it returned, and the bench it played on. The context is made
as the server makes it; a client certificate is asked for and may be left out. `papers` are the files of a server,
of a client with the authority that signed it, and of a stranger whose certificate only claims to be signed by it.
"""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from users import Users
from wire import Bench, make_service

from fastsmtp.certificates import read_pair
from fastsmtp.connection import Connection
from fastsmtp.gate import Gate
from fastsmtp.tls import Demands, Entrance, bare_context

T = TypeVar("T")


class Papers(NamedTuple):
    """PEM files of a server, and of a client with the authority that signed it."""

    server: tuple[Path, Path]
    authority: Path
    client: tuple[Path, Path]
    stranger: tuple[Path, Path]


def write_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return key


def write_certificate(
    path: Path, name: str, key: ec.EllipticCurvePrivateKey, issuer: str, by: ec.EllipticCurvePrivateKey, email: str = ""
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
    )
    if email:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.RFC822Name(email)]), critical=False)
    path.write_bytes(builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    folder = tmp_path_factory.mktemp("papers")
    keys = {name: write_key(folder / f"{name}.key") for name in ("server", "authority", "client", "stranger")}

    def write(name: str, called: str, issuer: str, by: str, email: str = "") -> tuple[Path, Path]:
        path = folder / f"{name}.pem"
        write_certificate(path, called, keys[name], issuer, keys[by], email)
        return path, folder / f"{name}.key"

    write("authority", "authority", "authority", "authority")
    return Papers(
        write("server", "mx.here.test", "mx.here.test", "server"),
        folder / "authority.pem",
        write("client", "Ann", "authority", "authority", "bob@here.test"),
        write("stranger", "ann", "authority", "stranger", "ann"),
    )


def serve(
    papers: Papers, client: Callable[[int], T], *, role: str = "submission", implicit: bool = False, **options: Any
) -> tuple[T, Bench]:
    """Runs a client in a thread against a listener with TLS and users."""
    entrance = Entrance(bare_context())
    entrance.use(Demands(client="optional", client_ca=papers.authority.read_text()), [read_pair(*papers.server)])

    async def run() -> tuple[T, Bench]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: None)
        made = make_service(
            loop,
            "submission",
            context=entrance.context,
            tls=not implicit,
            users=Users(),
            early_refused=False,
            **options,
        )
        kind = Gate if implicit else Connection
        listening = await loop.create_server(lambda: kind(made.service), "127.0.0.1", 0)
        try:
            result = await asyncio.to_thread(client, listening.sockets[0].getsockname()[1])
            for _ in range(500):
                if not made.service.connections():
                    break
                await asyncio.sleep(0.01)
        finally:
            listening.close()
        made.check_bugs(0)
        return result, made

    return asyncio.run(run())


def trusting(identity: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if identity is not None:
        context.load_cert_chain(*identity)
    return context
