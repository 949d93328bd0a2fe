"""The machine of docs/submission.md: its configuration served on ports 25, 587 and 465 of a loopback address.

In: a folder. Out: a `Site` with the server of the document, a certificate of an authority of the test's own, users, a
stranger's server with a name server that knows it. The address is this process's own, so that sites stand beside each
other. What differs from the document stands in `Site.replace`, and nowhere else. Commands run in a shell, and on a
terminal where they ask for a password. Needs root, for the ports. On failure: AssertionError with the server's log.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from documents import Document, install, serve
from nameserver import nameserver
from needs import SYSTEM_PATH, needs, needs_root, public_folder
from servers import Server

from loadtest.sink_server import SinkProcess

DOCUMENT = Document("submission.md")
MAIN = DOCUMENT.sections["The server"][0].text
HOST = "mail.example.org"
CONFIG = "/etc/fastsmtp/fastsmtp.toml"
PASSWORD = "correct horse"
ZONE = """\
partner IN MX 10 mx.partner
mx.partner IN A {sink}
"""


def addresses() -> list[str]:
    """Of this process alone: the server's, a trusted client's, a stranger's, another server's."""
    process = os.getpid()
    net = f"127.{64 + process // 15_000 % 64}.{process // 60 % 250}"
    return [f"{net}.{process % 60 * 4 + 4 + place}" for place in range(4)]


def make_chain(folder: Path, name: str, ip: str) -> tuple[Path, Path, Path]:
    """The authority's certificate, the server's, its key."""
    now = datetime.now(UTC)

    def make(
        subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=subject == issuer, path_length=None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
        )
        if subject != issuer:
            names = [x509.DNSName(name), x509.IPAddress(ip_address(ip))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        return builder.sign(signer, hashes.SHA256())

    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = make("Test authority", "Test authority", root, root)
    leaf = make(name, "Test authority", key, root)
    files = folder / "authority.pem", folder / "mail.pem", folder / "mail.key"
    files[0].write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(leaf.public_bytes(serialization.Encoding.PEM) + files[0].read_bytes())
    files[2].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    files[2].chmod(0o600)
    return files


class Site:
    """`ip` is the server's address, `friend` and `stranger` are those of clients, `sink` that of a partner's server."""

    def __init__(self, folder: Path, dns: str, ips: Sequence[str]) -> None:
        self.folder = folder
        self.dns = dns
        self.ip, self.friend, self.stranger, self.sink = ips
        self.authority, self.certificate, self.key = make_chain(folder, HOST, self.ip)
        self.server = Server(folder, "")
        self.partner = folder / "partner"  # where a stranger's messages are
        install(folder)
        (folder / "bin" / "systemctl").write_text("#!/bin/sh\n")
        (folder / "bin" / "systemctl").chmod(0o755)
        (folder / "mail").mkdir()
        (folder / "mail").chmod(0o777)

    def replace(self, text: str) -> str:
        """What stands in the document, for this machine."""
        replaced = {  # one after the other
            "/etc/fastsmtp/": f"{self.folder}/",
            "/var/lib/fastsmtp": f"{self.folder}/data",
            "-o fastsmtp /srv/": f"-o nobody {self.folder}/",
            "/srv/mail": f"{self.folder}/mail",
            "/etc/ssl/mail.pem": str(self.certificate),
            "/etc/ssl/mail.key": str(self.key),
            'user       = "fastsmtp"': 'user = "nobody"\nworkers = 2',
            "0.0.0.0:": f"{self.ip}:",
            ', "[::]:25"': "",
            ', "[::]:587"': "",
            ', "[::]:465"': "",
            f"--server {HOST}": f"--server {self.ip}",
            f"smtps://{HOST}": f"smtps://{self.ip}",
            f"smtp://{HOST}": f"smtp://{self.ip}",
            f"-connect {HOST}": f"-connect {self.ip}",
            f"host           {HOST}": f"host {self.ip}",
            f"smtp-open-relay {HOST}": f"smtp-open-relay {self.ip}",
            f"report for {HOST}": f"report for {self.ip}",
            "~/": f"{self.folder}/",
        }
        for old, new in replaced.items():
            text = text.replace(old, new)
        return text

    def serve(self, configuration: str) -> None:
        serve(self.server, self.replace(configuration), self.dns)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.folder}/bin:{SYSTEM_PATH}",
            "HOME": str(self.folder),
            "FASTSMTP_CONFIG": f"{self.folder}/fastsmtp.toml",
            "SSL_CERT_FILE": str(self.authority),
            "CURL_CA_BUNDLE": str(self.authority),
            "TZ": "UTC",
            "LC_ALL": "C.UTF-8",
        }

    def shell(self, command: str, typed: Sequence[str] = ()) -> tuple[str, int]:
        """What a command prints, and its exit code; `typed` is what is answered to its prompts."""
        if typed:
            return on_terminal(command, typed, self.environment, self.folder)
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout.decode(errors="replace"), done.returncode

    def add_user(self, name: str, *options: str) -> None:
        done = subprocess.run(
            [f"{self.folder}/bin/fastsmtp", "user", "add", name, *options],
            env=self.environment, input=f"{PASSWORD}\n".encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout.decode(errors="replace")


def on_terminal(command: str, typed: Sequence[str], environment: Mapping[str, str], folder: Path) -> tuple[str, int]:
    """Runs a command whose prompts (they end in a colon) are answered."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        os.execvpe("/bin/sh", ["sh", "-c", command], environment)
    answers = list(typed)
    shown = b""
    while True:
        try:
            octets = os.read(terminal, 4096)
        except OSError:  # it has closed its end
            break
        shown += octets
        if answers and re.search(rb": ?\Z", shown):
            os.write(terminal, f"{answers.pop(0)}\n".encode())
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    return shown.decode().replace("\r\n", "\n"), os.waitstatus_to_exitcode(status)


@contextmanager
def site(*users: Sequence[str]) -> Iterator[Site]:
    """The document's server. `users` are those that there are, with options of `user add`; without any it does not
    serve yet."""
    needs_root()
    needs("nsd")
    with ExitStack() as stack:
        folder = stack.enter_context(public_folder("submission"))
        ips = addresses()
        dns = stack.enter_context(nameserver(folder / "dns", {"example": ZONE.format(sink=ips[3])}))
        found = Site(folder, dns, ips)
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("SSL_CERT_FILE", str(found.authority))
        stack.callback(found.server.kill)
        options = ["--keep", str(found.partner), "--answer", "data 554 5.5.1 By BDAT only"]
        stack.enter_context(SinkProcess(*options, address=f"{ips[3]}:25"))
        (folder / "fastsmtp.toml").write_text(found.replace(MAIN))
        for name, *options in users:
            found.add_user(name, *options)
        if users:
            found.serve(MAIN)
        yield found
        found.server.check_bugs()
